// SPDX-License-Identifier: GPL-2.0-or-later
//! Keeps what a restart needs: descriptors at the keeper, everything else in the state file.
//!
//! A client's record is valid before the client is sent a byte. So a socket that comes back without
//! a record was sent nothing, or had left, and may be refused. A record whose socket does not come
//! back tells the id that others know.
//!
//! Storing never waits. What the keeper does not take now is done later, in order; meanwhile no
//! further clients are accepted. A keeper that takes nothing for [`PATIENCE`] is not waited for:
//! the log says what does not survive.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, poll};

use super::connection::{Clients, Connection};
use super::rate_limit::RateLimit;
use super::roster::{Key, SavedDeparture};
use super::state::{State, Things};
use crate::keeper::{Keeper, MOST_IN_MESSAGE, OWN_LISTENER, PATIENCE};
use crate::sys;

/// The names of the descriptors that are not a client's.
pub(super) const STATE: &str = "state";
pub(super) const MEMORY: &str = "mem";
pub(super) const LISTENER: &str = OWN_LISTENER;

/// The name of a client's descriptors: of 5 characters at most, as all names must fit in one
/// environment string.
pub(super) fn name_of(slot: u32) -> String {
    let mut name = Vec::new();
    let mut rest = slot;
    loop {
        name.push(char::from_digit(rest % 36, 36).unwrap_or('0'));
        rest /= 36;
        if rest == 0 {
            break;
        }
    }
    name.push('c');
    name.into_iter().rev().collect()
}

/// Whether [`name_of`] makes such names.
pub(super) fn is_client_name(name: &str) -> bool {
    name.strip_prefix('c')
        .and_then(|slot| u32::from_str_radix(slot, 36).ok())
        .is_some_and(|slot| name_of(slot) == name)
}

