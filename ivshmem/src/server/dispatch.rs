// SPDX-License-Identifier: GPL-2.0-or-later
//! What a `dispatch` does: let go, let in, tell.

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{MsgFlags, recv};

use super::builder::READY;
use super::{Client, Event, LISTENER, Refusal, STOP, Server, TIMER, Wait, hang_up, new_vector};
use crate::protocol;
use crate::server::roster::{Key, Message};
use crate::server::wire::{Stop, Then};

/// Connections that one `dispatch` lets in: all are told of, and told, in one walk.
const DOOR: usize = 256;

/// Calls to send that one client gets in one turn, so that a fast reader with much to hear
/// does not keep the others waiting.
const TURN: usize = 4;

/// Messages that a socket is offered at least, however few it took: one that was all but full by
/// chance is soon offered many again.
const LEAST: usize = 16;

/// Any byte from a client, and any kind of end, ends it.
const END: EpollFlags = EpollFlags::EPOLLIN.union(EpollFlags::EPOLLRDHUP);

impl Server {
    pub(super) fn handle(&mut self, ready: &[EpollEvent]) -> Vec<Event> {
        let mut events = Vec::new();
        let mut ended = Vec::new();
        let mut roomy = Vec::new();
        let mut door = false;
        let mut retry = false;
        for event in ready {
            match event.data() {
                LISTENER => door = true,
                TIMER => retry = true,
                STOP => self.woken = true,
                key if event.events() == EpollFlags::EPOLLOUT => roomy.push(Key::from_u64(key)),
                key => ended.push(Key::from_u64(key)),
            }
        }

        let mut walk = self.let_go(&mut ended, &mut events);
        if door {
            walk |= self.let_in(&mut events);
        }
        for key in roomy {
            if let Some(index) = self.member(key) {
                self.roster.payload_mut(index).wait = Wait::None;
                self.tell(index, &mut ended);
            }
        }
        if retry {
            self.retry(&mut ended);
        }
        // Somebody who turns out to be gone is one more thing to tell the others.
        while walk | self.let_go(&mut ended, &mut events) {
            walk = false;
            for index in 0..self.roster.len() {
                self.tell(index, &mut ended);
            }
        }
        events
    }

    /// Lets those go who have ended; whether there was one.
    fn let_go(&mut self, ended: &mut Vec<Key>, events: &mut Vec<Event>) -> bool {
        let before = self.roster.len();
        for key in ended.drain(..) {
            if let Some((id, client)) = self.roster.leave(key) {
                // Closing does not end the watch while a forked child has a copy.
                let _ = self.epoll.delete(&client.socket);
                hang_up(&client);
                self.flight.leave(&client.share);
                log::info!("peer {id} left");
                events.push(Event::Left { id });
            }
        }
        self.roster.len() < before
    }

