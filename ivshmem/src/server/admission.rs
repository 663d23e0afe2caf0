// SPDX-License-Identifier: GPL-2.0-or-later
//! Admits clients from the listening socket to the roster, or refuses them.
//!
//! A refused client is sent a message that makes a QEMU end with an error, and is closed. No
//! other client is told of it. [`Candidate`] undoes the steps that were taken for it.
//!
//! # Out of descriptors
//! A listening socket stays readable while `accept` fails for want of descriptors, and the loop
//! would spin. So the server keeps one descriptor in reserve. It closes the reserve, accepts the
//! client, refuses it, and opens the reserve again. If another thread took the descriptor in
//! between, the server stops watching the listener until the timer expires.
//!
//! # One user that comes and goes
//! Each join and each departure is told to every client. A user whose clients connect and close
//! without end would fill every round of the broadcast, and delay the clients of other users. So
//! when 16 clients of a user have left in one round, the user's next connections wait for the
//! next round. See `waiting`.
//!
//! To add a reason for a refusal: add a variant to `Refusal` and its counter to `Stats`, and
//! return it from `Limits::check`, or from `Candidate::check`.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::io;
use std::mem::{Discriminant, discriminant};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{Shutdown, shutdown};
use std::os::fd::AsRawFd;

use super::applicant::{Applicant, Credentials};
use super::connection::{Connection, has_spoken};
use super::core::{BUDGET, Core, Turn};
use super::limits::{self, Limits};
use super::rate_limit::RateLimit;
use super::roster::Key;
use super::waiting::Waiting;
use super::{Event, Refusal, send};
use crate::Chain;
use crate::listener::{Accept, Listener};

/// The cost to accept a connection, as the number of messages that take the same time.
const ACCEPT: usize = 8;

/// The clients of one user that may leave in one round of the broadcast before its next
/// connections have to wait for the next round.
const AT_ONCE: u32 = 16;

pub(super) struct Admission {
    listener: Listener,
    limits: Limits,
    waiting: Waiting,
    /// The descriptor in reserve.
    spare: Option<Spare>,
    watch: Watch,
    /// One for each reason, so that a frequent one does not hide another.
    refused: HashMap<Discriminant<Refusal>, RateLimit>,
    cannot_accept: RateLimit,
    cannot_watch: RateLimit,
}

/// A descriptor in reserve: an eventfd that nobody uses, or the connection of the client that was
/// refused last. That one stays open until the next one is refused; see `Core::refuse`.
#[derive(Debug)]
enum Spare {
    Eventfd(#[expect(dead_code, reason = "it only holds the descriptor")] OwnedFd),
    Refused(UnixStream),
}

/// Whether epoll watches the listening socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Watch {
    On,
    /// Not watched until the timer expires.
    Paused,
    /// The caller's socket was shut down, so no process can connect to it.
    Dead,
}

/// Makes an eventfd with the flags that the protocol requires.
pub(super) fn new_vector() -> io::Result<OwnedFd> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    Ok(EventFd::from_flags(flags).map(OwnedFd::from)?)
}

impl Admission {
    pub(super) fn new(listener: Listener, spare: OwnedFd, limits: Limits) -> Self {
        Self {
            listener,
            limits,
            waiting: Waiting::default(),
            spare: Some(Spare::Eventfd(spare)),
            watch: Watch::On,
            refused: HashMap::new(),
            cannot_accept: RateLimit::default(),
            cannot_watch: RateLimit::default(),
        }
    }

    pub(super) fn listener(&self) -> &Listener {
        &self.listener
    }

    /// Whether connections wait for their turn.
    pub(super) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    pub(super) fn is_listening(&self) -> bool {
        self.watch == Watch::On
    }

