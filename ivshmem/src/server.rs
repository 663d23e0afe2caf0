// SPDX-License-Identifier: GPL-2.0-or-later
//! The one that joins roster, wire, memory and listener: an epoll instance, `dispatch`, `run`.
//!
//! # Theory of operation
//! Everything that can happen (a connection, a client's end, room in a full socket, a retry,
//! the wish to stop) is a descriptor in one epoll instance, which is itself pollable: it is
//! readable whenever there is something to do. One `dispatch` takes what is ready:
//!
//! 1. clients that ended, or said anything, leave the roster;
//! 2. whoever waits at the door is let in, all at once;
//! 3. each client is told, in join order, whatever its cursor leaves to be told.
//!
//! Step 3 is the only place where a client is ever sent anything. A client whose socket is
//! full is left alone until epoll says that there is room. Two conditions have no event that
//! ends them (too many descriptors in flight, no memory); they wait for a timer.
//!
//! In step 3 the members go in join order, so the peers already here know a newcomer before
//! the newcomer knows how to ring them.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{Shutdown, getsockopt, shutdown, sockopt};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use crate::Error;
use crate::listener::Listener;
use crate::memory::Memory;
use crate::server::roster::{Key, Roster};
use crate::server::wire::{Rest, Sender};
use crate::sys;

mod builder;
mod dispatch;
mod flight;
mod limit;
mod roster;
mod wire;

pub use builder::Builder;
use flight::{Flight, Share};
#[doc(hidden)]
pub use limit::LogLimit;

/// Epoll tokens that are not a member's key.
const LISTENER: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;
const STOP: u64 = u64::MAX - 2;

/// What happened in a `dispatch`.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// A client was let in.
    Joined {
        /// Its id.
        id: u16,
        /// The number of its socket, for a log; it may be closed by now.
        socket: RawFd,
    },
    /// A client left: it hung up, it sent something (which the protocol forbids), or it was
    /// disconnected.
    Left {
        /// Its id.
        id: u16,
    },
    /// A client was turned away, by closing its connection.
    Refused(Refusal),
}

/// Why a client was turned away.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// All ids are in use, or are remembered by a client that is connected.
    #[error(
        "no id is left: each is in use, or was told to a client that is still connected; end \
         the oldest clients"
    )]
    NoIds,
    /// No descriptors are left for its socket and its vectors.
    #[error("no descriptors are left: {0}; raise the limit of open files (RLIMIT_NOFILE)")]
    NoDescriptors(io::Error),
    /// It had hung up, or sent something, before it was let in.
    #[error("it hung up, or sent something, before it was let in")]
    Ended,
    /// The system could not take one more client.
    #[error("{0}")]
    System(io::Error),
}

impl From<Errno> for Refusal {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::EMFILE | Errno::ENFILE => Self::NoDescriptors(errno.into()),
            _ => Self::System(errno.into()),
        }
    }
}

/// What keeps a client from being told more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wait {
    /// Nothing.
    None,
    /// Its socket is full; epoll tells when there is room.
    Room,
    /// The timer.
    Timer,
}

/// A client's end of things: what a roster's member brings along.
#[derive(Debug)]
struct Client {
    socket: UnixStream,
    /// Its own eventfds.
    vectors: Box<[OwnedFd]>,
    share: Share,
    wait: Wait,
    /// Whether epoll is to tell of room.
    watches_room: bool,
    /// Messages to offer its socket at once, if that many can go: twice what it took until it
    /// was full. To prepare many for one that takes few costs more than to send these few.
    offer: usize,
    rest: Option<Rest>,
}

/// A running server.
///
/// It is one pollable descriptor: when that is readable, [`dispatch`](Self::dispatch) does
/// what there is to do, and never waits. A program without a loop of its own calls
/// [`run`](Self::run).
///
/// Dropping it disconnects every client, and removes the socket's path and the POSIX name of
/// the shared memory.
///
/// ```
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("socket");
/// use std::time::Duration;
/// use ivshmem::{Event, Server};
///
/// let mut server = Server::builder().socket_path(&path).vectors(2).start()?;
/// # let socket = std::os::unix::net::UnixStream::connect(&path)?;
/// for event in server.wait(Some(Duration::from_secs(1)))? {
///     if let Event::Joined { id, .. } = event {
///         println!("{:?} is {id}", server.peer(id).expect("just now").credentials()?);
///     }
/// }
/// assert_eq!(server.peers().count(), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Server {
    epoll: Epoll,
    timer: TimerFd,
    armed: bool,
    /// Given up for a moment to accept, and so be able to close, a client that no descriptor
    /// is left for: otherwise it stays at the door and the loop spins.
    spare: Option<OwnedFd>,
    /// Whether connections wake us.
    listening: bool,
    listener: Listener,
    memory: Memory,
    roster: Roster<Client>,
    sender: Sender,
    flight: Flight,
    /// Reused by every `dispatch`.
    ready: Vec<EpollEvent>,
    stop: Option<Arc<EventFd>>,
    /// Something that is not our business ended the last waiting.
    woken: bool,
    refusals: LogLimit,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server")
            .field("listener", &self.listener)
            .field("memory", &self.memory)
            .field("peers", &self.roster.len())
            .finish_non_exhaustive()
    }
}

