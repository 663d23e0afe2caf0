// SPDX-License-Identifier: GPL-2.0-or-later
//! The view of a client that the server's caller gets.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use super::applicant::Credentials;
use super::connection::{Clients, Connection};

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

    /// The process at the other end (`SO_PEERCRED` of `unix(7)`).
    ///
    /// # Errors
    /// Those of `getsockopt(2)`.
    pub fn credentials(&self) -> io::Result<Credentials> {
        Credentials::of(self.connection().socket.as_fd())
    }
}
