// SPDX-License-Identifier: GPL-2.0-or-later
//! Which ids the clients of a server that ended may still have: a hint that lives with them.
//!
//! All clients of a server share one open file description of the memory. The server holds read
//! locks (`F_OFD_SETLK`) on that description: byte `BASE` + N stands for the id N. The kernel
//! removes a lock with the last descriptor or mapping of the description. So the locks outlive
//! the server exactly as long as a client has the memory. The next server opens the object anew,
//! and asks (`F_OFD_GETLK`) which bytes others have locked.
//!
//! # Blocks
//! Ids are locked in blocks of 64, so that a join rarely costs a system call. When 64 further
//! blocks were locked, the blocks without a connected client are unlocked. So a server that runs
//! for years does not keep all ids.
//!
//! # It is no protection
//! Each client can remove these locks, and can add others. Without them the next server gives
//! ids that clients have, as it would without this file. Locks on all ids must not keep it from
//! starting: see `Memory::unused_ids`. Nothing else depends on these locks; the lock that tells
//! whether a server serves the memory is another one (`lock_file.rs`).
//!
//! This file knows an open file and ids. It must not know names or clients.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io;

use nix::fcntl::{FcntlArg, fcntl};

use crate::protocol::ID_SPACE;

/// The byte of id 0. No memory is as large, so no lock on a part of the content lies here.
const BASE: i64 = super::size::MAX_SIZE as i64;

/// Ids in a block.
const BLOCK: u32 = 64;

const BLOCKS: usize = (ID_SPACE / BLOCK) as usize;

/// A set of blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Blocks([bool; BLOCKS]);

impl Blocks {
    const NONE: Self = Self([false; BLOCKS]);

    fn of(ids: impl Iterator<Item = u16>) -> Self {
        let mut blocks = Self::NONE;
        ids.for_each(|id| blocks.0[block_of(id)] = true);
        blocks
    }

    /// The sequences of blocks that are all in the set, or all not in it: whether they are, and
    /// the first and the end of each.
    fn runs(&self) -> impl Iterator<Item = (bool, usize, usize)> + '_ {
        let mut start = 0;
        self.0.chunk_by(|a, b| a == b).map(move |run| {
            let first = start;
            start += run.len();
            (run[0], first, start)
        })
    }
}

fn block_of(id: u16) -> usize {
    usize::from(id) / BLOCK as usize
}

/// The ids that clients of servers that ended may have.
#[derive(Debug)]
pub(super) struct Used {
    blocks: Blocks,
    /// A process has locked the object itself, so that locks of a server may be hidden.
    pub(super) is_uncertain: bool,
}

impl Used {
    /// Finds them by the locks of others on this object.
    pub(super) fn find(object: &File) -> io::Result<Self> {
        let mut used = Self { blocks: Blocks::NONE, is_uncertain: false };
        // The kernel reports one lock in a range, and not the first one. So what is left of the
        // range on both sides of it is asked about too.
        let mut ranges = vec![(0, BLOCKS)];
        while let Some((first, end)) = ranges.pop() {
            if first == end {
                continue;
            }
            let mut lock = lock_on(first, end, libc::F_WRLCK);
            fcntl(object, FcntlArg::F_OFD_GETLK(&mut lock))?;
            if lock.l_type == libc::F_UNLCK as libc::c_short {
                continue;
            }
            if let Some((from, to)) = as_of_a_server(&lock) {
                let (from, to) = (from.clamp(first, end), to.clamp(first, end));
                used.blocks.0[from..to].fill(true);
                ranges.extend([(first, from), (to, end)]);
            } else if end - first > 1 {
                // Another program's lock, on the whole file for instance. It may be found first
                // in one half only.
                let middle = first.midpoint(end);
                ranges.extend([(first, middle), (middle, end)]);
            } else {
                used.is_uncertain = true;
            }
        }
        Ok(used)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.blocks == Blocks::NONE
    }

    /// Chooses ids that are not used: the first id, and how many follow each other. None if all
    /// are used.
    ///
    /// They begin with `first` if `space` ids, or half of all, are not used from there on.
    /// Otherwise they are the longest sequence of ids that are not used, modulo 65,536.
    pub(super) fn choose(&self, first: u16, space: u32) -> Option<(u16, u32)> {
        if self.is_empty() {
            return Some((first, space));
        }
        // Twice, so that a sequence that goes on at id 0 is one.
        let doubled = [self.blocks.0, self.blocks.0].concat();
        let free_from = |block: usize| {
            let blocks = doubled[block..].iter().take_while(|&&is_used| !is_used).count();
            BLOCK * blocks.min(BLOCKS) as u32
        };
        let from_first = free_from(block_of(first)).saturating_sub(u32::from(first) % BLOCK);
        if from_first >= space.min(ID_SPACE / 2) {
            return Some((first, from_first.min(space)));
        }
        // Of sequences of the same length the first one.
        let block = (0..BLOCKS).rev().max_by_key(|&block| free_from(block))?;
        let ids = free_from(block).min(space);
        (ids > 0).then_some(((block as u32 * BLOCK) as u16, ids))
    }
}

