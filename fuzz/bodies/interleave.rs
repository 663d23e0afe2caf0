// SPDX-License-Identifier: GPL-2.0-or-later
//! A real server and real sockets, with actions selected by the input bytes: clients connect, read
//! a little, leave in every possible way, and misbehave; descriptors run out.
//!
//! The checks: each client receives only what the protocol allows (`checked_client`), at every step;
//! and in the end, when all have read all, each one's view is the roster, each doorbell is
//! its owner's, no well-behaved client was dropped, the server has nothing more to do,
//! and no descriptor is left open.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, Ordering};

use ivshmem::{Event, MemorySource, Refusal, Server};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{setsockopt, sockopt};

use super::Input;
use super::checked_client::CheckedClient;

/// The most clients at a time; fewer if each one has many vectors.
fn crowd(vectors: usize) -> usize {
    match vectors {
        ..=8 => 16,
        9..=64 => 8,
        _ => 4,
    }
}

/// Longer than the server's retry timer. If nothing happens for this time, the server is idle.
const QUIET_MILLIS: u16 = 40;

/// What a client has done wrong, which decides what the server may do with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Conduct {
    /// Nothing wrong.
    Good,
    /// It has shut down its receiving side: it may stay until the server sends it something.
    NotReceiving,
    /// The server must remove it.
    Bad,
}

struct Client {
    connection: CheckedClient,
    conduct: Conduct,
}

struct Scenario {
    server: Server,
    address: SocketAddr,
    vectors: usize,
    clients: Vec<Client>,
    /// The ids of the connected clients, according to the events of `dispatch`.
    here: BTreeSet<u16>,
    refused: usize,
    /// Whether the server's sockets get the smallest possible buffer.
    small_buffers: bool,
    /// Whether descriptors were limited, so that the server may wait for its retry timer.
    was_limited: bool,
}

/// Counts what a run has done, so that a test can check that it did something.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) joined: usize,
    pub(crate) left: usize,
    pub(crate) refused: usize,
    /// Views that were compared at the end.
    pub(crate) compared: usize,
    pub(crate) rung: usize,
}

/// Plays the actions that `bytes` select.
pub(crate) fn run(bytes: &[u8]) -> Seen {
    let before = open_descriptors();
    let mut input = Input::new(bytes);
    let mut scenario = Scenario::new(&mut input);
    let mut seen = Seen::default();
    while !input.is_empty() {
        scenario.step(&mut input, &mut seen);
    }
    scenario.settle(&mut seen);
    scenario.check_end_state(&mut seen);
    drop(scenario);
    // A thread closes connections with unread data, as the server was given its listener.
    let start = std::time::Instant::now();
    while open_descriptors() != before && start.elapsed() < std::time::Duration::from_secs(10) {
        std::thread::yield_now();
    }
    assert_eq!(open_descriptors(), before, "descriptors left open: {:?}", links());
    seen
}

impl Scenario {
    fn new(input: &mut Input<'_>) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let vectors = input.pick(&[1_u32, 2, 3, 8, 64, 300]);
        let ids = input.pick(&[65_536, 1, 2, 3, 5, 17]);
        let first = input.pick(&[0, 1, 65_535, 65_530]);
        let small_buffers = input.byte() & 1 == 1;
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("ivshmem-fuzz-{}-{number}", std::process::id());
        let address = SocketAddr::from_abstract_name(name).expect("a short name");
        let listener = UnixListener::bind_addr(&address).expect("a name of our own");
        let server = Server::builder()
            .listener(listener)
            .memory(MemorySource::Sealed)
            .size(4096)
            .vectors(vectors)
            .first_id(first)
            .id_space(ids)
            .start()
            .expect("the configuration is valid");
        Self {
            server,
            address,
            vectors: vectors as usize,
            clients: Vec::new(),
            here: BTreeSet::new(),
            refused: 0,
            small_buffers,
            was_limited: false,
        }
    }

