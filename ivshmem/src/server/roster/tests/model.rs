// SPDX-License-Identifier: GPL-2.0-or-later
//! A model to test the roster against: clients that read messages as a QEMU does, and panic
//! where a QEMU would hang or corrupt its heap.
//!
//! The model records the owner of each id and the messages of each client. It looks into the
//! roster only for state that no client can see, such as the number of pending messages.

use std::collections::{BTreeMap, BTreeSet};

use super::super::{Key, Message, Roster};
use crate::server::state::{State, Things};

/// The last owner of an id. Joins are numbered from 1, and the number is the payload.
#[derive(Clone)]
struct Owner {
    number: u64,
    /// Set when it left: clients with a smaller number had joined before.
    left: Option<u64>,
}

/// A peer that a client knows.
#[derive(Clone)]
struct Known {
    id: u16,
    number: u64,
    vectors: u32,
}

#[derive(Clone)]
pub(super) struct Client {
    pub(super) key: Key,
    /// Its record in the state file.
    pub(super) slot: u32,
    pub(super) number: u64,
    pub(super) id: u16,
    greeted: u8,
    /// The peers in the order in which they were told; the client itself is among them.
    known: Vec<Known>,
    gone: BTreeSet<u16>,
    /// The newest join that it was told of.
    newest: u64,
}

impl Client {
    /// Reads one message as a QEMU does.
    fn hear(&mut self, message: Message<'_, u64>, vectors: u32, owners: &BTreeMap<u16, Owner>) {
        let me = self.id;
        match message {
            Message::Version => self.greet(0),
            Message::YourId(id) => {
                assert_eq!(id, me, "the greeting's id");
                self.greet(1);
            }
            Message::Memory => self.greet(2),
            Message::Vector { id, owner: &number, vector } => {
                assert_eq!(self.greeted, 3, "{me} hears of {id} before the greeting is over");
                assert!(!self.gone.contains(&id), "{me} was told that {id} is gone: it came back");
                assert_eq!(number == self.number, id == me, "{me} has its id alone");
                let owner = &owners[&id];
                assert!(owner.number == number && owner.left.is_none(), "{me}: {id} is not here");
                if number != self.newest {
                    assert!(number > self.newest, "{me} hears of {id} out of join order");
                    // A peer that left before all its vectors were told is not in `known`.
                    let complete = self.known.last().is_none_or(|last| last.vectors == vectors);
                    assert!(complete, "{me} hears of {id} before the last one is complete");
                    self.known.push(Known { id, number, vectors: 0 });
                    self.newest = number;
                }
                let last = self.known.last_mut().expect("the newest is known");
                assert_eq!((last.id, last.number), (id, number), "{me} counts for the wrong peer");
                assert_eq!(vector, last.vectors as usize, "{me} counts the vectors of {id}");
                last.vectors += 1;
                assert!(last.vectors <= vectors, "{me} hears of too many vectors of {id}");
            }
            Message::Gone(id) => {
                assert_ne!(id, me, "{me} is told that itself is gone");
                assert!(self.gone.insert(id), "{me} is told twice that {id} is gone");
                let at = self.known.iter().position(|known| known.id == id);
                let at = at.unwrap_or_else(|| panic!("{me} never was told of {id}, who is gone"));
                let known = self.known.remove(at);
                let owner = &owners[&id];
                assert!(owner.number == known.number && owner.left.is_some(), "{id} is here");
            }
        }
    }

    fn greet(&mut self, step: u8) {
        assert_eq!(self.greeted, step, "{} is greeted in order, and once", self.id);
        self.greeted += 1;
    }

    /// The peers that it knows, itself included.
    pub(super) fn view(&self) -> Vec<u16> {
        self.known.iter().map(|known| known.id).collect()
    }
}

pub(super) struct World {
    pub(super) roster: Roster<u64>,
    pub(super) state: State,
    pub(super) model: Model,
    vectors: u32,
    first: u16,
    space: u32,
}

/// What must be true of the roster.
#[derive(Clone)]
pub(super) struct Model {
    /// In join order, like the roster's members.
    pub(super) clients: Vec<Client>,
    owners: BTreeMap<u16, Owner>,
    next: u64,
}

impl Model {
    /// The client at position `at` in join order leaves.
    pub(super) fn end(&mut self, at: usize) -> Client {
        let client = self.clients.remove(at);
        self.owners.get_mut(&client.id).expect("it had joined").left = Some(self.next);
        client
    }
}

impl World {
    pub(super) fn new(vectors: u32, first: u16, space: u32) -> Self {
        Self {
            roster: Roster::new(vectors, first, space),
            state: State::create(vectors, first, space, &Things::default()).expect("a memfd"),
            model: Model { clients: Vec::new(), owners: BTreeMap::new(), next: 1 },
            vectors,
            first,
            space,
        }
    }

    /// All ids, in the order in which they are first given.
    pub(super) fn all_ids(&self) -> impl Iterator<Item = u16> + use<> {
        let first = u32::from(self.first);
        (first..first + self.space).map(|id| (id % 65_536) as u16)
    }