/// The locks of this server.
#[derive(Debug)]
pub(super) struct IdLocks {
    locked: Blocks,
    /// The blocks that were locked since unused blocks were unlocked.
    added: u32,
    has_failed: bool,
}

impl Default for IdLocks {
    fn default() -> Self {
        Self { locked: Blocks::NONE, added: 0, has_failed: false }
    }
}

impl IdLocks {
    /// Locks the ids of all clients of a server that is resumed, and no others.
    pub(super) fn resume(&mut self, object: &File, label: &str, ids: impl Iterator<Item = u16>) {
        self.set(object, label, &Blocks::of(ids));
    }

    /// Whether this id is locked.
    pub(super) fn has(&self, id: u16) -> bool {
        self.locked.0[block_of(id)]
    }

    /// Locks the block of an id that is about to be given, on the description that clients get. `connected`
    /// are the ids of all clients.
    pub(super) fn add(
        &mut self,
        object: &File,
        label: &str,
        id: u16,
        connected: impl Iterator<Item = u16>,
    ) {
        let block = block_of(id);
        let result = set(object, block, block + 1, libc::F_RDLCK);
        self.locked.0[block] = self.note(label, result);
        self.added += 1;
        if self.added > BLOCK {
            self.added = 0;
            let mut blocks = Blocks::of(connected);
            blocks.0[block] = true;
            self.set(object, label, &blocks);
        }
    }

    fn set(&mut self, object: &File, label: &str, blocks: &Blocks) {
        for (is_used, first, end) in blocks.runs() {
            let kind = if is_used { libc::F_RDLCK } else { libc::F_UNLCK };
            let result = set(object, first, end, kind);
            let done = self.note(label, result);
            self.locked.0[first..end].fill(is_used && done);
        }
    }

    /// Returns whether a call succeeded. A failure is logged once, and is harmless while this
    /// server lives.
    fn note(&mut self, label: &str, result: io::Result<()>) -> bool {
        if let Err(error) = &result {
            if !std::mem::replace(&mut self.has_failed, true) {
                log::warn!(
                    "cannot mark ids as used on shared memory {label}: {error}; if this server is \
                     killed, the next one may give ids that clients have"
                );
            }
        }
        result.is_ok()
    }
}

fn set(object: &File, first: usize, end: usize, kind: libc::c_int) -> io::Result<()> {
    fcntl(object, FcntlArg::F_OFD_SETLK(&lock_on(first, end, kind)))?;
    Ok(())
}

fn lock_on(first: usize, end: usize, kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: BASE + (first * BLOCK as usize) as i64,
        l_len: ((end - first) * BLOCK as usize) as i64,
        l_pid: 0,
    }
}

