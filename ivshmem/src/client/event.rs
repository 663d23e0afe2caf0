// SPDX-License-Identifier: GPL-2.0-or-later
//! What a client reports: events, and the peers that it knows.
//!
//! Plain values. This module must not know how they come about.

#![forbid(unsafe_code)]

use super::Error;

/// What happened to a client.
///
/// ```
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("socket");
/// # let mut server = ivshmem::Server::builder().socket_path(&path).start()?;
/// # std::thread::spawn(move || server.run());
/// use ivshmem::client::{Client, Event};
///
/// let mut client = Client::connect(&path)?;
/// client.ring(client.id(), 0)?;
/// for event in client.wait(None)? {
///     match event {
///         Event::Joined { peer, vectors } => println!("{peer} joined, with {vectors} vectors"),
///         Event::Left { peer } => println!("{peer} left"),
///         Event::Rung { vector, count } => println!("{count} interrupts on vector {vector}"),
///         Event::Disconnected { reason } => println!("no server any more: {reason}"),
///         _ => {}
///     }
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// A peer joined and can be interrupted. It has as many vectors as this client, or the server
    /// went on to tell of another peer.
    Joined {
        /// Its id.
        peer: u16,
        /// The vectors that it has.
        vectors: u32,
    },
    /// A peer left.
    Left {
        /// Its id.
        peer: u16,
    },
    /// A peer interrupted this client.
    Rung {
        /// On which of its vectors.
        vector: u32,
        /// How often since the last report. Guests may have interrupted it more often: several
        /// interrupts can be merged into one.
        count: u64,
    },
    /// This client has one more vector than it had when it connected.
    Vector {
        /// Its number.
        vector: u32,
    },
    /// The server ended, or broke the protocol and was disconnected. This comes once. No `Joined`,
    /// `Left` or `Vector` comes after it.
    Disconnected {
        /// [`Error::Closed`], or what the server did.
        reason: Error,
    },
}

/// A peer that a client knows.
///
/// ```
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("socket");
/// # let mut server = ivshmem::Server::builder().socket_path(&path).vectors(2).start()?;
/// # std::thread::spawn(move || server.run());
/// # let _other = ivshmem::Client::connect(&path)?;
/// # let client = ivshmem::Client::connect(&path)?;
/// for peer in client.peers() {
///     println!("peer {} has {} vectors", peer.id(), peer.vectors());
/// }
/// let peer = client.peer(0).expect("it joined before");
/// assert_eq!((peer.id(), peer.vectors()), (0, 2));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    pub(super) id: u16,
    pub(super) vectors: u32,
}

impl Peer {
    /// Its id, as the guests know it.
    pub fn id(self) -> u16 {
        self.id
    }

    /// How many vectors it has, as far as the server has told.
    pub fn vectors(self) -> u32 {
        self.vectors
    }
}