/// Stops a [`Server::run`] from another thread.
///
/// ```
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("socket");
/// # let mut server = ivshmem::Server::builder().socket_path(&path).start()?;
/// let stopper = server.stopper()?;
/// let serving = std::thread::spawn(move || server.run());
/// stopper.stop();
/// serving.join().expect("no panic")?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Stopper(Arc<EventFd>);

impl Stopper {
    /// Makes `run` return: the one that runs now, or else the next.
    pub fn stop(&self) {
        // It fails only when 2^64 - 2 stops wait to be noticed.
        let _ = self.0.write(1);
    }
}

/// A client of the server.
///
/// ```
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("socket");
/// # let mut server = ivshmem::Server::builder().socket_path(&path).start()?;
/// # let socket = std::os::unix::net::UnixStream::connect(&path)?;
/// # server.wait(None)?;
/// // Whoever is far behind does not read, and holds up nobody but itself.
/// let stuck: Vec<u16> =
///     server.peers().filter(|peer| peer.behind() > 10_000).map(|peer| peer.id()).collect();
/// for id in stuck {
///     server.disconnect(id);
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Peer<'a> {
    id: u16,
    client: &'a Client,
    behind: u64,
}

/// The process at the other end of a connection, as it was when it connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// Process id.
    pub pid: i32,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

impl<'a> Peer<'a> {
    /// Its id, as the guests know it.
    pub fn id(&self) -> u16 {
        self.id
    }

    /// Its eventfds, one a vector: writing to one interrupts it.
    pub fn vectors(&self) -> impl ExactSizeIterator<Item = BorrowedFd<'a>> + use<'a> {
        self.client.vectors.iter().map(AsFd::as_fd)
    }

    /// Its connection.
    pub fn socket(&self) -> BorrowedFd<'a> {
        self.client.socket.as_fd()
    }

    /// Messages that it is still to be told. More than 0 for long means that it does not read.
    pub fn behind(&self) -> u64 {
        self.behind
    }

    /// The process at the other end (`SO_PEERCRED` of `unix(7)`).
    ///
    /// # Errors
    /// As `getsockopt(2)`.
    pub fn credentials(&self) -> io::Result<Credentials> {
        let credentials = getsockopt(&self.client.socket, sockopt::PeerCredentials)?;
        Ok(Credentials { pid: credentials.pid(), uid: credentials.uid(), gid: credentials.gid() })
    }
}

