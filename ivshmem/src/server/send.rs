// SPDX-License-Identifier: GPL-2.0-or-later
//! Sending messages to one client. A run of messages goes out with one system call.
//!
//! Sending never waits. What did not go out, the caller offers again later; the [`Verdict`] says
//! what must happen before. This module knows sockets and numbers, not clients.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, send};

use crate::protocol::{MESSAGE, REFUSED_VALUE, REFUSED_VERSION};
use crate::sys;

/// Messages that go out with one call at most. A socket of the default size holds 278.
pub(super) const RUN: usize = 256;

/// What must happen before a client can be sent more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// There is nothing more to send.
    Done,
    /// There may be more to send, and the socket takes it.
    More,
    /// The socket is full; epoll tells when it is writable again.
    Full,
    /// The system cannot take it now, and no event tells when it can: too many descriptors of
    /// this user are in flight, or there is no memory.
    Exhausted(Errno),
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

/// A message that went out in part. Its descriptor went with its first byte.
#[derive(Clone, Copy, Debug)]
pub(super) struct Partial {
    value: [u8; MESSAGE],
    sent: u8,
}

/// Sends runs of messages. One serves all sockets.
pub(super) struct Sender {
    buffer: sys::SendBuffer,
}

impl Sender {
    pub(super) fn new() -> Self {
        Self { buffer: sys::SendBuffer::new(RUN) }
    }

    /// Sends as many messages as one call takes, `most` at most ([`RUN`] if that is less), but
    /// first the remainder of `partial`. `fill` puts them into the run, no more than its second
    /// argument says. Returns how many messages were told: one that went out in part counts,
    /// and `partial` then holds its remainder.
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
            // Nearly always the socket is full. If it is something else, epoll reports the
            // socket as writable at once, and the next call says what it is.
            Verdict::Full
        } else if run.len() < most {
            Verdict::Done
        } else {
            Verdict::More
        };
        (sent.messages, verdict)
    }
}

/// Sends the remainder of a message that went out in part.
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

/// Ends a client that was not sent all of its greeting. QEMU waits for the memory in a loop that
/// takes an end of file for "nothing yet", and would spin for ever; a message that it cannot
/// accept makes it stop with an error. `greeted` is the number of messages of the greeting that
/// the client was sent.
pub(super) fn refuse(socket: BorrowedFd<'_>, greeted: usize, partial: Option<Partial>) {
    let mut partial = partial;
    if complete(socket, &mut partial).is_err() {
        return;
    }
    let value = if greeted == 0 { REFUSED_VERSION } else { REFUSED_VALUE };
    // A socket that takes nothing has messages that the client has not read: nothing helps then.
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let _ = send(socket.as_raw_fd(), &value.to_le_bytes(), flags);
}
