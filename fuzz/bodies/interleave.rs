// SPDX-License-Identifier: GPL-2.0-or-later
//! A real server, real sockets, and a history made of bytes: clients connect, read a little,
//! leave in every way there is, misbehave; descriptors run out.
//!
//! Held against it: every client hears only what the rules allow (`member`), at every step;
//! and in the end, when all have read all, each one's view is the roster, each doorbell is
//! its owner's, nobody who did nothing wrong was dropped, the server has nothing more to do,
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
use super::member::Member;

/// Clients at a time: fewer where each costs more.
fn crowd(vectors: usize) -> usize {
    match vectors {
        ..=8 => 16,
        9..=64 => 8,
        _ => 4,
    }
}

/// Longer than the server's retry timer: silence for this long is the end of it.
const QUIET_MILLIS: u16 = 40;

/// What a client has done, and so what the server owes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Conduct {
    /// Nothing wrong.
    Good,
    /// It only said that it will not read: it may stay until it is to be told something.
    Deaf,
    /// It must go.
    Bad,
}

struct Client {
    member: Member,
    conduct: Conduct,
}

struct World {
    server: Server,
    address: SocketAddr,
    vectors: usize,
    clients: Vec<Client>,
    /// Who is here by what `dispatch` returned.
    here: BTreeSet<u16>,
    refused: usize,
    /// Sockets of the server get the smallest buffer there is.
    small_buffers: bool,
    /// Descriptors were scarce, so the server may wait for its retry timer.
    squeezed: bool,
}

/// What a run saw, for whoever wants to know that it saw something.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) joined: usize,
    pub(crate) left: usize,
    pub(crate) refused: usize,
    /// Views that were compared at the end.
    pub(crate) compared: usize,
    pub(crate) rung: usize,
}

/// Plays the history that `bytes` make.
pub(crate) fn run(bytes: &[u8]) -> Seen {
    let before = open_descriptors();
    let mut input = Input::new(bytes);
    let mut world = World::new(&mut input);
    let mut seen = Seen::default();
    while !input.is_empty() {
        world.step(&mut input, &mut seen);
    }
    world.settle(&mut seen);
    world.judge(&mut seen);
    drop(world);
    assert_eq!(open_descriptors(), before, "descriptors left open");
    seen
}

