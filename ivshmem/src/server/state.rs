// SPDX-License-Identifier: GPL-2.0-or-later
//! The state file: what a server needs to be resumed after its process has ended.
//!
//! It is a memfd that is mapped, and that a keeper holds when the process is gone. Its contents
//! are right at every instruction, because the process may be killed at any:
//!
//! - A client's record is written before its key, which makes it valid with one store.
//! - A departure is written to the record of the client's id before the client's record is made
//!   invalid. Found in between, the departure counts.
//! - Before a send, the record of the client says how many messages are about to go, and after it
//!   what went. Found in between, nobody can know what the client was told: it must be ended.
//!
//! The processor's order does not matter: a process that is killed leaves all its stores. The
//! order of the compiler does, so each store is an atomic one with `Release`.
//!
//! The file has its full size from the start and is a hole where nothing was written. Records are
//! allocated before their first use, so that a machine without memory gives an error and not
//! SIGBUS.
//!
//! This module knows numbers and a file. It must not know sockets, or how a client is told
//! anything. `check` reads a file that another process wrote.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Relaxed, Release};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::resource::{Resource, getrlimit};

use super::roster::{Progress, Roster, SavedDeparture, SavedMember};
use crate::sys::Mapping;

mod check;
mod layout;
#[cfg(test)]
mod tests;

pub(super) use check::{Image, SavedClient, is_state};
use layout::{FORMAT, Layout, MAGIC, client, header, id};

/// Room for records is allocated in steps of this many bytes.
const STEP: usize = 64 << 10;

/// What identifies the memory and the listening socket among descriptors without names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Things {
    /// Device and inode.
    pub(super) memory: (u64, u64),
    pub(super) memory_size: u64,
    /// `SO_COOKIE`.
    pub(super) listener: u64,
    /// Device and inode of its path; zeroes if the path is not the server's.
    pub(super) path: (u64, u64),
}

/// The rest of a partial write: the message, and how many of its bytes were sent.
pub(super) type PartialWrite = ([u8; 8], u8);

/// The record of a client, without the ids of its eventfds.
type Record = [AtomicU64; client::SIZE / 8];

#[derive(Debug)]
pub(super) struct State {
    file: File,
    map: Mapping,
    layout: Layout,
    first: u16,
    /// Records that are not used, among the first `slots`.
    free_slots: Vec<u32>,
    slots: u32,
    /// The times that an id became free that the file knows of.
    frees: u64,
    /// The bytes of id records, and of client records, that are allocated.
    allocated: [usize; 2],
    /// The stores that are still made, so that a test can stop at each of them.
    #[cfg(test)]
    fuel: std::sync::atomic::AtomicUsize,
}

/// The record of a client: what it was sent.
#[derive(Clone, Copy)]
pub(super) struct ClientRecord<'a> {
    state: &'a State,
    words: &'a Record,
}

impl ClientRecord<'_> {
    /// Up to `messages` messages, at least one, are about to be sent to the client.
    #[inline]
    pub(super) fn sending(self, messages: u32) {
        self.state.put(&self.words[client::PENDING / 8], pair(messages, 0));
    }

    /// The send has returned.
    #[inline]
    pub(super) fn sent(self, progress: &Progress, partial: Option<PartialWrite>) {
        self.state.set_progress(self.words, progress, partial);
    }
}