impl Server {
    /// Sets out to start a server.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// The clients, in join order.
    pub fn peers(&self) -> impl DoubleEndedIterator<Item = Peer<'_>> + ExactSizeIterator {
        self.roster.iter().enumerate().map(|(index, (id, client))| Peer {
            id,
            client,
            behind: self.roster.behind(index),
        })
    }

    /// The client with this id.
    pub fn peer(&self, id: u16) -> Option<Peer<'_>> {
        let index = self.roster.iter().position(|(other, _)| other == id)?;
        let client = self.roster.payload(index);
        Some(Peer { id, client, behind: self.roster.behind(index) })
    }

    /// Ends a client's connection; whether there is one of this id.
    ///
    /// It leaves in the next [`dispatch`](Self::dispatch), which this makes due.
    pub fn disconnect(&mut self, id: u16) -> bool {
        let peer = self.peer(id);
        peer.is_some_and(|peer| {
            use std::os::fd::AsRawFd;
            shutdown(peer.socket().as_raw_fd(), Shutdown::Both).is_ok()
        })
    }

    /// Vectors of each peer.
    pub fn vectors(&self) -> u32 {
        self.roster.vectors()
    }

    /// The id that the next client will get. None when no id is left.
    pub fn next_id(&mut self) -> Option<u16> {
        self.roster.next_id()
    }

    /// The size of the shared memory, in bytes.
    pub fn memory_size(&self) -> u64 {
        self.memory.size()
    }

    /// The shared memory.
    pub fn memory(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }

    /// The listening socket.
    pub fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Whether connections are looked for at all. Not for a moment when no descriptor is left,
    /// while the listening socket stays readable.
    pub fn is_listening(&self) -> bool {
        self.listening
    }

    /// The path of the socket; none where the caller gave a socket.
    pub fn socket_path(&self) -> Option<&Path> {
        self.listener.path()
    }

    /// A way to stop [`run`](Self::run) from another thread.
    ///
    /// # Errors
    /// [`Error::System`] when no descriptor is left for it.
    pub fn stopper(&mut self) -> Result<Stopper, Error> {
        if self.stop.is_none() {
            let failed = |errno: Errno| Error::System {
                action: "make an eventfd to stop by",
                source: errno.into(),
            };
            let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
                .map_err(failed)?;
            self.epoll.add(&stop, EpollEvent::new(EpollFlags::EPOLLIN, STOP)).map_err(failed)?;
            self.stop = Some(Arc::new(stop));
        }
        let stop = self.stop.as_ref().expect("it was just made");
        Ok(Stopper(Arc::clone(stop)))
    }

    /// Has `fd`, when it is readable, end [`wait`](Self::wait) and [`run`](Self::run) too: for
    /// a program whose loop is one of these, and that has one more thing to wait for.
    ///
    /// It stays so for as long as `fd` and its copies are open.
    ///
    /// # Errors
    /// [`Error::System`] when `fd` cannot be waited for, as a regular file.
    pub fn wake_on(&mut self, fd: impl AsFd) -> Result<(), Error> {
        self.epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, STOP)).map_err(|errno| {
            Error::System { action: "wait for a descriptor too", source: errno.into() }
        })
    }

    /// Whether a [`Stopper`], or what [`wake_on`](Self::wake_on) names, was among the reasons
    /// why the last [`wait`](Self::wait) or [`dispatch`](Self::dispatch) returned.
    pub fn woken(&self) -> bool {
        self.woken
    }

    /// Serves until a [`Stopper`], or what [`wake_on`](Self::wake_on) names, says otherwise.
    ///
    /// # Errors
    /// [`Error::System`] when the system no longer lets the server wait for events. What a
    /// client does is never an error.
    pub fn run(&mut self) -> Result<(), Error> {
        loop {
            self.wait(None)?;
            if self.woken {
                if let Some(stop) = &self.stop {
                    let _ = stop.read();
                }
                return Ok(());
            }
        }
    }

    /// Does what there is to do, without waiting, and returns what happened, in order.
    ///
    /// # Errors
    /// [`Error::System`] when the system does not tell of events. What a client does is never
    /// an error.
    pub fn dispatch(&mut self) -> Result<Vec<Event>, Error> {
        self.wait(Some(Duration::ZERO))
    }

    /// Waits until there is something to do, for `timeout` at most (rounded up to
    /// milliseconds), and does it. A signal, and a [`Stopper`], end the waiting too.
    ///
    /// # Errors
    /// As [`dispatch`](Self::dispatch).
    pub fn wait(&mut self, timeout: Option<Duration>) -> Result<Vec<Event>, Error> {
        let timeout = sys::milliseconds(timeout);
        let mut ready = std::mem::take(&mut self.ready);
        self.woken = false;
        let count = match self.epoll.wait(&mut ready, timeout) {
            Err(Errno::EINTR) => Ok(0),
            result => result
                .map_err(|errno| Error::System { action: "wait for events", source: errno.into() }),
        };
        let events = count.map(|count| self.handle(&ready[..count]));
        self.ready = ready;
        events
    }
}

impl Server {
    /// Whether [`dispatch`](Self::dispatch) has something to do now.
    ///
    /// A loop that tells of a change only (edge-triggered: tokio, mio) dispatches until this
    /// is false. That nothing happened in a `dispatch` does not mean that nothing is left. A
    /// [`Stopper`] and [`wake_on`](Self::wake_on) are not for such a loop: what they make
    /// ready stays so.
    pub fn is_ready(&self) -> bool {
        let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }
}

impl AsFd for Server {
    /// Readable when [`dispatch`](Self::dispatch) has something to do.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for (_, client) in self.roster.iter() {
            hang_up(client);
        }
    }
}

/// Ends a connection even where a forked child still has a copy of its descriptor.
fn hang_up(client: &Client) {
    let _ = client.socket.shutdown(std::net::Shutdown::Both);
}

/// An eventfd as the protocol wants it.
fn new_vector() -> nix::Result<OwnedFd> {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map(OwnedFd::from)
}

/// A timer that is not running.
fn new_timer() -> nix::Result<TimerFd> {
    TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK)
}

impl Server {
    /// Has the timer wake us once, a little later; whether it will.
    fn arm(&mut self) -> bool {
        const RETRY: Duration = Duration::from_millis(10);
        if !self.armed {
            let once = Expiration::OneShot(TimeSpec::from_duration(RETRY));
            match self.timer.set(once, TimerSetTimeFlags::empty()) {
                Ok(()) => self.armed = true,
                Err(errno) => {
                    self.refusals.warn(format_args!("cannot set the retry timer: {errno}"));
                }
            }
        }
        self.armed
    }

    fn member(&self, key: Key) -> Option<usize> {
        self.roster.index(key)
    }
}