impl World {
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
            .expect("nothing is wrong yet");
        Self {
            server,
            address,
            vectors: vectors as usize,
            clients: Vec::new(),
            here: BTreeSet::new(),
            refused: 0,
            small_buffers,
            squeezed: false,
        }
    }

    fn step(&mut self, input: &mut Input<'_>, seen: &mut Seen) {
        let (what, how) = (input.byte() % 16, input.byte());
        let who = (!self.clients.is_empty()).then(|| usize::from(how) % self.clients.len());
        match (what, who) {
            (0..=2, _) if self.clients.len() < crowd(self.vectors) => self.connect(),
            (3, _) => drop(UnixStream::connect_addr(&self.address)),
            (4 | 5, _) => self.dispatch(seen),
            (6, _) => self.squeeze(usize::from(how) % 24, seen),
            (7, _) => {
                let ids: Vec<u16> = self.here.iter().copied().collect();
                if let Some(&id) = ids.get(usize::from(how) % ids.len().max(1)) {
                    assert!(self.server.disconnect(id), "{id} is here");
                    self.note_disconnect(id);
                }
            }
            (8 | 9, Some(who)) => {
                let limit = input.pick(&[1, 3, 8, 9, 24, 100, 4096]);
                self.hear(who, |member| member.hear(limit).map(drop));
            }
            (10 | 11, Some(who)) => self.hear(who, |member| member.drain().map(drop)),
            (12, Some(who)) => drop(self.clients.swap_remove(who)),
            (13, Some(who)) => self.shut(who, input.pick(&[Shutdown::Write, Shutdown::Both])),
            (14, Some(who)) => self.shut(who, Shutdown::Read),
            (15, Some(who)) => {
                use std::io::Write;
                let client = &mut self.clients[who];
                let length = input.pick(&[1, 8, 300]);
                if client.member.stream().write(&[0x55; 300][..length]).is_ok() {
                    client.conduct = Conduct::Bad;
                }
            }
            _ => {}
        }
    }

    fn connect(&mut self) {
        let stream = UnixStream::connect_addr(&self.address).expect("it listens");
        let member = Member::new(stream, self.vectors, self.vectors <= 8);
        self.clients.push(Client { member, conduct: Conduct::Good });
    }

    fn shut(&mut self, who: usize, how: Shutdown) {
        let client = &mut self.clients[who];
        let done = client.member.stream().shutdown(how);
        if done.is_ok() && client.conduct != Conduct::Bad {
            client.conduct = if how == Shutdown::Read { Conduct::Deaf } else { Conduct::Bad };
        }
    }

    /// The one that has this id now must go. Others had it before, and are gone already.
    fn note_disconnect(&mut self, id: u16) {
        let is = |client: &Client, id| client.member.view().id() == id;
        let mut good = self.clients.iter_mut().filter(|client| client.conduct == Conduct::Good);
        match good.find(|client| is(client, Some(id))) {
            Some(client) => client.conduct = Conduct::Bad,
            // It does not read, or has not read its id yet: whoever that is may end.
            None => {
                for client in self.clients.iter_mut() {
                    if client.conduct == Conduct::Good && is(client, None) {
                        client.conduct = Conduct::Deaf;
                    }
                }
            }
        }
    }

    fn hear(&mut self, who: usize, read: impl FnOnce(&mut Member) -> Result<(), String>) {
        let client = &mut self.clients[who];
        match read(&mut client.member) {
            Ok(()) => {}
            // The one that shut its own reading side cuts a message where it likes.
            Err(_) if client.conduct != Conduct::Good => {}
            Err(error) => panic!("client {who}, {:?}: {error}", client.member.view().id()),
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
                // Ended before it was let in, so it is not one that did nothing wrong.
                Event::Refused(Refusal::Ended) => {}
                Event::Refused(refusal) => {
                    let known = matches!(refusal, Refusal::NoIds | Refusal::NoDescriptors(_));
                    assert!(known, "refused: {refusal}");
                    self.refused += 1;
                    seen.refused += 1;
                }
                other => panic!("an event that this test does not know: {other:?}"),
            }
        }
        let roster: BTreeSet<u16> = self.server.peers().map(|peer| peer.id()).collect();
        assert_eq!(roster, self.here, "the roster is what the events say");
    }

    /// One dispatch with only `left` descriptors to be had.
    fn squeeze(&mut self, left: usize, seen: &mut Seen) {
        self.squeezed = true;
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
        let next = File::open("/dev/null").expect("a descriptor").as_raw_fd();
        let limit = (next as u64 + left as u64).min(soft);
        setrlimit(Resource::RLIMIT_NOFILE, limit, hard).expect("lowering is allowed");
        self.dispatch(seen);
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard).expect("as it was");
    }

    /// Reads and dispatches until nobody has anything more to say or to hear.
    fn settle(&mut self, seen: &mut Seen) {
        // Far more than there can be messages: a server that spins never gets there.
        for _ in 0..20_000 {
            let mut heard = false;
            for who in 0..self.clients.len() {
                let before = self.clients[who].member.view().messages();
                self.hear(who, |member| member.drain().map(drop));
                heard |= self.clients[who].member.view().messages() != before;
            }
            let quiet = !is_readable(&self.server, 0) && !heard;
            let waits = || self.squeezed && !self.is_satisfied();
            if quiet && !(waits() && is_readable(&self.server, QUIET_MILLIS)) {
                return;
            }
            self.dispatch(seen);
        }
        panic!("the server does not come to rest: {:?}", self.server);
    }

    /// Whether each client that did nothing wrong knows all the others, or was closed.
    fn is_satisfied(&self) -> bool {
        let good = |client: &&Client| client.conduct == Conduct::Good;
        self.clients
            .iter()
            .filter(good)
            .all(|Client { member, .. }| member.knows_exactly(&self.here) || member.has_ended())
    }

    fn judge(&mut self, seen: &mut Seen) {
        let (mut good, mut deaf, mut turned_away) = (0, 0, 0);
        for client in &self.clients {
            let view = client.member.view();
            match client.conduct {
                Conduct::Bad => continue,
                Conduct::Deaf => deaf += 1,
                Conduct::Good if client.member.has_ended() && view.is_refused() => turned_away += 1,
                Conduct::Good => {
                    good += 1;
                    let who = view.id();
                    assert!(!client.member.has_ended(), "{who:?} was dropped");
                    let right = client.member.knows_exactly(&self.here);
                    assert!(right, "{:?} are here, but {view:?}", self.here);
                    let peer = self.server.peer(who.unwrap()).expect("it is here");
                    assert_eq!(peer.behind(), 0, "{who:?} heard all");
                    assert_eq!(peer.vectors().len(), self.vectors);
                    seen.compared += 1;
                }
            }
        }
        assert!(turned_away <= self.refused, "{turned_away} ended, {} refused", self.refused);
        let here = self.here.len();
        assert!((good..=good + deaf).contains(&here), "{here} here, {good} good, {deaf} deaf");
        self.ring_all(seen);
    }

    /// Everybody rings everybody, and each ring arrives where it was meant for.
    fn ring_all(&self, seen: &mut Seen) {
        let good: Vec<&Member> = (self.clients.iter())
            .filter(|client| client.conduct == Conduct::Good && !client.member.has_ended())
            .map(|client| &client.member)
            .collect();
        if self.vectors > 8 {
            return;
        }
        for to in &good {
            let id = to.view().id().expect("it was greeted");
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

pub(crate) fn open_descriptors() -> usize {
    fs::read_dir("/proc/self/fd").expect("Linux with /proc").count()
}
