// SPDX-License-Identifier: GPL-2.0-or-later
//! A client: a process of the host that is a peer of the guests. It shares the memory, interrupts
//! guests and other clients, and is interrupted by them.
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
//! // Each client is told of the peers that join after it.
//! let events = one.wait(Some(Duration::from_secs(10)))?;
//! assert!(matches!(events[..], [Event::Joined { peer: 1, vectors: 2 }]));
//!
//! // Both have the same memory. An interrupt on vector 1 says that there is something in it.
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
//! A [`Client`] is one pollable descriptor ([`AsFd`]). It is readable when
//! [`dispatch`](Client::dispatch) has something to report. A program without an event loop calls
//! [`wait`](Client::wait). To react to one vector as fast as possible, take it out as a [`Vector`].
//! A client starts no thread and handles no signal.
//!
//! # When the greeting is complete
//! [`Client::connect`] returns when the client has the memory and its own vectors. The protocol
//! does not say how many vectors there are. The caller can say it, with [`Builder::vectors`].
//! Otherwise the vectors are complete when
//!
//! - there are as many as another peer has, or
//! - the server goes on to tell of another peer, or
//! - nothing more comes for a short [quiet time](Builder::quiet_time).
//!
//! A vector that comes later is added, and reported as [`Event::Vector`].
//!
//! # What a faulty or hostile server can do
//! - A server that is too slow gives [`Error::Timeout`].
//! - A server that breaks the protocol gives another [`Error`], one for each rule. The connection
//!   is closed, and so are all descriptors that came with it.
//! - After the greeting both are reported once, as [`Event::Disconnected`]. So is the ordinary end
//!   of a server. A client without a server still has the memory, can interrupt the peers that it
//!   knew, and is interrupted by them.
//! - A descriptor that the client does not use cannot make it block when it is closed, such as a
//!   TCP socket with `SO_LINGER`. Files of FUSE and of network file systems, and some devices, are
//!   an exception.

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
mod event;
mod memory;
mod peers;
mod untrusted;
mod vector;

pub use builder::Builder;
use connection::Connection;
pub use error::{Error, ErrorKind};
pub use event::{Event, Peer};
pub use memory::Memory;
use peers::{Change, PeerTable};
pub use vector::{Doorbell, Vector};

/// The epoll token of the server's socket. The token of a vector is its number.
const SERVER: u64 = u64::MAX;

/// How many messages one dispatch takes at most. So a server that sends without end does not keep
/// the caller.
const TURN: usize = 1024;

/// How many ready descriptors one call takes from epoll at most.
const READY: usize = 64;

