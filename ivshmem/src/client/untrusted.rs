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
//!   of its connections. Each queue is shut down and emptied, and its descriptors are treated in
//!   the same way.
//! - A read that passes urgent data closes its descriptors. So urgent data is read too.
//! - The kernel itself closes what it cannot give to this process, for want of descriptors. So near
//!   the limit of open files, [`receive`] looks first, and leaves a message that does not fit where
//!   it is. It can be taken when the client has closed other descriptors.
//!
//! The client keeps eventfds and one regular file. To close these does not sleep on a local file
//! system.
//!
//! This can still sleep, because no system call prevents it:
//!
//! - A file of FUSE or of a network file system is flushed in close, and its server may take its
//!   time (already for `fstat`). So may a few devices, such as a serial port, which a server needs
//!   privileges to open.
//! - A server that keeps a copy of a socket can turn `SO_LINGER` on again, and close its copy,
//!   between two system calls of this module.
//! - A message may still not fit when the client has closed all that it can, or a security module
//!   may forbid its descriptors.
//!
//! This module knows descriptors. It must not know what they are for.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::socket::{
    AddressFamily, Shutdown, SockType, SockaddrLike, SockaddrStorage, getsockname, getsockopt,
    setsockopt, shutdown, sockopt,
};
use nix::sys::time::TimeVal;

use crate::sys::{self, Received};

/// How many empty datagrams [`next_fds`] skips. An empty datagram looks like the end of the queue,
/// and a queue of datagrams has a limit of this order.
const EMPTY_DATAGRAMS: usize = 1024;

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

/// Receives a message, whose descriptors may not fit into this process. Then it stays in the queue,
/// and `truncated` is set.
///
/// `newest` is the number of a descriptor that this process opened lately. Numbers are given from
/// the lowest one that is free, so it tells how many are in use.
pub(super) fn receive(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    newest: RawFd,
) -> io::Result<Received> {
    let full = u64::from(newest.unsigned_abs()) + sys::RECEIVE_FDS as u64;
    if getrlimit(Resource::RLIMIT_NOFILE).is_ok_and(|(soft, _)| full >= soft) {
        // To close the copies cannot sleep: the queue still has the originals.
        let mut peeked = sys::peek(socket, buffer)?;
        peeked.fds.clear();
        if peeked.truncated {
            return Ok(peeked);
        }
    }
    sys::receive(socket, buffer)
}

/// Makes each read of a socket give urgent data (`MSG_OOB`) too. Otherwise a read that passes such
/// data closes its descriptors. Kernels before Linux 5.15 have none on these sockets.
pub(super) fn take_urgent_data_in_order(socket: BorrowedFd<'_>) {
    let _ = setsockopt(&socket, sockopt::OobInline, &true);
}

/// Shuts a socket down for every process that has a copy of it, and closes what waits in its queue.
pub(super) fn shut_down(socket: BorrowedFd<'_>) {
    let _ = shutdown(socket.as_raw_fd(), Shutdown::Both);
    take_urgent_data_in_order(socket);
    while let Some(fds) = next_fds(socket) {
        close(fds);
    }
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
        // Now nobody can add to its queue.
        let _ = shutdown(fd.as_raw_fd(), Shutdown::Both);
        take_urgent_data_in_order(fd.as_fd());
        if let Some(found) = next_fds(fd.as_fd()) {
            // There may be more. It is closed after those that were found.
            fds.push(fd);
            fds.extend(found);
        } else if getsockopt(&fd, sockopt::AcceptConn) == Ok(true) {
            // A listener that was shut down fails when no connection is left, and does not wait.
            let listener = UnixListener::from(fd);
            if let Ok((connection, _)) = listener.accept() {
                fds.extend([listener.into(), connection.into()]);
            }
        }
    }
}

/// Takes messages out of a socket until one has descriptors. None if there is no such message, or
/// if its descriptors do not fit into this process.
fn next_fds(socket: BorrowedFd<'_>) -> Option<Vec<OwnedFd>> {
    let newest = socket.try_clone_to_owned().map_or(RawFd::MAX, |copy| copy.as_raw_fd());
    // Nothing is the end of a stream, but may be an empty datagram.
    let stream = getsockopt(&socket, sockopt::SockType) == Ok(SockType::Stream);
    let mut empty = if stream { 1 } else { EMPTY_DATAGRAMS };
    while empty > 0 {
        match receive(socket, &mut [0; 4096], newest) {
            Ok(received) if !received.fds.is_empty() => return Some(received.fds),
            Ok(received) if received.truncated => return None,
            Ok(received) if received.bytes == 0 => empty -= 1,
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return None,
            _ => {}
        }
    }
    None
}
