// SPDX-License-Identifier: GPL-2.0-or-later
//! What is passed on to the supervisor's own service manager: readiness, status, and descriptors up to a number.
//!
//! systemd compares each descriptor that it stores with all others, in PID 1, so it gets [`LIMIT`] at most. A name is
//! there with all its descriptors or not at all. The socket does not block: a slow service manager must not delay the
//! server, which waits for the supervisor to receive. What could not be sent yet is in a queue.

#![forbid(unsafe_code)]

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use super::notify;
use super::store::Store;
use super::sys::MESSAGE_FDS;

/// The most descriptors that the service manager gets.
const LIMIT: usize = 2_000;

#[derive(Debug)]
enum Item {
    Text(String),
    /// The descriptors of a name, from the given one on.
    Store {
        name: String,
        from: usize,
        keep_hung_up: bool,
    },
}

#[derive(Debug)]
pub(super) struct Upstream {
    socket: UnixDatagram,
    queue: VecDeque<Item>,
    /// How many descriptors of each name it has, or will have when the queue is sent.
    passed: HashMap<String, usize>,
    count: usize,
    limit: usize,
    /// Names that the server stored and that are not passed on.
    left_out: BTreeSet<String>,
}

impl Upstream {
    /// `None` if there is no service manager to notify.
    pub(super) fn connect() -> io::Result<Option<Self>> {
        let Some(socket) = notify::connect()? else { return Ok(None) };
        socket.set_nonblocking(true)?;
        // systemd 254 and later say how many the unit may store.
        let limit = std::env::var("FDSTORE").ok().and_then(|text| text.parse().ok());
        Ok(Some(Self {
            socket,
            queue: VecDeque::new(),
            passed: HashMap::new(),
            count: 0,
            limit: limit.map_or(LIMIT, |limit: usize| limit.min(LIMIT)),
            left_out: BTreeSet::new(),
        }))
    }

    /// The service manager has this already: it gave it to this process.
    pub(super) fn has(&mut self, name: &str, count: usize) {
        *self.passed.entry(name.to_owned()).or_default() += count;
        self.count += count;
    }

    pub(super) fn text(&mut self, text: impl Into<String>, store: &Store) {
        self.queue.push_back(Item::Text(text.into()));
        self.flush(store);
    }

    /// The server stored `count` more descriptors with this name.
    pub(super) fn stored(&mut self, name: &str, count: usize, keep_hung_up: bool, store: &Store) {
        if self.left_out.contains(name) {
            return;
        }
        if count > self.limit.saturating_sub(self.count) {
            if self.left_out.is_empty() {
                log::warn!(
                    "the service manager holds {} descriptors and gets no more (limit {}): clients that \
                     join now do not survive a restart of the unit; they survive a restart of the \
                     server by this supervisor",
                    self.count,
                    self.limit
                );
            }
            // A client of which only a part is there would be of no use.
            self.withdraw(name);
            self.left_out.insert(name.to_owned());
        } else {
            let from = store.get(name).len().saturating_sub(count);
            self.has(name, count);
            self.queue.push_back(Item::Store { name: name.to_owned(), from, keep_hung_up });
        }
        self.flush(store);
    }

    /// The server removed this name; what was left out may have room now.
    pub(super) fn removed(&mut self, name: &str, store: &Store) {
        self.left_out.remove(name);
        self.withdraw(name);
        while let Some(name) = self.left_out.first().cloned() {
            let count = store.get(&name).len();
            if count > self.limit.saturating_sub(self.count) {
                break;
            }
            self.left_out.remove(&name);
            self.has(&name, count);
            self.queue.push_back(Item::Store { name, from: 0, keep_hung_up: true });
            if self.left_out.is_empty() {
                log::warn!(
                    "the service manager holds all descriptors again: all clients survive a restart of \
                     the unit"
                );
            }
        }
        self.flush(store);
    }

    fn withdraw(&mut self, name: &str) {
        if let Some(count) = self.passed.remove(name) {
            self.count -= count;
            self.queue.push_back(Item::Text(format!("FDSTOREREMOVE=1\nFDNAME={name}")));
        }
    }

    /// Whether something waits for room in the service manager's socket.
    pub(super) fn is_waiting(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Sends the rest before the end, as long as the service manager takes it.
    pub(super) fn finish(&mut self, store: &Store) {
        let limit = Some(Duration::from_secs(5));
        let blocking = self.socket.set_nonblocking(false);
        if blocking.and_then(|()| self.socket.set_write_timeout(limit)).is_ok() {
            self.flush(store);
        }
    }

    /// Sends what can be sent without waiting.
    pub(super) fn flush(&mut self, store: &Store) {
        while let Some(item) = self.queue.front_mut() {
            let sent = match item {
                Item::Text(text) => notify::send(&self.socket, text, &[]).map(|()| true),
                Item::Store { name, from, keep_hung_up } => {
                    let fds = store.get(name).get(*from..).unwrap_or(&[]);
                    let fds = &fds[..fds.len().min(MESSAGE_FDS)];
                    let poll = if *keep_hung_up { "\nFDPOLL=0" } else { "" };
                    // The name may have been removed in the meantime.
                    let sent = if fds.is_empty() {
                        Ok(())
                    } else {
                        notify::send(&self.socket, &format!("FDSTORE=1\nFDNAME={name}{poll}"), fds)
                    };
                    sent.map(|()| {
                        *from += fds.len();
                        fds.len() < MESSAGE_FDS
                    })
                }
            };
            match sent {
                Ok(false) => {}
                Ok(true) => drop(self.queue.pop_front()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    log::warn!("cannot notify the service manager: {error}");
                    self.queue.pop_front();
                }
            }
        }
    }
}

impl AsFd for Upstream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
