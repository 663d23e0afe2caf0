// SPDX-License-Identifier: GPL-2.0-or-later
//! The server: `dispatch` joins admission, broadcast, the roster and the reactor.
//!
//! # Theory of operation
//! Everything that can happen (a connection, a client's end, a full socket that is writable
//! again, a retry, a wish to stop) is a descriptor in one epoll instance, the `reactor`. That is
//! itself a pollable descriptor: it is readable while there is something to do. One `dispatch`
//! takes what is ready:
//!
//! 1. Clients that ended, or sent anything, are removed from the `roster`.
//! 2. Connections that wait are admitted (`admission`), and sent their greeting at once: a QEMU
//!    is blocked until it has it.
//! 3. Each client is sent, in join order, what its cursor leaves to be told (`broadcast`).
//!
//! A dispatch has a budget of some thousand messages, so that no crowd keeps a signal or the
//! caller's loop waiting. The descriptor stays readable while work is left.

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use crate::memory::Memory;
use crate::sys;
use crate::{Error, Keeper};

mod accounts;
mod admission;
mod applicant;
mod broadcast;
mod builder;
mod closing;
mod connection;
mod core;
mod event;
mod in_flight;
mod keeping;
mod limits;
mod peer;
mod rate_limit;
mod reactor;
mod resume;
mod roster;
mod send;
mod state;
mod waiting;

use admission::Admission;
pub use applicant::{Applicant, Credentials};
use broadcast::Broadcast;
pub use builder::Builder;
use core::{Core, Turn};
pub use event::{Event, LeaveReason, Refusal, Stats};
pub use peer::Peer;
use reactor::Source;

/// A running server.
///
/// It is one pollable descriptor: when that is readable, [`dispatch`](Self::dispatch) does
/// what there is to do, and never waits. A program without a loop of its own calls
/// [`run`](Self::run).
///
/// Dropping it disconnects every client, and removes the socket's path and the POSIX name of
/// the shared memory. With a keeper, a drop by a panic does neither: the next server goes on.
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
    core: Core,
    admission: Admission,
    broadcast: Broadcast,
    memory: Memory,
    hands_over: bool,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server")
            .field("listener", self.admission.listener())
            .field("memory", &self.memory)
            .field("peers", &self.core.clients.len())
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

