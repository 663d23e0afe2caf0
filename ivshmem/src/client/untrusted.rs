// SPDX-License-Identifier: GPL-2.0-or-later
//! Descriptors that a server sent and nobody has checked: they are closed without sleeping.
//!
//! close(2) sleeps if the open file says so, and the server chose the file. So each descriptor that
//! is received is an [`Untrusted`] until the client has checked what it is and keeps it. All others
//! are made harmless before they are closed. The same goes for messages that the client never
//! reads: the kernel closes their descriptors when the connection is closed.
//!
//! What makes close(2) sleep, and what this module does about it:
//!
//! - `SO_LINGER` (TCP, VSOCK, SCTP, Bluetooth): close waits for unsent data, for as long as the
//!   sender chose. It is turned off.
//! - A TLS socket of the kernel sends its last record in close, and waits for room. The time limit
//!   for sending bounds that.
//! - A UNIX socket closes the descriptors in its own queue, and a listening one those in the queues
//!   of its connections. Both queues are shut down and emptied, and what they had is treated in the
//!   same way.
//!
//! Eventfds and files of a local file system, which are all that a client keeps, do not sleep.
//!
//! This is not bounded here, because there is no system call that bounds it:
//! - A file of FUSE or of a network file system is flushed in close, and its server may take its
//!   time (already for `fstat`). So may a few devices, such as a serial port, which a server needs
//!   privileges to open.
//! - The kernel itself closes what it cannot pass to this process, for want of descriptors or by a
//!   rule of a security module ([`Error::Truncated`](super::Error::Truncated)).
//! - A server that keeps a copy of a socket can turn `SO_LINGER` on again and close its copy between
//!   this module's two system calls.
//!
//! This module knows descriptors. It must not know what they are for.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;

use nix::sys::socket::{
    AddressFamily, Shutdown, SockaddrLike, SockaddrStorage, getsockname, getsockopt, setsockopt,
    shutdown, sockopt,
};
use nix::sys::time::TimeVal;

use crate::sys;

/// How many empty messages [`empty`] takes. An empty message looks like the end of the queue, and a
/// queue of datagrams has a limit of this order.
const EMPTY_MESSAGES: usize = 1024;

/// A descriptor that a server sent. Dropping it does not sleep.
#[derive(Debug)]
pub(super) struct Untrusted(Option<OwnedFd>);

impl Untrusted {
    pub(super) fn new(fd: OwnedFd) -> Self {
        Self(Some(fd))
    }

    /// The descriptor as it is. For one that was checked: an eventfd, or a file.
    pub(super) fn keep(mut self) -> OwnedFd {
        self.0.take().expect("only `keep` and `drop` take it")
    }
}

impl AsFd for Untrusted {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_ref().expect("only `keep` and `drop` take it").as_fd()
    }
}

impl Drop for Untrusted {
    fn drop(&mut self) {
        if let Some(fd) = self.0.take() {
            close(vec![fd]);
        }
    }
}

/// Shuts a socket down for every process that has a copy of it, and closes what waits in its queue.
pub(super) fn shut_down(socket: BorrowedFd<'_>) {
    let mut found = Vec::new();
    empty(socket, &mut found);
    close(found);
}

/// Closes descriptors, and those that are found in them. The list is used as a stack, since a
/// sender can nest them deeply.
fn close(mut fds: Vec<OwnedFd>) {
    while let Some(fd) = fds.pop() {
        // On a descriptor that is no socket each of these calls fails and does nothing.
        let off = libc::linger { l_onoff: 0, l_linger: 0 };
        if setsockopt(&fd, sockopt::Linger, &off).is_err() {
            continue;
        }
        // 0 would be no limit.
        let _ = setsockopt(&fd, sockopt::SendTimeout, &TimeVal::new(0, 1));
        let address = getsockname::<SockaddrStorage>(fd.as_raw_fd());
        if address.is_ok_and(|address| address.family() != Some(AddressFamily::Unix)) {
            continue;
        }
        empty(fd.as_fd(), &mut fds);
        if getsockopt(&fd, sockopt::AcceptConn) == Ok(true) {
            // A listener that was shut down fails when no connection is left, and does not wait.
            let listener = UnixListener::from(fd);
            while let Ok((connection, _)) = listener.accept() {
                fds.push(connection.into());
            }
        }
    }
}

/// Shuts a UNIX socket down, so that nobody can add to its queue, and takes the descriptors out of
/// the queue.
fn empty(socket: BorrowedFd<'_>, fds: &mut Vec<OwnedFd>) {
    let _ = shutdown(socket.as_raw_fd(), Shutdown::Both);
    let mut empty_messages = 0;
    while empty_messages < EMPTY_MESSAGES {
        match sys::receive(socket, &mut [0; 4096]) {
            Ok(received) => {
                if received.bytes == 0 && received.fds.is_empty() {
                    empty_messages += 1;
                }
                fds.extend(received.fds);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}