    /// A client joins or is refused. A refusal must have a reason.
    pub(super) fn join(&mut self) -> Option<u16> {
        let foretold = self.roster.next_id();
        let key = self.roster.next_key();
        // As the server does: a client without a record would be forgotten by a restart.
        let slot = foretold.map_or(0, |id| self.state.reserve(id).expect("there is memory"));
        match self.roster.join(self.model.next as u32 % 3, self.model.next) {
            Ok(id) => {
                let member = self.roster.saved_member(self.roster.len() - 1);
                let cookie = self.model.next;
                let eventfds: Vec<u32> = (0..self.vectors).collect();
                self.state.joined(slot, &self.roster, &member, cookie, &eventfds);
                assert_eq!(Some(id), foretold, "the id that was foretold");
                assert!(self.model.clients.iter().all(|client| client.id != id), "{id} is taken");
                let given = self.model.owners.len() as u32;
                if given < self.space {
                    assert_eq!(id, self.first.wrapping_add(given as u16), "fresh ids, in turn");
                } else {
                    assert!(self.model.owners.contains_key(&id), "{id} is outside the space");
                }
                let number = self.model.next;
                self.model.next += 1;
                self.model.owners.insert(id, Owner { number, left: None });
                self.model.clients.push(Client {
                    key,
                    slot,
                    number,
                    id,
                    greeted: 0,
                    known: Vec::new(),
                    gone: BTreeSet::new(),
                    newest: 0,
                });
                Some(id)
            }
            Err(payload) => {
                assert_eq!(payload, self.model.next, "the payload comes back");
                assert_eq!(foretold, None, "nothing was foretold");
                let free = self.all_ids().find(|id| !self.is_held(*id));
                assert_eq!(free, None, "refused, though this id is free");
                None
            }
        }
    }

    /// Whether the id is in use, or may not be given again by the rule in `ids.rs`.
    fn is_held(&self, id: u16) -> bool {
        let Some(owner) = self.model.owners.get(&id) else { return false };
        let Some(left) = owner.left else { return true };
        self.model
            .clients
            .iter()
            .any(|client| client.number < left && client.newest >= owner.number)
    }

    /// The client at position `at` in join order leaves.
    pub(super) fn leave(&mut self, at: usize) -> u16 {
        let Client { key, slot, number, id, .. } = self.model.end(at);
        assert_eq!(self.roster.leave(key), Some((id, number)));
        self.state.left(slot, &self.roster.last_departure().expect("it has just left"));
        assert_eq!(self.roster.leave(key), None, "nobody leaves twice");
        id
    }

    /// The client at position `at` in join order reads at most `limit` messages. Returns the number
    /// of messages.
    pub(super) fn tell(&mut self, at: usize, limit: usize) -> usize {
        let client = &mut self.model.clients[at];
        assert_eq!(self.roster.index(client.key), Some(at), "the roster is in join order");
        let behind = self.roster.behind(at);
        let slot = client.slot;
        let mut count = 0;
        for message in self.roster.messages(at).take(limit) {
            if count == 0 {
                self.state.record_of(slot).sending(behind.min(limit as u64) as u32);
            }
            client.hear(message, self.vectors, &self.model.owners);
            count += 1;
        }
        self.roster.note_told(at, count);
        if count > 0 {
            self.state.record_of(slot).sent(&self.roster.progress(at), None);
        }
        assert_eq!(self.roster.behind(at), behind - count as u64, "{count} messages later");
        count
    }

    /// Every client reads, `chunk` messages at a time, until no message is pending. Then each
    /// client's view must equal the roster.
    pub(super) fn rest(&mut self, chunk: usize) {
        for at in 0..self.model.clients.len() {
            let behind = self.roster.behind(at);
            let mut told = 0;
            loop {
                match self.tell(at, chunk) {
                    0 => break,
                    count => told += count as u64,
                }
            }
            assert_eq!(told, behind, "messages until rest, as foretold");
        }
        let here: Vec<u16> = self.roster.iter().map(|(id, _)| id).collect();
        for (client, id) in self.model.clients.iter().zip(&here) {
            assert_eq!((client.id, client.greeted), (*id, 3));
            assert_eq!(client.view(), here, "the view of {id}");
            let complete = client.known.iter().all(|known| known.vectors == self.vectors);
            assert!(complete, "{id} knows every vector");
        }
    }

    /// Checks that the size of the roster's state is bounded.
    pub(super) fn check_bounds(&self) {
        assert_eq!(self.roster.len(), self.model.clients.len());
        let departures = self.roster.departures.len();
        assert!(departures <= self.space as usize, "departures beyond the id space");
        for (at, client) in self.model.clients.iter().enumerate() {
            assert_eq!(self.roster.index_of_id(client.id), Some(at), "found by its id");
        }
        let (left, remembered) = self.roster.ids_left();
        let accounted = self.roster.len() + (left + remembered) as usize;
        assert_eq!(accounted, self.space as usize, "each id is used, free, or remembered, once");
    }
}
