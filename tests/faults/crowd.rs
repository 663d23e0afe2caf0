// SPDX-License-Identifier: GPL-2.0-or-later
//! The clients of a fault test. One of them may be stalled: it does not read for a while. In the
//! end, each remaining client must know all the others.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use crate::common::checked_client::CheckedClient;
use crate::common::wait_for;

pub(crate) struct Crowd {
    socket: PathBuf,
    vectors: usize,
    clients: Vec<CheckedClient>,
    /// The index of the client that does not read.
    pub(crate) stalled: Option<usize>,
    /// The ids of the clients that the server closed although they did nothing wrong.
    ended: Vec<Option<u16>>,
}

impl Crowd {
    pub(crate) fn new(socket: &Path, vectors: usize) -> Self {
        Self {
            socket: socket.into(),
            vectors,
            clients: Vec::new(),
            stalled: None,
            ended: Vec::new(),
        }
    }

    /// Connects one more client, which reads nothing yet.
    pub(crate) fn connect(&mut self) {
        let stream = UnixStream::connect(&self.socket).expect("the server listens");
        self.clients.push(CheckedClient::new(stream, self.vectors, false));
    }

    /// Connects one more client. Returns when its greeting is complete or the server refused it.
    #[track_caller]
    pub(crate) fn join(&mut self) {
        self.connect();
        let newest = self.clients.len() - 1;
        wait_for("the newest client's greeting, or its end", || {
            self.read();
            let client = &self.clients[newest];
            (client.view().is_greeting_complete() || client.has_ended()).then_some(())
        });
    }

    /// All clients but the stalled one read all available messages.
    #[track_caller]
    pub(crate) fn read(&mut self) {
        for (index, client) in self.clients.iter_mut().enumerate() {
            if self.stalled == Some(index) {
                continue;
            }
            if let Err(error) = client.drain() {
                panic!("client {index}, id {:?}: {error}", client.view().id());
            }
        }
    }

    /// Closes the connection of the client with the index `after`.
    pub(crate) fn close_one(&mut self, after: usize) {
        if after < self.clients.len() {
            drop(self.clients.remove(after));
        }
    }

    /// The newest client sends data, so the server must close it.
    #[track_caller]
    pub(crate) fn send_data(&mut self) {
        let mut client = self.clients.pop().expect("there is a client");
        let _ = client.stream().write_all(b"?");
        wait_for("the end of a client that sent data", || {
            let result = client.drain();
            (result.is_err() || client.has_ended()).then_some(())
        });
    }

    /// Waits until every client that the server has not closed knows exactly the others.
    #[track_caller]
    pub(crate) fn settle(&mut self) {
        assert_eq!(self.stalled, None, "all clients must read before they can settle");
        wait_for("each client's view equals the roster", || {
            self.read();
            let here = || self.clients.iter().filter(|client| !client.has_ended());
            let ids: BTreeSet<u16> = here().filter_map(|client| client.view().id()).collect();
            here().all(|client| client.knows_exactly(&ids)).then_some(())
        });
        let ended = self.clients.iter().filter(|client| client.has_ended());
        self.ended.extend(ended.map(|client| client.view().id()));
        self.clients.retain(|client| !client.has_ended());
    }

    /// The number of clients that the server closed although they did nothing wrong.
    pub(crate) fn dropped(&self) -> usize {
        self.ended.len()
    }

    /// Their ids.
    pub(crate) fn ended(&self) -> &[Option<u16>] {
        &self.ended
    }

    pub(crate) fn len(&self) -> usize {
        self.clients.len()
    }
}
