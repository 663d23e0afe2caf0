// SPDX-License-Identifier: GPL-2.0-or-later
//! Reads a state file that another process wrote, and trusts nothing in it.
//!
//! A file that no server can have written is refused, with the number that is wrong. What a killed
//! server left half done is completed, in the file too: see `state`.

#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::uio::pread;

use super::layout::{FORMAT, Layout, MAGIC, client, header, id};
use super::{PartialWrite, State, Things, seals};
use crate::protocol::{ID_SPACE, MAX_VECTORS, MESSAGE};
use crate::server::roster::{GREETING, Progress, Saved, SavedDeparture, SavedMember};
use crate::sys::Mapping;

/// What a state file says.
#[derive(Debug)]
pub(in super::super) struct Image {
    pub(in super::super) roster: Saved,
    /// Beside each member of the roster, what only the server knows.
    pub(in super::super) clients: Vec<SavedClient>,
    pub(in super::super) things: Things,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct SavedClient {
    pub(in super::super) slot: u32,
    pub(in super::super) cookie: u64,
    pub(in super::super) eventfds: Vec<u32>,
    pub(in super::super) partial: Option<PartialWrite>,
    /// The server was killed while it sent: what the client was told is not known.
    pub(in super::super) is_unknown: bool,
}

/// Whether a regular file is a state file, of any format.
pub(in super::super) fn is_state(file: BorrowedFd<'_>) -> io::Result<bool> {
    let mut magic = [0; 8];
    match pread(file, &mut magic, 0) {
        Ok(length) => Ok(length == magic.len() && u64::from_ne_bytes(magic) == MAGIC),
        // It cannot be read at all.
        Err(Errno::EBADF | Errno::EINVAL | Errno::EOPNOTSUPP) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

type Check<T> = Result<T, String>;

fn require(is_right: bool, problem: impl FnOnce() -> String) -> Check<()> {
    if is_right { Ok(()) } else { Err(problem()) }
}

impl State {
    /// Opens the state file of a server whose process has ended. The error says what is wrong.
    pub(in super::super) fn open(fd: OwnedFd) -> Check<(Self, Image)> {
        let file = File::from(fd);
        let meta = file.metadata().map_err(|error| format!("it cannot be looked at: {error}"))?;
        let len = meta.len();
        require(len >= header::SIZE as u64, || {
            format!("it has {len} bytes; the header alone has {}", header::SIZE)
        })?;
        let has = fcntl(&file, FcntlArg::F_GET_SEALS).unwrap_or(0);
        require(SealFlag::from_bits_retain(has).contains(seals()), || {
            format!("it has the seals {has:#x}; those against a change of its size are missing")
        })?;
        let len = usize::try_from(len).map_err(|_| format!("it has {len} bytes"))?;
        let map = Mapping::new(std::os::fd::AsFd::as_fd(&file), len)
            .map_err(|error| format!("it cannot be mapped: {error}"))?;
        let mut state = Self::of(file, map, Layout::new(1, 1), 0);
        state.check_header(len)?;
        let image = state.read()?;
        Ok((state, image))
    }

    fn check_header(&mut self, len: usize) -> Check<()> {
        let magic = self.get64(header::MAGIC);
        require(magic == MAGIC, || format!("it begins with {magic:#x}, not {MAGIC:#x}"))?;
        let format = self.get32(header::FORMAT);
        require(format == FORMAT, || {
            format!("its format is {format}; this program knows format {FORMAT} only")
        })?;
        let [vectors, first, space] =
            [header::VECTORS, header::FIRST, header::SPACE].map(|at| self.get32(at));
        require((1..=MAX_VECTORS).contains(&vectors), || format!("it has {vectors} vectors"))?;
        require((1..=ID_SPACE).contains(&space), || format!("it has {space} ids"))?;
        self.first = u16::try_from(first).map_err(|_| format!("its first id is {first}"))?;
        self.layout = Layout::new(vectors, space);
        let size = self.layout.size();
        require(len == size, || {
            format!("it has {len} bytes; with {vectors} vectors and {space} ids it has {size}")
        })
    }

    fn read(&mut self) -> Check<Image> {
        let layout = self.layout;
        let given = self.get32(header::GIVEN);
        let slots = self.get32(header::SLOTS);
        require(given <= layout.space, || format!("{given} of {} ids are given", layout.space))?;
        require(slots <= layout.space, || format!("{slots} client records are used"))?;
        self.slots = slots;
        self.allocated = [layout.id(given) - layout.id(0), layout.client(slots) - layout.client(0)];

        let mut members = BTreeMap::new();
        for slot in 0..slots {
            match self.get64(layout.client(slot) + client::KEY) {
                0 => self.free_slots.push(slot),
                key => {
                    let found = self.read_client(slot, key, given)?;
                    let before = members.insert(key, found);
                    require(before.is_none(), || format!("two clients have the key {key}"))?;
                }
            }
        }
        self.free_slots.reverse();
        let (mut owners, mut cookies) = (BTreeMap::new(), BTreeSet::new());
        for (member, client) in members.values() {
            require(cookies.insert(client.cookie), || {
                format!("two clients have the socket {:#x}", client.cookie)
            })?;
            let before = owners.insert(member.id, member.key);
            require(before.is_none(), || format!("two clients have the id {}", member.id))?;
        }

        let (mut departures, mut free) = (BTreeMap::new(), BTreeMap::new());
        let (mut never, mut newest, mut frees) = (Vec::new(), 0, 0);
        for offset in 0..given {
            let at = layout.id(offset);
            let [key, left, freed] =
                [id::KEY, id::LEFT, id::FREED].map(|part| self.get64(at + part));
            let number = self.first.wrapping_add(offset as u16);
            let owner = owners.get(&number).copied();
            // A departure that was being written has no `left` yet.
            require(left == 0 || key < left && key != 0, || {
                format!("id {number}: its owner joined as {key} and left as {left}")
            })?;
            newest = newest.max(left);
            frees = frees.max(freed);
            match owner {
                // The client was about to be removed from its record.
                Some(owner) if owner == key && left != 0 => {
                    if let Some((member, gone)) = members.remove(&key) {
                        self.clear_slot(gone.slot);
                        newest = newest.max(member.key);
                    }
                    let owner = self.get32(at + id::OWNER);
                    let departure = SavedDeparture { id: number, key, left, owner };
                    let before = departures.insert(left, departure);
                    require(before.is_none(), || format!("two clients left as {left}"))?;
                }
                // The client had just been given the id of one that left before.
                Some(_) => {
                    if left != 0 || freed != 0 {
                        self.clear_id(number);
                    }
                }
                None if freed != 0 => {
                    let before = free.insert(freed, number);
                    require(before.is_none(), || format!("two ids became free as {freed}"))?;
                }
                None if left != 0 => {
                    let owner = self.get32(at + id::OWNER);
                    let departure = SavedDeparture { id: number, key, left, owner };
                    let before = departures.insert(left, departure);
                    require(before.is_none(), || format!("two clients left as {left}"))?;
                }
                None => never.push((offset, number)),
            }
        }
        let mut given = given;
        match never[..] {
            [] => {}
            // It was taken for a client whose record was not valid yet.
            [(offset, _)] if offset + 1 == given => given -= 1,
            [(_, id), ..] => return Err(format!("nothing is known of id {id}, which was given")),
        }

        let newest = members.keys().next_back().copied().unwrap_or(0).max(newest);
        let next = newest.checked_add(1).ok_or("the number of the last join is too large")?;
        for (key, (member, _)) in &members {
            let Progress { cursor: (reached, _), heard, .. } = member.progress;
            require(!departures.contains_key(key), || format!("{key} is a join and a departure"))?;
            require(reached < next && heard <= next && *key <= heard, || {
                format!(
                    "client {}, which joined as {key}, was told of joins up to {reached} and \
                     departures up to {heard}, of {next}",
                    member.id
                )
            })?;
        }
        self.frees = frees;
        let (members, clients) = members.into_values().unzip();
        let roster = Saved {
            vectors: layout.vectors,
            first: self.first,
            space: layout.space,
            given,
            next,
            frees,
            free: free.into_values().collect(),
            departures: departures.into_values().collect(),
            members,
        };
        Ok(Image { roster, clients, things: self.things() })
    }

    fn read_client(&self, slot: u32, key: u64, given: u32) -> Check<(SavedMember, SavedClient)> {
        let at = self.layout.client(slot);
        let id = self.get32(at + client::ID);
        let id = u16::try_from(id).map_err(|_| format!("a client has the id {id}"))?;
        let offset = self.offset_of(id);
        require(offset < given, || format!("a client has the id {id}, which was not given"))?;
        let pending = self.get32(at + client::PENDING);
        let is_unknown = pending != 0;
        let owner = self.get32(at + client::OWNER);
        let greeted = self.get32(at + client::GREETED);
        let (mut progress, mut partial) = (Progress { heard: key, ..Progress::default() }, None);
        if is_unknown {
            // It was sent as much at least.
            progress.greeted = greeted.min(u32::from(GREETING)) as u8;
        } else {
            let cursor =
                (self.get64(at + client::CURSOR_KEY), self.get32(at + client::CURSOR_VECTORS));
            let is_greeted = greeted == u32::from(GREETING);
            require(greeted <= u32::from(GREETING), || {
                format!("client {id} was sent {greeted} messages of the greeting")
            })?;
            let is_right = match cursor {
                (0, vectors) => vectors == 0,
                (_, vectors) => is_greeted && (1..=self.layout.vectors).contains(&vectors),
            };
            require(is_right, || {
                let (key, vectors) = cursor;
                format!(
                    "client {id} was sent {greeted} messages of the greeting, and {vectors} vectors of join {key}"
                )
            })?;
            let heard = self.get64(at + client::HEARD);
            progress = Progress { greeted: greeted as u8, cursor, heard };
            let sent = self.get32(at + client::PARTIAL_SENT);
            require((sent as usize) < MESSAGE, || {
                format!("client {id} was sent {sent} bytes of a message")
            })?;
            if sent > 0 {
                partial = Some((self.get64(at + client::PARTIAL).to_le_bytes(), sent as u8));
            }
        }
        let eventfds = (0..self.layout.vectors as usize)
            .map(|number| self.get32(at + client::SIZE + 4 * number))
            .collect();
        let cookie = self.get64(at + client::COOKIE);
        let member = SavedMember { key, id, owner, progress };
        Ok((member, SavedClient { slot, cookie, eventfds, partial, is_unknown }))
    }

    fn things(&self) -> Things {
        let pair = |at| (self.get64(at), self.get64(at + 8));
        Things {
            memory: pair(header::MEMORY),
            memory_size: self.get64(header::MEMORY + 16),
            listener: self.get64(header::LISTENER),
            path: pair(header::PATH),
        }
    }
}