    /// Lets those in who wait at the door; whether anybody came, or left.
    fn let_in(&mut self, events: &mut Vec<Event>) -> bool {
        let before = events.len();
        if self.spare.is_none() {
            // It comes before any client: without it the next exhaustion has no way out.
            self.spare = new_vector().ok();
        }
        for n in 0..DOOR {
            if n > 0 && !self.listener.has_waiting() {
                break;
            }
            let outcome = match self.listener.accept() {
                Ok(socket) => self.admit(socket, events),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => break,
                    // That one has gone again; there may be another.
                    Some(libc::ECONNABORTED | libc::EPROTO) => continue,
                    Some(libc::EMFILE | libc::ENFILE) if self.make_room(events) => continue,
                    Some(libc::EMFILE | libc::ENFILE) => match self.turn_away() {
                        true => Err(Refusal::NoDescriptors(error)),
                        false => {
                            self.wait_to_accept(&error);
                            break;
                        }
                    },
                    _ => {
                        self.wait_to_accept(&error);
                        break;
                    }
                },
            };
            events.push(match outcome {
                Ok(event) => event,
                Err(Refusal::Ended) => Event::Refused(Refusal::Ended),
                Err(refusal) => {
                    self.refusals.warn(format_args!("client refused: {refusal}"));
                    Event::Refused(refusal)
                }
            });
        }
        let changed = |event: &Event| matches!(event, Event::Joined { .. } | Event::Left { .. });
        events[before..].iter().any(changed)
    }

    /// With no descriptor left, lets those go who have hung up since epoll was asked last, a
    /// moment ago; whether there was one. To refuse somebody while they hold what is missing
    /// would be wrong.
    fn make_room(&mut self, events: &mut Vec<Event>) -> bool {
        let mut ready = [EpollEvent::empty(); READY];
        let count = self.epoll.wait(&mut ready, EpollTimeout::ZERO).unwrap_or(0);
        let mut ended: Vec<Key> = ready[..count]
            .iter()
            .filter(|event| event.events() != EpollFlags::EPOLLOUT)
            .filter(|event| ![LISTENER, TIMER, STOP].contains(&event.data()))
            .map(|event| Key::from_u64(event.data()))
            .collect();
        self.let_go(&mut ended, events)
    }

    fn new_vectors(&self) -> nix::Result<Box<[OwnedFd]>> {
        (0..self.roster.vectors()).map(|_| new_vector()).collect()
    }

    /// Makes a connection a member, wholly or not at all.
    fn admit(&mut self, socket: UnixStream, events: &mut Vec<Event>) -> Result<Event, Refusal> {
        // One that only knocked would cost an id, and two messages for everybody else.
        let peek = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        if recv(socket.as_raw_fd(), &mut [0], peek) != Err(Errno::EAGAIN) {
            return Err(Refusal::Ended);
        }
        let vectors = match self.new_vectors() {
            Err(Errno::EMFILE | Errno::ENFILE) if self.make_room(events) => self.new_vectors()?,
            result => result?,
        };
        let event = EpollEvent::new(END, self.roster.next_key().to_u64());
        self.epoll.add(&socket, event)?;
        let number = socket.as_raw_fd();
        let share = self.flight.enter(&socket)?;
        let client = Client {
            socket,
            vectors,
            share,
            wait: Wait::None,
            watches_room: false,
            offer: usize::MAX,
            rest: None,
        };
        match self.roster.join(client) {
            Ok(id) => {
                log::info!("peer {id} joined");
                Ok(Event::Joined { id, socket: number })
            }
            Err(client) => {
                let _ = self.epoll.delete(&client.socket);
                self.flight.leave(&client.share);
                Err(Refusal::NoIds)
            }
        }
    }

    /// With no descriptor left, takes one client from the door and closes it; whether it could.
    ///
    /// It cannot where somebody else has used up what is free: this process with another
    /// thread, or the whole system.
    fn turn_away(&mut self) -> bool {
        let turned = self.spare.take().is_some() && {
            let accepted = self.listener.accept();
            accepted.is_ok()
        };
        self.spare = new_vector().ok();
        if self.spare.is_none() {
            self.pause();
        }
        turned
    }

    fn wait_to_accept(&mut self, error: &std::io::Error) {
        self.refusals.warn(format_args!("cannot accept a client now: {error}"));
        self.pause();
    }

    /// Leaves the door alone until the timer comes, as nothing else tells when to try again.
    /// Without a timer it stays as it is: better to be woken too often than never.
    fn pause(&mut self) {
        if self.arm() {
            self.watch_door(false);
        }
    }

    fn watch_door(&mut self, listening: bool) {
        let flags = if listening { EpollFlags::EPOLLIN } else { EpollFlags::empty() };
        match self.epoll.modify(&self.listener, &mut EpollEvent::new(flags, LISTENER)) {
            Ok(()) => self.listening = listening,
            Err(errno) => {
                self.refusals.warn(format_args!("cannot change the watch on the listener: {errno}"))
            }
        }
    }

    /// The timer came: tries again what no event would tell of.
    fn retry(&mut self, ended: &mut Vec<Key>) {
        let _ = self.timer.wait();
        self.armed = false;
        if !self.listening {
            self.watch_door(true);
            if !self.listening {
                self.arm();
            }
        }
        for index in 0..self.roster.len() {
            if self.roster.payload(index).wait == Wait::Timer {
                self.roster.payload_mut(index).wait = Wait::None;
                self.tell(index, ended);
                if self.roster.payload(index).wait == Wait::Timer {
                    // What holds up one holds up all.
                    break;
                }
            }
        }
    }

    /// Tells the member at `index` what its cursor leaves to be told, as far as it goes now.
    fn tell(&mut self, index: usize, ended: &mut Vec<Key>) {
        if self.roster.payload(index).wait != Wait::None {
            return;
        }
        let (mut turns, mut taken) = (0, 0);
        let Client { mut rest, mut offer, .. } = *self.roster.payload(index);
        let wait = loop {
            if turns == TURN {
                // There is room, so epoll comes back to it at once, after the others.
                break Wait::Room;
            }
            turns += 1;
            let memory = self.memory.as_fd();
            let messages = self.roster.messages(index).map(|message| match message {
                Message::Version => (protocol::PROTOCOL_VERSION, None),
                Message::YourId(id) | Message::Gone(id) => (i64::from(id), None),
                Message::Memory => (protocol::MEMORY, Some(memory)),
                Message::Vector { id, owner, vector } => {
                    (i64::from(id), Some(owner.vectors[vector].as_fd()))
                }
            });
            let socket = self.roster.payload(index).socket.as_fd();
            match self.sender.send(socket, &mut rest, offer, messages) {
                Ok(told) => {
                    self.roster.told(index, told.messages);
                    taken += told.messages;
                    match told.then {
                        Then::Done => break Wait::None,
                        Then::More => offer = offer.saturating_mul(2),
                        // Where it was something else than a full socket, epoll comes back to it
                        // at once, or when the client has read what it has, and the next call
                        // says what it is.
                        Then::Stopped => {
                            offer = (2 * taken).max(LEAST);
                            break Wait::Room;
                        }
                    }
                }
                Err(Stop::Full) => break Wait::Room,
                Err(Stop::Later(error)) => {
                    self.refusals.warn(format_args!(
                        "peers have to wait to be told more: {error}; if too many descriptors are \
                         in flight, raise the limit of open files (RLIMIT_NOFILE)"
                    ));
                    // Without a timer epoll has to wake us, as it does at once.
                    break if self.arm() { Wait::Timer } else { Wait::Room };
                }
                Err(Stop::Broken(error)) => {
                    log::debug!("cannot send to a peer, which ends it: {error}");
                    ended.push(self.roster.key(index));
                    break Wait::None;
                }
            }
        };
        let client = self.roster.payload_mut(index);
        client.rest = rest;
        client.offer = offer;
        client.wait = wait;
        self.watch_room(index, ended);
    }

    /// Has epoll tell when a full socket has room, and not otherwise.
    fn watch_room(&mut self, index: usize, ended: &mut Vec<Key>) {
        let key = self.roster.key(index);
        let client = self.roster.payload_mut(index);
        let room = client.wait == Wait::Room;
        if client.watches_room != room {
            let flags = if room { END | EpollFlags::EPOLLOUT } else { END };
            match self.epoll.modify(&client.socket, &mut EpollEvent::new(flags, key.to_u64())) {
                Ok(()) => client.watches_room = room,
                Err(error) => {
                    log::error!("cannot watch a peer's socket, which ends it: {error}");
                    ended.push(key);
                }
            }
        }
    }
}
