// SPDX-License-Identifier: GPL-2.0-or-later
//! The connected clients (the members), and the messages that are pending for each. Pure state:
//! no I/O and no descriptors.
//!
//! **All messages to a client come from one list that all clients share, and a client is a
//! position in that list.** After the greeting a client is told of the members in join order:
//! first the members that joined before it, then itself, then the members that joined later. So
//! no client has a queue of its own. The *cursor* of a client that does not read stays where it
//! is, and needs no more memory.
//!
//! # Time
//! One counter numbers all joins and all departures. A member's key is the number of its join.
//! So "X left after Y joined" is a comparison of two numbers.
//!
//! # The cursor
//! A cursor holds the key of the newest member that the client was told of, and the number of
//! that member's vectors that were sent. Keys only grow, so a departure changes no cursor: the
//! next member is the first one with a larger key. While X is connected, a client was told of X
//! exactly if the cursor's key is at least X's key.
//!
//! # The departures
//! All clients share one log of departures (`departures`). Each client holds the number of the
//! first departure that it has not *heard*. Pending departures are sent before members, so a
//! cursor does not move while a departure is pending. Therefore the cursor still tells whether
//! the client was told of the member that left: the departure is sent exactly if the cursor's
//! key is at least the member's key. Other departures are skipped.
//!
//! A departure adds one entry to the log. It does not look at any client.

#![forbid(unsafe_code)]

mod departures;
mod ids;
mod saved;
#[cfg(test)]
mod tests;

use departures::{Departure, Departures};
use ids::Ids;
pub(crate) use saved::{Progress, Saved, SavedDeparture, SavedMember};

/// The number of a join. It identifies a member, and is never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key(u64);

impl Key {
    pub(crate) fn to_u64(self) -> u64 {
        self.0
    }

    pub(crate) fn from_u64(key: u64) -> Self {
        Self(key)
    }
}

/// One message of the protocol, by its meaning.
#[derive(Debug)]
pub(crate) enum Message<'a, T> {
    /// The protocol version.
    Version,
    /// The id that the client was given.
    YourId(u16),
    /// The shared memory.
    Memory,
    /// One vector of a peer, or of the client itself.
    Vector { id: u16, owner: &'a T, vector: usize },
    /// A peer that the client was told of has left.
    Gone(u16),
}

/// The number of messages in the greeting: version, id and memory.
pub(crate) const GREETING: u8 = 3;

/// The newest member that a client was told of, and the number of its vectors that were sent.
#[derive(Clone, Copy, Debug, Default)]
struct Cursor {
    key: u64,
    vectors: u32,
}

/// The whole state of a client. `payload` belongs to the caller.
#[derive(Debug)]
struct Member<T> {
    key: u64,
    id: u16,
    /// The user on whose account its id is remembered when it has left.
    owner: u32,
    greeted: u8,
    cursor: Cursor,
    /// Every departure with a smaller number was sent to it or skipped.
    heard: u64,
    payload: T,
}

/// The members, in join order, and the departures.
#[derive(Debug)]
pub(crate) struct Roster<T> {
    members: Vec<Member<T>>,
    /// The key of the member with each id; 0 where there is none.
    keys: Vec<u64>,
    vectors: u32,
    /// The number of the next join or departure.
    next: u64,
    departures: Departures,
    ids: Ids,
}

impl<T> Roster<T> {
    /// An empty roster whose members have `vectors` vectors each (at least 1). Its ids are
    /// `first`, `first + 1`, … modulo 65,536, `space` of them.
    pub(crate) fn new(vectors: u32, first: u16, space: u32) -> Self {
        assert!(vectors > 0, "a member has at least one vector");
        Self {
            members: Vec::new(),
            keys: Vec::new(),
            vectors,
            next: 1,
            departures: Departures::default(),
            ids: Ids::new(first, space),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.members.len()
    }

    pub(crate) fn vectors(&self) -> u32 {
        self.vectors
    }

    /// The id that the next member will get. None if all ids are in use or remembered.
    pub(crate) fn next_id(&mut self) -> Option<u16> {
        if self.ids.is_exhausted() {
            self.forget();
        }
        self.ids.next()
    }

    /// Frees the remembered ids of which no member was told.
    pub(crate) fn forget(&mut self) {
        if self.departures.has_grown() {
            // Takes a step for each departure and each member. Runs at most once for each
            // departure.
            let told = self.told();
            let ids = &mut self.ids;
            self.departures.forget(|departure| {
                let remembered = is_remembered(departure, &told);
                if !remembered {
                    ids.give_back(departure.id);
                }
                !remembered
            });
        }
    }

    /// The number of ids, in use or not.
    pub(crate) fn id_space(&self) -> u32 {
        self.ids.space()
    }

    /// The ids that are remembered on the account of `owner`. Some may be free again: see
    /// [`forget`](Self::forget).
    pub(crate) fn remembered_of(&self, owner: u32) -> u32 {
        self.departures.count_of(owner)
    }

    /// The owners on whose account ids are remembered.
    pub(crate) fn owners(&self) -> impl Iterator<Item = u32> + '_ {
        self.departures.owners()
    }