/// A peer of guests and of other clients. When it is dropped, it leaves.
///
/// The [module](self) explains how to use it.
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
    /// A connection that ended with a message whose descriptors did not fit. To close it could
    /// sleep, until this client has closed its other descriptors.
    unread: Option<Connection>,
    id: u16,
    memory: Memory,
    table: PeerTable,
    /// The peer that the server told of last. It may get more vectors.
    in_progress: Option<u16>,
    /// Watches the server and the vectors. A [`Vector`] is taken out, and put back when dropped.
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

    /// Takes a stream socket that is connected to a server, and of which nothing has been read.
    ///
    /// ```
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("socket");
    /// # let mut server = ivshmem::Server::builder().socket_path(&path).start()?;
    /// # std::thread::spawn(move || server.run());
    /// let socket = std::os::unix::net::UnixStream::connect(&path)?;
    /// let client = ivshmem::Client::adopt(socket)?;
    /// assert_eq!(client.id(), 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// As [`Builder::adopt`].
    pub fn adopt(socket: impl Into<OwnedFd>) -> Result<Self, Error> {
        Self::builder().adopt(socket)
    }

    /// Returns a builder, to connect with other settings than the defaults.
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
        let unread = None;
        let client = Self {
            connection,
            unread,
            id,
            memory,
            table,
            in_progress,
            epoll: Arc::new(epoll),
            ready,
        };
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

    /// This client's own id. Peers interrupt it by this id.
    pub fn id(&self) -> u16 {
        self.id
    }

    /// How many vectors this client has.
    pub fn vectors(&self) -> u32 {
        self.table.own.len() as u32
    }

    /// The shared memory. Clone the handle to use it in another thread, or after the client's end.
    #[inline]
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Whether the client has a server. Without one, it is not told of peers that join or leave.
    pub fn is_connected(&self) -> bool {
        self.connection.is_some()
    }

    /// The connection to the server. None without a server. It is for a log: do not read from it.
    pub fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.connection.as_ref().map(AsFd::as_fd)
    }

    /// The other peers, in the order of their ids.
    pub fn peers(&self) -> impl ExactSizeIterator<Item = Peer> + use<'_> {
        self.table.peers.iter().map(|(&id, entry)| Peer { id, vectors: entry.vectors.len() as u32 })
    }

    /// The other peer with this id.
    pub fn peer(&self, id: u16) -> Option<Peer> {
        let entry = self.table.peers.get(&id)?;
        Some(Peer { id, vectors: entry.vectors.len() as u32 })
    }

    /// Interrupts a peer on one of its vectors. The client's own id interrupts the client itself.
    ///
    /// # Errors
    /// [`Error::UnknownPeer`], [`Error::UnknownVector`], and as [`Doorbell::ring`].
    #[inline]
    pub fn ring(&self, peer: u16, vector: u32) -> Result<(), Error> {
        self.table.vector(peer, vector)?.ring()
    }

    /// Interrupts a peer on all its vectors.
    ///
    /// # Errors
    /// [`Error::UnknownPeer`], and as [`Doorbell::ring`].
    pub fn ring_peer(&self, peer: u16) -> Result<(), Error> {
        self.table.vectors(peer)?.iter().try_for_each(Doorbell::ring)
    }

    /// Interrupts all other peers on all their vectors.
    ///
    /// # Errors
    /// As [`Doorbell::ring`].
    pub fn ring_all(&self) -> Result<(), Error> {
        self.table.peers.values().flat_map(|entry| &entry.vectors).try_for_each(Doorbell::ring)
    }

    /// The doorbell of one vector of a peer, or of this client itself. It can be rung in another
    /// thread, and without a look-up of the peer.
    ///
    /// # Errors
    /// [`Error::UnknownPeer`], [`Error::UnknownVector`].
    pub fn doorbell(&self, peer: u16, vector: u32) -> Result<Doorbell, Error> {
        self.table.vector(peer, vector).cloned()
    }

    /// Takes one of the client's own vectors out of it, to wait for interrupts on this vector
    /// alone. Until the [`Vector`] is dropped, the client does not report these interrupts.
    ///
    /// # Errors
    /// [`Error::UnknownVector`]; [`Error::VectorTaken`] while there is a [`Vector`] for it.
    pub fn vector(&self, vector: u32) -> Result<Vector, Error> {
        let peer = self.id;
        let has = self.vectors();
        let own = self.table.own.get(vector as usize);
        let eventfd = own.ok_or(Error::UnknownVector { peer, vector, has })?;
        Vector::new(eventfd.clone(), vector, Arc::clone(&self.epoll))
    }

    /// Reports what happened since the last call, without waiting.
    ///
    /// In an event loop, it is due when the client's descriptor is readable:
    /// ```
    /// # use std::os::fd::AsFd;
    /// # use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("socket");
    /// # let mut server = ivshmem::Server::builder().socket_path(&path).start()?;
    /// # std::thread::spawn(move || server.run());
    /// # let mut client = ivshmem::Client::connect(&path)?;
    /// client.ring(client.id(), 0)?;
    /// poll(&mut [PollFd::new(client.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE)?;
    /// assert!(client.is_ready());
    /// assert_eq!(client.dispatch()?.len(), 1);
    /// assert!(!client.is_ready());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::System`] when the system does not report events. What the server and the peers do
    /// is never an error.
    pub fn dispatch(&mut self) -> Result<Vec<Event>, Error> {
        let mut events = Vec::new();
        self.take_ready(EpollTimeout::ZERO, &mut events)?;
        Ok(events)
    }

    /// Waits until something happens, for `timeout` at most (rounded up to milliseconds), and
    /// reports it. The result is empty if nothing happened in time, or if a signal handler ran.
    ///
    /// # Errors
    /// As [`dispatch`](Self::dispatch).
    pub fn wait(&mut self, timeout: Option<Duration>) -> Result<Vec<Event>, Error> {
        let start = Instant::now();
        let mut events = Vec::new();
        loop {
            let left = timeout.map(|timeout| timeout.saturating_sub(start.elapsed()));
            let woken = self.take_ready(sys::milliseconds(left), &mut events)?;
            // A part of a message, or of a peer, is no event yet.
            if !events.is_empty() || !woken || left.is_some_and(|left| left.is_zero()) {
                return Ok(events);
            }
        }
    }

    /// Whether [`dispatch`](Self::dispatch) has something to do now.
    ///
    /// A loop that reports changes only (edge-triggered, such as mio) dispatches until this is
    /// false, and serves its other descriptors in between. A `dispatch` that reports nothing may
    /// still leave something to do.
    pub fn is_ready(&self) -> bool {
        let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Takes what is ready. Returns false if nothing is.
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
                        // Without /proc, an epoll instance or a timer is taken for an eventfd.
                        Some(Err(_)) => bad_vector = Some(vector),
                    }
                }
            }
        }
        let outcome = match bad_vector {
            Some(vector) => {
                // Otherwise it would stay ready.
                let _ = self.epoll.delete(&self.table.own[vector as usize]);
                Err(Error::NotAnEventfd { peer: self.id, vector })
            }
            None if server => self.read_messages(events),
            None => Ok(()),
        };
        if let Err(reason) = outcome {
            if self.connection.is_some() {
                self.close_connection(matches!(reason, Error::Truncated));
                events.push(Event::Disconnected { reason });
            }
        }
        Ok(count > 0)
    }

    /// Reads what the server sent.
    fn read_messages(&mut self, events: &mut Vec<Event>) -> Result<(), Error> {
        for _ in 0..TURN {
            let Some(connection) = &mut self.connection else { return Ok(()) };
            let Some(message) = connection.next()? else { return Ok(()) };
            let change = self.table.apply(message)?;
            // A departure may come between two vectors of a peer, and does not complete the peer.
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
                    // A client without vectors cannot know how many vectors a peer will have.
                    let own = self.table.own.len();
                    self.announce(peer, if own == 0 { usize::MAX } else { own }, events);
                }
                Change::Left(_, false) | Change::Greeting => {}
            }
        }
        Ok(())
    }

    /// Reports a peer, once, when it has at least `whole` vectors.
    fn announce(&mut self, peer: u16, whole: usize, events: &mut Vec<Event>) {
        let Some(entry) = self.table.peers.get_mut(&peer) else { return };
        if !entry.announced && entry.vectors.len() >= whole {
            entry.announced = true;
            events.push(Event::Joined { peer, vectors: entry.vectors.len() as u32 });
        }
    }

    /// Ends the connection. A forked child may have a copy of its descriptor, so the epoll instance
    /// would not forget it by itself.
    fn close_connection(&mut self, keep_unread: bool) {
        if let Some(connection) = self.connection.take() {
            let _ = self.epoll.delete(&connection);
            if keep_unread {
                connection.shut_down();
                self.unread = Some(connection);
            }
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
        // The descriptors of the peers go first, so that those in unread messages fit.
        self.table = PeerTable::default();
        self.close_connection(false);
    }
}
