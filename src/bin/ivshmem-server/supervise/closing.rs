// SPDX-License-Identifier: GPL-2.0-or-later
//! Closes descriptors that the supervisor has stored, and never waits for that.
//!
//! The last close of a connection closes the descriptors that its client has passed and nobody has received. Such a
//! descriptor can make close(2) wait: a TCP socket with SO_LINGER waits for hours. Listening sockets refuse descriptors
//! since Linux 6.16, but not those of a socket unit before the server runs. So what has unread data is closed by a child
//! process.

#![forbid(unsafe_code)]

use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{MsgFlags, recv};
use nix::unistd::Pid;

use super::sys;

/// Closing processes that may run at the same time. Beyond that, descriptors stay open until the next time.
const PROCESSES: usize = 16;

/// What is to be closed, and the processes that do so.
#[derive(Debug, Default)]
pub(super) struct Closing {
    waiting: Vec<OwnedFd>,
    processes: Vec<Pid>,
}

impl Closing {
    pub(super) fn close(&mut self, fds: impl IntoIterator<Item = OwnedFd>) {
        self.waiting.extend(fds.into_iter().filter(has_unread));
        if self.waiting.is_empty() || self.processes.len() >= PROCESSES {
            return;
        }
        // At an error they wait for the next time.
        match sys::close_in_child(&mut self.waiting) {
            Ok(pid) => self.processes.push(pid),
            Err(error) => log::warn!(
                "cannot start a process that closes {} connections: {error}; they stay open for now",
                self.waiting.len()
            ),
        }
    }

    /// A child process has ended.
    pub(super) fn ended(&mut self, pid: Pid) {
        self.processes.retain(|&process| process != pid);
    }
}

impl Drop for Closing {
    fn drop(&mut self) {
        if !self.waiting.is_empty() && sys::close_in_child(&mut self.waiting).is_err() {
            // The end of the process closes them.
            self.waiting.drain(..).for_each(std::mem::forget);
        }
    }
}

/// Whether data is unread, with which descriptors may have come. Not for what is not a socket.
fn has_unread(fd: &OwnedFd) -> bool {
    let peek = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    // Urgent data is not seen by a plain call.
    [peek, peek | MsgFlags::MSG_OOB]
        .iter()
        .any(|&flags| recv(fd.as_raw_fd(), &mut [0], flags).is_ok_and(|bytes| bytes > 0))
}