    /// Admits the waiting connections, with half of the budget at most. `connections` says that
    /// some wait to be accepted. Returns the keys of the new clients, in join order.
    pub(super) fn run(&mut self, core: &mut Core, turn: &mut Turn, connections: bool) -> Vec<Key> {
        let mut admitted = Vec::new();
        if self.spare.is_none() {
            // The reserve comes before any client: without it no client could be refused.
            self.spare = new_vector().ok().map(Spare::Eventfd);
        }
        if connections && core.is_keeper_behind() {
            self.pause(core);
        } else if connections {
            self.accept_all(core, turn, &mut admitted);
        }
        while turn.budget > BUDGET / 2 && !core.is_keeper_behind() {
            let ready = |uid| core.accounts.of(uid).just_left < AT_ONCE;
            let Some((socket, credentials)) = self.waiting.next(ready) else { break };
            turn.spend(ACCEPT);
            self.admit(core, turn, socket, credentials, &mut admitted);
        }
        admitted
    }

    /// Accepts connections, and admits those that need not wait.
    fn accept_all(&mut self, core: &mut Core, turn: &mut Turn, admitted: &mut Vec<Key>) {
        let mut first = true;
        while turn.budget > BUDGET / 2 {
            if !std::mem::take(&mut first) && !self.listener.has_waiting() {
                break;
            }
            if core.is_keeper_behind() {
                self.pause(core);
                break;
            }
            turn.spend(ACCEPT);
            match self.listener.accept() {
                Accept::Accepted(socket) => self.sort(core, turn, socket, admitted),
                Accept::None => break,
                Accept::Gone => {}
                // To refuse a client while those that have hung up hold what is missing would
                // be wrong.
                Accept::NoDescriptors(_) if core.remove_ended(turn).unwrap_or(false) => {}
                Accept::NoDescriptors(_) if core.drop_refused() => {}
                // Nor may connections that wait for their turn hold it.
                Accept::NoDescriptors(_) if !self.waiting.is_empty() => {
                    if let Some((socket, credentials)) = self.waiting.drop_one() {
                        let reason = Refusal::Busy { uid: credentials.uid };
                        self.refuse(core, turn, socket, reason, Some(credentials));
                    }
                }
                Accept::NoDescriptors(error) => match self.refuse_one(core) {
                    Some(credentials) => {
                        self.note(Refusal::NoDescriptors(error), credentials, core, turn);
                    }
                    None => {
                        self.cannot_accept(core, &error);
                        break;
                    }
                },
                Accept::Failed(error) => {
                    self.cannot_accept(core, &error);
                    break;
                }
                Accept::Dead => {
                    log::error!("the listening socket was shut down; no client can connect");
                    // epoll reports a hang-up whatever it is asked for.
                    core.reactor.forget(self.listener.as_fd());
                    self.watch = Watch::Dead;
                    break;
                }
            }
        }
    }

    fn cannot_accept(&mut self, core: &mut Core, error: &io::Error) {
        self.cannot_accept.warn(format_args!("cannot accept a client now: {error}"));
        self.pause(core);
    }

    /// Admits a connection, or lets it wait if clients of its user come and go too fast.
    fn sort(
        &mut self,
        core: &mut Core,
        turn: &mut Turn,
        socket: UnixStream,
        admitted: &mut Vec<Key>,
    ) {
        let credentials = match Credentials::of(socket.as_fd()) {
            Ok(credentials) => credentials,
            Err(error) => return self.refuse(core, turn, socket, error.into(), None),
        };
        let uid = credentials.uid;
        if core.accounts.of(uid).just_left < AT_ONCE && !self.waiting.has(uid) {
            self.admit(core, turn, socket, credentials, admitted);
        } else if has_spoken(&socket) != Err(Errno::EAGAIN) {
            self.refuse(core, turn, socket, Refusal::Ended, Some(credentials));
        } else if let Err(socket) = self.waiting.add(socket, credentials) {
            self.refuse(core, turn, socket, Refusal::Busy { uid }, Some(credentials));
        }
    }

    fn admit(
        &mut self,
        core: &mut Core,
        turn: &mut Turn,
        socket: UnixStream,
        credentials: Credentials,
        admitted: &mut Vec<Key>,
    ) {
        let waiting = self.waiting.len();
        let candidate = Candidate::new(core, socket, credentials);
        match candidate.admit(&mut self.limits, waiting, turn) {
            Ok((key, event)) => {
                admitted.push(key);
                turn.events.push(event);
            }
            Err(refusal) => self.note(refusal, Some(credentials), core, turn),
        }
    }

