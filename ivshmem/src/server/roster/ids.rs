// SPDX-License-Identifier: GPL-2.0-or-later
//! Which ids may be given.
//!
//! QEMU's heap is corrupted by an id that comes back after its client was told that the id's
//! owner had left. So an id is free again only when no client that is connected was told of
//! its last owner. Nobody keeps a list of who was told what: a client that joined before the
//! owner left, and whose cursor has passed the owner's key, *may* have been told. That errs
//! only towards caution, and not at all for a client that stands still.

#![forbid(unsafe_code)]

use std::collections::VecDeque;

use super::Member;
use crate::protocol::ID_SPACE;

#[derive(Debug)]
struct Retired {
    id: u16,
    /// The key of the member that had it.
    owner: u64,
    /// Whoever has a smaller key was here when it left.
    left: u64,
}

#[derive(Debug)]
pub(super) struct Ids {
    first: u16,
    space: u32,
    /// How many of the space have ever been given. They are given in turn, like the
    /// reference does, before any comes back.
    given: u32,
    free: VecDeque<u16>,
    /// In order of leaving.
    retired: VecDeque<Retired>,
    /// Somebody left since the retired were last looked through, so some may be free.
    look: bool,
}

impl Ids {
    pub(super) fn new(first: u16, space: u32) -> Self {
        assert!((1..=ID_SPACE).contains(&space), "ids are 16 bits");
        Self {
            first,
            space,
            given: 0,
            free: VecDeque::new(),
            retired: VecDeque::new(),
            look: false,
        }
    }

    pub(super) fn next<T>(&mut self, members: &[Member<T>]) -> Option<u16> {
        if self.given < self.space {
            return Some(self.first.wrapping_add(self.given as u16));
        }
        if self.free.is_empty() && self.look {
            self.look_through(members);
        }
        self.free.front().copied()
    }

    pub(super) fn take<T>(&mut self, members: &[Member<T>]) -> Option<u16> {
        let id = self.next(members)?;
        if self.given < self.space {
            self.given += 1;
        } else {
            self.free.pop_front();
        }
        Some(id)
    }

    /// Ids that were given and that nobody has: free again or not.
    #[cfg(test)]
    pub(super) fn unused(&self) -> usize {
        self.free.len() + self.retired.len()
    }

    pub(super) fn retire(&mut self, id: u16, owner: u64, left: u64) {
        self.retired.push_back(Retired { id, owner, left });
        self.look = true;
    }

    /// Frees what no member can have been told of. Costs a step for each retired id and each
    /// member; it is done only when nothing else is left, and at most once for each leaving.
    fn look_through<T>(&mut self, members: &[Member<T>]) {
        self.look = false;
        // How far along the roster the members up to each one, in join order, have been told.
        let mut furthest = 0;
        let told: Vec<u64> = members
            .iter()
            .map(|member| {
                furthest = member.cursor.key.max(furthest);
                furthest
            })
            .collect();
        let free = &mut self.free;
        self.retired.retain(|retired| {
            let here = members.partition_point(|member| member.key < retired.left);
            let remembered = here > 0 && told[here - 1] >= retired.owner;
            if !remembered {
                free.push_back(retired.id);
            }
            remembered
        });
    }
}