    fn step(&mut self, input: &mut Input<'_>, seen: &mut Seen) {
        let (what, how) = (input.byte() % 16, input.byte());
        let who = (!self.clients.is_empty()).then(|| usize::from(how) % self.clients.len());
        match (what, who) {
            (0..=2, _) if self.clients.len() < crowd(self.vectors) => self.connect(),
            (3, _) => drop(UnixStream::connect_addr(&self.address)),
            (4 | 5, _) => self.dispatch(seen),
            (6, _) => self.dispatch_with_limit(usize::from(how) % 24, seen),
            (7, _) => {
                let ids: Vec<u16> = self.here.iter().copied().collect();
                if let Some(&id) = ids.get(usize::from(how) % ids.len().max(1)) {
                    assert!(self.server.disconnect(id), "{id} is connected");
                    self.note_disconnect(id);
                }
            }
            (8 | 9, Some(who)) => {
                let limit = input.pick(&[1, 3, 8, 9, 24, 100, 4096]);
                self.receive(who, |client| client.receive(limit).map(drop));
            }
            (10 | 11, Some(who)) => self.receive(who, |client| client.drain().map(drop)),
            (12, Some(who)) => drop(self.clients.swap_remove(who)),
            (13, Some(who)) => self.shut(who, input.pick(&[Shutdown::Write, Shutdown::Both])),
            (14, Some(who)) => self.shut(who, Shutdown::Read),
            (15, Some(who)) => {
                use std::io::Write;
                let client = &mut self.clients[who];
                let length = input.pick(&[1, 8, 300]);
                if client.connection.stream().write(&[0x55; 300][..length]).is_ok() {
                    client.conduct = Conduct::Bad;
                }
            }
            _ => {}
        }
    }

    fn connect(&mut self) {
        let stream = UnixStream::connect_addr(&self.address).expect("the server listens");
        let checked = CheckedClient::new(stream, self.vectors, self.vectors <= 8);
        self.clients.push(Client { connection: checked, conduct: Conduct::Good });
    }

    fn shut(&mut self, who: usize, how: Shutdown) {
        let client = &mut self.clients[who];
        let done = client.connection.stream().shutdown(how);
        if done.is_ok() && client.conduct != Conduct::Bad {
            client.conduct =
                if how == Shutdown::Read { Conduct::NotReceiving } else { Conduct::Bad };
        }
    }

    /// The client that has this id now must be removed. Earlier clients with this id have already left.
    fn note_disconnect(&mut self, id: u16) {
        let is = |client: &Client, id| client.connection.view().id() == id;
        let mut good = self.clients.iter_mut().filter(|client| client.conduct == Conduct::Good);
        match good.find(|client| is(client, Some(id))) {
            Some(client) => client.conduct = Conduct::Bad,
            // That client has not read its id yet, so any client without a known id may be removed.
            None => {
                for client in self.clients.iter_mut() {
                    if client.conduct == Conduct::Good && is(client, None) {
                        client.conduct = Conduct::NotReceiving;
                    }
                }
            }
        }
    }

    fn receive(&mut self, who: usize, read: impl FnOnce(&mut CheckedClient) -> Result<(), String>) {
        let client = &mut self.clients[who];
        match read(&mut client.connection) {
            Ok(()) => {}
            // A client that shut down its receiving side may get a cut-off message.
            Err(_) if client.conduct != Conduct::Good => {}
            Err(error) => panic!("client {who}, {:?}: {error}", client.connection.view().id()),
        }
    }

    fn dispatch(&mut self, seen: &mut Seen) {
        for event in self.server.dispatch().expect("epoll works") {
            match event {
                Event::Joined { id, .. } => {
                    assert!(self.here.insert(id), "{id} joined twice");
                    seen.joined += 1;
                    if let Some(peer) = self.server.peer(id).filter(|_| self.small_buffers) {
                        setsockopt(&peer.socket(), sockopt::SndBuf, &1).expect("the least");
                    }
                }
                Event::Left { id, .. } => {
                    assert!(self.here.remove(&id), "{id} left twice");
                    seen.left += 1;
                }
                // The client ended before it was admitted, so it is not one that did nothing wrong.
                Event::Refused { reason: Refusal::Ended, .. } => {}
                Event::Refused { reason: refusal, .. } => {
                    let known = matches!(refusal, Refusal::NoIds | Refusal::NoDescriptors(_));
                    assert!(known, "refused: {refusal}");
                    self.refused += 1;
                    seen.refused += 1;
                }
                other => panic!("an event unknown to this test: {other:?}"),
            }
        }
        let roster: BTreeSet<u16> = self.server.peers().map(|peer| peer.id()).collect();
        assert_eq!(roster, self.here, "the roster must agree with the events");
    }

