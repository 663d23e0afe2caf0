// SPDX-License-Identifier: GPL-2.0-or-later
//! The ids that may be given.
//!
//! QEMU's heap is corrupted by an id that comes back after a client was told that the id's
//! owner left. So an id is free again only when no connected client was told of its last owner.
//! The roster decides that; this module knows only which ids were never given, and which are
//! free again.

#![forbid(unsafe_code)]

use std::collections::VecDeque;

use crate::protocol::ID_SPACE;

#[derive(Debug)]
pub(super) struct Ids {
    first: u16,
    space: u32,
    /// How many of the space have ever been given. They are given in turn, as the reference
    /// does, before any comes back.
    given: u32,
    /// The id that has been free for longest is given first.
    free: VecDeque<u16>,
}

impl Ids {
    pub(super) fn new(first: u16, space: u32) -> Self {
        assert!((1..=ID_SPACE).contains(&space), "ids are 16 bits");
        Self { first, space, given: 0, free: VecDeque::new() }
    }

    /// The id that `take` takes.
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

    pub(super) fn is_exhausted(&self) -> bool {
        self.left() == 0
    }

    /// How many ids can be given.
    pub(super) fn left(&self) -> u32 {
        self.space - self.given + self.free.len() as u32
    }

    pub(super) fn give_back(&mut self, id: u16) {
        self.free.push_back(id);
    }
}
