// SPDX-License-Identifier: GPL-2.0-or-later
//! The view of a client that the server's caller gets.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::SystemTime;

use super::applicant::Credentials;
use super::connection::{Clients, Connection};
use super::in_flight;
use crate::sys;

/// A client of the server.
///
/// ```
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("socket");
/// # let mut server = ivshmem::Server::builder().socket_path(&path).start()?;
/// # let socket = std::os::unix::net::UnixStream::connect(&path)?;
/// # server.wait(None)?;
/// // A client with many pending messages does not read. It delays no other client.
/// let stuck: Vec<u16> =
///     server.peers().filter(|peer| peer.behind() > 10_000).map(|peer| peer.id()).collect();
/// for id in stuck {
///     server.disconnect(id);
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Peer<'a> {
    clients: &'a Clients,
    index: usize,
}

impl<'a> Peer<'a> {
    pub(super) fn new(clients: &'a Clients, index: usize) -> Self {
        Self { clients, index }
    }

    fn connection(&self) -> &'a Connection {
        self.clients.payload(self.index)
    }

    /// Its id, which the guests use too.
    pub fn id(&self) -> u16 {
        self.clients.id(self.index)
    }

    /// Its eventfds, one for each vector. Writing to an eventfd interrupts the peer.
    pub fn vectors(&self) -> impl ExactSizeIterator<Item = BorrowedFd<'a>> + use<'a> {
        self.connection().vectors.iter().map(AsFd::as_fd)
    }

    /// Its connection.
    pub fn socket(&self) -> BorrowedFd<'a> {
        self.connection().socket.as_fd()
    }

    /// The number of its pending messages. If it stays above 0 for long, the client does not read.
    pub fn behind(&self) -> u64 {
        self.clients.behind(self.index)
    }

    /// The number of messages that it was sent and has not read. The server asks the kernel
    /// (`SIOCOUTQ`), so it is a system call.
    ///
    /// # Errors
    /// Those of `ioctl(2)`.
    pub fn unread(&self) -> io::Result<u64> {
        self.unread_bytes().map(in_flight::messages_in)
    }

    /// The bytes of kernel memory that its unread messages take: some hundred for each message of 8
    /// bytes.
    ///
    /// # Errors
    /// As [`unread`](Self::unread).
    pub fn unread_bytes(&self) -> io::Result<u64> {
        sys::unread_bytes(self.socket()).map(|bytes| bytes as u64)
    }

    /// When it was admitted. If [`is_resumed`](Self::is_resumed), when this server resumed it,
    /// because the time before is not kept.
    pub fn since(&self) -> SystemTime {
        self.connection().since
    }

    /// Whether a server before admitted it, and this one goes on: see [`Keeper`](crate::Keeper).
    pub fn is_resumed(&self) -> bool {
        self.connection().resumed
    }

    /// The process at the other end (`SO_PEERCRED` of `unix(7)`).
    ///
    /// # Errors
    /// Those of `getsockopt(2)`.
    pub fn credentials(&self) -> io::Result<Credentials> {
        Credentials::of(self.connection().socket.as_fd())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::time::{Duration, SystemTime};

    use crate::Server;

    #[test]
    fn what_a_client_has_not_read_is_counted_until_it_reads() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("socket");
        let before = SystemTime::now();
        let mut server = Server::builder().socket_path(&path).start().expect("it starts");
        let mut socket = UnixStream::connect(&path).expect("it listens");
        server.wait(Some(Duration::from_secs(10))).expect("it serves");
        let peer = server.peer(0).expect("it joined");
        assert_eq!((peer.behind(), peer.unread().expect("a socket")), (0, 4));
        assert!(peer.unread_bytes().expect("a socket") >= 4 * 8);
        assert!(!peer.is_resumed());
        assert!((before..=SystemTime::now()).contains(&peer.since()));
        socket.read_exact(&mut [0; 4 * 8]).expect("four messages");
        assert_eq!(peer.unread().expect("a socket"), 0);
    }
}
