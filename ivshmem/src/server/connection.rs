// SPDX-License-Identifier: GPL-2.0-or-later
//! A client's descriptors, and the state of sending to it.

#![forbid(unsafe_code)]

use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::SystemTime;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};

use super::LeaveReason;
use super::in_flight::Unread;
use super::roster::{GREETING, Roster};
use super::send::{self, Partial, Verdict};

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) socket: UnixStream,
    /// The client's own eventfds.
    pub(super) vectors: Box<[OwnedFd]>,
    pub(super) unread: Unread,
    /// What must happen before the client is sent more messages.
    pub(super) verdict: Verdict,
    /// Whether epoll reports when its socket becomes writable.
    pub(super) watches_writable: bool,
    /// The largest number of messages in its next send: twice the number that its socket took
    /// before it was full. Preparing many messages for a socket that takes few costs more than
    /// sending these few.
    pub(super) batch: usize,
    pub(super) partial: Option<Partial>,
    /// `Server::disconnect` was called.
    pub(super) disconnected: bool,
    /// When it was admitted. If a server before did that: when this one resumed it.
    pub(super) since: SystemTime,
    /// A server before admitted it.
    pub(super) resumed: bool,
    /// Its record in the state file, if there is a keeper.
    pub(super) slot: u32,
    /// The number of its descriptors that the keeper has, or will have.
    pub(super) kept: u32,
}

/// The clients in join order, with their descriptors.
pub(super) type Clients = Roster<Connection>;

impl Connection {
    pub(super) fn new(socket: UnixStream, vectors: Box<[OwnedFd]>) -> Self {
        Self {
            socket,
            vectors,
            unread: Unread::new(),
            verdict: Verdict::Done,
            watches_writable: false,
            batch: usize::MAX,
            partial: None,
            disconnected: false,
            since: SystemTime::now(),
            resumed: false,
            slot: 0,
            kept: 0,
        }
    }

    /// Ends the connection, even if a forked child has a copy of its descriptor.
    /// `greeting_left` is the number of messages of the greeting that were not sent.
    pub(super) fn hang_up(&self, greeting_left: usize) {
        let mut ended = Shutdown::Both;
        if greeting_left > 0 {
            let greeted = usize::from(GREETING) - greeting_left;
            send::refuse(self.socket.as_fd(), greeted, self.partial);
            // QEMU drops what it has not read when both directions are shut down.
            ended = Shutdown::Write;
        }
        let _ = self.socket.shutdown(ended);
    }

    /// Returns the reason for which epoll reports the client as ended.
    pub(super) fn leave_reason(&self) -> LeaveReason {
        if self.disconnected {
            return LeaveReason::Disconnected;
        }
        match has_spoken(&self.socket) {
            _ if has_unread(&self.socket) => LeaveReason::SentData,
            Ok(_) | Err(Errno::EAGAIN | Errno::ECONNRESET) => LeaveReason::HungUp,
            Err(errno) => LeaveReason::Broken(errno.into()),
        }
    }
}

/// Returns true if the client sent data that is unread, false if it has hung up, and `EAGAIN` if
/// it has done neither.
pub(super) fn has_spoken(socket: &UnixStream) -> nix::Result<bool> {
    let peek = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    recv(socket.as_raw_fd(), &mut [0], peek).map(|bytes| bytes > 0)
}

/// Whether the client sent data that is unread, which a descriptor may have come with.
pub(super) fn has_unread(socket: &UnixStream) -> bool {
    let urgent = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_OOB;
    has_spoken(socket) == Ok(true) || recv(socket.as_raw_fd(), &mut [0], urgent) == Ok(1)
}
