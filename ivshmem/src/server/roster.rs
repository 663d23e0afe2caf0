// SPDX-License-Identifier: GPL-2.0-or-later
//! Who is here, and what each must still be told.
//!
//! The one idea of this server: **everything a client is ever told is one walk along the
//! roster, in join order.** After the greeting a client is told of the members one by one,
//! from the oldest to itself and on. "The peers already here", "your own vectors" and "a peer
//! that joined later" are the same walk, so nobody has a queue of messages: a client that
//! does not read has a *cursor* that stands still, and costs nothing more.
//!
//! A cursor names the newest member its client was told of, and how many of that member's
//! vectors. Keys only grow, so a member that leaves moves nobody's cursor: the next one to
//! tell of is the first with a larger key. And "was told of X" is `cursor.key >= X.key`, for
//! as long as X is here.
//!
//! There is no I/O in here and no descriptor: what a member brings along is the caller's.

#![forbid(unsafe_code)]

use std::collections::VecDeque;

mod ids;
#[cfg(test)]
mod tests;

use ids::Ids;

/// A member for as long as it is here. Grows with every join and is never given twice.
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

/// One message, as the client is to understand it.
#[derive(Debug)]
pub(crate) enum Message<'a, T> {
    /// The protocol version.
    Version,
    /// The id that the client has been given.
    YourId(u16),
    /// The shared memory.
    Memory,
    /// One vector of a peer, or of the client itself.
    Vector { id: u16, owner: &'a T, vector: usize },
    /// A peer that the client was told of has left.
    Gone(u16),
}

/// Version, id and memory, before the walk.
const GREETING: u8 = 3;

/// The newest member that a client was told of, and how many of its vectors.
#[derive(Clone, Copy, Debug, Default)]
struct Cursor {
    key: u64,
    vectors: u32,
}

#[derive(Debug)]
struct Member<T> {
    key: u64,
    id: u16,
    greeted: u8,
    cursor: Cursor,
    /// Ids whose leaving is still to be told. At most one entry for an id: an id that this
    /// client was told of is not given to anybody while it is connected.
    gone: VecDeque<u16>,
    payload: T,
}

/// The members, in join order.
#[derive(Debug)]
pub(crate) struct Roster<T> {
    members: Vec<Member<T>>,
    vectors: u32,
    next_key: u64,
    ids: Ids,
}

impl<T> Roster<T> {
    /// An empty roster whose members have `vectors` vectors each (at least 1), and whose
    /// ids are `first`, `first + 1`, … modulo 65,536, `space` of them.
    pub(crate) fn new(vectors: u32, first: u16, space: u32) -> Self {
        assert!(vectors > 0, "a member has at least one vector");
        Self { members: Vec::new(), vectors, next_key: 1, ids: Ids::new(first, space) }
    }

    pub(crate) fn len(&self) -> usize {
        self.members.len()
    }

    pub(crate) fn vectors(&self) -> u32 {
        self.vectors
    }

    /// The id that the next to join will get; none when all are in use or remembered.
    pub(crate) fn next_id(&mut self) -> Option<u16> {
        self.ids.next(&self.members)
    }

    /// The key that the next to join will get.
    pub(crate) fn next_key(&self) -> Key {
        Key(self.next_key)
    }

    /// Lets a member in. Everybody, itself included, is now to be told of it.
    ///
    /// With no id left the payload comes back.
    pub(crate) fn join(&mut self, payload: T) -> Result<u16, T> {
        let Some(id) = self.ids.take(&self.members) else {
            return Err(payload);
        };
        let key = self.next_key;
        self.next_key += 1;
        self.members.push(Member {
            key,
            id,
            greeted: 0,
            cursor: Cursor::default(),
            gone: VecDeque::new(),
            payload,
        });
        Ok(id)
    }

    /// Lets a member go. Whoever was told of it is now to be told that it is gone.
    pub(crate) fn leave(&mut self, key: Key) -> Option<(u16, T)> {
        let index = self.index(key)?;
        let left = self.members.remove(index);
        for member in &mut self.members {
            if member.cursor.key >= left.key {
                member.gone.push_back(left.id);
            }
        }
        self.ids.retire(left.id, left.key, self.next_key);
        Some((left.id, left.payload))
    }

    /// Where a member stands now. Good until the next `leave`.
    pub(crate) fn index(&self, key: Key) -> Option<usize> {
        self.members.binary_search_by_key(&key.0, |member| member.key).ok()
    }

    /// The members in join order.
    pub(crate) fn iter(&self) -> impl DoubleEndedIterator<Item = (u16, &T)> + ExactSizeIterator {
        self.members.iter().map(|member| (member.id, &member.payload))
    }

    pub(crate) fn key(&self, index: usize) -> Key {
        Key(self.members[index].key)
    }

    pub(crate) fn payload(&self, index: usize) -> &T {
        &self.members[index].payload
    }

    pub(crate) fn payload_mut(&mut self, index: usize) -> &mut T {
        &mut self.members[index].payload
    }

    /// The first member, and the number of its vectors, that `cursor` leaves to be told.
    fn next_to_tell(&self, cursor: Cursor) -> (usize, u32) {
        // Nearly always the client knows everybody, or everybody but the newest.
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

    /// Messages that the member at `index` is still to be told.
    pub(crate) fn behind(&self, index: usize) -> u64 {
        let member = &self.members[index];
        let (next, vector) = self.next_to_tell(member.cursor);
        let walk = (self.members.len() - next) as u64 * u64::from(self.vectors);
        u64::from(GREETING - member.greeted) + member.gone.len() as u64 + walk - u64::from(vector)
    }

    /// What the member at `index` is still to be told, in order.
    pub(crate) fn messages(&self, index: usize) -> impl Iterator<Item = Message<'_, T>> {
        let member = &self.members[index];
        let greeting = (member.greeted..GREETING).map(|n| match n {
            0 => Message::Version,
            1 => Message::YourId(member.id),
            _ => Message::Memory,
        });
        let gone = member.gone.iter().map(|&id| Message::Gone(id));
        let (next, first) = self.next_to_tell(member.cursor);
        let walk = self.members[next..].iter().enumerate().flat_map(move |(n, peer)| {
            let from = if n == 0 { first } else { 0 };
            (from..self.vectors).map(|vector| Message::Vector {
                id: peer.id,
                owner: &peer.payload,
                vector: vector as usize,
            })
        });
        greeting.chain(gone).chain(walk)
    }

    /// Notes that the first `count` of `messages(index)` have been told.
    pub(crate) fn told(&mut self, index: usize, count: usize) {
        let member = &mut self.members[index];
        let greeting = count.min(usize::from(GREETING - member.greeted));
        member.greeted += greeting as u8;
        let gone = (count - greeting).min(member.gone.len());
        if gone > 0 {
            member.gone.drain(..gone);
            if member.gone.is_empty() {
                // A crowd that left while this client was not reading leaves no memory behind.
                member.gone = VecDeque::new();
            }
        }
        let walked = count - greeting - gone;
        if walked == 0 {
            return;
        }
        let (next, first) = self.next_to_tell(self.members[index].cursor);
        let last = first as usize + walked - 1;
        let vectors = self.vectors as usize;
        self.members[index].cursor = Cursor {
            key: self.members[next + last / vectors].key,
            vectors: (last % vectors) as u32 + 1,
        };
    }
}
