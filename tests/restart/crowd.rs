// SPDX-License-Identifier: GPL-2.0-or-later
//! Clients that join, read parts of messages, stall and leave at random, and check each message.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use crate::common::checked_client::CheckedClient;
use crate::common::wait_for;

/// The clients that are connected at the same time, at most.
const MOST: usize = 60;

/// A random number below `limit`.
pub(crate) fn below(state: &mut u64, limit: u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) % limit
}

pub(crate) struct Crowd {
    socket: PathBuf,
    vectors: u32,
    pub(crate) clients: Vec<CheckedClient>,
    /// The ids of the clients that the server ended.
    pub(crate) ended: Vec<Option<u16>>,
}

impl Crowd {
    pub(crate) fn new(socket: PathBuf, vectors: u32) -> Self {
        Self { socket, vectors, clients: Vec::new(), ended: Vec::new() }
    }

    /// Connects a client.
    pub(crate) fn connect(&mut self) {
        // Between two servers the socket accepts connections too, up to its backlog.
        if let Ok(stream) = UnixStream::connect(&self.socket) {
            self.clients.push(CheckedClient::new(stream, self.vectors as usize, false));
        }
    }

    /// Lets some clients join, read and leave.
    pub(crate) fn step(&mut self, random: &mut u64) {
        if self.clients.len() < MOST && below(random, 3) == 0 {
            self.connect();
        }
        if self.clients.len() > MOST / 3 && below(random, 20) == 0 {
            let index = below(random, self.clients.len() as u64) as usize;
            drop(self.clients.swap_remove(index));
        }
        let mut index = 0;
        while index < self.clients.len() {
            // Some do not read now, and some read parts of messages.
            let stays = below(random, 4) == 0 || {
                let limit = 1 + below(random, 60) as usize;
                self.read(index, limit)
            };
            index += usize::from(stays);
        }
        thread::sleep(Duration::from_millis(1));
    }

    /// Reads at most `limit` bytes of the client at `index`. Returns false if it was ended.
    fn read(&mut self, index: usize, limit: usize) -> bool {
        let client = &mut self.clients[index];
        match client.receive(limit) {
            Ok(_) if !client.has_ended() => return true,
            Ok(_) => {}
            // It was ended when nobody could know what it had of its greeting.
            Err(error) if error.starts_with("-2,") => {}
            // The server was killed in a partial write.
            Err(error) if error.starts_with("the stream ended") => {}
            Err(error) => panic!("client {:?}: {error}", client.view().id()),
        }
        let client = self.clients.swap_remove(index);
        // A client that was sent nothing was never admitted.
        if client.view().messages() > 0 {
            self.ended.push(client.view().id());
        }
        false
    }

    /// Waits until each client knows exactly the others. Returns the number of messages that they received.
    pub(crate) fn settle(&mut self) -> u64 {
        wait_for("each client knows exactly the others", || {
            let mut index = 0;
            while index < self.clients.len() {
                index += usize::from(self.read(index, 4096));
            }
            let ids: BTreeSet<u16> =
                self.clients.iter().filter_map(|client| client.view().id()).collect();
            let is_settled = ids.len() == self.clients.len()
                && self.clients.iter().all(|client| client.knows_exactly(&ids));
            is_settled.then_some(())
        });
        self.clients.iter().map(|client| client.view().messages()).sum()
    }
}
