// SPDX-License-Identifier: GPL-2.0-or-later
//! Which servers run in this process, by the address of their C structure.
//!
//! The table is locked only to look something up, so calls for different servers do not wait
//! for each other; calls for the same one do.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::state::State;

/// A server; `None` while it starts, and after another thread has closed it.
pub(super) type Slot = Arc<Mutex<Option<State>>>;

static RUNNING: Mutex<BTreeMap<usize, Slot>> = Mutex::new(BTreeMap::new());

fn running() -> MutexGuard<'static, BTreeMap<usize, Slot>> {
    // Nothing in here panics between two changes that belong together.
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The server of the structure at this address.
pub(super) fn find(address: usize) -> Option<Slot> {
    running().get(&address).cloned()
}

/// Reserves the entry of this address in the table, unless it exists.
pub(super) fn take(address: usize, slot: &Slot) -> bool {
    let mut running = running();
    let free = !running.contains_key(&address);
    if free {
        running.insert(address, Arc::clone(slot));
    }
    free
}

/// Removes the entry of this server.
pub(super) fn leave(address: usize, slot: &Slot) {
    let mut running = running();
    if running.get(&address).is_some_and(|other| Arc::ptr_eq(other, slot)) {
        running.remove(&address);
    }
    if running.is_empty() {
        // An empty map may keep memory, which a search for leaks would find.
        *running = BTreeMap::new();
    }
}
