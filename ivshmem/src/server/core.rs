// SPDX-License-Identifier: GPL-2.0-or-later
//! The state that admission and broadcast share: clients, reactor, in-flight budget, counters.
//! A client is removed only here.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use super::accounts::Accounts;
use super::closing::Closer;
use super::connection::Clients;
use super::in_flight::{InFlight, Room, Unread};
use super::keeping::Keeping;
use super::reactor::{Reactor, Source};
use super::roster::Key;
use super::{Event, LeaveReason, Stats, send};
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

/// A client that was removed, but has not read what it was sent. Its messages take up kernel
/// memory until it reads them or ends, so it counts, and its connection stays open.
struct Lingering {
    socket: UnixStream,
    unread: Unread,
    /// The user on whose account it counts. None for a client that was refused.
    uid: Option<u32>,
}

/// Refused clients have keys from this value on. The roster's keys are smaller.
const REFUSED: u64 = 1 << 62;

/// The refused clients whose connections stay open until they have read the refusal, at most.
const REFUSALS: usize = 64;

pub(super) struct Core {
    pub(super) reactor: Reactor,
    pub(super) clients: Clients,
    pub(super) accounts: Accounts,
    pub(super) in_flight: InFlight,
    pub(super) closer: Closer,
    /// What survives this process, if there is a keeper.
    pub(super) keeping: Option<Keeping>,
    lingering: BTreeMap<u64, Lingering>,
    /// The clients that were refused and whose connections were kept open, so far.
    refused: u64,
    pub(super) stats: Stats,
}

