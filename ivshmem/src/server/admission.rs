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
//! To add a reason for a refusal: add a variant to `Refusal` and its counter to `Stats`, and
//! return it from `Candidate::check`.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{Shutdown, shutdown};
use std::os::fd::AsRawFd;

use super::connection::{Connection, has_spoken};
use super::core::{BUDGET, Core, Turn};
use super::in_flight::Share;
use super::rate_limit::RateLimit;
use super::roster::Key;
use super::{Event, Refusal, send};
use crate::Chain;
use crate::listener::{Accept, Listener};

/// The cost to accept a connection, as the number of messages that take the same time.
const ACCEPT: usize = 8;

pub(super) struct Admission {
    listener: Listener,
    /// The descriptor in reserve.
    spare: Option<OwnedFd>,
    watch: Watch,
    refused: RateLimit,
    cannot_accept: RateLimit,
    cannot_watch: RateLimit,
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
    pub(super) fn new(listener: Listener, spare: OwnedFd) -> Self {
        Self {
            listener,
            spare: Some(spare),
            watch: Watch::On,
            refused: RateLimit::default(),
            cannot_accept: RateLimit::default(),
            cannot_watch: RateLimit::default(),
        }
    }

    pub(super) fn listener(&self) -> &Listener {
        &self.listener
    }

    pub(super) fn is_listening(&self) -> bool {
        self.watch == Watch::On
    }

    /// Admits the waiting connections, with half of the budget at most. Returns the keys of the
    /// new clients, in join order.
    pub(super) fn run(&mut self, core: &mut Core, turn: &mut Turn) -> Vec<Key> {
        let mut admitted = Vec::new();
        if self.spare.is_none() {
            // The reserve comes before any client: without it no client could be refused.
            self.spare = new_vector().ok();
        }
        let mut first = true;
        while turn.budget > BUDGET / 2 {
            if !std::mem::take(&mut first) && !self.listener.has_waiting() {
                break;
            }
            turn.spend(ACCEPT);
            let outcome = match self.listener.accept() {
                Accept::Accepted(socket) => Candidate::new(core, socket).admit(turn),
                Accept::None => break,
                Accept::Gone => continue,
                // To refuse a client while those that have hung up hold what is missing would
                // be wrong.
                Accept::NoDescriptors(_) if core.remove_ended(turn).unwrap_or(false) => continue,
                Accept::NoDescriptors(error) if self.refuse_one(core) => {
                    Err(Refusal::NoDescriptors(error))
                }
                Accept::Dead => {
                    log::error!("the listening socket was shut down; no client can connect");
                    // epoll reports a hang-up whatever it is asked for.
                    core.reactor.forget(self.listener.as_fd());
                    self.watch = Watch::Dead;
                    break;
                }
                Accept::NoDescriptors(error) | Accept::Failed(error) => {
                    self.cannot_accept.warn(format_args!("cannot accept a client now: {error}"));
                    self.pause(core);
                    break;
                }
            };
            match outcome {
                Ok((key, event)) => {
                    admitted.push(key);
                    turn.events.push(event);
                }
                Err(refusal) => self.note(refusal, core, turn),
            }
        }
        admitted
    }

    fn note(&mut self, refusal: Refusal, core: &mut Core, turn: &mut Turn) {
        core.stats.count(&refusal);
        if !matches!(refusal, Refusal::Ended) {
            self.refused.warn(format_args!("client refused: {}", Chain(&refusal)));
        }
        turn.events.push(Event::Refused(refusal));
    }

    /// With no descriptor left, accepts one client with the help of the reserve and refuses it.
    /// Returns whether that worked. It fails if another thread of this process, or another
    /// process, has taken the free descriptor.
    fn refuse_one(&mut self, core: &mut Core) -> bool {
        let mut refused = false;
        if self.spare.take().is_some() {
            if let Accept::Accepted(socket) = self.listener.accept() {
                send::refuse(socket.as_fd(), 0, None);
                refused = true;
            }
        }
        self.spare = new_vector().ok();
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

    /// Refuses the waiting connections, so that no QEMU waits for a server that has ended. A
    /// socket that the caller supplied is left alone: the caller may go on using it.
    pub(super) fn close(&self) {
        if self.listener.path().is_none() {
            return;
        }
        // After this no process can connect; waiting connections can still be accepted.
        let _ = shutdown(self.listener.as_fd().as_raw_fd(), Shutdown::Both);
        while let Accept::Accepted(socket) = self.listener.accept() {
            send::refuse(socket.as_fd(), 0, None);
        }
    }
}

/// A connection that may become a client. Dropping it before `admit` succeeds refuses it and
/// undoes the steps that were taken for it.
struct Candidate<'a> {
    core: &'a mut Core,
    socket: Option<UnixStream>,
    watched: bool,
    share: Option<Share>,
}

impl<'a> Candidate<'a> {
    fn new(core: &'a mut Core, socket: UnixStream) -> Self {
        Self { core, socket: Some(socket), watched: false, share: None }
    }

    /// Finds reasons to refuse it before any descriptor is made for it.
    fn check(&mut self, socket: &UnixStream) -> Result<(), Refusal> {
        // A connection that has already ended would cost an id, and two messages to every other
        // client.
        if has_spoken(socket) != Err(Errno::EAGAIN) {
            return Err(Refusal::Ended);
        }
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

    fn admit(mut self, turn: &mut Turn) -> Result<(Key, Event), Refusal> {
        let socket = self.socket.take().expect("it was just accepted");
        let result = self.prepare(&socket, turn);
        let (vectors, share) = match result {
            Ok(parts) => parts,
            Err(refusal) => {
                self.socket = Some(socket);
                return Err(refusal);
            }
        };
        let key = self.core.clients.next_key();
        let number = socket.as_raw_fd();
        match self.core.clients.join(Connection::new(socket, vectors, share)) {
            Ok(id) => {
                self.core.stats.joined += 1;
                log::info!("peer {id} joined");
                Ok((key, Event::Joined { id, socket: number }))
            }
            Err(connection) => {
                self.share = Some(connection.share);
                self.socket = Some(connection.socket);
                Err(Refusal::NoIds)
            }
        }
    }

    fn prepare(
        &mut self,
        socket: &UnixStream,
        turn: &mut Turn,
    ) -> Result<(Box<[OwnedFd]>, Share), Refusal> {
        self.check(socket)?;
        let vectors = self.new_vectors(turn)?;
        self.core.reactor.watch_client(socket.as_fd(), self.core.clients.next_key())?;
        self.watched = true;
        let share = self.core.in_flight.enter(socket).map_err(io::Error::from)?;
        Ok((vectors, share))
    }
}

impl Drop for Candidate<'_> {
    fn drop(&mut self) {
        if let Some(socket) = &self.socket {
            if self.watched {
                self.core.reactor.forget(socket.as_fd());
            }
            send::refuse(socket.as_fd(), 0, None);
        }
        if let Some(share) = &self.share {
            self.core.in_flight.leave(share);
        }
    }
}