    /// Refuses a connection that is no candidate.
    fn refuse(
        &mut self,
        core: &mut Core,
        turn: &mut Turn,
        socket: UnixStream,
        reason: Refusal,
        credentials: Option<Credentials>,
    ) {
        match reason {
            Refusal::Ended => core.closer.close(socket),
            _ => core.refuse(socket),
        }
        self.note(reason, credentials, core, turn);
    }

    /// Counts, logs and reports a refusal.
    fn note(
        &mut self,
        reason: Refusal,
        credentials: Option<Credentials>,
        core: &mut Core,
        turn: &mut Turn,
    ) {
        core.stats.count(&reason);
        if !matches!(reason, Refusal::Ended) {
            self.refused.entry(discriminant(&reason)).or_default().limit(|| {
                let who = credentials.map(|credentials| limits::describe(&credentials));
                let holder = reason.is_shortage().then(|| limits::largest_holder(core)).flatten();
                let mut line = format!("client refused: {}", Chain(&reason));
                for part in [who, holder].into_iter().flatten() {
                    line = format!("{line}; {part}");
                }
                line
            });
        }
        turn.events.push(Event::Refused { reason, credentials });
    }

    /// With no descriptor left, accepts one client with the help of the reserve and refuses it.
    /// Returns the client's credentials, or None if that failed: another thread of this process,
    /// or another process, has taken the free descriptor.
    fn refuse_one(&mut self, core: &mut Core) -> Option<Option<Credentials>> {
        let mut refused = None;
        let had_spare = self.spare.is_some();
        match self.spare.take() {
            Some(Spare::Refused(socket)) => core.closer.close(socket),
            Some(Spare::Eventfd(_)) | None => {}
        }
        if had_spare {
            if let Accept::Accepted(socket) = self.listener.accept() {
                refused = Some(Credentials::of(socket.as_fd()).ok());
                send::refuse(socket.as_fd(), 0, None);
                let _ = socket.shutdown(std::net::Shutdown::Write);
                self.spare = Some(Spare::Refused(socket));
                return refused;
            }
        }
        self.spare = new_vector().ok().map(Spare::Eventfd);
        if self.spare.is_none() {
            self.pause(core);
        }
        refused
    }

    /// Stops watching the listener until the timer expires, because no event reports when
    /// `accept` would work again. If the timer cannot be set, the listener stays watched: the
    /// loop is then woken too often, but no client is forgotten.
    fn pause(&mut self, core: &mut Core) {
        if core.reactor.arm() {
            self.set_watch(core, Watch::Paused);
        }
    }

    /// Watches the listener again after the timer has expired.
    pub(super) fn resume(&mut self, core: &mut Core) {
        if self.watch == Watch::Paused {
            self.set_watch(core, Watch::On);
            if self.watch == Watch::Paused {
                core.reactor.arm();
            }
        }
    }

    fn set_watch(&mut self, core: &Core, watch: Watch) {
        match core.reactor.listen(self.listener.as_fd(), watch == Watch::On) {
            Ok(()) => self.watch = watch,
            Err(error) => self
                .cannot_watch
                .warn(format_args!("cannot change the watch on the listening socket: {error}")),
        }
    }

    /// Leaves the listener to the next server. A connection that was accepted is not among what
    /// the keeper has, and is refused.
    pub(super) fn hand_over(&mut self, core: &mut Core) {
        while let Some((socket, _)) = self.waiting.next(|_| true) {
            send::refuse(socket.as_fd(), 0, None);
            core.closer.close(socket);
        }
        self.listener.keep();
    }

    /// Refuses the waiting connections, so that no QEMU waits for a server that has ended. A
    /// socket that the caller supplied is left alone: the caller may go on using it.
    pub(super) fn close(&mut self, core: &mut Core) {
        while let Some((socket, _)) = self.waiting.next(|_| true) {
            send::refuse(socket.as_fd(), 0, None);
            core.closer.close(socket);
        }
        if self.listener.path().is_none() {
            return;
        }
        // After this no process can connect; waiting connections can still be accepted.
        let _ = shutdown(self.listener.as_fd().as_raw_fd(), Shutdown::Both);
        while let Accept::Accepted(socket) = self.listener.accept() {
            send::refuse(socket.as_fd(), 0, None);
            core.closer.close(socket);
        }
    }
}

