// SPDX-License-Identifier: GPL-2.0-or-later
//! The other end of the wire: a process of the host that is a peer, shares the memory, rings
//! guests and other clients, and is rung by them.
//!
//! ```
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path().join("socket");
//! # let mut server = ivshmem::Server::builder().socket_path(&path).vectors(2).start()?;
//! # let stopper = server.stopper()?;
//! # let serving = std::thread::spawn(move || server.run());
//! use std::time::Duration;
//! use ivshmem::client::{Client, Event};
//!
//! let mut one = Client::connect(&path)?;
//! let two = Client::connect(&path)?;
//! assert_eq!((one.id(), two.id()), (0, 1));
//!
//! // Each learns of who comes after it.
//! let events = one.wait(Some(Duration::from_secs(10)))?;
//! assert!(matches!(events[..], [Event::Joined { peer: 1, vectors: 2 }]));
//!
//! // The memory is the same one, and vector 1 says that there is something in it.
//! two.memory().write(0, b"hello")?;
//! two.ring(0, 1)?;
//! let events = one.wait(Some(Duration::from_secs(10)))?;
//! assert!(matches!(events[..], [Event::Rung { vector: 1, count: 1 }]));
//! let mut bytes = [0; 5];
//! one.memory().read(0, &mut bytes)?;
//! assert_eq!(&bytes, b"hello");
//! # stopper.stop();
//! # serving.join().unwrap()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # One descriptor
//! A [`Client`] is one pollable descriptor ([`AsFd`]): readable when
//! [`dispatch`](Client::dispatch) has something to tell. A program without a loop of its own
//! calls [`wait`](Client::wait), or, to be quick about a single vector, has a [`Vector`]. It
//! starts no thread, and handles no signal.
//!
//! # When the greeting is complete
//! [`Client::connect`] returns when the memory and the client's own vectors are there. The
//! protocol does not say how many vectors those are. The caller can, by
//! [`Builder::vectors`]; otherwise they are complete when there are as many as another peer
//! has, or when the server goes on to tell of another peer, or when nothing more comes for
//! a short [quiet time](Builder::quiet_time). A vector that comes later all the same is
//! added, and is [`Event::Vector`].
//!
//! # What a bad server can do
//! It can be slow, and that ends with [`Error::Timeout`]; it can say what is wrong, and each
//! kind of that is another [`Error`], after which the connection is closed and no descriptor
//! is left over. After the greeting it is [`Event::Disconnected`], once, and so is the
//! server's ordinary end. A client without a server still has the memory, still rings those
//! it knew, and is rung by them.

#![forbid(unsafe_code)]

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::sys;

mod builder;
mod connection;
mod error;
mod memory;
mod peers;
mod untrusted;
mod vector;

pub use builder::Builder;
use connection::Connection;
pub use error::{Error, ErrorKind};
pub use memory::Memory;
use peers::{Change, PeerTable};
pub use vector::{Doorbell, Vector};

/// The epoll token of the server's socket; those of vectors are their numbers.
const SERVER: u64 = u64::MAX;

/// Messages that one look at the socket takes: a server that never stops talking does not
/// keep the caller for ever.
const TURN: usize = 1024;

/// Vectors that one call takes from epoll.
const READY: usize = 64;

/// What happened to a client.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// A peer is here now and can be rung. It has as many vectors as this client, or the server
    /// has gone on to tell of another peer.
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
    /// A vector of this client was rung.
    Rung {
        /// Which one.
        vector: u32,
        /// How often since it was last told of. Guests may ring more often than that: several
        /// at once can come as one.
        count: u64,
    },
    /// This client has one more vector than was thought when it connected.
    Vector {
        /// Its number.
        vector: u32,
    },
    /// The server ended, or said something that is wrong and was cut off. It comes once, and
    /// no more of `Joined`, `Left` and `Vector` come after it.
    Disconnected {
        /// [`Error::Closed`], or what was wrong.
        reason: Error,
    },
}

