// SPDX-License-Identifier: GPL-2.0-or-later
//! Sends each client its pending messages. No other module sends messages of the protocol.
//!
//! # Rounds
//! After a join or a departure all clients have pending messages. A *round* visits the clients
//! in join order. So the connected peers are told of a new client before the new client is told
//! how to ring them. The order matters: a guest drops a doorbell from a peer that it does not
//! know.
//!
//! A dispatch has a budget. When the budget is spent, the round stops and goes on at the same
//! client in the next dispatch. A client that joins during a round is visited by the next round,
//! because the clients that were visited before its join have not been told of it.
//!
//! # The queue
//! The queue holds clients whose full socket became writable, and clients with more pending
//! messages than one visit sends. It is first in, first out, and each client gets one run of
//! messages in turn. So no client starves, and a fast reader with a large backlog does not delay
//! the others. Round and queue share the budget.
//!
//! # Waiting
//! A client with a full socket waits until epoll reports the socket as writable. No event reports
//! the end of two other conditions: too many descriptors in flight, and no kernel memory. Clients
//! with these wait for a timer.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};

use super::LeaveReason;
use super::connection::{Clients, Connection};
use super::core::{Core, Turn};
use super::in_flight::Room;
use super::rate_limit::RateLimit;
use super::roster::{Key, Message};
use super::send::{Partial, RUN, Sender, Verdict};
use crate::protocol;

/// Send calls in one visit of a round, at most.
const CALLS: usize = 4;

/// The smallest batch, even for a socket that took fewer messages. So a socket that was almost
/// full only once soon gets large batches again.
const SMALLEST_BATCH: usize = 16;

/// A visit that sends nothing takes time too: this many such visits count as one message.
const VISITS: usize = 16;

/// Which messages to send.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Which {
    All,
    /// The messages before the first one that has a descriptor.
    Plain,
}

/// A round under way.
struct Round {
    /// The next client to visit has this key or a larger one.
    next: Key,
    /// Clients with this key or a larger one joined after the round began.
    end: Key,
}

pub(super) struct Broadcast {
    sender: Sender,
    queue: VecDeque<Key>,
    round: Option<Round>,
    /// A client joined or left since the last round began.
    stale: bool,
    /// Clients with a smaller key have been visited by a round.
    visited: Key,
    held_up: RateLimit,
}

impl Broadcast {
    pub(super) fn new() -> Self {
        Self {
            sender: Sender::new(),
            queue: VecDeque::new(),
            round: None,
            stale: false,
            visited: Key::from_u64(0),
            held_up: RateLimit::default(),
        }
    }

    /// Starts a round after a join or a departure: all clients have pending messages.
    pub(super) fn start_round(&mut self) {
        self.stale = true;
    }

    /// Whether a dispatch has messages to send.
    pub(super) fn has_work(&self) -> bool {
        self.stale || self.round.is_some() || !self.queue.is_empty()
    }

    /// Sends a new client its greeting. A QEMU is blocked until it has received the greeting.
    pub(super) fn greet(
        &mut self,
        core: &mut Core,
        key: Key,
        memory: BorrowedFd<'_>,
        turn: &mut Turn,
    ) {
        if let Some(index) = core.clients.index(key) {
            let greeting = core.clients.greeting_left(index);
            self.send(core, index, greeting, memory, turn, Which::All);
            let connection = core.clients.payload_mut(index);
            if connection.verdict == Verdict::More {
                // The round sends the rest, in join order.
                connection.verdict = Verdict::Done;
            }
        }
    }

    /// Epoll reports that a client's socket is writable.
    pub(super) fn note_writable(&mut self, clients: &mut Clients, key: Key) {
        if let Some(index) = clients.index(key) {
            let connection = clients.payload_mut(index);
            if connection.verdict == Verdict::Full {
                connection.verdict = Verdict::More;
                self.queue.push_back(key);
            }
        }
    }

