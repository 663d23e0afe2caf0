// SPDX-License-Identifier: GPL-2.0-or-later
//! A raw client of the protocol: cheap beside a QEMU, and stricter.
//!
//! [`Connection`] only receives messages. [`Peer`] goes through the greeting and keeps the book that a QEMU keeps, but
//! where a wrong message would corrupt QEMU's heap, it panics: an id that comes back, a second goodbye, and so on.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::unistd;

use super::PATIENCE;

/// One message of the server.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) value: i64,
    pub(crate) fd: Option<OwnedFd>,
}

/// A connection to the server that reads nothing by itself.
pub(crate) struct Connection {
    stream: UnixStream,
}

impl Connection {
    #[track_caller]
    pub(crate) fn open(socket: &Path) -> Self {
        match UnixStream::connect(socket) {
            Ok(stream) => Self { stream },
            Err(error) => panic!("cannot connect to {}: {error}", socket.display()),
        }
    }

    /// The socket itself, for tests that misbehave on it.
    pub(crate) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// The next message; `None` is the end of the stream. Nothing within `limit` is an error of the kind `TimedOut`;
    /// a message that is no message of this protocol (cut short, two descriptors) is `InvalidData`.
    pub(crate) fn receive(&mut self, limit: Duration) -> io::Result<Option<Message>> {
        let deadline = Instant::now() + limit;
        let mut bytes = [0; 8];
        let mut filled = 0;
        let mut fds = Vec::new();
        while filled < bytes.len() {
            if !is_readable(self.stream.as_fd(), deadline)? {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let mut part = [IoSliceMut::new(&mut bytes[filled..])];
            // Room for more than the one that is allowed: two must be seen as two.
            let mut space = cmsg_space!([RawFd; 4]);
            let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
            let received =
                match recvmsg::<()>(self.stream.as_raw_fd(), &mut part, Some(&mut space), flags) {
                    Err(Errno::EINTR | Errno::EAGAIN) => continue,
                    other => other?,
                };
            for control in received.cmsgs()? {
                if let ControlMessageOwned::ScmRights(numbers) = control {
                    fds.extend(numbers.into_iter().map(own));
                }
            }
            if received.bytes == 0 {
                if filled == 0 && fds.is_empty() {
                    return Ok(None);
                }
                return Err(io::ErrorKind::InvalidData.into());
            }
            filled += received.bytes;
        }
        let fd = fds.pop();
        if !fds.is_empty() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(Some(Message { value: i64::from_le_bytes(bytes), fd }))
    }

    /// The next message, which must come.
    #[track_caller]
    pub(crate) fn expect(&mut self, what: &str) -> Message {
        match self.receive(PATIENCE) {
            Ok(Some(message)) => message,
            Ok(None) => panic!("the server closed instead of sending {what}"),
            Err(error) => panic!("waiting for {what}: {error}"),
        }
    }
}

/// Takes over a descriptor that was just received.
#[expect(unsafe_code, reason = "nix hands received descriptors out as numbers")]
fn own(number: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for our recvmsg, and nobody else has been told its number.
    unsafe { OwnedFd::from_raw_fd(number) }
}

/// A client that went through the greeting, and the peers that it knows.
pub(crate) struct Peer {
    connection: Connection,
    id: u16,
    vectors: usize,
    memory: OwnedFd,
    own: Vec<OwnedFd>,
    others: BTreeMap<u16, Vec<OwnedFd>>,
    gone: BTreeSet<u16>,
}

impl Peer {
    /// Joins: reads everything up to the last of its own vectors.
    #[track_caller]
    pub(crate) fn join(socket: &Path, vectors: u16) -> Self {
        let mut connection = Connection::open(socket);
        let version = connection.expect("the version");
        assert!(version.value == 0 && version.fd.is_none(), "{version:?}");
        let id = connection.expect("the id");
        assert!(id.fd.is_none(), "{id:?}");
        let memory = connection.expect("the memory");
        assert_eq!(memory.value, -1, "in place of the memory");
        let mut peer = Self {
            connection,
            id: u16::try_from(id.value).expect("an id has 16 bits"),
            vectors: usize::from(vectors),
            memory: memory.fd.expect("the memory's descriptor"),
            own: Vec::new(),
            others: BTreeMap::new(),
            gone: BTreeSet::new(),
        };
        while peer.own.len() < peer.vectors {
            let message = peer.connection.expect("the rest of the greeting");
            peer.note(message);
        }
        for (id, fds) in &peer.others {
            assert_eq!(fds.len(), peer.vectors, "vectors of peer {id} at the greeting");
        }
        peer
    }

