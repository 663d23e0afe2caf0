// SPDX-License-Identifier: GPL-2.0-or-later
//! Events, reasons and counters that a server reports.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::RawFd;

/// Something that happened in [`Server::dispatch`](super::Server::dispatch).
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// A client was admitted.
    #[non_exhaustive]
    Joined {
        /// Its id, 0 to 65,535.
        id: u16,
        /// The number of its socket, for log lines. The socket may already be closed.
        socket: RawFd,
    },
    /// A client was removed.
    #[non_exhaustive]
    Left {
        /// Its id.
        id: u16,
        /// Why it was removed.
        reason: LeaveReason,
    },
    /// A client was refused: its connection is closed, and no other client was told of it.
    Refused(Refusal),
    /// A [`Stopper`](super::Stopper) was used.
    Stopped,
    /// A descriptor that was passed to [`Server::wake_on`](super::Server::wake_on) is readable.
    #[non_exhaustive]
    Woken {
        /// The token that was passed with it.
        token: u64,
    },
}

/// Why a client was removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LeaveReason {
    /// It closed its connection.
    #[error("it hung up")]
    HungUp,
    /// It sent data. The protocol has no message from a client to a server.
    #[error("it sent something, which the protocol forbids")]
    SentData,
    /// [`Server::disconnect`](super::Server::disconnect) was called.
    #[error("it was disconnected")]
    Disconnected,
    /// Its connection failed.
    #[error("its connection failed")]
    Broken(#[source] io::Error),
}

/// Why a client was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// No id is left: each is in use, or a connected client was told of its last owner.
    #[error(
        "no id is left: each is in use, or was told to a client that is still connected; \
         disconnect the oldest clients"
    )]
    NoIds,
    /// No descriptor is left for its socket or one of its vectors.
    #[error("no descriptor is left; raise the limit of open files (RLIMIT_NOFILE)")]
    NoDescriptors(#[source] io::Error),
    /// It had hung up, or sent data, before it was admitted.
    #[error("it hung up, or sent something, before it was admitted")]
    Ended,
    /// A system call for it failed.
    #[error("a system call for the new client failed")]
    System(#[source] io::Error),
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EMFILE | libc::ENFILE) => Self::NoDescriptors(error),
            _ => Self::System(error),
        }
    }
}

/// Counters of a server since its start, and the ids that are left. Made by
/// [`Server::stats`](super::Server::stats).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Clients that are connected.
    pub peers: usize,
    /// Clients that were admitted.
    pub joined: u64,
    /// Clients that were removed.
    pub left: u64,
    /// Clients that were refused because no id was left.
    pub refused_no_ids: u64,
    /// Clients that were refused because no descriptor was left.
    pub refused_no_descriptors: u64,
    /// Clients that were refused because they had hung up or sent data.
    pub refused_ended: u64,
    /// Clients that were refused because a system call failed.
    pub refused_system: u64,
    /// Messages that were sent.
    pub messages: u64,
    /// Ids that can be given now. The server does not check first which remembered ids have become
    /// free.
    pub ids_free: u32,
    /// Ids of departed clients that may not be given again yet.
    pub ids_remembered: u32,
}

impl Stats {
    pub(super) fn count(&mut self, refusal: &Refusal) {
        let counter = match refusal {
            Refusal::NoIds => &mut self.refused_no_ids,
            Refusal::NoDescriptors(_) => &mut self.refused_no_descriptors,
            Refusal::Ended => &mut self.refused_ended,
            Refusal::System(_) => &mut self.refused_system,
        };
        *counter += 1;
    }
}