/// The blocks of a lock, if a server may have made it: an OFD read lock on bytes of ids only.
fn as_of_a_server(lock: &libc::flock) -> Option<(usize, usize)> {
    let start = u64::try_from(lock.l_start.checked_sub(BASE)?).ok()?;
    let length = u64::try_from(lock.l_len).ok()?;
    let end = start.checked_add(length)?;
    let is_possible = lock.l_type == libc::F_RDLCK as libc::c_short
        && lock.l_pid == -1
        && length > 0
        && end <= u64::from(ID_SPACE);
    let block = u64::from(BLOCK);
    is_possible.then_some(((start / block) as usize, end.div_ceil(block) as usize))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file, and a description of it for each of so many servers.
    fn files<const N: usize>() -> (File, [File; N]) {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        let open = || File::options().read(true).write(true).open(file.path()).expect("it is ours");
        (open(), std::array::from_fn(|_| open()))
    }

    fn used(ids: &[u16]) -> Used {
        Used { blocks: Blocks::of(ids.iter().copied()), is_uncertain: false }
    }

    fn give(locks: &mut IdLocks, file: &File, id: u16) {
        if !locks.has(id) {
            locks.add(file, "test", id, std::iter::once(id));
        }
    }

    #[test]
    fn the_ids_of_all_servers_before_are_found_while_a_copy_of_their_file_is_open() {
        let (next, [one, two]) = files();
        // Not in the order of the ids.
        give(&mut IdLocks::default(), &one, 1000);
        give(&mut IdLocks::default(), &two, 65_535);
        let mut locks = IdLocks::default();
        [3, 4, 63].iter().for_each(|&id| give(&mut locks, &two, id));
        let client = two.try_clone().expect("dup works");
        drop(two);
        let found = Used::find(&next).expect("fcntl works");
        assert_eq!(found.blocks, used(&[0, 960, 65_472]).blocks);
        assert!(!found.is_uncertain);
        drop(one);
        assert_eq!(Used::find(&next).expect("fcntl works").blocks, used(&[0, 65_472]).blocks);
        drop(client);
        assert!(Used::find(&next).expect("fcntl works").is_empty());
    }

    #[test]
    fn only_the_first_id_of_a_block_costs_a_call() {
        let (next, [file]) = files();
        let mut locks = IdLocks::default();
        (0..64).for_each(|id| give(&mut locks, &file, id));
        set(&file, 0, 1, libc::F_UNLCK).expect("fcntl works");
        give(&mut locks, &file, 63);
        assert!(Used::find(&next).expect("fcntl works").is_empty(), "it was not locked again");
    }

    #[test]
    fn an_id_that_cannot_be_locked_is_tried_again_and_nothing_else_fails() {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        // A read lock needs a file that can be read.
        let blind = File::options().write(true).open(file.path()).expect("it is ours");
        let mut locks = IdLocks::default();
        give(&mut locks, &blind, 0);
        assert!(!locks.has(0));
        give(&mut locks, file.as_file(), 0);
        assert!(locks.has(0));
    }

    #[test]
    fn blocks_without_a_client_are_unlocked_in_the_end() {
        let (next, [file]) = files();
        let mut locks = IdLocks::default();
        for id in 0..=u16::MAX {
            if !locks.has(id) {
                locks.add(&file, "test", id, [7, id].into_iter());
            }
        }
        let found = Used::find(&next).expect("fcntl works");
        assert!(found.blocks.0[0], "its client is connected");
        let count = found.blocks.0.iter().filter(|&&is_used| is_used).count();
        assert!(count <= 66, "{count} blocks");
        locks.resume(&file, "test", [70, 7000].into_iter());
        let found = Used::find(&next).expect("fcntl works");
        assert_eq!(found.blocks, used(&[70, 7000]).blocks);
    }

    #[test]
    fn locks_of_other_programs_are_no_ids() {
        let (next, [server, other]) = files();
        give(&mut IdLocks::default(), &server, 0);
        let whole = libc::flock { l_start: 0, l_len: 0, ..lock_on(0, 1, libc::F_RDLCK) };
        fcntl(&other, FcntlArg::F_OFD_SETLK(&whole)).expect("it is a read lock");
        let found = Used::find(&next).expect("fcntl works");
        assert_eq!(found.blocks, used(&[0]).blocks, "the server locked before");
        assert!(found.is_uncertain);
        drop(other);
        set(&next, 2, 3, libc::F_WRLCK).expect("nobody has it");
        let found = Used::find(&server).expect("fcntl works");
        assert!(found.is_empty() && found.is_uncertain);
    }

    #[test]
    fn unused_ids_follow_each_other_and_avoid_those_that_are_used() {
        let all: Vec<u16> = (0..=u16::MAX).collect();
        for (ids, first, space, chosen) in [
            (&[][..], 7, 65_536, Some((7, 65_536))),
            (&[0], 0, 65_536, Some((64, 65_472))),
            (&[0], 63, 65_536, Some((64, 65_472))),
            (&[0], 1000, 65_536, Some((1000, 64_536))),
            (&[0], 0, 10, Some((64, 10))),
            // Few ids are left behind the first one.
            (&[64], 0, 65_536, Some((128, 65_472))),
            (&[64], 0, 64, Some((0, 64))),
            (&[65_535], 0, 65_536, Some((0, 65_472))),
            (&[65_535], 65_535, 65_536, Some((0, 65_472))),
            (&[100, 40_000], 100, 65_536, Some((128, 39_872))),
            (&[100, 10_000], 100, 65_536, Some((10_048, 55_552))),
            (&all[64..], 500, 65_536, Some((0, 64))),
            (&all, 0, 65_536, None),
        ] {
            assert_eq!(used(ids).choose(first, space), chosen, "first {first}, {space} ids");
        }
    }
}
