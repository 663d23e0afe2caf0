// SPDX-License-Identifier: GPL-2.0-or-later
//! The clients that are connected, and what each must still be told. Pure state: no I/O and no
//! descriptor.
//!
//! **Everything a client is ever told is one walk along a log, and a client is a position in
//! it.** After the greeting a client is told of the members one by one, from the oldest to
//! itself and on. "The peers already here", "your own vectors" and "a peer that joined later"
//! are the same walk. So no client has a queue of messages: a client that does not read has a
//! *cursor* that stands still, and costs nothing more.
//!
//! # Time
//! One counter numbers all joins and all departures. A member's key is the number of its join.
//! So "X left after Y joined" is a comparison of two numbers.
//!
//! # The cursor
//! A cursor names the newest member its client was told of, and how many of that member's
//! vectors. Keys only grow, so a departure moves no cursor: the next member to tell of is the
//! first with a larger key. A client was told of X exactly if its cursor's key is at least X's,
//! for as long as X is here.
//!
//! # The departures
//! All clients share one log of departures (`departures`). A client holds the number of the
//! first departure that it has not *heard*. Departures are told before the walk goes on, so a
//! cursor cannot move while one of them is due. Therefore "was this client told of the member
//! that left?" can be asked late, of the cursor as it stands: a departure is due exactly if the
//! cursor has reached the key of the member that left. All others are skipped.
//!
//! A departure costs one entry in the log, whoever is connected, and no look at any client.

#![forbid(unsafe_code)]

mod departures;
mod ids;
#[cfg(test)]
mod tests;

use departures::{Departure, Departures};
use ids::Ids;

/// The number of a join: a member's name while it is connected. Never given twice.
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

/// One message, as the client understands it.
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

/// The messages before the walk: version, id and memory.
pub(crate) const GREETING: u8 = 3;

/// The newest member that a client was told of, and how many of its vectors.
#[derive(Clone, Copy, Debug, Default)]
struct Cursor {
    key: u64,
    vectors: u32,
}

/// A client's whole state is these few numbers; `payload` is the caller's.
#[derive(Debug)]
struct Member<T> {
    key: u64,
    id: u16,
    greeted: u8,
    cursor: Cursor,
    /// It has heard of every departure with a smaller number.
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

    /// The id that the next member will get. None when all are in use or remembered.
    pub(crate) fn next_id(&mut self) -> Option<u16> {
        if self.ids.is_exhausted() && self.departures.has_grown() {
            // Costs a step for each departure and each member, at most once a departure.
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
        self.ids.next()
    }

    /// For each member, in join order: its key, and the furthest cursor among all members up
    /// to and including it.
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

    /// The key that the next member will get, if nobody leaves before.
    pub(crate) fn next_key(&self) -> Key {
        Key(self.next)
    }

    /// Adds a member. From now on every member, the new one included, is due to be told of it.
    ///
    /// With no id left the payload comes back.
    pub(crate) fn join(&mut self, payload: T) -> Result<u16, T> {
        let Some(id) = self.next_id() else {
            return Err(payload);
        };
        self.ids.take();
        let key = self.next;
        self.next += 1;
        let cursor = Cursor::default();
        self.members.push(Member { key, id, greeted: 0, cursor, heard: key, payload });
        self.set_key(id, key);
        Ok(id)
    }

    /// Removes a member. Every client that was told of it is now due to be told that it left.
    pub(crate) fn leave(&mut self, key: Key) -> Option<(u16, T)> {
        let index = self.index(key)?;
        let member = self.members.remove(index);
        self.set_key(member.id, 0);
        self.departures.add(Departure { id: member.id, key: member.key, left: self.next });
        self.next += 1;
        Some((member.id, member.payload))
    }

    /// The position of a member. Valid until the next `leave`.
    pub(crate) fn index(&self, key: Key) -> Option<usize> {
        self.members.binary_search_by_key(&key.0, |member| member.key).ok()
    }

    /// The position of the first member whose key is at least this one; the number of members
    /// if there is none.
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

    /// How many ids were never given or are free, and how many are remembered: the id of a
    /// client that left, which may not be given again yet.
    pub(crate) fn ids_left(&self) -> (u32, u32) {
        (self.ids.left(), self.departures.len() as u32)
    }

    /// The first member, and the number of its vectors, that `cursor` leaves to be told.
    #[inline]
    fn next_to_tell(&self, cursor: Cursor) -> (usize, u32) {
        // Nearly always the client knows all members, or all but the newest.
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

    /// The departures that the member is due to be told, oldest first.
    fn due(&self, member: &Member<T>) -> impl Iterator<Item = &Departure> + use<'_, T> {
        let reached = member.cursor.key;
        self.departures.since(member.heard).iter().filter(move |departure| departure.key <= reached)
    }

    /// The number of messages that the member at `index` is still to be told.
    pub(crate) fn behind(&self, index: usize) -> u64 {
        let member = &self.members[index];
        let (next, vector) = self.next_to_tell(member.cursor);
        let walk = (self.members.len() - next) as u64 * u64::from(self.vectors);
        let departures = self.due(member).count() as u64;
        u64::from(GREETING - member.greeted) + departures + walk - u64::from(vector)
    }

    /// Calls `each` with what the member at `index` is still to be told, in order: `most`
    /// messages at most, and until `each` returns false.
    ///
    /// The loop is here, and not the caller's: an iterator over all of it is so large that it
    /// costs more than the messages.
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

    /// What the member at `index` is still to be told, in order.
    #[cfg(test)]
    fn messages(&self, index: usize) -> impl Iterator<Item = Message<'_, T>> {
        let mut messages = Vec::new();
        self.for_each_message(index, usize::MAX, |message| {
            messages.push(message);
            true
        });
        messages.into_iter()
    }

    /// Notes that the first `count` messages of `for_each_message` have been told.
    pub(crate) fn note_told(&mut self, index: usize, count: usize) {
        let member = &self.members[index];
        let greeting = count.min(usize::from(GREETING - member.greeted));
        let mut left = count - greeting;
        // Once all that are due have been told, every departure up to now is settled for this
        // client: it must not be asked anew of a cursor that has moved.
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

/// Whether a member was connected when this one left, and may have been told of it. `told` is
/// that of [`Roster::told`].
///
/// Exact for a client that stands still. For one that went on reading it errs towards caution:
/// its cursor may have passed the key after the departure.
fn is_remembered(departure: &Departure, told: &[(u64, u64)]) -> bool {
    let here = told.partition_point(|(key, _)| *key < departure.left);
    here > 0 && told[here - 1].1 >= departure.key
}
