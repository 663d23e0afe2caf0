// SPDX-License-Identifier: GPL-2.0-or-later
//! The state that admission and broadcast share: clients, reactor, in-flight budget, counters.
//! A client is removed only here.

#![forbid(unsafe_code)]

use std::os::fd::AsFd;

use super::connection::Clients;
use super::in_flight::InFlight;
use super::reactor::{Reactor, Source};
use super::roster::{Key, Roster};
use super::{Event, LeaveReason, Stats};
use crate::{Chain, Error};

/// The budget of one dispatch, in messages: some milliseconds of processor time.
pub(super) const BUDGET: usize = 4096;

/// The state of one dispatch: its events so far, and the rest of its budget.
pub(super) struct Turn {
    pub(super) events: Vec<Event>,
    /// Clients whose connection failed while sending. They are removed at the end.
    pub(super) broken: Vec<(Key, LeaveReason)>,
    /// The number of messages that may still be sent. Other work counts as the number of messages
    /// that take the same time.
    pub(super) budget: usize,
}

impl Turn {
    pub(super) fn new() -> Self {
        Self { events: Vec::new(), broken: Vec::new(), budget: BUDGET }
    }

    pub(super) fn spend(&mut self, messages: usize) {
        self.budget = self.budget.saturating_sub(messages);
    }
}

pub(super) struct Core {
    pub(super) reactor: Reactor,
    pub(super) clients: Clients,
    pub(super) in_flight: InFlight,
    pub(super) stats: Stats,
}

impl Core {
    pub(super) fn new(reactor: Reactor, vectors: u32, first_id: u16, id_space: u32) -> Self {
        Self {
            reactor,
            clients: Roster::new(vectors, first_id, id_space),
            in_flight: InFlight::new(vectors),
            stats: Stats::default(),
        }
    }

    pub(super) fn vectors(&self) -> usize {
        self.clients.vectors() as usize
    }

    /// Removes a client. If `reason` is None, the reason is found from the connection. Returns
    /// whether the client was connected.
    pub(super) fn remove(
        &mut self,
        key: Key,
        reason: Option<LeaveReason>,
        turn: &mut Turn,
    ) -> bool {
        let Some(index) = self.clients.index(key) else { return false };
        let greeting_left = self.clients.greeting_left(index);
        let Some((id, connection)) = self.clients.leave(key) else { return false };
        self.reactor.forget(connection.socket.as_fd());
        let reason = reason.unwrap_or_else(|| connection.leave_reason());
        connection.hang_up(greeting_left);
        self.in_flight.leave(&connection.share);
        self.stats.left += 1;
        // Closing a descriptor takes a quarter of the time of a message.
        turn.spend(1 + self.vectors() / 4);
        log::info!("peer {id} left: {}", Chain(&reason));
        turn.events.push(Event::Left { id, reason });
        true
    }

    /// Removes the clients that have hung up since the last wait for events. Returns whether it
    /// removed any.
    pub(super) fn remove_ended(&mut self, turn: &mut Turn) -> Result<bool, Error> {
        let ready = self.reactor.wait(nix::poll::PollTimeout::ZERO)?;
        let ended: Vec<Key> = ready
            .filter_map(|source| match source {
                Source::Ended(key) => Some(key),
                _ => None,
            })
            .collect();
        // `|` and not `||`: every client in the list has to be removed.
        Ok(ended.into_iter().fold(false, |any, key| self.remove(key, None, turn) | any))
    }
}
