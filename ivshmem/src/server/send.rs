// SPDX-License-Identifier: GPL-2.0-or-later
//! Sends messages to one client. A run of messages takes one system call.
//!
//! Sending never waits. The caller sends the remaining messages later; the [`Verdict`] tells what
//! must happen before. This module knows sockets and numbers, not clients.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, send};

use crate::protocol::{MESSAGE, REFUSED_VALUE, REFUSED_VERSION};
use crate::sys;

#[cfg(test)]
mod tests;

/// The number of messages in one call, at most. A socket of the default size holds 278.
pub(super) const RUN: usize = 256;

/// What must happen before a client can be sent more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// There is nothing more to send.
    Done,
    /// There may be more to send, and the socket is writable.
    More,
    /// The socket is full. Epoll reports when it is writable again.
    Full,
    /// The system cannot send now: too many descriptors of this user are in flight, or there is
    /// no memory. No event reports when it can.
    Exhausted(Errno),
    /// Other clients use the in-flight budget. The timer tells when to try again.
    Waiting,
    /// The connection cannot be used any more.
    Broken(Errno),
}

impl From<io::Error> for Verdict {
    fn from(error: io::Error) -> Self {
        match Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)) {
            Errno::EAGAIN => Self::Full,
            errno @ (Errno::ETOOMANYREFS | Errno::ENOBUFS | Errno::ENOMEM) => {
                Self::Exhausted(errno)
            }
            errno => Self::Broken(errno),
        }
    }
}

/// A partial write: the message and the number of its bytes that were sent. The descriptor was
/// sent with the first byte.
#[derive(Clone, Copy, Debug)]
pub(super) struct Partial {
    value: [u8; MESSAGE],
    sent: u8,
}

impl Partial {
    /// The message, and the number of its bytes that were sent.
    pub(super) fn parts(self) -> ([u8; MESSAGE], u8) {
        (self.value, self.sent)
    }

    pub(super) fn from_parts((value, sent): ([u8; MESSAGE], u8)) -> Self {
        Self { value, sent }
    }
}

/// Sends runs of messages. One instance is used for all sockets.
pub(super) struct Sender {
    buffer: sys::SendBuffer,
}

impl Sender {
    pub(super) fn new() -> Self {
        Self { buffer: sys::SendBuffer::new(RUN) }
    }

    /// Sends the remainder of `partial`, and then as many messages as one call takes: `most` or
    /// [`RUN`] at most, whichever is less. `fill` puts the messages into the run; its second
    /// argument is the largest number of them. Returns the number of messages that were sent. A
    /// partial write counts as sent, and `partial` then holds its remainder.
    #[inline]
    pub(super) fn send<'fd>(
        &mut self,
        socket: BorrowedFd<'_>,
        partial: &mut Option<Partial>,
        most: usize,
        fill: impl FnOnce(&mut sys::Run<'_, 'fd>, usize),
    ) -> (usize, Verdict) {
        if partial.is_some() {
            if let Err(verdict) = complete(socket, partial) {
                return (0, verdict);
            }
        }
        let most = most.min(RUN);
        let mut run = self.buffer.run();
        fill(&mut run, most);
        if run.is_empty() {
            return (0, Verdict::Done);
        }
        let sent = loop {
            match run.send(socket) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return (0, error.into()),
                Ok(sent) => break sent,
            }
        };
        if sent.bytes_of_next > 0 {
            let value = run.value(sent.messages);
            *partial = Some(Partial { value, sent: sent.bytes_of_next as u8 });
            return (sent.messages + 1, Verdict::Full);
        }
        let verdict = if sent.messages < run.len() {
            // Usually the socket is full. After any other error epoll reports the socket as
            // writable at once, and the next call returns the error.
            Verdict::Full
        } else if run.len() < most {
            Verdict::Done
        } else {
            Verdict::More
        };
        (sent.messages, verdict)
    }
}

/// Sends the remainder of a partial write.
fn complete(socket: BorrowedFd<'_>, partial: &mut Option<Partial>) -> Result<(), Verdict> {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    while let Some(Partial { value, sent }) = partial {
        let left = &value[usize::from(*sent)..];
        match send(socket.as_raw_fd(), left, flags) {
            Ok(bytes) if bytes < left.len() => *sent += bytes as u8,
            Ok(_) => *partial = None,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(io::Error::from(errno).into()),
        }
    }
    Ok(())
}

/// Refuses a client that was not sent its whole greeting: sends a message that QEMU cannot accept,
/// so that QEMU ends with an error. Without the message QEMU would spin without end, because it
/// waits for the memory in a loop that treats an end of file as "no data yet". `greeted` is the
/// number of messages of the greeting that the client was sent.
pub(super) fn refuse(socket: BorrowedFd<'_>, greeted: usize, partial: Option<Partial>) {
    let mut partial = partial;
    if complete(socket, &mut partial).is_err() {
        return;
    }
    let value = if greeted == 0 { REFUSED_VERSION } else { REFUSED_VALUE };
    // The send fails if the socket is full, which means that the client does not read. Nothing can
    // be done for such a client.
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let _ = send(socket.as_raw_fd(), &value.to_le_bytes(), flags);
}

/// Refuses a client of which it is not known how much of the greeting it was sent: a QEMU ends at
/// this value in each place of the greeting, and ignores it after that.
pub(super) fn refuse_anywhere(socket: BorrowedFd<'_>) {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let _ = send(socket.as_raw_fd(), &REFUSED_VALUE.to_le_bytes(), flags);
}
