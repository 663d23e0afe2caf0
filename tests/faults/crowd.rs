// SPDX-License-Identifier: GPL-2.0-or-later
//! The clients of a fault run: some read, one does not until it is let, and each of those
//! that are left must know all the others in the end.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use crate::common::member::Member;
use crate::common::wait_for;

pub(crate) struct Crowd {
    socket: PathBuf,
    vectors: usize,
    members: Vec<Member>,
    /// The one that does not read, by its place.
    pub(crate) stalled: Option<usize>,
    /// Those that the server closed though they had done nothing.
    dropped: usize,
}

impl Crowd {
    pub(crate) fn new(socket: &Path, vectors: usize) -> Self {
        Self { socket: socket.into(), vectors, members: Vec::new(), stalled: None, dropped: 0 }
    }

    /// One more client, which reads nothing yet.
    pub(crate) fn connect(&mut self) {
        let stream = UnixStream::connect(&self.socket).expect("the server listens");
        self.members.push(Member::new(stream, self.vectors, false));
    }

    /// One more client; returns when it is greeted, or was turned away.
    #[track_caller]
    pub(crate) fn join(&mut self) {
        self.connect();
        let newest = self.members.len() - 1;
        wait_for("the newest client is greeted, or dropped", || {
            self.read();
            let member = &self.members[newest];
            (member.view().is_welcomed() || member.has_ended()).then_some(())
        });
    }

    /// All but the stalled one read what there is.
    #[track_caller]
    pub(crate) fn read(&mut self) {
        for (place, member) in self.members.iter_mut().enumerate() {
            if self.stalled == Some(place) {
                continue;
            }
            if let Err(error) = member.drain() {
                panic!("client {place}, id {:?}: {error}", member.view().id());
            }
        }
    }

    /// The oldest of the readers that come after `after` hangs up without a word.
    pub(crate) fn hang_up(&mut self, after: usize) {
        if after < self.members.len() {
            drop(self.members.remove(after));
        }
    }

    /// The newest client sends something, which is its end.
    #[track_caller]
    pub(crate) fn misbehave(&mut self) {
        let mut member = self.members.pop().expect("there is one");
        let _ = member.stream().write_all(b"?");
        wait_for("the end of a client that said something", || {
            let result = member.drain();
            (result.is_err() || member.has_ended()).then_some(())
        });
    }

    /// Waits until every client that the server has not closed knows exactly the others.
    #[track_caller]
    pub(crate) fn settle(&mut self) {
        assert_eq!(self.stalled, None, "settling needs everybody to read");
        wait_for("each client's view is the roster", || {
            self.read();
            let here = || self.members.iter().filter(|member| !member.has_ended());
            let ids: BTreeSet<u16> = here().filter_map(|member| member.view().id()).collect();
            here().all(|member| member.knows_exactly(&ids)).then_some(())
        });
        let before = self.members.len();
        self.members.retain(|member| !member.has_ended());
        self.dropped += before - self.members.len();
    }

    /// Those that the server closed though they had done nothing.
    pub(crate) fn dropped(&self) -> usize {
        self.dropped
    }

    pub(crate) fn len(&self) -> usize {
        self.members.len()
    }
}