impl State {
    /// Makes a state file without clients.
    pub(super) fn create(
        vectors: u32,
        first: u16,
        space: u32,
        things: &Things,
    ) -> io::Result<Self> {
        let layout = Layout::new(vectors, space);
        let size = layout.size();
        let (limit, _) = getrlimit(Resource::RLIMIT_FSIZE)?;
        if size as u64 > limit {
            // The kernel would not only refuse, but kill.
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = File::from(memfd_create(c"ivshmem-state", flags)?);
        file.set_len(size as u64)?;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals()))?;
        let map = Mapping::new(file.as_fd(), size)?;
        let state = Self::of(file, map, layout, first);
        allocate(&state.file, 0, header::SIZE)?;
        state.set32(header::FORMAT, FORMAT);
        state.set32(header::VECTORS, vectors);
        state.set32(header::FIRST, u32::from(first));
        state.set32(header::SPACE, space);
        state.set_things(things);
        state.set64(header::MAGIC, MAGIC);
        Ok(state)
    }

    fn of(file: File, map: Mapping, layout: Layout, first: u16) -> Self {
        Self {
            file,
            map,
            layout,
            first,
            free_slots: Vec::new(),
            slots: 0,
            frees: 0,
            allocated: [0; 2],
            #[cfg(test)]
            fuel: std::sync::atomic::AtomicUsize::new(usize::MAX),
        }
    }

    fn set_things(&self, things: &Things) {
        let &Things { memory, memory_size, listener, path } = things;
        self.set64(header::MEMORY, memory.0);
        self.set64(header::MEMORY + 8, memory.1);
        self.set64(header::MEMORY + 16, memory_size);
        self.set64(header::LISTENER, listener);
        self.set64(header::PATH, path.0);
        self.set64(header::PATH + 8, path.1);
    }

    /// Counts a restart, and returns the number of restarts. The number is the position of the open
    /// file: nothing reads or writes there, and it stays with the descriptor when a process ends.
    pub(super) fn count_restart(&self) -> u64 {
        (&self.file).seek(SeekFrom::Current(1)).unwrap_or(1)
    }

    /// The server has ended for good: the file is no state file any more.
    pub(super) fn retire(&self) {
        self.set64(header::MAGIC, 0);
    }

    /// Another listening socket takes the place of the one that is lost.
    pub(super) fn set_listener(&self, cookie: u64, path: (u64, u64)) {
        self.set64(header::LISTENER, cookie);
        self.set64(header::PATH, path.0);
        self.set64(header::PATH + 8, path.1);
    }

    /// Finds a record for a client that is about to join as the owner of `id`, and makes sure that
    /// both records have memory.
    pub(super) fn reserve(&mut self, id: u16) -> io::Result<u32> {
        let slot = self.free_slots.last().copied().unwrap_or(self.slots);
        let layout = self.layout;
        let ids = (layout.id(0), layout.id(self.offset_of(id) + 1));
        let clients = (layout.client(0), layout.client(slot + 1));
        for (allocated, (start, end)) in self.allocated.iter_mut().zip([ids, clients]) {
            while *allocated < end - start {
                let len = STEP.min(layout.size() - start - *allocated);
                allocate(&self.file, start + *allocated, len)?;
                *allocated += len;
            }
        }
        Ok(slot)
    }

    /// A client has joined, whose record [`reserve`](Self::reserve) found.
    pub(super) fn joined<T>(
        &mut self,
        slot: u32,
        roster: &Roster<T>,
        member: &SavedMember,
        cookie: u64,
        eventfds: &[u32],
    ) {
        // Before the record is valid: an id that was taken is found among those given.
        self.set32(header::GIVEN, roster.ids_given());
        if slot == self.slots {
            self.slots += 1;
            self.set32(header::SLOTS, self.slots);
        } else {
            self.free_slots.pop();
        }
        let at = self.layout.client(slot);
        self.set64(at + client::COOKIE, cookie);
        self.set32(at + client::ID, u32::from(member.id));
        self.set32(at + client::OWNER, member.owner);
        self.set_progress(self.record(slot), &member.progress, None);
        for (number, &eventfd) in eventfds.iter().enumerate() {
            self.set32(at + client::SIZE + 4 * number, eventfd);
        }
        self.set64(at + client::KEY, member.key);
        self.clear_id(member.id);
        self.sync_free(roster);
    }

    /// The owner of an id before has left long ago, and all have heard that.
    fn clear_id(&self, id: u16) {
        let at = self.layout.id(self.offset_of(id));
        self.set64(at + id::LEFT, 0);
        self.set64(at + id::FREED, 0);
    }

    /// The client of a record has left.
    pub(super) fn left(&mut self, slot: u32, departure: &SavedDeparture) {
        let at = self.layout.id(self.offset_of(departure.id));
        self.set64(at + id::KEY, departure.key);
        self.set32(at + id::OWNER, departure.owner);
        self.set64(at + id::FREED, 0);
        self.set64(at + id::LEFT, departure.left);
        self.clear_slot(slot);
    }

    fn clear_slot(&mut self, slot: u32) {
        self.set64(self.layout.client(slot) + client::KEY, 0);
        self.free_slots.push(slot);
    }

    /// Ids have become free.
    pub(super) fn sync_free<T>(&mut self, roster: &Roster<T>) {
        for (number, id) in roster.freed_since(self.frees) {
            self.set64(self.layout.id(self.offset_of(id)) + id::FREED, number);
            self.frees = number;
        }
    }

    /// The record of a client that is sent messages.
    #[inline]
    pub(super) fn record_of(&self, slot: u32) -> ClientRecord<'_> {
        ClientRecord { state: self, words: self.record(slot) }
    }

    /// Writes what the client was told. The last store says that it is right.
    #[inline]
    fn set_progress(&self, record: &Record, progress: &Progress, partial: Option<PartialWrite>) {
        let (key, vectors) = progress.cursor;
        let sent = partial.map_or(0, |(value, sent)| {
            self.put(&record[client::PARTIAL / 8], u64::from_le_bytes(value));
            u32::from(sent)
        });
        self.put(&record[client::GREETED / 8], pair(progress.greeted.into(), vectors));
        self.put(&record[client::CURSOR_KEY / 8], key);
        self.put(&record[client::HEARD / 8], progress.heard);
        self.put(&record[client::PENDING / 8], pair(0, sent));
    }

    #[inline]
    fn record(&self, slot: u32) -> &Record {
        self.map.words(self.layout.client(slot)).expect("it lies in the file")
    }

    /// The position of an id in the order in which ids are first given.
    fn offset_of(&self, id: u16) -> u32 {
        u32::from(id.wrapping_sub(self.first))
    }

    // A place that is not in the file would be an error of this module: `Layout` gives its size.

    #[inline]
    fn get64(&self, at: usize) -> u64 {
        self.map.atomic_u64(at).expect("it lies in the file").load(Relaxed)
    }

    #[inline]
    fn get32(&self, at: usize) -> u32 {
        self.map.atomic_u32(at).expect("it lies in the file").load(Relaxed)
    }

    fn set64(&self, at: usize, value: u64) {
        self.put(self.map.atomic_u64(at).expect("it lies in the file"), value);
    }

    #[inline]
    fn put(&self, word: &AtomicU64, value: u64) {
        if self.may_store() {
            word.store(value, Release);
        }
    }

    #[inline]
    fn set32(&self, at: usize, value: u32) {
        if self.may_store() {
            self.map.atomic_u32(at).expect("it lies in the file").store(value, Release);
        }
    }

    #[cfg(not(test))]
    #[inline]
    fn may_store(&self) -> bool {
        true
    }

    /// After so many stores the process counts as killed.
    #[cfg(test)]
    fn may_store(&self) -> bool {
        let fuel = self.fuel.load(Relaxed);
        self.fuel.store(fuel.saturating_sub(usize::from(fuel < usize::MAX)), Relaxed);
        fuel > 0
    }

    #[cfg(test)]
    pub(super) fn stop_after(&self, stores: usize) {
        self.fuel.store(stores, Relaxed);
    }
}

impl AsFd for State {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Two numbers in one word, as they lie in memory.
#[inline]
fn pair(first: u32, second: u32) -> u64 {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&first.to_ne_bytes());
    bytes[4..].copy_from_slice(&second.to_ne_bytes());
    u64::from_ne_bytes(bytes)
}

/// Nobody can make the mapping invalid.
fn seals() -> SealFlag {
    SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL
}

fn allocate(file: &File, offset: usize, len: usize) -> io::Result<()> {
    loop {
        match fallocate(file, FallocateFlags::empty(), offset as i64, len as i64) {
            Err(Errno::EINTR) => {}
            result => return Ok(result?),
        }
    }
}
