// SPDX-License-Identifier: GPL-2.0-or-later
//! A raw client of the protocol. It is cheaper than a QEMU and stricter.
//!
//! [`Connection`] only receives messages. [`Peer`] reads the greeting and records peers as a QEMU does. If a
//! message would corrupt QEMU's heap, it panics: for example, an id that is used again, or a second departure.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::unistd;

use super::PATIENCE;

/// One message from the server.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) value: i64,
    pub(crate) fd: Option<OwnedFd>,
}

/// A connection to the server. It reads only when `receive` or `expect` is called.
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

    /// The socket, for tests that misuse it.
    pub(crate) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// The next message, or `None` at the end of the stream. Returns the error `TimedOut` if no message comes within
    /// `limit`, and `InvalidData` for an invalid message (cut off, or with two descriptors).
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
            // There is space for more than the one allowed descriptor, so that a second one is noticed.
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

    /// The next message. Panics if there is none.
    #[track_caller]
    pub(crate) fn expect(&mut self, what: &str) -> Message {
        match self.receive(PATIENCE) {
            Ok(Some(message)) => message,
            Ok(None) => panic!("the server closed the connection instead of sending {what}"),
            Err(error) => panic!("waiting for {what}: {error}"),
        }
    }
}

/// The number of messages that were sent to a client and that it has not read.
#[expect(unsafe_code, reason = "nix has no function for FIONREAD")]
pub(crate) fn unread(stream: &UnixStream) -> u64 {
    let mut bytes: libc::c_int = 0;
    // SAFETY: FIONREAD writes an int through the pointer, which is valid for the call.
    let result = unsafe { libc::ioctl(stream.as_raw_fd(), libc::FIONREAD, &raw mut bytes) };
    assert_eq!(result, 0, "FIONREAD");
    bytes as u64 / 8
}

/// Takes ownership of a descriptor that was just received.
#[expect(unsafe_code, reason = "nix hands received descriptors out as numbers")]
fn own(number: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for our recvmsg, and no other code knows its number.
    unsafe { OwnedFd::from_raw_fd(number) }
}

/// A client that has read its greeting, and the peers that it knows.
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
    /// Connects and reads all messages up to the last of its own vectors.
    #[track_caller]
    pub(crate) fn join(socket: &Path, vectors: u16) -> Self {
        let mut connection = Connection::open(socket);
        let version = connection.expect("the version");
        assert!(version.value == 0 && version.fd.is_none(), "{version:?}");
        let id = connection.expect("the id");
        assert!(id.fd.is_none(), "{id:?}");
        let memory = connection.expect("the memory");
        assert_eq!(memory.value, -1, "the value of the memory message");
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
            peer.record(message);
        }
        for (id, fds) in &peer.others {
            assert_eq!(fds.len(), peer.vectors, "vectors of peer {id} at the greeting");
        }
        peer
    }

    pub(crate) fn id(&self) -> u16 {
        self.id
    }

    /// Returns the connection, for tests that go on reading in another way.
    pub(crate) fn into_connection(self) -> Connection {
        self.connection
    }

    /// The shared memory.
    pub(crate) fn memory(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }

    /// The ids of the known peers, without this one.
    pub(crate) fn others(&self) -> Vec<u16> {
        self.others.keys().copied().collect()
    }

    /// Records a message from the server. Panics if the protocol does not allow it here.
    #[track_caller]
    fn record(&mut self, message: Message) {
        let id = u16::try_from(message.value)
            .unwrap_or_else(|_| panic!("not a message about a peer: {message:?}"));
        match message.fd {
            Some(fd) => {
                assert!(!self.gone.contains(&id), "id {id} was used again");
                let fds =
                    if id == self.id { &mut self.own } else { self.others.entry(id).or_default() };
                fds.push(fd);
                assert!(fds.len() <= self.vectors, "too many vectors of peer {id}");
            }
            None => {
                let known = self.others.remove(&id);
                assert!(known.is_some(), "a departure of {id}, which was not connected");
                self.gone.insert(id);
            }
        }
    }

    /// Reads and records messages until `done` returns true.
    #[track_caller]
    fn read_until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        while !done(self) {
            let message = self.connection.expect(what);
            self.record(message);
        }
    }

    /// Waits until all vectors of this peer have come.
    #[track_caller]
    pub(crate) fn wait_for_peer(&mut self, id: u16) {
        self.read_until(&format!("all vectors of {id}"), |peer| {
            (peer.others.get(&id)).is_some_and(|fds| fds.len() == peer.vectors)
        });
    }

    /// Waits for the departure of this peer.
    #[track_caller]
    pub(crate) fn wait_for_departure(&mut self, id: u16) {
        self.read_until(&format!("the departure of {id}"), |peer| peer.gone.contains(&id));
    }

    /// Rings a vector of a known peer.
    #[track_caller]
    pub(crate) fn ring(&self, id: u16, vector: u16) {
        let eventfd = &self.others[&id][usize::from(vector)];
        let written = unistd::write(eventfd, &1_u64.to_ne_bytes());
        assert_eq!(written, Ok(8), "ringing vector {vector} of {id}");
    }

    /// Returns which of its own vectors were rung since the last call. Does not wait.
    ///
    /// It calls poll before it reads, although the server makes its eventfds non-blocking. All holders of an
    /// eventfd share this flag, and a QEMU that receives the eventfd clears the flag for a moment: its
    /// chardev clears it, and then its ivshmem device sets it again. A read without poll in that moment would
    /// block for ever.
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

/// Waits until the descriptor is readable or at its end. Returns `false` after the deadline.
fn is_readable(fd: BorrowedFd<'_>, deadline: Instant) -> io::Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout) {
            Err(Errno::EINTR) => {}
            // Less than a millisecond is rounded down to 0, so the deadline is checked again.
            Ok(0) if Instant::now() < deadline => {}
            other => return Ok(other? > 0),
        }
    }
}