impl Core {
    pub(super) fn new(
        reactor: Reactor,
        closer: Closer,
        clients: Clients,
        keeping: Option<Keeping>,
    ) -> Self {
        let mut accounts = Accounts::default();
        (0..clients.len()).for_each(|index| accounts.joined(clients.owner(index)));
        Self {
            reactor,
            clients,
            accounts,
            in_flight: InFlight::default(),
            closer,
            keeping,
            lingering: BTreeMap::new(),
            refused: 0,
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
        let Some(index) = self.clients.index(key) else {
            self.settle(key.to_u64());
            return false;
        };
        let greeting_left = self.clients.greeting_left(index);
        let uid = self.clients.owner(index);
        let Some((id, connection)) = self.clients.leave(key) else { return false };
        let reason = reason.unwrap_or_else(|| connection.leave_reason());
        connection.hang_up(greeting_left);
        if let (Some(keeping), Some(departure)) = (&mut self.keeping, self.clients.last_departure())
        {
            keeping.left(&mut self.clients, &departure, connection.slot, connection.kept);
        }
        self.accounts.left(uid);
        self.let_linger(key, connection.socket, connection.unread, uid);
        self.stats.left += 1;
        // Closing a descriptor takes a quarter of the time of a message.
        turn.spend(1 + self.vectors() / 4);
        log::info!("peer {id} left: {}", Chain(&reason));
        turn.events.push(Event::Left { id, reason });
        true
    }

    /// Closes the connection of a removed client, or keeps it open for as long as messages are
    /// unread.
    fn let_linger(&mut self, key: Key, socket: UnixStream, mut unread: Unread, uid: u32) {
        if unread.is_unread(&socket) && self.reactor.watch_end(socket.as_fd(), key).is_ok() {
            self.accounts.lingers(uid);
            self.lingering.insert(key.to_u64(), Lingering { socket, unread, uid: Some(uid) });
        } else {
            self.reactor.forget(socket.as_fd());
            self.closer.close(socket);
        }
    }

    /// Refuses a client that was sent nothing yet, and closes its connection when it has read
    /// that.
    ///
    /// A QEMU that adds a device to a running machine connects first, and reads later. In
    /// between it notices a connection that was closed, and drops what it has not read. Then it
    /// would wait for the memory without end.
    pub(super) fn refuse(&mut self, socket: UnixStream) {
        send::refuse(socket.as_fd(), 0, None);
        let _ = socket.shutdown(Shutdown::Write);
        let key = Key::from_u64(REFUSED + self.refused);
        self.refused += 1;
        let mut unread = Unread::new();
        unread.note_sent(1);
        if unread.is_unread(&socket) && self.reactor.watch_refused(socket.as_fd(), key).is_ok() {
            self.lingering.insert(key.to_u64(), Lingering { socket, unread, uid: None });
            let refused = self.lingering.range(REFUSED..);
            if refused.clone().count() > REFUSALS {
                let oldest = refused.map(|(&key, _)| key).next();
                oldest.into_iter().for_each(|key| self.drop_lingering(key));
            }
        } else {
            self.closer.close(socket);
        }
    }

    /// Closes the connections of refused clients, which may need a descriptor more than they.
    /// Returns whether there were any.
    pub(super) fn drop_refused(&mut self) -> bool {
        let keys: Vec<u64> = self.lingering.range(REFUSED..).map(|(&key, _)| key).collect();
        let any = !keys.is_empty();
        keys.into_iter().for_each(|key| self.drop_lingering(key));
        any
    }

    /// Closes the connection of a removed client if it has read everything or ended.
    pub(super) fn settle(&mut self, key: u64) {
        let Some(lingering) = self.lingering.get_mut(&key) else { return };
        if lingering.unread.is_unread(&lingering.socket) {
            return;
        }
        self.drop_lingering(key);
    }

    fn drop_lingering(&mut self, key: u64) {
        let Some(Lingering { socket, uid, .. }) = self.lingering.remove(&key) else { return };
        uid.into_iter().for_each(|uid| self.accounts.settled(uid));
        self.reactor.forget(socket.as_fd());
        self.closer.close(socket);
    }

    /// Closes the connections of removed clients that have read everything or ended.
    pub(super) fn settle_all(&mut self) {
        let keys: Vec<u64> = self.lingering.keys().copied().collect();
        for key in keys {
            self.settle(key);
        }
    }

    /// Closes all connections at the end of the server. Each of them may have data that its client
    /// sent and the server has not seen. With `hands_over` those that the keeper has go on: they
    /// must not be shut down, and to close a copy never waits.
    pub(super) fn close_all(&mut self, hands_over: bool) {
        for (_, Lingering { socket, .. }) in std::mem::take(&mut self.lingering) {
            self.closer.close(socket);
        }
        while let Some(last) = self.clients.len().checked_sub(1) {
            // The last one: no other has to move.
            let key = self.clients.key(last);
            match self.clients.leave(key) {
                Some((_, connection)) if !hands_over || connection.kept == 0 => {
                    self.closer.close(connection.socket);
                }
                _ => {}
            }
        }
    }

    /// Records the ids that have become free.
    pub(super) fn sync_ids(&mut self) {
        if let Some(keeping) = &mut self.keeping {
            keeping.state.sync_free(&self.clients);
        }
    }

    /// Watches the clients of a server before.
    pub(super) fn watch_all(&mut self) -> io::Result<()> {
        (0..self.clients.len()).try_for_each(|index| {
            let socket = self.clients.payload(index).socket.as_fd();
            self.reactor.watch_client(socket, self.clients.key(index))
        })
    }

    /// Does what the keeper did not take before.
    pub(super) fn keep_up(&mut self) {
        if let Some(keeping) = &mut self.keeping {
            if keeping.is_behind() {
                keeping.work(&mut self.clients);
            }
        }
    }

    /// Whether the keeper has not taken everything yet.
    pub(super) fn is_keeper_behind(&self) -> bool {
        self.keeping.as_ref().is_some_and(Keeping::is_behind)
    }

    /// The descriptors of all clients, of those that left too.
    pub(super) fn descriptors(&self) -> u64 {
        let clients = self.clients.len() as u64 * (1 + u64::from(self.clients.vectors()));
        clients + self.lingering.len() as u64 + self.closer.parked() as u64
    }

    /// Raises the limit of a client that has as many unread messages as it may have, and `want`
    /// more pending.
    #[cold]
    pub(super) fn ask_for_room(&mut self, index: usize, want: usize) -> Room {
        let key = self.clients.key(index);
        let mut swept = false;
        loop {
            let connection = self.clients.payload_mut(index);
            let (unread, socket) = (&mut connection.unread, &connection.socket);
            let room = self.in_flight.ask(key, unread, socket, want);
            if swept || room != Room::Later {
                return room;
            }
            let Some(holders) = self.in_flight.sweep() else { return room };
            for key in holders {
                if let Some(index) = self.clients.index(key) {
                    let connection = self.clients.payload_mut(index);
                    self.in_flight.reclaim(key, &mut connection.unread, &connection.socket);
                }
            }
            self.settle_all();
            swept = true;
        }
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