    /// Runs one dispatch with at most `left` free descriptors.
    fn dispatch_with_limit(&mut self, left: usize, seen: &mut Seen) {
        self.was_limited = true;
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
        let next = File::open("/dev/null").expect("a descriptor").as_raw_fd();
        let limit = (next as u64 + left as u64).min(soft);
        setrlimit(Resource::RLIMIT_NOFILE, limit, hard).expect("the limit can be lowered");
        self.dispatch(seen);
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard).expect("the limit can be restored");
    }

    /// Reads and dispatches until the server and all clients are idle.
    fn settle(&mut self, seen: &mut Seen) {
        // Far more turns than there can be messages, so a server in a busy loop fails.
        for _ in 0..20_000 {
            let mut received = false;
            for who in 0..self.clients.len() {
                let before = self.clients[who].connection.view().messages();
                self.receive(who, |client| client.drain().map(drop));
                received |= self.clients[who].connection.view().messages() != before;
            }
            let quiet = !is_readable(&self.server, 0) && !received;
            let waits = || self.was_limited && !self.is_satisfied();
            if quiet && !(waits() && is_readable(&self.server, QUIET_MILLIS)) {
                return;
            }
            self.dispatch(seen);
        }
        panic!("the server does not become idle: {:?}", self.server);
    }

    /// Whether each client that did nothing wrong knows all the others, or was closed.
    fn is_satisfied(&self) -> bool {
        let good = |client: &&Client| client.conduct == Conduct::Good;
        self.clients.iter().filter(good).all(|Client { connection, .. }| {
            connection.knows_exactly(&self.here) || connection.has_ended()
        })
    }

    fn check_end_state(&mut self, seen: &mut Seen) {
        let (mut good, mut not_receiving, mut refused) = (0, 0, 0);
        for client in &self.clients {
            let view = client.connection.view();
            match client.conduct {
                Conduct::Bad => continue,
                Conduct::NotReceiving => not_receiving += 1,
                Conduct::Good if client.connection.has_ended() && view.is_refused() => refused += 1,
                Conduct::Good => {
                    good += 1;
                    let who = view.id();
                    assert!(!client.connection.has_ended(), "{who:?} was dropped");
                    let right = client.connection.knows_exactly(&self.here);
                    assert!(right, "{:?} are connected, but {view:?}", self.here);
                    let peer = self.server.peer(who.unwrap()).expect("the peer is connected");
                    assert_eq!(peer.behind(), 0, "{who:?} has received everything");
                    assert_eq!(peer.vectors().len(), self.vectors);
                    seen.compared += 1;
                }
            }
        }
        assert!(refused <= self.refused, "{refused} ended, {} refused", self.refused);
        let here = self.here.len();
        assert!(
            (good..=good + not_receiving).contains(&here),
            "{here} connected, {good} good, {not_receiving} not receiving"
        );
        self.ring_all(seen);
    }

    /// Each client rings each vector of each client, and each ring must arrive at the right vector.
    fn ring_all(&self, seen: &mut Seen) {
        let good: Vec<&CheckedClient> = (self.clients.iter())
            .filter(|client| client.conduct == Conduct::Good && !client.connection.has_ended())
            .map(|client| &client.connection)
            .collect();
        if self.vectors > 8 {
            return;
        }
        for to in &good {
            let id = to.view().id().expect("its greeting is complete");
            for vector in 0..self.vectors {
                assert_eq!(to.rung(vector), 0, "vector {vector} of {id} before it was rung");
                for from in &good {
                    assert!(from.ring(id, vector), "ringing vector {vector} of {id}");
                }
                assert_eq!(to.rung(vector), good.len() as u64, "rings of vector {vector} of {id}");
                seen.rung += good.len();
            }
        }
    }
}

fn is_readable(server: &Server, millis: u16) -> bool {
    let mut fds = [PollFd::new(server.as_fd(), PollFlags::POLLIN)];
    loop {
        match poll(&mut fds, PollTimeout::from(millis)) {
            // libFuzzer has a timer of its own.
            Err(Errno::EINTR) => {}
            ready => return ready.expect("poll works") > 0,
        }
    }
}

/// What the open descriptors refer to.
fn links() -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir("/proc/self/fd").expect("Linux with /proc");
    entries.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok()).collect()
}

pub(crate) fn open_descriptors() -> usize {
    fs::read_dir("/proc/self/fd").expect("Linux with /proc").count()
}
