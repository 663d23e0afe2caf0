// SPDX-License-Identifier: GPL-2.0-or-later
//! A client, and a server that says whatever the bytes say: messages whole and in parts, with
//! descriptors of every kind and number, at every moment; and the end.
//!
//! Held against it: nothing panics or waits, whoever connects knows exactly what a second
//! reading of the same bytes says, up to the first thing that is wrong; each doorbell is the
//! eventfd that was sent; and no descriptor is left open.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use ivshmem::client::{Client, Event};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::unistd::{ftruncate, read, write};

use super::Input;
use super::interleave::open_descriptors;

/// Bytes of the memory when it is right.
const SIZE: i64 = 4096;

/// A descriptor that a server may send.
enum Sent {
    Eventfd(OwnedFd),
    Memory(OwnedFd),
    /// Neither, or no good one.
    Other(OwnedFd),
}

impl Sent {
    fn new(kind: u8) -> Self {
        let memfd = |size| {
            let fd = memfd_create(c"fuzz", MFdFlags::MFD_CLOEXEC).expect("a memfd");
            ftruncate(&fd, size).expect("a size");
            fd
        };
        let eventfd = |flags| EventFd::from_flags(flags | EfdFlags::EFD_CLOEXEC).expect("one");
        match kind % 16 {
            0..=8 => Self::Eventfd(eventfd(EfdFlags::EFD_NONBLOCK).into()),
            9 => Self::Eventfd(eventfd(EfdFlags::empty()).into()),
            10 | 11 => Self::Memory(memfd(SIZE)),
            12 => Self::Other(memfd(0)),
            13 => Self::Other(nix::unistd::pipe().expect("a pipe").0),
            14 => Self::Other(File::open("/dev/null").expect("/dev/null").into()),
            _ => Self::Other(UnixStream::pair().expect("two sockets").0.into()),
        }
    }

    fn fd(&self) -> RawFd {
        let (Self::Eventfd(fd) | Self::Memory(fd) | Self::Other(fd)) = self;
        fd.as_raw_fd()
    }
}

/// The second reading: what a client that has heard all of it knows.
#[derive(Default)]
struct Model {
    bytes: Vec<u8>,
    fds: Vec<Sent>,
    messages: usize,
    id: Option<u16>,
    memory: bool,
    own: Vec<OwnedFd>,
    peers: BTreeMap<u16, Vec<OwnedFd>>,
    wrong: bool,
}

impl Model {
    /// Some bytes that were sent, and the descriptors that go with the first of them.
    fn hear(&mut self, bytes: &[u8], fds: Vec<Sent>) {
        let mut fds = Some(fds);
        for &byte in bytes {
            self.fds.extend(fds.take().unwrap_or_default());
            self.bytes.push(byte);
            if let Ok(value) = <[u8; 8]>::try_from(&self.bytes[..]) {
                self.bytes.clear();
                let fds = std::mem::take(&mut self.fds);
                self.wrong = self.wrong || self.note(i64::from_le_bytes(value), fds).is_none();
            }
        }
    }

    /// None if it is wrong.
    fn note(&mut self, value: i64, mut fds: Vec<Sent>) -> Option<()> {
        self.messages += 1;
        let fd = fds.pop();
        if !fds.is_empty() {
            return None;
        }
        match (self.messages, value, fd) {
            (1, 0, None) => {}
            (1, ..) => return None,
            (2, id, None) => self.id = Some(u16::try_from(id).ok()?),
            (2, ..) => return None,
            (_, -1, Some(Sent::Memory(_))) if !self.memory => self.memory = true,
            (_, peer, fd) => {
                let peer = u16::try_from(peer).ok()?;
                match fd {
                    None if Some(peer) == self.id => return None,
                    None => drop(self.peers.remove(&peer)?),
                    Some(Sent::Eventfd(fd)) if Some(peer) == self.id => self.own.push(fd),
                    Some(Sent::Eventfd(fd)) => self.peers.entry(peer).or_default().push(fd),
                    Some(_) => return None,
                }
            }
        }
        Some(())
    }
}