    /// Returns for each member, in join order, its key, and the largest cursor key of the members
    /// up to and including it.
    fn told(&self) -> Vec<(u64, u64)> {
        let mut furthest = 0;
        self.members
            .iter()
            .map(|member| {
                furthest = member.cursor.key.max(furthest);
                (member.key, furthest)
            })
            .collect()
    }

    /// The key that the next member will get if no member leaves before.
    pub(crate) fn next_key(&self) -> Key {
        Key(self.next)
    }

    /// Adds a member of the user `owner`. Its vectors become pending for every member, itself
    /// included.
    ///
    /// If no id is left, it returns the payload as the error.
    pub(crate) fn join(&mut self, owner: u32, payload: T) -> Result<u16, T> {
        let Some(id) = self.next_id() else {
            return Err(payload);
        };
        self.ids.take();
        let key = self.next;
        self.next += 1;
        let cursor = Cursor::default();
        self.members.push(Member { key, id, owner, greeted: 0, cursor, heard: key, payload });
        self.set_key(id, key);
        Ok(id)
    }

    /// Removes a member. Its departure becomes pending for every client that was told of it.
    pub(crate) fn leave(&mut self, key: Key) -> Option<(u16, T)> {
        let index = self.index(key)?;
        let member = self.members.remove(index);
        self.set_key(member.id, 0);
        let Member { id, key, owner, .. } = member;
        self.departures.add(Departure { id, key, left: self.next, owner });
        self.next += 1;
        Some((member.id, member.payload))
    }

    /// The position of a member. Valid until the next `leave`.
    pub(crate) fn index(&self, key: Key) -> Option<usize> {
        self.members.binary_search_by_key(&key.0, |member| member.key).ok()
    }

    /// The position of the first member whose key is at least this one. If there is none, the
    /// number of members.
    pub(crate) fn index_from(&self, key: Key) -> usize {
        self.members.partition_point(|member| member.key < key.0)
    }

    /// The position of the member with this id.
    pub(crate) fn index_of_id(&self, id: u16) -> Option<usize> {
        self.index(Key(*self.keys.get(usize::from(id))?))
    }

    fn set_key(&mut self, id: u16, key: u64) {
        let id = usize::from(id);
        if id >= self.keys.len() {
            // Ids are given in turn: a doubling would waste half of it.
            let len = (id + 1).next_multiple_of(1024);
            self.keys.reserve_exact(len - self.keys.len());
            self.keys.resize(len, 0);
        }
        self.keys[id] = key;
    }

    /// The members in join order.
    pub(crate) fn iter(&self) -> impl DoubleEndedIterator<Item = (u16, &T)> + ExactSizeIterator {
        self.members.iter().map(|member| (member.id, &member.payload))
    }

    pub(crate) fn key(&self, index: usize) -> Key {
        Key(self.members[index].key)
    }

    pub(crate) fn id(&self, index: usize) -> u16 {
        self.members[index].id
    }

    /// The user of the member at `index`.
    pub(crate) fn owner(&self, index: usize) -> u32 {
        self.members[index].owner
    }

    pub(crate) fn payload(&self, index: usize) -> &T {
        &self.members[index].payload
    }

    pub(crate) fn payload_mut(&mut self, index: usize) -> &mut T {
        &mut self.members[index].payload
    }

    /// Messages of the greeting that the member at `index` has not been sent yet.
    pub(crate) fn greeting_left(&self, index: usize) -> usize {
        usize::from(GREETING - self.members[index].greeted)
    }

    /// Returns the number of ids that can be given, and the number of ids of departed clients
    /// that may not be given again yet.
    pub(crate) fn ids_left(&self) -> (u32, u32) {
        (self.ids.left(), self.departures.len() as u32)
    }

