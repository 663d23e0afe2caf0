// SPDX-License-Identifier: GPL-2.0-or-later
//! The connection to a server: whole messages out of a socket, each with its own descriptors.
//!
//! A call asks for no more bytes than the current message lacks. So a descriptor that comes with
//! them can belong to no other message. What a message means, and whether it should have a
//! descriptor, is for `peers` to know.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::sys::socket::{Shutdown, shutdown};

use super::Error;
use super::untrusted::{Untrusted, receive, shut_down, take_urgent_data_in_order};
use crate::protocol::MESSAGE;

/// A whole message.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) value: i64,
    fds: Vec<Untrusted>,
}

impl Message {
    /// Checks that there is no descriptor.
    pub(super) fn bare(self, what: &'static str) -> Result<(), Error> {
        match self.fds.len() {
            0 => Ok(()),
            count => Err(Error::SurplusDescriptors { value: self.value, what, count, right: 0 }),
        }
    }

    /// The one descriptor, if there is any.
    pub(super) fn descriptor(mut self, what: &'static str) -> Result<Option<Untrusted>, Error> {
        match self.fds.len() {
            0 | 1 => Ok(self.fds.pop()),
            count => Err(Error::SurplusDescriptors { value: self.value, what, count, right: 1 }),
        }
    }
}

/// A connected socket, and the message that is being received from it.
///
/// Dropped, it is shut down, also where a forked child has a copy of the socket. Closing it does
/// not sleep, whatever waits in it.
#[derive(Debug)]
pub(super) struct Connection {
    socket: OwnedFd,
    bytes: [u8; MESSAGE],
    filled: usize,
    fds: Vec<Untrusted>,
    /// The number of the descriptor that came last.
    newest: RawFd,
}

impl Connection {
    pub(super) fn new(socket: OwnedFd) -> Self {
        let newest = socket.as_raw_fd();
        take_urgent_data_in_order(socket.as_fd());
        Self { socket, bytes: [0; MESSAGE], filled: 0, fds: Vec::new(), newest }
    }

    /// Ends the connection, but keeps the messages that were not read.
    pub(super) fn shut_down(&self) {
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Both);
    }

    /// The next message, without waiting. None if it is not complete yet.
    pub(super) fn next(&mut self) -> Result<Option<Message>, Error> {
        loop {
            let buffer = &mut self.bytes[self.filled..];
            let received = match receive(self.socket.as_fd(), buffer, self.newest) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                // The server closed the connection, and had not read all that was sent to it.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Err(self.end());
                }
                Err(source) => return Err(Error::Receive { source }),
                Ok(received) => received,
            };
            self.newest = received.fds.last().map_or(self.newest, AsRawFd::as_raw_fd);
            self.fds.extend(received.fds.into_iter().map(Untrusted::new));
            if received.truncated {
                return Err(Error::Truncated);
            }
            if received.bytes == 0 {
                return Err(self.end());
            }
            self.filled += received.bytes;
            if self.filled == MESSAGE {
                self.filled = 0;
                let value = i64::from_le_bytes(self.bytes);
                return Ok(Some(Message { value, fds: std::mem::take(&mut self.fds) }));
            }
        }
    }

    fn end(&self) -> Error {
        match self.filled {
            0 => Error::Closed,
            bytes => Error::CutShort { bytes },
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        shut_down(self.socket.as_fd());
    }
}