/// What runs saw.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) connected: usize,
    pub(crate) refused: usize,
    pub(crate) joined: usize,
    pub(crate) left: usize,
    pub(crate) rung: usize,
}

struct Server {
    socket: UnixStream,
    model: Model,
    open: bool,
}

impl Server {
    /// Sends what fits, like a server that never waits.
    fn send(&mut self, bytes: &[u8], fds: Vec<Sent>) {
        // Without a byte no descriptor goes; with a wrong one before, nobody listens.
        if bytes.is_empty() || !self.open {
            return;
        }
        let numbers: Vec<RawFd> = fds.iter().map(Sent::fd).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        let control = if numbers.is_empty() { &rights[..0] } else { &rights[..] };
        let part = [std::io::IoSlice::new(bytes)];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match sendmsg::<()>(self.socket.as_raw_fd(), &part, control, flags, None) {
            Ok(sent) => self.model.hear(&bytes[..sent], fds),
            Err(_) => self.end(),
        }
    }

    fn message(&mut self, value: i64, fds: Vec<Sent>) {
        self.send(&value.to_le_bytes(), fds);
    }

    fn end(&mut self) {
        self.open = false;
        let _ = self.socket.shutdown(Shutdown::Write);
    }

    /// One thing that a server may say, or must not.
    fn step(&mut self, input: &mut Input<'_>) {
        let eventfd = || vec![Sent::new(0)];
        let peer = i64::from(input.byte() % 6);
        match input.byte() % 16 {
            0..=5 => self.message(peer, eventfd()),
            6 | 7 => self.message(peer, Vec::new()),
            8 => self.message(self.model.id.unwrap_or(0).into(), eventfd()),
            9 => {
                let value = input.pick(&[-1, 65_535, 65_536, -2, i64::MIN, i64::MAX, 1 << 32]);
                let kind = input.byte();
                let fds = (0..input.pick(&[1, 0, 1, 2])).map(|_| Sent::new(kind));
                self.message(value, fds.collect());
            }
            10 => {
                let kind = input.byte();
                let fds = (0..input.pick(&[1, 2, 3, 15, 16, 17, 20])).map(|_| Sent::new(kind));
                self.message(peer, fds.collect());
            }
            11 => {
                // A message in two parts, the descriptor with either.
                let (at, last) = (1 + usize::from(input.byte() % 7), input.byte() & 1 == 1);
                let bytes = peer.to_le_bytes();
                self.send(&bytes[..at], if last { Vec::new() } else { eventfd() });
                self.send(&bytes[at..], if last { eventfd() } else { Vec::new() });
            }
            12 => {
                let bytes: Vec<u8> = (0..input.byte() % 20).map(|_| input.byte()).collect();
                self.send(&bytes, Vec::new());
            }
            13 => {
                // Two messages with one call.
                let value = peer.to_le_bytes();
                self.send(&[value, value].concat(), eventfd());
            }
            14 => self.message(peer, vec![Sent::new(input.byte())]),
            _ if input.byte() % 8 == 0 => self.end(),
            _ => {}
        }
    }

    fn greet(&mut self, vectors: u32) {
        self.message(0, Vec::new());
        self.message(3, Vec::new());
        self.message(-1, vec![Sent::new(10)]);
        for _ in 0..vectors {
            self.message(3, vec![Sent::new(0)]);
        }
    }
}

/// Plays what `bytes` say.
pub(crate) fn run(bytes: &[u8]) -> Seen {
    let before = open_descriptors();
    let mut seen = Seen::default();
    play(&mut Input::new(bytes), &mut seen);
    assert_eq!(open_descriptors(), before, "descriptors left open");
    seen
}