    /// Tries again to send to the clients that waited for the timer.
    pub(super) fn retry(&mut self, core: &mut Core, memory: BorrowedFd<'_>, turn: &mut Turn) {
        let mut exhausted = false;
        for index in 0..core.clients.len() {
            match core.clients.payload(index).verdict {
                Verdict::Exhausted(_) | Verdict::Waiting => {}
                _ => continue,
            }
            if turn.budget == 0 {
                core.reactor.arm();
                return;
            }
            // If one client cannot be sent a descriptor, no client can. Messages without a
            // descriptor can still be sent.
            let which = if exhausted { Which::Plain } else { Which::All };
            self.send(core, index, RUN.min(turn.budget), memory, turn, which);
            let connection = core.clients.payload_mut(index);
            match connection.verdict {
                Verdict::Exhausted(_) => exhausted = true,
                Verdict::Done if exhausted => {
                    // The remaining messages have descriptors, and wait for the next timer.
                    connection.verdict = Verdict::Exhausted(nix::errno::Errno::ETOOMANYREFS);
                    core.reactor.arm();
                }
                Verdict::More => self.queue.push_back(core.clients.key(index)),
                Verdict::Done | Verdict::Full | Verdict::Waiting | Verdict::Broken(_) => {}
            }
        }
    }

    /// Sends pending messages, within the budget.
    pub(super) fn run(&mut self, core: &mut Core, memory: BorrowedFd<'_>, turn: &mut Turn) {
        let in_round = self.stale || self.round.is_some();
        let reserve = if in_round { turn.budget / 2 } else { 0 };
        self.run_queue(core, memory, turn, reserve);
        self.run_round(core, memory, turn);
        // The queue gets the budget that the round left over.
        self.run_queue(core, memory, turn, 0);
    }

    fn run_queue(
        &mut self,
        core: &mut Core,
        memory: BorrowedFd<'_>,
        turn: &mut Turn,
        reserve: usize,
    ) {
        while turn.budget > reserve {
            let Some(key) = self.queue.pop_front() else { return };
            let Some(index) = core.clients.index(key) else { continue };
            // A client that no round has visited gets only its greeting; see `Rounds` at the top
            // of this file.
            let limit = if key < self.visited { RUN } else { core.clients.greeting_left(index) };
            self.send(core, index, limit.min(turn.budget), memory, turn, Which::All);
            let connection = core.clients.payload_mut(index);
            if connection.verdict == Verdict::More {
                if key < self.visited {
                    self.queue.push_back(key);
                } else {
                    connection.verdict = Verdict::Done;
                }
            }
        }
    }

    fn run_round(&mut self, core: &mut Core, memory: BorrowedFd<'_>, turn: &mut Turn) {
        let mut visits = 0;
        while turn.budget > 0 {
            let mut round = match self.round.take() {
                Some(round) => round,
                None if self.stale => {
                    self.stale = false;
                    Round { next: Key::from_u64(0), end: core.clients.next_key() }
                }
                None => return,
            };
            let mut index = core.clients.index_from(round.next);
            while index < core.clients.len() && turn.budget > 0 {
                let key = core.clients.key(index);
                if key >= round.end {
                    break;
                }
                if core.clients.payload(index).verdict == Verdict::Done {
                    let limit = (CALLS * RUN).min(turn.budget);
                    self.send(core, index, limit, memory, turn, Which::All);
                    if core.clients.payload(index).verdict == Verdict::More {
                        self.queue.push_back(key);
                    }
                }
                visits += 1;
                turn.spend(usize::from(visits % VISITS == 0));
                round.next = Key::from_u64(key.to_u64() + 1);
                self.visited = self.visited.max(round.next);
                index += 1;
            }
            let at_end = index == core.clients.len() || core.clients.key(index) >= round.end;
            if at_end {
                self.visited = self.visited.max(round.end);
                core.accounts.round_ended();
            } else {
                self.round = Some(round);
            }
        }
    }

