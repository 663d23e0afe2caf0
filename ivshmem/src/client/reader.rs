// SPDX-License-Identifier: GPL-2.0-or-later
//! Messages as they come out of a socket, whole, each with its own descriptors.
//!
//! A call asks for no more than the bytes that the message at hand still lacks, so a
//! descriptor that comes with them can belong to no other message. What the message means,
//! and whether it should have a descriptor, is for `peers` to know.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use super::Error;
use crate::protocol::MESSAGE;
use crate::sys;

/// A whole message.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) value: i64,
    fds: Vec<OwnedFd>,
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
    pub(super) fn descriptor(mut self, what: &'static str) -> Result<Option<OwnedFd>, Error> {
        match self.fds.len() {
            0 | 1 => Ok(self.fds.pop()),
            count => Err(Error::SurplusDescriptors { value: self.value, what, count, right: 1 }),
        }
    }
}

/// The message that is being received.
#[derive(Debug, Default)]
pub(super) struct Reader {
    bytes: [u8; MESSAGE],
    filled: usize,
    fds: Vec<OwnedFd>,
}

impl Reader {
    /// The next message, without waiting; none if it is not there yet.
    pub(super) fn next(&mut self, socket: &UnixStream) -> Result<Option<Message>, Error> {
        loop {
            let received = match sys::receive(socket.as_fd(), &mut self.bytes[self.filled..]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                // An end like any other: it went with messages of ours unread.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Err(self.end());
                }
                Err(source) => return Err(Error::Receive { source }),
                Ok(received) => received,
            };
            self.fds.extend(received.fds);
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
