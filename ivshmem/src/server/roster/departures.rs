// SPDX-License-Identifier: GPL-2.0-or-later
//! The log of departures. It is also the list of ids that may not be given again yet.
//!
//! An entry stays until its id may be given again. So an id is in the log at most once, and the
//! log is never longer than the id space.

#![forbid(unsafe_code)]

use std::collections::HashMap;

/// An entry of the log: a member that left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Departure {
    pub(super) id: u16,
    /// The number of its join.
    pub(super) key: u64,
    /// The number of its departure. A connected member with a smaller key was connected at that
    /// time.
    pub(super) left: u64,
    /// The user that the member belonged to.
    pub(super) owner: u32,
}

#[derive(Debug, Default)]
pub(super) struct Departures {
    /// In the order of departure, so `left` grows.
    log: Vec<Departure>,
    /// The number of entries of each owner.
    owners: HashMap<u32, u32>,
    /// A departure was added since the last call of `forget`, so an id may have become free.
    grown: bool,
}

impl Departures {
    pub(super) fn len(&self) -> usize {
        self.log.len()
    }

    /// The number of entries of an owner.
    pub(super) fn count_of(&self, owner: u32) -> u32 {
        self.owners.get(&owner).copied().unwrap_or(0)
    }

    pub(super) fn owners(&self) -> impl Iterator<Item = u32> + '_ {
        self.owners.keys().copied()
    }

    pub(super) fn last(&self) -> Option<&Departure> {
        self.log.last()
    }

    #[cfg(test)]
    pub(super) fn capacity(&self) -> usize {
        self.log.capacity()
    }

    pub(super) fn has_grown(&self) -> bool {
        self.grown
    }

    pub(super) fn add(&mut self, departure: Departure) {
        self.log.push(departure);
        *self.owners.entry(departure.owner).or_default() += 1;
        self.grown = true;
    }

    /// The entries whose number is at least `number`, oldest first.
    #[inline]
    pub(super) fn since(&self, number: u64) -> &[Departure] {
        // Usually there is no such entry.
        match self.log.last() {
            Some(newest) if newest.left >= number => {
                &self.log[self.log.partition_point(|departure| departure.left < number)..]
            }
            _ => &[],
        }
    }

    /// Removes the entries for which `is_free` returns true.
    pub(super) fn forget(&mut self, mut is_free: impl FnMut(&Departure) -> bool) {
        self.grown = false;
        let owners = &mut self.owners;
        self.log.retain(|departure| {
            let free = is_free(departure);
            if free {
                let count = owners.entry(departure.owner).or_default();
                *count -= 1;
                if *count == 0 {
                    owners.remove(&departure.owner);
                }
            }
            !free
        });
        if self.log.len() < self.log.capacity() / 4 {
            self.log.shrink_to_fit();
        }
    }
}