/// A peer of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    id: u16,
    vectors: u32,
}

impl Peer {
    /// Its id, as the guests know it.
    pub fn id(self) -> u16 {
        self.id
    }

    /// The vectors that it has, or that the server has told of so far.
    pub fn vectors(self) -> u32 {
        self.vectors
    }
}

/// A peer of guests and of other clients. Dropping it is leaving.
///
/// See the [module](self) for how to use it.
///
/// ```
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("socket");
/// # let mut server = ivshmem::Server::builder().socket_path(&path).vectors(2).start()?;
/// # let stopper = server.stopper()?;
/// # let serving = std::thread::spawn(move || server.run());
/// use ivshmem::Client;
///
/// let client = Client::connect(&path)?;
/// for peer in client.peers() {
///     client.ring_peer(peer.id())?;
/// }
/// client.memory().store_u32(0, 1)?;
/// # stopper.stop();
/// # serving.join().unwrap()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Client {
    /// None once disconnected.
    connection: Option<Connection>,
    id: u16,
    memory: Memory,
    table: PeerTable,
    /// The peer that the server told of last.
    in_progress: Option<u16>,
    /// Watches the server and the vectors; a vector that is taken goes back to it.
    epoll: Arc<Epoll>,
    ready: Vec<EpollEvent>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("id", &self.id)
            .field("connected", &self.is_connected())
            .field("vectors", &self.vectors())
            .field("peers", &self.table.peers.len())
            .finish_non_exhaustive()
    }
}

impl Client {
    /// Connects to the server at this path, within 10 seconds.
    ///
    /// # Errors
    /// As [`Builder::connect`].
    pub fn connect(path: impl AsRef<Path>) -> Result<Self, Error> {
        Self::builder().connect(path)
    }

    /// Takes a stream socket that is connected to a server, of which nothing has been read.
    ///
    /// # Errors
    /// As [`Builder::adopt`].
    pub fn adopt(socket: impl Into<OwnedFd>) -> Result<Self, Error> {
        Self::builder().adopt(socket)
    }

    /// Sets out to connect in another way than the usual one.
    pub fn builder() -> Builder {
        Builder::default()
    }

