// SPDX-License-Identifier: GPL-2.0-or-later
//! The control socket: other programs look at the server without joining it, and disconnect
//! clients. It speaks Varlink; docs/control.md describes the interface.
//!
//! Everything runs in the server's own loop, and nothing of it waits. All control connections are
//! in one epoll instance, which is one descriptor for the server, so a server without control
//! connections does nothing for them. What a control client can use up is bounded: the number of
//! connections, the buffers of each ([`connection`]), and the steps in one turn of the loop.
//!
//! When the server has no descriptor left, an operator wants to look. So some descriptors are held
//! in reserve.

#![forbid(unsafe_code)]

mod connection;
mod interface;
mod memory;
mod metrics;
mod opening;
mod programs;
mod status;
mod varlink;

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use ivshmem::{Error, Event, PathListener, Server};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{MsgFlags, getsockopt, send, sockopt};
use nix::unistd::geteuid;

use connection::{Connection, Verdict};
pub(crate) use opening::{Opening, Place, open_with, path_of};
use programs::Programs;
use status::Facts;

/// The token of the control socket at the server.
pub(crate) const TOKEN: u64 = 1;

/// The connections at a time.
const CONNECTIONS: usize = 16;

/// A connection that has done nothing for this time makes room for a new one.
const IDLE: Duration = Duration::from_secs(5);

/// Connections that are accepted in one turn.
const ACCEPTS: usize = 32;

/// The pause after a failed accept.
const PAUSE: Duration = Duration::from_secs(1);

/// Descriptors in reserve: for a connection, for the answers of [`Programs`], and to read /proc.
const SPARES: usize = 3;

const LISTENER: u64 = 0;
const PROGRAMS: u64 = 1;
/// The first key of a connection.
const FIRST: u64 = 2;

/// The control socket and its connections. Dropping it removes the path.
#[derive(Debug)]
pub(crate) struct Control {
    epoll: Epoll,
    listener: PathListener,
    connections: BTreeMap<u64, Connection>,
    /// The key of the next connection.
    next: u64,
    spares: Vec<EventFd>,
    programs: Option<Programs>,
    facts: Facts,
    /// When to accept connections again.
    paused: Option<Instant>,
    /// When a connection of another user was logged.
    warned: Option<Instant>,
}

fn failed(action: &'static str) -> impl Fn(nix::errno::Errno) -> Error {
    move |errno| Error::System { action, source: errno.into() }
}