/// The number that the kernel gives an eventfd and no other that exists at the same time.
pub(super) fn eventfd_id(fd: BorrowedFd<'_>) -> io::Result<u32> {
    // It has some 100 bytes, and one read gives them all.
    let mut buffer = [0; 512];
    let mut file = File::open(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
    let length = file.read(&mut buffer)?;
    let info = std::str::from_utf8(&buffer[..length]).unwrap_or_default();
    let id = info.lines().find_map(|line| line.strip_prefix("eventfd-id:"));
    id.and_then(|id| id.trim().parse().ok()).ok_or_else(|| {
        let text = "/proc/self/fdinfo has no eventfd-id; Linux 5.2 or newer is needed";
        io::Error::new(io::ErrorKind::Unsupported, text)
    })
}

/// What the keeper is to be told.
#[derive(Debug)]
enum Job {
    /// To store a client's descriptors, from this one on.
    Store {
        key: Key,
        from: usize,
    },
    Remove {
        slot: u32,
        count: u32,
    },
}

/// What a client's record needs, found before it joins.
pub(super) struct Identity {
    pub(super) slot: u32,
    cookie: u64,
    eventfds: Vec<u32>,
}

pub(super) struct Keeping {
    pub(super) keeper: Keeper,
    pub(super) state: State,
    jobs: VecDeque<Job>,
    /// Since when the keeper has taken nothing.
    waits_since: Option<Instant>,
    not_kept: RateLimit,
    full: RateLimit,
}

impl Keeping {
    pub(super) fn new(keeper: Keeper, state: State) -> Self {
        Self {
            keeper,
            state,
            jobs: VecDeque::new(),
            waits_since: None,
            not_kept: RateLimit::default(),
            full: RateLimit::default(),
        }
    }

    /// Stores the three descriptors that every server has. Waits for the keeper, as no client is
    /// connected yet.
    pub(super) fn store_things(
        &mut self,
        memory: BorrowedFd<'_>,
        listener: BorrowedFd<'_>,
    ) -> io::Result<()> {
        let state = self.state.as_fd().try_clone_to_owned()?;
        for (name, fd) in [(STATE, state.as_fd()), (MEMORY, memory), (LISTENER, listener)] {
            self.insist(|keeper| keeper.store(name, &[fd]))?;
            self.keeper.count(1);
        }
        Ok(())
    }

    /// Another listening socket replaces the one that is kept.
    pub(super) fn replace_listener(
        &mut self,
        listener: BorrowedFd<'_>,
        things: &Things,
    ) -> io::Result<()> {
        self.insist(|keeper| keeper.remove(LISTENER, 1))?;
        self.state.set_listener(things.listener, things.path);
        self.keeper.count(1);
        self.insist(|keeper| keeper.store(LISTENER, &[listener]))
    }

    /// Repeats a call until the keeper has taken it, for [`PATIENCE`] at most.
    fn insist(&mut self, mut call: impl FnMut(&mut Keeper) -> io::Result<()>) -> io::Result<()> {
        let until = Instant::now() + PATIENCE;
        loop {
            match call(&mut self.keeper) {
                Err(error) if is_for_now(&error) && Instant::now() < until => {
                    let mut fds = [PollFd::new(self.keeper.as_fd(), PollFlags::POLLOUT)];
                    let _ = poll(&mut fds, 10u16);
                }
                result => return result,
            }
        }
    }

    /// Finds what the record of a client needs that is about to join with the id `id`.
    pub(super) fn identify(&mut self, id: u16, connection: &Connection) -> io::Result<Identity> {
        let slot = self.state.reserve(id)?;
        let cookie = sys::socket_cookie(connection.socket.as_fd())?;
        let eventfds = connection.vectors.iter().map(|fd| eventfd_id(fd.as_fd()));
        Ok(Identity { slot, cookie, eventfds: eventfds.collect::<io::Result<_>>()? })
    }

    /// The newest client has joined.
    pub(super) fn joined(&mut self, clients: &mut Clients, identity: &Identity) {
        let index = clients.len() - 1;
        let count = 1 + u64::from(clients.vectors());
        if self.keeper.has_room(count) {
            self.keeper.count(count);
            clients.payload_mut(index).kept = count as u32;
            self.jobs.push_back(Job::Store { key: clients.key(index), from: 0 });
            self.work(clients);
        } else {
            let (id, capacity) = (clients.id(index), self.keeper.capacity());
            self.full.warn(format_args!(
                "peer {id} does not survive a restart of the server: the keeper keeps {capacity} \
                 descriptors at most"
            ));
        }
        let member = clients.saved_member(index);
        let Identity { slot, cookie, ref eventfds } = *identity;
        self.state.joined(slot, clients, &member, cookie, eventfds);
    }

    /// A client has left.
    pub(super) fn left(
        &mut self,
        clients: &mut Clients,
        departure: &SavedDeparture,
        slot: u32,
        kept: u32,
    ) {
        self.state.left(slot, departure);
        self.forget(clients, slot, kept);
    }

    /// The keeper is to close the descriptors of a client.
    pub(super) fn forget(&mut self, clients: &mut Clients, slot: u32, kept: u32) {
        if kept > 0 {
            self.jobs.push_back(Job::Remove { slot, count: kept });
            self.work(clients);
        }
    }

    /// Whether clients wait to be stored.
    pub(super) fn is_behind(&self) -> bool {
        !self.jobs.is_empty()
    }

    /// Does what waits, as far as the keeper takes it now.
    pub(super) fn work(&mut self, clients: &mut Clients) {
        while let Some(job) = self.jobs.front_mut() {
            let done = match job {
                Job::Remove { slot, count } => {
                    self.keeper.remove(&name_of(*slot), u64::from(*count)).map(|()| true)
                }
                Job::Store { key, from } => match clients.index(*key) {
                    Some(index) => store_part(&self.keeper, clients.payload(index), from),
                    None => Ok(true),
                },
            };
            match done {
                Ok(true) => {
                    self.jobs.pop_front();
                    self.waits_since = None;
                }
                Ok(false) => {}
                Err(error) => {
                    let since = *self.waits_since.get_or_insert_with(Instant::now);
                    if is_for_now(&error) && since.elapsed() < PATIENCE {
                        return;
                    }
                    self.waits_since = None;
                    self.give_up(clients, &error);
                }
            }
        }
    }

    fn give_up(&mut self, clients: &Clients, error: &io::Error) {
        let jobs = std::mem::take(&mut self.jobs);
        let lost = jobs.iter().filter_map(|job| match job {
            Job::Store { key, .. } => Some(clients.id(clients.index(*key)?)),
            Job::Remove { .. } => None,
        });
        let lost: Vec<u16> = lost.collect();
        self.not_kept.warn(format_args!(
            "the keeper takes no descriptors ({error}); these peers do not survive a restart of \
             the server: {lost:?}"
        ));
    }

    /// The server ends for good: nothing of it is to come back.
    pub(super) fn retire(&mut self, clients: &Clients) {
        self.state.retire();
        let result = self.insist_all(clients);
        if let Err(error) = result {
            log::warn!("cannot have the keeper close what it keeps: {error}");
        }
    }

    fn insist_all(&mut self, clients: &Clients) -> io::Result<()> {
        for name in [LISTENER, MEMORY] {
            self.insist(|keeper| keeper.remove(name, 1))?;
        }
        for (_, connection) in clients.iter().filter(|(_, connection)| connection.kept > 0) {
            let name = name_of(connection.slot);
            self.insist(|keeper| keeper.remove(&name, u64::from(connection.kept)))?;
        }
        self.insist(|keeper| keeper.remove(STATE, 1))
    }

    /// The process ends, and another one goes on. Waits until the keeper has everything.
    pub(super) fn hand_over(&mut self, clients: &mut Clients) {
        let until = Instant::now() + PATIENCE;
        while self.is_behind() && Instant::now() < until {
            let mut fds = [PollFd::new(self.keeper.as_fd(), PollFlags::POLLOUT)];
            let _ = poll(&mut fds, 10u16);
            self.work(clients);
        }
    }
}

/// Stores as many of a client's descriptors as one message takes. Returns whether it was the rest.
fn store_part(keeper: &Keeper, connection: &Connection, from: &mut usize) -> io::Result<bool> {
    let fds: Vec<BorrowedFd<'_>> = std::iter::once(connection.socket.as_fd())
        .chain(connection.vectors.iter().map(AsFd::as_fd))
        .skip(*from)
        .take(MOST_IN_MESSAGE)
        .collect();
    keeper.store(&name_of(connection.slot), &fds)?;
    *from += fds.len();
    Ok(*from > connection.vectors.len())
}

/// Whether a call that failed can succeed later.
fn is_for_now(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM | libc::ETOOMANYREFS)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_clients_are_short_and_differ() {
        let names: std::collections::BTreeSet<_> = (0..65_536).map(name_of).collect();
        assert_eq!(names.len(), 65_536);
        assert!(names.iter().all(|name| is_client_name(name)));
        assert!(names.iter().all(|name| name.len() <= 5), "all in one environment string");
        assert!([STATE, MEMORY, LISTENER].iter().all(|name| !names.contains(*name)));
        assert_eq!((name_of(0), name_of(37)), ("c0".to_owned(), "c11".to_owned()));
    }
}