/// A connection that may become a client. Dropping it before `admit` succeeds refuses it and
/// undoes the steps that were taken for it.
struct Candidate<'a> {
    core: &'a mut Core,
    socket: Option<UnixStream>,
    credentials: Credentials,
    watched: bool,
    /// It had ended before.
    ended: bool,
}

impl<'a> Candidate<'a> {
    fn new(core: &'a mut Core, socket: UnixStream, credentials: Credentials) -> Self {
        Self { core, socket: Some(socket), credentials, watched: false, ended: false }
    }

    /// Finds reasons to refuse it before any descriptor is made for it.
    fn check(
        &mut self,
        socket: &UnixStream,
        limits: &mut Limits,
        waiting: usize,
    ) -> Result<(), Refusal> {
        // A connection that has already ended would cost an id, and two messages to every other
        // client.
        if has_spoken(socket) != Err(Errno::EAGAIN) {
            self.ended = true;
            return Err(Refusal::Ended);
        }
        limits.check(self.core, &Applicant::new(socket.as_fd(), self.credentials), waiting)?;
        self.core.clients.next_id().map(drop).ok_or(Refusal::NoIds)
    }

    fn new_vectors(&mut self, turn: &mut Turn) -> Result<Box<[OwnedFd]>, Refusal> {
        let count = self.core.vectors();
        turn.spend(count);
        let make = || (0..count).map(|_| new_vector()).collect::<io::Result<_>>();
        match make().map_err(Refusal::from) {
            Err(Refusal::NoDescriptors(_)) if self.core.remove_ended(turn).unwrap_or(false) => {
                Ok(make()?)
            }
            result => result,
        }
    }

    fn admit(
        mut self,
        limits: &mut Limits,
        waiting: usize,
        turn: &mut Turn,
    ) -> Result<(Key, Event), Refusal> {
        let socket = self.socket.take().expect("it was just accepted");
        let vectors = match self.prepare(&socket, limits, waiting, turn) {
            Ok(vectors) => vectors,
            Err(refusal) => {
                self.socket = Some(socket);
                return Err(refusal);
            }
        };
        let credentials = self.credentials;
        let key = self.core.clients.next_key();
        let number = socket.as_raw_fd();
        let mut connection = Connection::new(socket, vectors);
        let mut identity = None;
        if let (Some(keeping), Some(id)) = (&mut self.core.keeping, self.core.clients.next_id()) {
            match keeping.identify(id, &connection) {
                Ok(found) => {
                    connection.slot = found.slot;
                    identity = Some(found);
                }
                Err(error) => {
                    self.socket = Some(connection.socket);
                    return Err(error.into());
                }
            }
        }
        match self.core.clients.join(credentials.uid, connection) {
            Ok(id) => {
                if let (Some(keeping), Some(identity)) = (&mut self.core.keeping, &identity) {
                    keeping.joined(&mut self.core.clients, identity);
                }
                self.core.stats.joined += 1;
                self.core.accounts.joined(credentials.uid);
                if log::log_enabled!(log::Level::Info) {
                    log::info!("peer {id} joined: {}", limits::describe(&credentials));
                }
                Ok((key, Event::Joined { id, socket: number }))
            }
            Err(connection) => {
                self.socket = Some(connection.socket);
                Err(Refusal::NoIds)
            }
        }
    }

    fn prepare(
        &mut self,
        socket: &UnixStream,
        limits: &mut Limits,
        waiting: usize,
        turn: &mut Turn,
    ) -> Result<Box<[OwnedFd]>, Refusal> {
        self.check(socket, limits, waiting)?;
        let vectors = self.new_vectors(turn)?;
        self.core.reactor.watch_client(socket.as_fd(), self.core.clients.next_key())?;
        self.watched = true;
        Ok(vectors)
    }
}

impl Drop for Candidate<'_> {
    fn drop(&mut self) {
        if let Some(socket) = self.socket.take() {
            if self.watched {
                self.core.reactor.forget(socket.as_fd());
            }
            if self.ended {
                self.core.closer.close(socket);
            } else {
                self.core.refuse(socket);
            }
        }
    }
}