    pub(crate) fn id(&self) -> u16 {
        self.id
    }

    /// Its connection, to read it in some other way from here on.
    pub(crate) fn into_connection(self) -> Connection {
        self.connection
    }

    /// The shared memory.
    pub(crate) fn memory(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }

    /// The peers known by now, this one excepted.
    pub(crate) fn others(&self) -> Vec<u16> {
        self.others.keys().copied().collect()
    }

    /// Writes a message of the server into the book, where it must fit.
    #[track_caller]
    fn note(&mut self, message: Message) {
        let id = u16::try_from(message.value)
            .unwrap_or_else(|_| panic!("not a peer's message: {message:?}"));
        match message.fd {
            Some(fd) => {
                assert!(!self.gone.contains(&id), "id {id} came back");
                let fds =
                    if id == self.id { &mut self.own } else { self.others.entry(id).or_default() };
                fds.push(fd);
                assert!(fds.len() <= self.vectors, "too many vectors of peer {id}");
            }
            None => {
                let known = self.others.remove(&id);
                assert!(known.is_some(), "a goodbye of {id}, who was not there");
                self.gone.insert(id);
            }
        }
    }

    /// Takes note of messages until `done` says that it is enough.
    #[track_caller]
    fn listen_until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        while !done(self) {
            let message = self.connection.expect(what);
            self.note(message);
        }
    }

    /// Waits until every vector of this peer is known.
    #[track_caller]
    pub(crate) fn wait_for_peer(&mut self, id: u16) {
        self.listen_until(&format!("all vectors of {id}"), |peer| {
            (peer.others.get(&id)).is_some_and(|fds| fds.len() == peer.vectors)
        });
    }

    /// Waits for the goodbye of this peer.
    #[track_caller]
    pub(crate) fn wait_for_goodbye(&mut self, id: u16) {
        self.listen_until(&format!("the goodbye of {id}"), |peer| peer.gone.contains(&id));
    }

    /// Rings a vector of a peer that is known.
    #[track_caller]
    pub(crate) fn ring(&self, id: u16, vector: u16) {
        let eventfd = &self.others[&id][usize::from(vector)];
        let written = unistd::write(eventfd, &1_u64.to_ne_bytes());
        assert_eq!(written, Ok(8), "ringing vector {vector} of {id}");
    }

    /// Which of its own vectors were rung since the last call; does not wait.
    ///
    /// It asks poll first, although the server makes its eventfds non-blocking: that flag belongs to the description
    /// that all share, and a QEMU that receives a descriptor clears it for a moment (its chardev does so with every
    /// descriptor, its ivshmem device then sets it again). A bare read in that moment would hang for good.
    pub(crate) fn take_rung(&self) -> BTreeSet<u16> {
        let rung = |fd: &OwnedFd| {
            if !is_readable(fd.as_fd(), Instant::now()).expect("poll works") {
                return false;
            }
            let read = unistd::read(fd, &mut [0; 8]);
            assert_eq!(read, Ok(8), "reading an eventfd that is readable");
            true
        };
        (0..).zip(&self.own).filter(|(_, fd)| rung(fd)).map(|(vector, _)| vector).collect()
    }
}

/// Waits until something can be read, an end of file included; `false` after the deadline.
fn is_readable(fd: BorrowedFd<'_>, deadline: Instant) -> io::Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout) {
            Err(Errno::EINTR) => {}
            // A rest of less than a millisecond is rounded down to 0: look at the clock again.
            Ok(0) if Instant::now() < deadline => {}
            other => return Ok(other? > 0),
        }
    }
}
