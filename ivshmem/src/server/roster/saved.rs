// SPDX-License-Identifier: GPL-2.0-or-later
//! The whole state of a roster as plain numbers: what a state file stores, and what a roster is
//! restored from.
//!
//! It checks nothing: the reader of the numbers does. It knows no file.

#![forbid(unsafe_code)]

use super::departures::{Departure, Departures};
use super::ids::Ids;
use super::{Cursor, GREETING, Member, Roster};

/// A member: see the fields of `Member`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SavedMember {
    pub(crate) key: u64,
    pub(crate) id: u16,
    pub(crate) owner: u32,
    pub(crate) progress: Progress,
}

/// What a member was told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    pub(crate) greeted: u8,
    /// The key of the newest member that it was told of, and how many vectors of that.
    pub(crate) cursor: (u64, u32),
    pub(crate) heard: u64,
}

/// A departure: see the fields of `Departure`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SavedDeparture {
    pub(crate) id: u16,
    pub(crate) key: u64,
    pub(crate) left: u64,
    pub(crate) owner: u32,
}

/// A roster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Saved {
    pub(crate) vectors: u32,
    pub(crate) first: u16,
    pub(crate) space: u32,
    /// The number of ids that were ever given.
    pub(crate) given: u32,
    /// The number of the next join or departure.
    pub(crate) next: u64,
    /// How often an id became free.
    pub(crate) frees: u64,
    /// The free ids. The first one is given first.
    pub(crate) free: Vec<u16>,
    /// In the order of departure.
    pub(crate) departures: Vec<SavedDeparture>,
    /// In join order.
    pub(crate) members: Vec<SavedMember>,
}

impl Saved {
    /// Makes the member at `index` leave, as [`Roster::leave`] does.
    pub(crate) fn leave(&mut self, index: usize) -> SavedDeparture {
        let SavedMember { key, id, owner, .. } = self.members.remove(index);
        let departure = SavedDeparture { id, key, left: self.next, owner };
        self.departures.push(departure);
        self.next += 1;
        departure
    }
}

impl<T> Roster<T> {
    /// Makes a roster from its saved state. `payloads` has one for each member, in join order.
    pub(crate) fn restore(saved: Saved, payloads: impl IntoIterator<Item = T>) -> Self {
        let mut roster = Self::new(saved.vectors, saved.first, saved.space);
        roster.next = saved.next;
        roster.ids = Ids::restore(saved.first, saved.space, saved.given, saved.frees, saved.free);
        roster.departures = Departures::default();
        for SavedDeparture { id, key, left, owner } in saved.departures {
            roster.departures.add(Departure { id, key, left, owner });
        }
        for (member, payload) in saved.members.into_iter().zip(payloads) {
            let SavedMember { key, id, owner, progress } = member;
            let (cursor_key, vectors) = progress.cursor;
            roster.set_key(id, key);
            roster.members.push(Member {
                key,
                id,
                owner,
                greeted: progress.greeted.min(GREETING),
                cursor: Cursor { key: cursor_key, vectors },
                heard: progress.heard,
                payload,
            });
        }
        roster
    }

    /// The state of the member at `index`.
    pub(crate) fn saved_member(&self, index: usize) -> SavedMember {
        let Member { key, id, owner, .. } = self.members[index];
        SavedMember { key, id, owner, progress: self.progress(index) }
    }

    /// What the member at `index` was told.
    #[inline]
    pub(crate) fn progress(&self, index: usize) -> Progress {
        let Member { greeted, cursor, heard, .. } = self.members[index];
        Progress { greeted, cursor: (cursor.key, cursor.vectors), heard }
    }

    /// The newest departure.
    pub(crate) fn last_departure(&self) -> Option<SavedDeparture> {
        let &Departure { id, key, left, owner } = self.departures.last()?;
        Some(SavedDeparture { id, key, left, owner })
    }

    /// The number of ids that were ever given.
    pub(crate) fn ids_given(&self) -> u32 {
        self.ids.given()
    }

    /// The ids that became free after the first `known` times that an id did, each with the number
    /// of that time. Ids that were given again are left out.
    pub(crate) fn freed_since(&self, known: u64) -> impl Iterator<Item = (u64, u16)> + '_ {
        self.ids.freed_since(known)
    }

    #[cfg(test)]
    pub(crate) fn save(&self) -> Saved {
        let departures = self.departures.since(0).iter();
        Saved {
            vectors: self.vectors,
            first: self.ids.first(),
            space: self.ids.space(),
            given: self.ids.given(),
            next: self.next,
            frees: self.ids.frees(),
            free: self.ids.freed_since(0).map(|(_, id)| id).collect(),
            departures: departures
                .map(|&Departure { id, key, left, owner }| SavedDeparture { id, key, left, owner })
                .collect(),
            members: (0..self.len()).map(|index| self.saved_member(index)).collect(),
        }
    }
}