    fn new(connection: Connection, mut table: PeerTable) -> Result<Self, Error> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(|errno| Error::System {
            action: "make an epoll instance",
            source: errno.into(),
        })?;
        let id = table.id.expect("a greeting is complete only with an id");
        let memory = table.memory.take().expect("and with the memory");
        let ready = vec![EpollEvent::empty(); READY];
        let connection = Some(connection);
        let in_progress = table.peers.iter().find(|(_, entry)| !entry.announced).map(|(&id, _)| id);
        let client =
            Self { connection, id, memory, table, in_progress, epoll: Arc::new(epoll), ready };
        if let Some(connection) = &client.connection {
            client.watch(connection.as_fd(), SERVER)?;
        }
        for (eventfd, token) in client.table.own.iter().zip(0..) {
            client.watch(eventfd.as_fd(), token)?;
        }
        Ok(client)
    }

    fn watch(&self, fd: BorrowedFd<'_>, token: u64) -> Result<(), Error> {
        self.epoll
            .add(fd, EpollEvent::new(EpollFlags::EPOLLIN, token))
            .map_err(|errno| Error::System { action: "watch a descriptor", source: errno.into() })
    }

    /// This client's own id: where others ring it.
    pub fn id(&self) -> u16 {
        self.id
    }

    /// How many vectors this client has.
    pub fn vectors(&self) -> u32 {
        self.table.own.len() as u32
    }

    /// The shared memory. Clone the handle to use it in another thread, or longer than the client.
    #[inline]
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Whether there is still a server to tell of peers that come and go.
    pub fn is_connected(&self) -> bool {
        self.connection.is_some()
    }

    /// The connection to the server, while there is one: for a log, not to read from.
    pub fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.connection.as_ref().map(AsFd::as_fd)
    }

    /// The others, in the order of their ids.
    pub fn peers(&self) -> impl ExactSizeIterator<Item = Peer> + use<'_> {
        self.table.peers.iter().map(|(&id, entry)| Peer { id, vectors: entry.vectors.len() as u32 })
    }

    /// The other of this id.
    pub fn peer(&self, id: u16) -> Option<Peer> {
        let entry = self.table.peers.get(&id)?;
        Some(Peer { id, vectors: entry.vectors.len() as u32 })
    }

    /// Interrupts a peer, or this client itself if it is its own id. It is one `write(2)`.
    ///
    /// # Errors
    /// [`Error::UnknownPeer`], [`Error::UnknownVector`].
    #[inline]
    pub fn ring(&self, peer: u16, vector: u32) -> Result<(), Error> {
        self.table.vector(peer, vector)?.ring()
    }

    /// Interrupts a peer on all its vectors.
    ///
    /// # Errors
    /// [`Error::UnknownPeer`].
    pub fn ring_peer(&self, peer: u16) -> Result<(), Error> {
        self.table.vectors(peer)?.iter().try_for_each(Doorbell::ring)
    }

    /// Interrupts all others on all their vectors.
    ///
    /// # Errors
    /// As [`Doorbell::ring`].
    pub fn ring_all(&self) -> Result<(), Error> {
        self.table.peers.values().flat_map(|entry| &entry.vectors).try_for_each(Doorbell::ring)
    }

    /// A peer's doorbell, or this client's own, to be rung from another thread, or without
    /// looking the peer up.
    ///
    /// # Errors
    /// As [`ring`](Self::ring).
    pub fn doorbell(&self, peer: u16, vector: u32) -> Result<Doorbell, Error> {
        self.table.vector(peer, vector).cloned()
    }

    /// Takes one of the client's own vectors out of it, to wait on it by itself. Until that is
    /// dropped, this client does not tell of its being rung.
    ///
    /// # Errors
    /// [`Error::UnknownVector`]; [`Error::VectorTaken`] while there is one.
    pub fn vector(&self, vector: u32) -> Result<Vector, Error> {
        let peer = self.id;
        let has = self.vectors();
        let own = self.table.own.get(vector as usize);
        let eventfd = own.ok_or(Error::UnknownVector { peer, vector, has })?;
        Vector::new(eventfd.clone(), vector, Arc::clone(&self.epoll))
    }

    /// Says what happened since the last time, without waiting.
    ///
    /// # Errors
    /// [`Error::System`] when the system does not tell of events. What the server and the
    /// peers do is never an error.
    pub fn dispatch(&mut self) -> Result<Vec<Event>, Error> {
        let mut events = Vec::new();
        self.take_ready(EpollTimeout::ZERO, &mut events)?;
        Ok(events)
    }

    /// Waits until something happens, for `timeout` at most (rounded up to milliseconds), and
    /// says what. There is nothing in it when the time is up; a signal that is caught ends the
    /// waiting too.
    ///
    /// # Errors
    /// As [`dispatch`](Self::dispatch).
    pub fn wait(&mut self, timeout: Option<Duration>) -> Result<Vec<Event>, Error> {
        let start = Instant::now();
        let mut events = Vec::new();
        loop {
            let left = timeout.map(|timeout| timeout.saturating_sub(start.elapsed()));
            let woken = self.take_ready(sys::milliseconds(left), &mut events)?;
            // Part of a message, or of a peer, is nothing to tell of yet.
            if !events.is_empty() || !woken || left.is_some_and(|left| left.is_zero()) {
                return Ok(events);
            }
        }
    }

    /// Whether [`dispatch`](Self::dispatch) has something to tell, or to take in, now.
    ///
    /// A loop that tells of a change only (edge-triggered: tokio, mio) dispatches until this
    /// is false. That nothing happened in a `dispatch` does not mean that nothing is left.
    pub fn is_ready(&self) -> bool {
        let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Takes what is ready; false if nothing is.
    fn take_ready(&mut self, time: EpollTimeout, events: &mut Vec<Event>) -> Result<bool, Error> {
        let count = match self.epoll.wait(&mut self.ready, time) {
            Err(Errno::EINTR) => 0,
            result => result.map_err(|errno| Error::System {
                action: "wait for events",
                source: errno.into(),
            })?,
        };
        let mut server = false;
        let mut bad_vector = None;
        for index in 0..count {
            match self.ready[index].data() {
                SERVER => server = true,
                number => {
                    let vector = number as u32;
                    match self.table.own.get(number as usize).map(vector::take) {
                        None | Some(Ok(0)) => {}
                        Some(Ok(count)) => events.push(Event::Rung { vector, count }),
                        // An epoll or a timer looks like an eventfd until it is read.
                        Some(Err(_)) => bad_vector = Some(vector),
                    }
                }
            }
        }
        let outcome = match bad_vector {
            Some(vector) => {
                // It would stay ready for ever.
                let _ = self.epoll.delete(&self.table.own[vector as usize]);
                Err(Error::NotAnEventfd { peer: self.id, vector })
            }
            None if server => self.read_messages(events),
            None => Ok(()),
        };
        if let Err(reason) = outcome {
            if self.connection.is_some() {
                self.close_connection();
                events.push(Event::Disconnected { reason });
            }
        }
        Ok(count > 0)
    }

    /// Takes note of what the server says.
    fn read_messages(&mut self, events: &mut Vec<Event>) -> Result<(), Error> {
        for _ in 0..TURN {
            let Some(connection) = &mut self.connection else { return Ok(()) };
            let Some(message) = connection.next()? else { return Ok(()) };
            let change = self.table.apply(message)?;
            // That somebody left may be told between two vectors of a peer.
            let now = match change {
                Change::Peer(peer) => Some(peer),
                Change::Own => Some(self.id),
                Change::Left(..) | Change::Greeting => None,
            };
            if let Some(now) = now {
                match self.in_progress.replace(now) {
                    Some(before) if before != now => self.announce(before, 0, events),
                    _ => {}
                }
            }
            match change {
                Change::Own => {
                    let vector = self.vectors() - 1;
                    let eventfd = &self.table.own[vector as usize];
                    self.watch(eventfd.as_fd(), u64::from(vector))?;
                    events.push(Event::Vector { vector });
                }
                Change::Left(peer, true) => events.push(Event::Left { peer }),
                Change::Peer(peer) => {
                    // Without any of its own, it cannot know how many make a peer whole.
                    let own = self.table.own.len();
                    self.announce(peer, if own == 0 { usize::MAX } else { own }, events);
                }
                Change::Left(_, false) | Change::Greeting => {}
            }
        }
        Ok(())
    }

    /// Tells of a peer that has as many vectors as it will have, once.
    fn announce(&mut self, peer: u16, whole: usize, events: &mut Vec<Event>) {
        let Some(entry) = self.table.peers.get_mut(&peer) else { return };
        if !entry.announced && entry.vectors.len() >= whole {
            entry.announced = true;
            events.push(Event::Joined { peer, vectors: entry.vectors.len() as u32 });
        }
    }

    /// Ends the connection. A forked child may have a copy of its descriptor, so the epoll instance
    /// would not forget it by itself.
    fn close_connection(&mut self) {
        if let Some(connection) = self.connection.take() {
            let _ = self.epoll.delete(&connection);
        }
    }
}

impl AsFd for Client {
    /// Readable when [`dispatch`](Client::dispatch) has something to do.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}

impl AsRawFd for Client {
    /// The descriptor of [`as_fd`](AsFd::as_fd), for a loop that takes numbers.
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.close_connection();
    }
}
