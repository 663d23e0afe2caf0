// SPDX-License-Identifier: GPL-2.0-or-later
//! The in-flight budget: limits the messages that clients can leave unread.
//!
//! An unread message with a descriptor costs the server twice:
//!
//! - Some 5 KiB of kernel memory, which is charged to the memory cgroup of the *sender*. A socket
//!   of the usual size takes 278 messages, so 250 clients that do not read would fill 300 MB.
//! - One descriptor in flight. Linux counts the descriptors that a user has sent and that no
//!   process has received yet, over all sockets of the user. When the count exceeds the sender's
//!   limit of open files, every message with a descriptor fails with `ETOOMANYREFS`, for every
//!   receiver. The kernel exempts a process with `CAP_SYS_RESOURCE` or `CAP_SYS_ADMIN`, except in
//!   a user namespace.
//!
//! So each client may have [`ALLOWANCE`] unread messages, and all clients together may have
//! [`POOL`] more, or half of the limit of open files if the process is not exempt. The pool
//! belongs to the process, over all its servers.
//!
//! # How it is counted
//! [`Unread`] holds an upper bound for each client. It grows with each message that is sent. The
//! kernel is asked (`SIOCOUTQ`) only when the bound reaches the limit of the client: once every
//! six messages, and more rarely for a client that holds a part of the pool. When the pool is
//! used up, the server asks for each client that holds a part of it, and takes back what is not
//! needed any more.
//!
//! A client that has not read what it was sent before gets only from the first half of the pool.
//! So clients that never read leave the other half to those that do.
//!
//! # A client that has reached its limit
//! epoll reports a socket as writable when a quarter of its buffer is used, or less. With the
//! usual size, of 278 messages, that would be at once. So the socket gets a buffer of the size of
//! the limit. A client without a part of the pool waits for the timer first: usually other
//! clients have read by then, and it gets a part. If not, it goes on with six messages at a time.

#![forbid(unsafe_code)]

use std::fs;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::socket::{getsockopt, setsockopt, sockopt};

use super::roster::Key;
use crate::sys;

/// The unread messages that each client may have without a part of the pool.
pub(super) const ALLOWANCE: u32 = 6;

/// The size of the pool: 64 MiB of kernel memory, at 5 KiB for each message.
const POOL: u32 = (64 << 20) / (5 << 10);

/// The smallest part of the pool that a client gets, if there is as much.
const PART: u32 = 32;

/// The largest limit of a client. The kernel limits a socket of the usual size to 278 messages.
const MOST: u32 = 320;

/// The largest limit of a client when the pool is used by many.
const CROWDED: u32 = 70;

/// A limit from which on the socket has its usual buffer.
const USUAL: u32 = 200;

/// The messages of the pool that all clients of this process hold.
static USED: AtomicU32 = AtomicU32::new(0);

/// What a client at its limit may be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Room {
    /// This number of messages now.
    Messages(usize),
    /// Nothing until epoll reports that it has read.
    AfterReading,
    /// Nothing until the timer expires: others use the pool.
    Later,
}

/// The unread messages of one client.
#[derive(Debug)]
pub(super) struct Unread {
    /// An upper bound of their number.
    count: u32,
    /// The largest number allowed: the allowance and the client's part of the pool.
    limit: u32,
    /// It has read what it was sent since it last got a part of the pool.
    reads: bool,
    /// It was told to wait for the timer, and has got no part of the pool since.
    has_waited: bool,
    /// The messages that its socket's buffer holds. 0 is the usual size.
    buffer: u16,
}

impl Unread {
    pub(super) fn new() -> Self {
        Self { count: 0, limit: ALLOWANCE, reads: false, has_waited: false, buffer: 0 }
    }

    /// Counts what a server before has sent to this client, and gives its socket a buffer of the
    /// usual size: [`usual_size`].
    pub(super) fn resume(&mut self, socket: &UnixStream, usual: Option<usize>) {
        self.count = MOST;
        self.refresh(socket);
        let has = getsockopt(socket, sockopt::SndBuf).ok();
        if let (Some(usual), Some(has)) = (usual, has) {
            if has < usual {
                // The kernel doubles the value.
                let _ = setsockopt(socket, sockopt::SndBuf, &(usual / 2));
            }
        }
    }