    /// Sends a client up to `limit` pending messages, and records in its verdict what must
    /// happen before the next send.
    fn send(
        &mut self,
        core: &mut Core,
        index: usize,
        limit: usize,
        memory: BorrowedFd<'_>,
        turn: &mut Turn,
        which: Which,
    ) {
        let Connection { mut partial, mut batch, .. } = *core.clients.payload(index);
        let mut sent = 0;
        let verdict = loop {
            if sent >= limit {
                break Verdict::More;
            }
            let mut most = core.clients.payload(index).unread.room();
            if most == 0 {
                let pending = core.clients.behind(index).min((limit - sent) as u64) as usize;
                if pending == 0 {
                    break Verdict::Done;
                }
                most = match core.ask_for_room(index, pending) {
                    Room::Messages(most) => most,
                    Room::AfterReading => break Verdict::Full,
                    Room::Later => break Verdict::Waiting,
                };
            }
            let most = most.min(batch).min(limit - sent);
            let clients = &core.clients;
            let connection = clients.payload(index);
            let (socket, slot) = (connection.socket.as_fd(), connection.slot);
            let keeping = core.keeping.as_ref();
            let record = keeping.map(|keeping| keeping.state.record_of(slot));
            let mut is_sending = partial.is_some();
            if let (Some(record), true) = (record, is_sending) {
                record.sending(1);
            }
            let (count, verdict) = self.sender.send(socket, &mut partial, most, |run, most| {
                clients.for_each_message(index, most, |message| {
                    let (value, descriptor) = on_the_wire(&message, memory);
                    if which == Which::Plain && descriptor.is_some() {
                        return false;
                    }
                    run.push(value.to_le_bytes(), descriptor);
                    true
                });
                if let (Some(record), false) = (record, run.is_empty()) {
                    record.sending(run.len() as u32);
                    is_sending = true;
                }
            });
            core.clients.note_told(index, count);
            if let (Some(record), true) = (record, is_sending) {
                record.sent(&core.clients.progress(index), partial.map(Partial::parts));
            }
            core.clients.payload_mut(index).unread.note_sent(count);
            sent += count;
            match verdict {
                Verdict::More => batch = batch.saturating_mul(2),
                Verdict::Full if count > 0 => {
                    batch = (2 * sent).max(SMALLEST_BATCH);
                    break verdict;
                }
                _ => break verdict,
            }
        };
        turn.spend(sent);
        core.stats.messages += sent as u64;
        let connection = core.clients.payload_mut(index);
        connection.partial = partial;
        connection.batch = batch;
        connection.verdict = verdict;
        match verdict {
            Verdict::Exhausted(errno) => {
                self.held_up.warn(format_args!(
                    "clients have to wait for their messages: {errno}; if too many descriptors \
                     are in flight, raise the limit of open files (RLIMIT_NOFILE)"
                ));
                if !core.reactor.arm() {
                    // The timer cannot be set, so wait for epoll, which reports the socket as
                    // writable at once.
                    core.clients.payload_mut(index).verdict = Verdict::Full;
                }
            }
            Verdict::Waiting => {
                if !core.reactor.arm() {
                    core.clients.payload_mut(index).verdict = Verdict::Full;
                }
            }
            Verdict::Broken(errno) => {
                let reason = LeaveReason::Broken(errno.into());
                turn.broken.push((core.clients.key(index), reason));
            }
            Verdict::Done | Verdict::More | Verdict::Full => {}
        }
        watch_writable(core, index, turn);
    }
}

/// Makes epoll report when the socket becomes writable if the socket is full, and not otherwise.
fn watch_writable(core: &mut Core, index: usize, turn: &mut Turn) {
    let key = core.clients.key(index);
    let connection = core.clients.payload_mut(index);
    let full = connection.verdict == Verdict::Full;
    if connection.watches_writable != full {
        match core.reactor.watch_writable(connection.socket.as_fd(), key, full) {
            Ok(()) => connection.watches_writable = full,
            Err(error) => {
                log::error!("cannot watch a client's socket, so the client is removed: {error}");
                turn.broken.push((key, LeaveReason::Broken(error)));
            }
        }
    }
}

/// Returns the value and the descriptor that a message has on the wire.
fn on_the_wire<'fd>(
    message: &Message<'fd, Connection>,
    memory: BorrowedFd<'fd>,
) -> (i64, Option<BorrowedFd<'fd>>) {
    match *message {
        Message::Version => (protocol::PROTOCOL_VERSION, None),
        Message::YourId(id) | Message::Gone(id) => (i64::from(id), None),
        Message::Memory => (protocol::MEMORY, Some(memory)),
        Message::Vector { id, owner, vector } => {
            (i64::from(id), Some(owner.vectors[vector].as_fd()))
        }
    }
}
