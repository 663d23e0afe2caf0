// SPDX-License-Identifier: GPL-2.0-or-later
//! The descriptors that the server has given to the supervisor, by name. The store does not know what they are, and
//! does nothing with them but hold and close them.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

#[derive(Debug)]
pub(super) struct Store {
    entries: HashMap<Box<str>, Vec<OwnedFd>>,
    count: usize,
    limit: usize,
}

impl Store {
    pub(super) fn new(limit: usize) -> Self {
        Self { entries: HashMap::new(), count: 0, limit }
    }

    /// The number of descriptors.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// Adds descriptors to those that have the name. Where the limit has no room for all of them, none is added, and
    /// the answer is false.
    pub(super) fn add(&mut self, name: &str, fds: Vec<OwnedFd>) -> bool {
        if fds.len() > self.limit.saturating_sub(self.count) {
            return false;
        }
        self.count += fds.len();
        match self.entries.get_mut(name) {
            Some(entry) => entry.extend(fds),
            None => drop(self.entries.insert(name.into(), fds)),
        }
        true
    }

    /// Takes out all descriptors that have the name. The caller closes them.
    pub(super) fn remove(&mut self, name: &str) -> Vec<OwnedFd> {
        let removed = self.entries.remove(name).unwrap_or_default();
        self.count -= removed.len();
        removed
    }

    /// Takes out all descriptors.
    pub(super) fn remove_all(&mut self) -> impl Iterator<Item = OwnedFd> + use<> {
        self.count = 0;
        std::mem::take(&mut self.entries).into_values().flatten()
    }

    /// The descriptors that have the name.
    pub(super) fn get(&self, name: &str) -> &[OwnedFd] {
        self.entries.get(name).map_or(&[], Vec::as_slice)
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(|name| &**name)
    }

    /// All of them in the order of their numbers, which is the order in which a child can take them.
    pub(super) fn sorted(&self) -> Vec<(BorrowedFd<'_>, &str)> {
        let mut all = Vec::with_capacity(self.count);
        for (name, fds) in &self.entries {
            all.extend(fds.iter().map(|fd| (fd.as_fd(), &**name)));
        }
        all.sort_unstable_by_key(|(fd, _)| fd.as_raw_fd());
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptors(count: usize) -> Vec<OwnedFd> {
        (0..count).map(|_| std::fs::File::open("/dev/null").unwrap().into()).collect()
    }

    #[test]
    fn a_name_holds_all_that_was_added_to_it_until_it_is_removed() {
        let mut store = Store::new(10);
        assert!(store.add("a", descriptors(2)) && store.add("b", descriptors(1)));
        assert!(store.add("a", descriptors(3)));
        assert_eq!((store.count(), store.get("a").len()), (6, 5));
        assert_eq!(store.remove("a").len(), 5);
        assert_eq!((store.remove("a").len(), store.count(), store.get("a").len()), (0, 1, 0));
        assert_eq!((store.remove_all().count(), store.count()), (1, 0));
    }

    #[test]
    fn what_does_not_fit_leaves_the_others() {
        let mut store = Store::new(3);
        assert!(store.add("a", descriptors(2)));
        assert!(!store.add("b", descriptors(2)) && store.add("c", descriptors(1)));
        assert_eq!((store.count(), store.get("b").len()), (3, 0));
    }

    #[test]
    fn the_list_rises_by_number() {
        let mut store = Store::new(100);
        for name in ["x", "y", "z"] {
            assert!(store.add(name, descriptors(5)));
        }
        let numbers: Vec<_> = store.sorted().iter().map(|(fd, _)| fd.as_raw_fd()).collect();
        assert_eq!(numbers.len(), 15);
        assert!(numbers.windows(2).all(|pair| pair[0] < pair[1]));
    }
}