    /// Returns the position of the first member that is pending for `cursor`, and its first pending
    /// vector.
    #[inline]
    fn next_to_tell(&self, cursor: Cursor) -> (usize, u32) {
        // Usually the client was told of all members, or of all except the newest.
        let len = self.members.len();
        let known = |index: usize| self.members[index].key <= cursor.key;
        let next = if len == 0 || known(len - 1) {
            len
        } else if len == 1 || known(len - 2) {
            len - 1
        } else {
            self.members.partition_point(|member| member.key <= cursor.key)
        };
        match next.checked_sub(1) {
            Some(last) if self.members[last].key == cursor.key && cursor.vectors < self.vectors => {
                (last, cursor.vectors)
            }
            _ => (next, 0),
        }
    }

    /// The departures that are pending for the member, oldest first.
    fn due(&self, member: &Member<T>) -> impl Iterator<Item = &Departure> + use<'_, T> {
        let reached = member.cursor.key;
        self.departures.since(member.heard).iter().filter(move |departure| departure.key <= reached)
    }

    /// The number of messages that are pending for the member at `index`.
    pub(crate) fn behind(&self, index: usize) -> u64 {
        let member = &self.members[index];
        let (next, vector) = self.next_to_tell(member.cursor);
        let walk = (self.members.len() - next) as u64 * u64::from(self.vectors);
        let departures = self.due(member).count() as u64;
        u64::from(GREETING - member.greeted) + departures + walk - u64::from(vector)
    }

    /// Calls `each` with the pending messages of the member at `index`, in order, until `each`
    /// returns false, and for `most` messages at most.
    ///
    /// This is a loop and not an iterator, because an iterator over all three parts is so large
    /// that copying it costs more than the messages.
    #[inline]
    pub(crate) fn for_each_message<'a>(
        &'a self,
        index: usize,
        most: usize,
        mut each: impl FnMut(Message<'a, T>) -> bool,
    ) {
        let member = &self.members[index];
        let mut left = most;
        let mut each = |message| {
            let more = left > 0 && each(message);
            left = left.saturating_sub(1);
            more
        };
        for step in member.greeted..GREETING {
            let message = match step {
                0 => Message::Version,
                1 => Message::YourId(member.id),
                _ => Message::Memory,
            };
            if !each(message) {
                return;
            }
        }
        for departure in self.due(member) {
            if !each(Message::Gone(departure.id)) {
                return;
            }
        }
        let (next, mut first) = self.next_to_tell(member.cursor);
        for peer in &self.members[next..] {
            for vector in first..self.vectors {
                let (id, owner, vector) = (peer.id, &peer.payload, vector as usize);
                if !each(Message::Vector { id, owner, vector }) {
                    return;
                }
            }
            first = 0;
        }
    }

    /// The pending messages of the member at `index`, in order.
    #[cfg(test)]
    fn messages(&self, index: usize) -> impl Iterator<Item = Message<'_, T>> {
        let mut messages = Vec::new();
        self.for_each_message(index, usize::MAX, |message| {
            messages.push(message);
            true
        });
        messages.into_iter()
    }

    /// Records that the first `count` messages of `for_each_message` have been sent.
    pub(crate) fn note_told(&mut self, index: usize, count: usize) {
        let member = &self.members[index];
        let greeting = count.min(usize::from(GREETING - member.greeted));
        let mut left = count - greeting;
        // When all pending departures have been sent, no departure up to now matters to this client
        // any more. They must not be compared again with a cursor that has moved.
        let mut heard = self.next;
        for departure in self.due(member) {
            if left == 0 {
                heard = departure.left;
                break;
            }
            left -= 1;
        }
        let mut cursor = member.cursor;
        if left > 0 {
            let (next, first) = self.next_to_tell(cursor);
            let last = first as usize + left - 1;
            let vectors = self.vectors as usize;
            cursor = Cursor {
                key: self.members[next + last / vectors].key,
                vectors: (last % vectors) as u32 + 1,
            };
        }
        let member = &mut self.members[index];
        member.greeted += greeting as u8;
        member.heard = heard;
        member.cursor = cursor;
    }
}

/// Whether a connected client may have been told of the member that left, so that the id may not
/// be given again. Only clients that were connected when it left count. `told` is the result of
/// [`Roster::told`].
///
/// The answer is exact for a client that has not read since the departure. A client that has read
/// since then may count although it was never told: its cursor may have passed the key after the
/// departure. That keeps an id back, which is safe.
fn is_remembered(departure: &Departure, told: &[(u64, u64)]) -> bool {
    let here = told.partition_point(|(key, _)| *key < departure.left);
    here > 0 && told[here - 1].1 >= departure.key
}