impl Server {
    /// Returns a builder, with the defaults of a server.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// The clients, in join order.
    pub fn peers(&self) -> impl DoubleEndedIterator<Item = Peer<'_>> + ExactSizeIterator {
        (0..self.core.clients.len()).map(|index| Peer::new(&self.core.clients, index))
    }

    /// The client with this id. The time does not depend on the number of clients.
    pub fn peer(&self, id: u16) -> Option<Peer<'_>> {
        let index = self.core.clients.index_of_id(id)?;
        Some(Peer::new(&self.core.clients, index))
    }

    /// Ends a client's connection. Returns whether there is a client with this id.
    ///
    /// It leaves in the next [`dispatch`](Self::dispatch), which this makes due.
    pub fn disconnect(&mut self, id: u16) -> bool {
        let Some(index) = self.core.clients.index_of_id(id) else { return false };
        let greeting_left = self.core.clients.greeting_left(index);
        let connection = self.core.clients.payload_mut(index);
        connection.disconnected = true;
        connection.hang_up(greeting_left);
        true
    }

    /// The keeper that the server was given.
    pub fn keeper(&self) -> Option<&Keeper> {
        self.core.keeping.as_ref().map(|keeping| &keeping.keeper)
    }

    /// Ends this server, and leaves everything to the next one, which the keeper's descriptors
    /// resume: no client is told, and no name is removed. Without a keeper it is a drop.
    pub fn hand_over(mut self) {
        if let Some(keeping) = &mut self.core.keeping {
            keeping.hand_over(&mut self.core.clients);
            self.hands_over = true;
        }
    }

    /// Vectors of each peer.
    pub fn vectors(&self) -> u32 {
        self.core.clients.vectors()
    }

    /// The id that the next client will get. None when no id is left.
    pub fn next_id(&mut self) -> Option<u16> {
        let id = self.core.clients.next_id();
        self.core.sync_ids();
        id
    }

    /// Counters since the start, and what is left.
    ///
    /// ```
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("socket");
    /// # let mut server = ivshmem::Server::builder().socket_path(&path).start()?;
    /// # let socket = std::os::unix::net::UnixStream::connect(&path)?;
    /// # server.wait(None)?;
    /// let stats = server.stats();
    /// assert_eq!((stats.peers, stats.joined, stats.left), (1, 1, 0));
    /// assert_eq!(stats.messages, 4, "version, id, memory, and its own vector");
    /// assert_eq!(stats.ids_free, 65_535);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn stats(&self) -> Stats {
        let (ids_free, ids_remembered) = self.core.clients.ids_left();
        Stats {
            peers: self.core.clients.len(),
            ids_free,
            ids_used: self.core.clients.len() as u32,
            ids_remembered,
            lingering: self.core.accounts.lingering(),
            ..self.core.stats
        }
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
        self.admission.listener().as_fd()
    }

    /// Whether connections are looked for. They are not for a moment when no descriptor is
    /// left, while the listening socket stays readable.
    pub fn is_listening(&self) -> bool {
        self.admission.is_listening()
    }

    /// The path of the socket. None if the caller gave the listening socket.
    pub fn socket_path(&self) -> Option<&Path> {
        self.admission.listener().path()
    }

    /// Returns a handle that stops [`run`](Self::run) from another thread.
    ///
    /// # Errors
    /// [`Error::System`] when no descriptor is left for it.
    pub fn stopper(&mut self) -> Result<Stopper, Error> {
        self.core.reactor.stopper().map(Stopper)
    }

    /// Watches one more descriptor, for a program whose loop is [`wait`](Self::wait) or
    /// [`run`](Self::run): when `fd` is readable, `wait` returns [`Event::Woken`] with `token`,
    /// and `run` returns.
    ///
    /// It stays watched for as long as `fd` and its copies are open.
    ///
    /// # Errors
    /// [`Error::System`] when `fd` cannot be waited for, such as a regular file.
    pub fn wake_on(&mut self, fd: impl AsFd, token: u64) -> Result<(), Error> {
        self.core.reactor.watch_caller(fd.as_fd(), token)
    }

    /// Serves until a [`Stopper`] is used, or a descriptor of [`wake_on`](Self::wake_on) is
    /// readable.
    ///
    /// # Errors
    /// [`Error::System`] when the system no longer lets the server wait for events. What a
    /// client does is never an error.
    pub fn run(&mut self) -> Result<(), Error> {
        loop {
            for event in self.wait(None)? {
                match event {
                    Event::Stopped => {
                        self.core.reactor.clear_stop();
                        return Ok(());
                    }
                    Event::Woken { .. } => return Ok(()),
                    _ => {}
                }
            }
        }
    }

    /// Does what there is to do, without waiting, and returns what happened, in order.
    ///
    /// It sends some 4,096 messages at most. If more is left, [`is_ready`](Self::is_ready) is
    /// true and the descriptor readable.
    ///
    /// # Errors
    /// [`Error::System`] when the system does not report events. What a client does is never
    /// an error.
    pub fn dispatch(&mut self) -> Result<Vec<Event>, Error> {
        self.wait(Some(Duration::ZERO))
    }

    /// Waits until there is something to do, for `timeout` at most (rounded up to
    /// milliseconds), and does it as [`dispatch`](Self::dispatch) does. A signal that is caught,
    /// and a [`Stopper`], end the wait too.
    ///
    /// # Errors
    /// As [`dispatch`](Self::dispatch).
    pub fn wait(&mut self, timeout: Option<Duration>) -> Result<Vec<Event>, Error> {
        let Self { core, admission, broadcast, memory, .. } = self;
        let ready: Vec<Source> = core.reactor.wait(sys::milliseconds(timeout))?.collect();
        core.keep_up();
        let mut turn = Turn::new();
        let (mut connections, mut timer) = (false, false);
        for source in ready {
            match source {
                Source::Listener => connections = true,
                Source::Timer => timer = true,
                Source::Due => {}
                Source::Stop => turn.events.push(Event::Stopped),
                Source::Caller { token } => turn.events.push(Event::Woken { token }),
                Source::Writable(key) => broadcast.note_writable(&mut core.clients, key),
                // With no budget left, epoll reports it again.
                Source::Ended(key) if turn.budget > 0 => {
                    if core.remove(key, None, &mut turn) {
                        broadcast.start_round();
                    }
                }
                // Of a client that was removed before, it reports only changes.
                Source::Ended(key) => core.settle(key.to_u64()),
            }
        }
        if timer {
            core.reactor.disarm();
            admission.resume(core);
            broadcast.retry(core, memory.as_fd(), &mut turn);
        }
        if connections || admission.has_waiting() {
            let left = core.stats.left;
            let admitted = admission.run(core, &mut turn, connections);
            if !admitted.is_empty() || core.stats.left > left {
                broadcast.start_round();
            }
            for key in admitted {
                if let Some(index) = core.clients.index(key) {
                    let connected = core.clients.iter().map(|(id, _)| id);
                    memory.mark_used(core.clients.id(index), connected);
                }
                broadcast.greet(core, key, memory.as_fd(), &mut turn);
            }
        }
        broadcast.run(core, memory.as_fd(), &mut turn);
        // A client that turns out to be gone is one more departure.
        while !turn.broken.is_empty() {
            for (key, reason) in std::mem::take(&mut turn.broken) {
                core.remove(key, Some(reason), &mut turn);
            }
            broadcast.start_round();
            broadcast.run(core, memory.as_fd(), &mut turn);
        }
        let waits = admission.has_waiting() && !core.is_keeper_behind();
        core.reactor.set_due(broadcast.has_work() || waits);
        if core.is_keeper_behind() {
            core.reactor.arm();
        }
        Ok(turn.events)
    }

    /// Whether [`dispatch`](Self::dispatch) has something to do now.
    ///
    /// A loop that reports changes only (edge-triggered: tokio, mio) dispatches until this is
    /// false, and serves its other descriptors in between. That nothing happened in a
    /// `dispatch` does not mean that nothing is left. A [`Stopper`] and
    /// [`wake_on`](Self::wake_on) are not for such a loop: what they make ready stays so.
    pub fn is_ready(&self) -> bool {
        let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }
}

impl AsFd for Server {
    /// Readable when [`dispatch`](Self::dispatch) has something to do.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.core.reactor.as_fd()
    }
}

impl AsRawFd for Server {
    fn as_raw_fd(&self) -> RawFd {
        self.core.reactor.as_raw_fd()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // A panic must not end the service: it is a crash, from which the next server goes on.
        let crashes = std::thread::panicking() && self.core.keeping.is_some();
        if self.hands_over || crashes {
            self.admission.hand_over(&mut self.core);
            self.memory.hand_over();
            self.core.close_all(true);
            return;
        }
        let clients = &self.core.clients;
        for (index, (_, connection)) in clients.iter().enumerate() {
            connection.hang_up(clients.greeting_left(index));
        }
        self.admission.close(&mut self.core);
        if let Some(keeping) = &mut self.core.keeping {
            keeping.retire(&self.core.clients);
        }
        self.core.close_all(false);
    }
}

const _: () = {
    const fn is_send_and_sync<T: Send + Sync>() {}
    is_send_and_sync::<Server>();
    is_send_and_sync::<Stopper>();
    is_send_and_sync::<Event>();
};
