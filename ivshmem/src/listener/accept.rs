// SPDX-License-Identifier: GPL-2.0-or-later
//! What came of an `accept`: the only place that knows what its errors mean.

#![forbid(unsafe_code)]

use std::io;
use std::os::unix::net::UnixStream;

/// What came of an `accept`.
#[derive(Debug)]
pub(crate) enum Accept {
    /// A connection, close-on-exec.
    Accepted(UnixStream),
    /// Nobody waits to be accepted.
    None,
    /// The connection that waited has ended; there may be another.
    Gone,
    /// No descriptor is left in the process, or in the system. The connection still waits.
    NoDescriptors(io::Error),
    /// The socket no longer listens, and never will again: a process that shares it has shut it
    /// down. It stays readable, so it must no longer be waited for.
    Dead,
    /// The system cannot accept now; later it may.
    Failed(io::Error),
}

impl Accept {
    /// What an error of `accept` means. `is_shut_down` asks whether the socket was shut down.
    pub(super) fn of(error: io::Error, is_shut_down: impl Fn() -> bool) -> Self {
        match error.raw_os_error() {
            // A non-blocking one says EAGAIN, and another one EINVAL.
            Some(libc::EAGAIN | libc::EINVAL) if is_shut_down() => Self::Dead,
            Some(libc::EAGAIN) => Self::None,
            Some(libc::ECONNABORTED | libc::EPROTO) => Self::Gone,
            Some(libc::EMFILE | libc::ENFILE) => Self::NoDescriptors(error),
            _ => Self::Failed(error),
        }
    }
}
