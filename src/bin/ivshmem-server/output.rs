// SPDX-License-Identifier: GPL-2.0-or-later
//! Lines for people, on stdout and stderr, that never hold up the server.
//!
//! A pipe that nobody reads, or a terminal that was stopped, would keep a `write` waiting, and
//! every client with it; a signal to end would wait as well. So a line is left out when there
//! is no room for it, and the next one says how many were. A reader that only is slower than a
//! crowd of clients gets a moment; one that has used it up gets none until it has read.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::IsTerminal;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use libc::PIPE_BUF;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::write;

/// How long one line waits for a reader that was there until now, in milliseconds.
const MOMENT: u8 = 100;

/// One of the two streams.
#[derive(Debug)]
pub(crate) struct Output<F> {
    stream: F,
    /// The same terminal, opened once more: one that has room for a part of a line lets the
    /// whole wait, unless it was opened not to, and others use the stream as well.
    terminal: Option<File>,
    dropped: u64,
    notice_prefix: String,
}

impl<F: AsFd + IsTerminal> Output<F> {
    pub(crate) fn new(stream: F) -> Self {
        let reopen = || {
            let path = format!("/proc/self/fd/{}", stream.as_fd().as_raw_fd());
            let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
            File::options().write(true).custom_flags(flags).open(path).ok()
        };
        let terminal = if stream.is_terminal() { reopen() } else { None };
        Self { terminal, ..Self::passing(stream) }
    }

    /// A stream that something else is soon put in the place of, so a terminal is not held on
    /// to by opening it once more.
    pub(crate) fn passing(stream: F) -> Self {
        Self { stream, terminal: None, dropped: 0, notice_prefix: String::new() }
    }

    /// Sets what precedes the line that says how many lines were dropped.
    pub(crate) fn with_notice_prefix(self, notice_prefix: String) -> Self {
        Self { notice_prefix, ..self }
    }

    fn target(&self) -> BorrowedFd<'_> {
        self.terminal.as_ref().map_or(self.stream.as_fd(), AsFd::as_fd)
    }

    /// Writes a line, or more, that ends with a newline. A reader that has gone, or a disk that
    /// is full, is no reason to end: nothing is said of it.
    pub(crate) fn line(&mut self, line: &[u8]) {
        let mut patience = PollTimeout::from(MOMENT);
        if self.dropped > 0 {
            patience = PollTimeout::ZERO;
            if !self.has_room(patience) {
                self.dropped += 1;
                return;
            }
            let dropped = std::mem::take(&mut self.dropped);
            let prefix = &self.notice_prefix;
            let text =
                format!("{prefix}ivshmem-server: {dropped} lines left out, as nobody took them\n");
            let _ = write(self.target(), text.as_bytes());
        }
        // More than a pipe takes at once comes in parts, each when there is room for it.
        for part in line.chunks(PIPE_BUF) {
            if !self.has_room(patience) {
                self.dropped += 1;
                return;
            }
            if write(self.target(), part).is_err() {
                return;
            }
        }
    }

    /// Whether a write of up to `PIPE_BUF` bytes would return at once, as far as can be known:
    /// with an error if need be.
    fn has_room(&self, patience: PollTimeout) -> bool {
        let mut fds = [PollFd::new(self.target(), PollFlags::POLLOUT)];
        poll(&mut fds, patience).is_ok_and(|ready| ready > 0)
    }
}