impl Control {
    fn open(path: PathBuf, socket: String, owner: Option<u32>) -> Result<Self, Error> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)
            .map_err(failed("make an epoll instance for the control socket"))?;
        let listener = PathListener::bind_for(path, 0o600, owner)?;
        epoll
            .add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))
            .map_err(failed("watch the control socket"))?;
        let mut control = Self {
            epoll,
            listener,
            connections: BTreeMap::new(),
            next: FIRST,
            spares: Vec::new(),
            programs: None,
            facts: Facts { socket, started: SystemTime::now() },
            paused: None,
            warned: None,
        };
        control.take_spares();
        Ok(control)
    }

    /// Its path, absolute.
    pub(crate) fn path(&self) -> &Path {
        self.listener.path()
    }

    /// How long the server may wait for events.
    pub(crate) fn due(&self) -> Option<Duration> {
        let connections = self.connections.values().filter_map(Connection::due);
        let next = connections.chain(self.paused).min()?;
        Some(next.saturating_duration_since(Instant::now()))
    }

    /// Whether there is something to do; `is_woken` says that its descriptor is readable.
    pub(crate) fn is_ready(&self, is_woken: bool) -> bool {
        is_woken || self.due() == Some(Duration::ZERO)
    }

    /// Tells the clients that watch what happened.
    pub(crate) fn tell(&mut self, event: &Event, server: &Server) {
        if !self.connections.values().any(Connection::is_watching) {
            return;
        }
        let Some(event) = status::event_of(event, server) else { return };
        let ended: Vec<u64> = self
            .connections
            .iter_mut()
            .filter_map(|(&key, connection)| {
                (connection.event(&event) == Verdict::Ended).then_some(key)
            })
            .collect();
        for key in ended {
            log::info!("a control client that watches has not read its events; it is disconnected");
            self.close(key);
        }
        self.watch_all();
    }

    /// Does what there is to do, without waiting.
    pub(crate) fn serve(&mut self, server: &mut Server) {
        let mut events = [EpollEvent::empty(); 2 * CONNECTIONS];
        let count = self.epoll.wait(&mut events, PollTimeout::ZERO).unwrap_or(0);
        for event in &events[..count] {
            match event.data() {
                LISTENER => self.accept(server),
                PROGRAMS => self.take_answers(server),
                key => {
                    let hung_up = EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR;
                    self.advance(key, server, event.events().intersects(hung_up));
                }
            }
        }
        self.look_at_clock(server);
        self.watch_all();
    }

    fn advance(&mut self, key: u64, server: &mut Server, hung_up: bool) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        let Self { facts, programs, .. } = self;
        if connection.advance(server, facts, programs, hung_up) == Verdict::Ended {
            self.close(key);
        }
    }

    /// Lets the connections go on whose clients have gone, which ends them.
    fn advance_ended(&mut self, server: &mut Server) {
        let mut fds: Vec<PollFd<'_>> = self
            .connections
            .values()
            .map(|connection| PollFd::new(connection.as_fd(), PollFlags::empty()))
            .collect();
        // A hang-up is reported whatever is asked for.
        if !poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ended| ended > 0) {
            return;
        }
        let keys = self.connections.keys().zip(&fds);
        let ended: Vec<u64> =
            keys.filter(|(_, fd)| fd.any() == Some(true)).map(|(&key, _)| key).collect();
        ended.into_iter().for_each(|key| self.advance(key, server, true));
    }

    /// Gives the programs that were found to the replies that wait for them.
    fn take_answers(&mut self, server: &mut Server) {
        let Some(programs) = &mut self.programs else { return };
        for found in programs.take() {
            let asked = |connection: &Connection| connection.question() == Some(found.question);
            let key = self.connections.iter().find(|(_, one)| asked(one)).map(|(&key, _)| key);
            if let Some(key) = key {
                if let Some(connection) = self.connections.get_mut(&key) {
                    connection.add_peers(server, &found.programs);
                }
                self.advance(key, server, false);
            }
        }
    }

    /// Goes on without answers that are late, and accepts again after a pause.
    fn look_at_clock(&mut self, server: &mut Server) {
        let now = Instant::now();
        let is_late = |connection: &Connection| connection.due().is_some_and(|due| due <= now);
        let late: Vec<u64> = self
            .connections
            .iter()
            .filter(|(_, connection)| is_late(connection))
            .map(|(&key, _)| key)
            .collect();
        for key in late {
            if let Some(connection) = self.connections.get_mut(&key) {
                connection.add_peers(server, &[]);
            }
            self.advance(key, server, false);
        }
        if self.paused.is_some_and(|until| until <= now) {
            self.listen(None);
        }
    }

    fn accept(&mut self, server: &mut Server) {
        for _ in 0..ACCEPTS {
            match self.listener.accept() {
                Ok(stream) => self.admit(stream, server),
                Err(error) => match (error.kind(), error.raw_os_error()) {
                    (ErrorKind::WouldBlock, _) => return,
                    (ErrorKind::Interrupted | ErrorKind::ConnectionAborted, _) => {}
                    (_, Some(libc::EMFILE | libc::ENFILE)) if !self.spares.is_empty() => {
                        self.spares.clear();
                    }
                    _ => {
                        log::warn!("cannot accept a control connection now: {error}");
                        return self.listen(Some(Instant::now() + PAUSE));
                    }
                },
            }
        }
    }

    /// Accepts connections, or does not before `paused`.
    fn listen(&mut self, paused: Option<Instant>) {
        let flags = if paused.is_some() { EpollFlags::empty() } else { EpollFlags::EPOLLIN };
        let _ = self.epoll.modify(&self.listener, &mut EpollEvent::new(flags, LISTENER));
        self.paused = paused;
    }

    fn admit(&mut self, stream: UnixStream, server: &mut Server) {
        let peer = getsockopt(&stream, sockopt::PeerCredentials);
        let caller = peer.map_or("an unknown process".to_owned(), |peer| {
            format!("pid {}, uid {}", peer.pid(), peer.uid())
        });
        let own = geteuid().as_raw();
        if !peer.is_ok_and(|peer| peer.uid() == 0 || peer.uid() == own) {
            if self.warned.is_none_or(|warned| warned.elapsed() > PAUSE) {
                log::warn!("control connection refused: {caller} is not root or this user");
                self.warned = Some(Instant::now());
            }
            return refuse(&stream, &varlink::Error::permission_denied());
        }
        if self.connections.len() >= CONNECTIONS {
            self.advance_ended(server);
        }
        if self.connections.len() >= CONNECTIONS {
            let idle = self.connections.iter().map(|(&key, one)| (one.idle(), key)).max();
            match idle {
                Some((idle, key)) if idle >= IDLE => self.close(key),
                _ => return refuse(&stream, &interface::too_many(CONNECTIONS)),
            }
        }
        if self.programs.is_none() {
            self.start_programs();
        }
        let (key, connection) = (self.next, Connection::new(stream, caller));
        if self.epoll.add(&connection, EpollEvent::new(connection.interest, key)).is_ok() {
            self.next += 1;
            self.connections.insert(key, connection);
        }
    }

    /// Without the thread no program is known.
    fn start_programs(&mut self) {
        let programs = Programs::start().and_then(|programs| {
            self.epoll.add(&programs, EpollEvent::new(EpollFlags::EPOLLIN, PROGRAMS))?;
            Ok(programs)
        });
        match programs {
            Ok(programs) => self.programs = Some(programs),
            Err(error) => log::info!("the programs of clients are not known: {error}"),
        }
    }

    fn close(&mut self, key: u64) {
        if let Some(connection) = self.connections.remove(&key) {
            let _ = self.epoll.delete(&connection);
        }
        self.take_spares();
        if self.paused.is_some() {
            self.listen(None);
        }
    }

    fn take_spares(&mut self) {
        while self.spares.len() < SPARES {
            match EventFd::from_flags(EfdFlags::EFD_CLOEXEC) {
                Ok(spare) => self.spares.push(spare),
                Err(_) => return,
            }
        }
    }

    /// Has epoll report what each connection waits for.
    fn watch_all(&mut self) {
        let mut failed = Vec::new();
        for (&key, connection) in &mut self.connections {
            let wants = connection.wants();
            if wants != connection.interest {
                connection.interest = wants;
                if self.epoll.modify(&*connection, &mut EpollEvent::new(wants, key)).is_err() {
                    failed.push(key);
                }
            }
        }
        failed.into_iter().for_each(|key| self.close(key));
    }
}

/// Sends an error to a connection that is not served.
fn refuse(stream: &UnixStream, error: &varlink::Error) {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let _ = send(stream.as_raw_fd(), &error.message(), flags);
}

impl AsFd for Control {
    /// Readable when there is something to do.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}
