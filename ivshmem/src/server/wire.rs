// SPDX-License-Identifier: GPL-2.0-or-later
//! One message on a socket: eight bytes, a signed little-endian number, and at most one
//! descriptor in `SCM_RIGHTS`.
//!
//! Sending never waits. A run of messages goes out with one system call; what did not go
//! out is for the caller to offer again.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::sys::socket::{MsgFlags, send};

use crate::protocol::MESSAGE;
use crate::sys;

/// Messages that go out with one call at most. A socket of the default size holds 278.
const RUN: usize = 256;

/// Why nothing went out.
#[derive(Debug)]
pub(crate) enum Stop {
    /// The socket is full; it says itself when it has room again.
    Full,
    /// The system cannot take it now, and no event will tell when it can: too many
    /// descriptors in flight for this user, or no memory.
    Later(io::Error),
    /// The connection is of no more use.
    Broken(io::Error),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EAGAIN) => Self::Full,
            Some(libc::ETOOMANYREFS | libc::ENOBUFS | libc::ENOMEM) => Self::Later(error),
            _ => Self::Broken(error),
        }
    }
}

/// The rest of a message that went out in part. Its descriptor went with its first byte.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rest {
    value: [u8; MESSAGE],
    sent: u8,
}

/// What went out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Told {
    /// Messages that are told: one that went out in part counts.
    pub(crate) messages: usize,
    pub(crate) then: Then,
}

/// What comes after a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Then {
    /// Nothing: all is told.
    Done,
    /// There is more to tell, perhaps.
    More,
    /// Something stopped the run before its end: nearly always, the socket is full.
    Stopped,
}

/// Sends runs of messages. One serves all sockets.
pub(crate) struct Sender {
    buffer: sys::SendBuffer,
}

impl Sender {
    pub(crate) fn new() -> Self {
        Self { buffer: sys::SendBuffer::new(RUN) }
    }

    /// Sends as much of `messages` as one call takes, `most` of them at most ([`RUN`] if that is
    /// more), but first what `rest` holds.
    ///
    /// Of a message that went out in part, `rest` then holds what is left.
    pub(crate) fn send<'fd>(
        &mut self,
        socket: BorrowedFd<'_>,
        rest: &mut Option<Rest>,
        most: usize,
        messages: impl Iterator<Item = (i64, Option<BorrowedFd<'fd>>)>,
    ) -> Result<Told, Stop> {
        finish(socket, rest)?;
        let most = most.min(RUN);
        let mut run = self.buffer.run();
        for (value, fd) in messages.take(most) {
            run.push(value.to_le_bytes(), fd);
        }
        if run.is_empty() {
            return Ok(Told { messages: 0, then: Then::Done });
        }
        let sent = loop {
            match run.send(socket) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
                Ok(sent) => break sent,
            }
        };
        let mut messages = sent.messages;
        if sent.bytes_of_next > 0 {
            *rest = Some(Rest { value: run.value(messages), sent: sent.bytes_of_next as u8 });
            messages += 1;
        }
        let then = if sent.messages < run.len() {
            Then::Stopped
        } else if run.len() < most {
            Then::Done
        } else {
            Then::More
        };
        Ok(Told { messages, then })
    }
}

/// Sends what is left of a message that went out in part.
fn finish(socket: BorrowedFd<'_>, rest: &mut Option<Rest>) -> Result<(), Stop> {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    while let Some(Rest { value, sent }) = rest {
        let left = &value[usize::from(*sent)..];
        match send(socket.as_raw_fd(), left, flags) {
            Ok(bytes) if bytes < left.len() => *sent += bytes as u8,
            Ok(_) => *rest = None,
            Err(nix::Error::EINTR) => {}
            Err(error) => return Err(io::Error::from(error).into()),
        }
    }
    Ok(())
}
