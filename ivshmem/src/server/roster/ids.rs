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
}

impl Ids {
    pub(super) fn new(first: u16, space: u32) -> Self {
        assert!((1..=ID_SPACE).contains(&space), "ids are 16 bits");
        Self { first, space, given: 0, free: VecDeque::new() }
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
    }
}