    /// Messages that may be sent without asking.
    #[inline]
    pub(super) fn room(&self) -> usize {
        self.limit.saturating_sub(self.count) as usize
    }

    #[inline]
    pub(super) fn note_sent(&mut self, messages: usize) {
        self.count += messages as u32;
    }

    fn holds_part(&self) -> bool {
        self.limit > ALLOWANCE
    }

    /// Asks the kernel how many messages are unread.
    fn refresh(&mut self, socket: &UnixStream) {
        if let Ok(bytes) = sys::unread_bytes(socket.as_fd()) {
            self.count = self.count.min(bytes.div_ceil(charge()) as u32);
        }
    }

    /// Gives the part of the pool back that is not needed for unread messages.
    fn give_back(&mut self) {
        let limit = self.count.max(ALLOWANCE).min(self.limit);
        USED.fetch_sub(self.limit - limit, Ordering::Relaxed);
        self.limit = limit;
    }

    /// Whether the client has unread messages. Gives back what is no longer needed.
    pub(super) fn is_unread(&mut self, socket: &UnixStream) -> bool {
        self.refresh(socket);
        self.give_back();
        self.count > 0
    }
}

impl Drop for Unread {
    fn drop(&mut self) {
        self.count = 0;
        self.give_back();
    }
}

/// The clients of one server that hold a part of the pool.
#[derive(Debug, Default)]
pub(super) struct InFlight {
    holders: Vec<Key>,
    /// Messages to clients at their limit since the last look at all holders.
    since_sweep: usize,
    /// How many holders there were at the last look, and how many messages they gave back.
    swept: usize,
    reclaimed: usize,
    /// Whether the kernel exempts this process, as of the last look at all holders.
    exempt: Option<bool>,
    /// The usual size of a socket's buffer.
    usual_size: usize,
}

impl InFlight {
    /// The clients that hold a part of the pool, if it is time to look at all of them: a look
    /// costs a system call for each, so if the last one was not worth it, the next one has to
    /// wait. The caller calls [`reclaim`](Self::reclaim) for each.
    pub(super) fn sweep(&mut self) -> Option<Vec<Key>> {
        let paid = self.reclaimed >= self.swept;
        if !paid && self.since_sweep < 4 * self.holders.len() {
            return None;
        }
        self.since_sweep = 0;
        self.reclaimed = 0;
        self.swept = self.holders.len();
        self.exempt = None;
        Some(std::mem::take(&mut self.holders))
    }

    /// Takes back what a client does not need any more.
    pub(super) fn reclaim(&mut self, key: Key, unread: &mut Unread, socket: &UnixStream) {
        let before = unread.limit;
        unread.refresh(socket);
        unread.give_back();
        self.reclaimed += (before - unread.limit) as usize;
        if unread.holds_part() {
            self.holders.push(key);
        }
    }

    /// Raises the limit of a client that has reached it, and has `want` more messages pending.
    pub(super) fn ask(
        &mut self,
        key: Key,
        unread: &mut Unread,
        socket: &UnixStream,
        want: usize,
    ) -> Room {
        unread.refresh(socket);
        self.since_sweep += ALLOWANCE as usize;
        if unread.count <= 1 {
            unread.reads = true;
        }
        if unread.room() < want {
            let most = if self.is_crowded() { CROWDED } else { MOST };
            let missing = (want - unread.room()) as u32;
            let part = missing.max(PART).min(most.saturating_sub(unread.limit));
            let got = if part > 0 { self.take(part, unread.reads) } else { 0 };
            if got > 0 {
                if !unread.holds_part() {
                    self.holders.push(key);
                }
                unread.limit += got;
                self.since_sweep += got as usize;
                // It has to read again before it may have more.
                unread.reads = false;
                unread.has_waited = false;
            }
        }
        let room = unread.room();
        // A few messages at a time would cost more than they are worth.
        if room >= want || room as u32 >= unread.limit / 2 {
            self.set_buffer(unread, socket);
            return Room::Messages(room.min(want));
        }
        if unread.holds_part() || std::mem::replace(&mut unread.has_waited, true) {
            self.set_buffer(unread, socket);
            return Room::AfterReading;
        }
        Room::Later
    }

