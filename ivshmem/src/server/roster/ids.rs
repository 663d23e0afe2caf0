// SPDX-License-Identifier: GPL-2.0-or-later
//! The ids that can be given to new clients.
//!
//! A QEMU corrupts its heap if an id comes back after the QEMU was told that the id's owner left.
//! So an id is free again only when no connected client was told of its last owner. The roster
//! decides that. This module only knows which ids were never given, and which are free again.

#![forbid(unsafe_code)]

use std::collections::VecDeque;

use crate::protocol::ID_SPACE;

#[derive(Debug)]
pub(super) struct Ids {
    first: u16,
    space: u32,
    /// The number of ids that have ever been given. All ids are given once, in turn, before any id
    /// is given again, as the reference does.
    given: u32,
    /// The free ids. The id that has been free for the longest time is given first.
    free: VecDeque<u16>,
    /// How often an id became free.
    frees: u64,
}

impl Ids {
    pub(super) fn new(first: u16, space: u32) -> Self {
        assert!((1..=ID_SPACE).contains(&space), "ids are 16 bits");
        Self { first, space, given: 0, free: VecDeque::new(), frees: 0 }
    }

    pub(super) fn restore(first: u16, space: u32, given: u32, frees: u64, free: Vec<u16>) -> Self {
        Self { given, frees, free: free.into(), ..Self::new(first, space) }
    }

    #[cfg(test)]
    pub(super) fn first(&self) -> u16 {
        self.first
    }

    pub(super) fn given(&self) -> u32 {
        self.given
    }

    #[cfg(test)]
    pub(super) fn frees(&self) -> u64 {
        self.frees
    }

    /// See [`Roster::freed_since`](super::Roster::freed_since).
    pub(super) fn freed_since(&self, known: u64) -> impl Iterator<Item = (u64, u16)> + '_ {
        // Ids are appended, and taken at the front.
        let start = self.frees - self.free.len() as u64;
        let skip = known.saturating_sub(start).min(self.free.len() as u64);
        let newer = self.free.range(skip as usize..);
        (start + skip + 1..).zip(newer.copied())
    }

    /// The id that the next `take` removes.
    pub(super) fn next(&self) -> Option<u16> {
        if self.given < self.space {
            Some(self.first.wrapping_add(self.given as u16))
        } else {
            self.free.front().copied()
        }
    }

    pub(super) fn take(&mut self) {
        if self.given < self.space {
            self.given += 1;
        } else {
            self.free.pop_front();
        }
    }

    pub(super) fn space(&self) -> u32 {
        self.space
    }

    pub(super) fn is_exhausted(&self) -> bool {
        self.left() == 0
    }

    /// The number of ids that can be given.
    pub(super) fn left(&self) -> u32 {
        self.space - self.given + self.free.len() as u32
    }

    pub(super) fn give_back(&mut self, id: u16) {
        self.free.push_back(id);
        self.frees += 1;
    }
}
