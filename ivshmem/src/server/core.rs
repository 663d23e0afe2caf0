// SPDX-License-Identifier: GPL-2.0-or-later
//! What admission and broadcast both act on: the clients, the reactor, the in-flight budget and
//! the counters. And the one way to remove a client.

#![forbid(unsafe_code)]

use std::os::fd::AsFd;

use super::connection::Clients;
use super::in_flight::InFlight;
use super::reactor::{Reactor, Source};
use super::roster::{Key, Roster};
use super::{Event, LeaveReason, Stats};
use crate::{Chain, Error};

/// What one dispatch may cost, in messages: some milliseconds of processor time.
pub(super) const BUDGET: usize = 4096;

/// One dispatch: what happened, and what it may still cost.
pub(super) struct Turn {
    pub(super) events: Vec<Event>,
    /// Clients that cannot be sent anything any more.
    pub(super) broken: Vec<(Key, LeaveReason)>,
    /// Messages that may still be sent. Other work is counted as the messages that would take
    /// as long.
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

    /// Removes a client. Without a reason, the connection is asked for it. Returns whether it
    /// was still there.
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
        // To close a descriptor takes a quarter of the time of a message.
        turn.spend(1 + self.vectors() / 4);
        log::info!("peer {id} left: {}", Chain(&reason));
        turn.events.push(Event::Left { id, reason });
        true
    }

    /// Removes the clients that have hung up since the last wait for events. Returns whether
    /// there was one.
    pub(super) fn remove_ended(&mut self, turn: &mut Turn) -> Result<bool, Error> {
        let ready = self.reactor.wait(nix::poll::PollTimeout::ZERO)?;
        let ended: Vec<Key> = ready
            .filter_map(|source| match source {
                Source::Ended(key) => Some(key),
                _ => None,
            })
            .collect();
        // All of them, so that none is left out.
        Ok(ended.into_iter().fold(false, |any, key| self.remove(key, None, turn) | any))
    }
}