    /// Whether so much of the pool is used that a client gets no more than a small part.
    fn is_crowded(&self) -> bool {
        USED.load(Ordering::Relaxed) > POOL / 4
    }

    /// Makes the socket's buffer as large as its limit, so that epoll reports it as writable when
    /// three quarters of that were read.
    fn set_buffer(&mut self, unread: &mut Unread, socket: &UnixStream) {
        let wanted = if unread.limit < USUAL { unread.limit as u16 } else { 0 };
        if unread.buffer == wanted {
            return;
        }
        if self.usual_size == 0 {
            let Ok(size) = getsockopt(socket, sockopt::SndBuf) else { return };
            self.usual_size = size;
        }
        // The kernel doubles the value, and its minimum is the size of 6 messages.
        let size = match wanted {
            0 => self.usual_size / 2,
            messages => usize::from(messages) * charge() / 2,
        };
        // If this fails, the socket is reported at once, and this is tried again.
        if setsockopt(socket, sockopt::SndBuf, &size).is_ok() {
            unread.buffer = wanted;
        }
    }

    fn take(&mut self, part: u32, reads: bool) -> u32 {
        let mut got = 0;
        let _ = USED.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
            let pool = self.pool(used + part);
            let most = if reads { pool } else { pool / 2 };
            got = part.min(most.saturating_sub(used));
            (got > 0).then_some(used + got)
        });
        got
    }

    /// The size of the pool, if `wanted` messages of it are to be used.
    fn pool(&mut self, wanted: u32) -> u32 {
        let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft);
        let pool = (limit / 2).min(u64::from(POOL)) as u32;
        // Privilege can change at any time, so it is looked at when it matters.
        if wanted > pool / 2 && pool < POOL && *self.exempt.get_or_insert_with(is_privileged) {
            return POOL;
        }
        pool
    }
}

/// The size of a new socket's buffer.
pub(super) fn usual_size() -> Option<usize> {
    let (one, _other) = UnixStream::pair().ok()?;
    getsockopt(&one, sockopt::SndBuf).ok()
}

/// The number of messages for which the kernel charges so many bytes.
pub(super) fn messages_in(bytes: u64) -> u64 {
    bytes.div_ceil(charge() as u64)
}

/// The bytes that the kernel charges a socket for one message of 8 bytes. On x86-64 it is 768: a
/// `sk_buff`, and a buffer that ends with a `skb_shared_info`.
fn charge() -> usize {
    static CHARGE: OnceLock<usize> = OnceLock::new();
    const USUAL: usize = 768;
    let measured = CHARGE.get().copied().or_else(|| {
        let (mut one, _other) = UnixStream::pair().ok()?;
        one.write_all(&[0; crate::protocol::MESSAGE]).ok()?;
        let bytes = sys::unread_bytes(one.as_fd()).ok().filter(|&bytes| bytes > 0)?;
        Some(*CHARGE.get_or_init(|| bytes))
    });
    measured.unwrap_or(USUAL)
}

/// Whether the kernel exempts this process from the limit of descriptors in flight.
fn is_privileged() -> bool {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    has_capability(&read("/proc/thread-self/status"))
        && is_initial_namespace(&read("/proc/thread-self/uid_map"))
}

fn has_capability(status: &str) -> bool {
    const SYS_ADMIN: u64 = 1 << 21;
    const SYS_RESOURCE: u64 = 1 << 24;
    status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .is_some_and(|effective| effective & (SYS_ADMIN | SYS_RESOURCE) != 0)
}