fn play(input: &mut Input<'_>, seen: &mut Seen) {
    let (socket, other) = UnixStream::pair().expect("two sockets");
    let mut server = Server { socket, model: Model::default(), open: true };
    let vectors = input.pick(&[1, 2, 3, 8]);
    let proper = input.byte() & 3 != 0;
    let mut builder = Client::builder().connect_timeout(Duration::from_secs(20));
    if proper {
        server.greet(vectors);
        builder = builder.vectors(vectors);
    } else {
        // All of it at once, and the end: nobody has to wait for more.
        for value in [0, 3, -1] {
            if input.byte() % 16 != 0 {
                server.message(value, if value == -1 { vec![Sent::new(10)] } else { Vec::new() });
            }
        }
        while !input.is_empty() {
            server.step(input);
        }
        server.end();
        if input.byte() & 1 == 1 {
            builder = builder.vectors(vectors);
        }
    }
    let mut client = match builder.adopt(other) {
        Err(error) => {
            assert!(!proper, "a proper greeting: {error}");
            assert!(!error.to_string().is_empty());
            seen.refused += 1;
            return;
        }
        Ok(client) => client,
    };
    seen.connected += 1;
    let mut told = Told::new(&client);
    while !input.is_empty() {
        server.step(input);
        match input.byte() % 8 {
            0..=3 => told.dispatch(&mut client, seen),
            4 if client.vectors() > 0 => {
                let vector = u32::from(input.byte()) % client.vectors();
                client.ring(client.id(), vector).expect("one of its own");
                told.rings += 1;
            }
            _ => {}
        }
    }
    server.end();
    for _ in 0..200 {
        told.dispatch(&mut client, seen);
    }
    judge(&server.model, &client, &told);
    ring_all(&mut server.model, &client, seen);
}

/// What the events say.
struct Told {
    joined: BTreeSet<u16>,
    ended: bool,
    rings: u64,
    rung: u64,
}

impl Told {
    fn new(client: &Client) -> Self {
        let whole = client.peers().filter(|peer| peer.vectors() >= client.vectors());
        Self { joined: whole.map(|peer| peer.id()).collect(), ended: false, rings: 0, rung: 0 }
    }

    fn dispatch(&mut self, client: &mut Client, seen: &mut Seen) {
        for event in client.dispatch().expect("epoll works") {
            let told = !self.ended;
            match event {
                Event::Joined { peer, .. } => {
                    assert!(told && self.joined.insert(peer), "{peer} joined twice");
                    seen.joined += 1;
                }
                Event::Left { peer } => {
                    assert!(told && self.joined.remove(&peer), "{peer} left, but never joined");
                    seen.left += 1;
                }
                Event::Rung { count, .. } => self.rung += count,
                Event::Vector { .. } => assert!(told, "a vector after the end"),
                Event::Disconnected { .. } => {
                    assert!(told, "disconnected twice");
                    self.ended = true;
                }
                other => panic!("an event that this test does not know: {other:?}"),
            }
        }
    }
}

fn judge(model: &Model, client: &Client, told: &Told) {
    assert!(told.ended && !client.is_connected(), "the server has ended");
    assert_eq!(Some(client.id()), model.id);
    assert_eq!(client.memory().len() as i64, SIZE);
    assert_eq!(client.vectors() as usize, model.own.len(), "own vectors");
    let known: Vec<_> = client.peers().map(|peer| (peer.id(), peer.vectors())).collect();
    let sent: Vec<_> = model.peers.iter().map(|(&id, fds)| (id, fds.len() as u32)).collect();
    assert_eq!(known, sent, "peers");
    let whole = |&(id, _): &(u16, u32)| told.joined.contains(&id);
    assert_eq!(known.iter().filter(|peer| whole(peer)).count(), told.joined.len(), "joined");
    assert_eq!(told.rung, told.rings, "rings");
}

/// Each doorbell is the eventfd that the server sent for it, and no other.
fn ring_all(model: &mut Model, client: &Client, seen: &mut Seen) {
    let own = model.id.into_iter().map(|id| (id, &model.own));
    for (id, fds) in own.chain(model.peers.iter().map(|(&id, fds)| (id, fds))) {
        for (vector, fd) in fds.iter().enumerate() {
            // So that a read never waits, and shows what the ring adds.
            assert_eq!(write(fd.as_fd(), &1_u64.to_ne_bytes()), Ok(8));
            client.ring(id, vector as u32).expect("a peer that is known");
            let mut count = [0; 8];
            assert_eq!(read(fd.as_fd(), &mut count), Ok(8));
            assert_eq!(u64::from_ne_bytes(count), 2, "vector {vector} of {id} was rung");
            seen.rung += 1;
        }
    }
}