/// Whether this is the initial user namespace, in which every user id is mapped to itself.
fn is_initial_namespace(uid_map: &str) -> bool {
    uid_map.split_ascii_whitespace().eq(["0", "0", "4294967295"])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn privilege_is_a_capability_in_the_initial_namespace() {
        assert!(has_capability("Name:\tx\nCapEff:\t0000000001000000\n"));
        assert!(has_capability("CapEff:\t000001ffffffffff\n"));
        assert!(!has_capability("CapPrm:\t000001ffffffffff\nCapEff:\t0000000000000400\n"));
        assert!(is_initial_namespace("         0          0 4294967295\n"));
        assert!(!is_initial_namespace("         0     100000      65536\n"));
    }

    /// Sends as many messages as the budget allows, 300 at most.
    fn fill(budget: &mut InFlight, unread: &mut Unread, socket: &mut UnixStream) -> usize {
        let mut sent = 0;
        while sent < 300 {
            let room = match unread.room() {
                0 => match budget.ask(Key::from_u64(1), unread, socket, 300 - sent) {
                    Room::Messages(room) => room,
                    Room::AfterReading | Room::Later => 0,
                },
                room => room.min(300 - sent),
            };
            if room == 0 {
                break;
            }
            for _ in 0..room {
                if socket.write_all(&[0; 8]).is_err() {
                    return sent;
                }
                unread.note_sent(1);
                sent += 1;
            }
        }
        sent
    }

    // One test, as the pool belongs to the process and tests run beside each other. The other
    // tests of this package leave almost nothing unread.
    #[test]
    fn clients_that_do_not_read_get_half_of_the_pool_and_those_that_read_get_the_rest() {
        let mut budget = InFlight { exempt: Some(true), ..InFlight::default() };
        let mut clients = Vec::new();
        loop {
            let (mut socket, other) = UnixStream::pair().expect("two descriptors");
            socket.set_nonblocking(true).expect("a socket");
            let mut unread = Unread::new();
            // The greeting, which it does not read.
            for _ in 0..2 {
                socket.write_all(&[0; 8]).expect("there is room");
                unread.note_sent(1);
            }
            let sent = fill(&mut budget, &mut unread, &mut socket);
            let at_limit = sent + 2 == ALLOWANCE as usize;
            clients.push((socket, other, unread));
            if at_limit {
                break;
            }
            assert!(clients.len() < 100, "the pool is endless");
        }
        let held = |clients: &[(UnixStream, UnixStream, Unread)]| -> u32 {
            clients.iter().map(|(_, _, unread)| unread.limit - ALLOWANCE).sum()
        };
        assert!(held(&clients).abs_diff(POOL / 2) < MOST, "{} of {POOL}", held(&clients));

        let (mut socket, mut other) = UnixStream::pair().expect("two descriptors");
        socket.set_nonblocking(true).expect("a socket");
        let mut unread = Unread::new();
        assert_eq!(fill(&mut budget, &mut unread, &mut socket), ALLOWANCE as usize);
        let mut bytes = vec![0; 8 * 300];
        for _ in 0..ALLOWANCE {
            assert_eq!(other.read(&mut bytes[..8]).expect("an unread message"), 8);
        }
        assert!(fill(&mut budget, &mut unread, &mut socket) > 60, "it had read everything");
        // A client that reads gives back what it held.
        let before = USED.load(Ordering::Relaxed);
        assert!(other.read(&mut bytes).expect("unread messages") >= 8);
        while unread.is_unread(&socket) {
            assert!(other.read(&mut bytes).expect("unread messages") >= 8);
        }
        assert_eq!(unread.limit, ALLOWANCE);
        assert!(USED.load(Ordering::Relaxed) <= before - 60);

        // A socket at its limit is writable only when it was read.
        let (socket, other, unread) = clients.last_mut().expect("there are some");
        assert_eq!(budget.ask(Key::from_u64(1), unread, socket, 100), Room::AfterReading);
        let writable = |socket: &UnixStream| {
            use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
            let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
            poll(&mut fds, PollTimeout::ZERO) == Ok(1)
        };
        assert!(!writable(socket));
        while unread.is_unread(socket) {
            assert!(other.read(&mut bytes).expect("unread messages") >= 8);
        }
        assert!(writable(socket));
    }
}
