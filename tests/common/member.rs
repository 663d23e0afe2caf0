// SPDX-License-Identifier: GPL-2.0-or-later
//! A client that reads as little as it likes, and judges all that it is told.
//!
//! [`View`] is the rules alone: what a client may be told, whatever the order in which the
//! world moves. It knows no socket. [`Member`] is a view at the end of a connection, fed by
//! reads of any length: part of a message, or many. Neither panics; both say what is wrong,
//! so that a fuzzer, a soak and a fault run can put their own history beside it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::unistd;

/// What a client knows, and the rules of how it may come to know it.
#[derive(Debug)]
pub(crate) struct View {
    vectors: usize,
    told: usize,
    id: Option<u16>,
    /// Vectors told of, the client's own included.
    peers: BTreeMap<u16, usize>,
    gone: BTreeSet<u16>,
    /// The peer of whom some vectors are told, and not all.
    partial: Option<u16>,
}

impl View {
    pub(crate) fn new(vectors: usize) -> Self {
        let (peers, gone) = Default::default();
        Self { vectors, told: 0, id: None, peers, gone, partial: None }
    }

    /// Takes one message, and the number of descriptors that came with it.
    ///
    /// Returns the peer and the vector whose eventfd it brought, if it did.
    pub(crate) fn note(&mut self, value: i64, fds: usize) -> Result<Option<(u16, usize)>, String> {
        let wrong = |what: &str| Err(format!("message {value} with {fds} descriptors: {what}"));
        self.told += 1;
        let Ok(id) = u16::try_from(value) else {
            return match (self.told, value, fds) {
                (3, -1, 1) => Ok(None),
                _ => wrong("out of range"),
            };
        };
        match (self.told, fds) {
            (1, 0) if value == 0 => return Ok(None),
            (1, _) => return wrong("in place of the version"),
            (2, 0) => {
                self.id = Some(id);
                return Ok(None);
            }
            (2, _) => return wrong("in place of the id"),
            (3, _) => return wrong("in place of the memory"),
            (_, 0) => {}
            (_, 1) => return self.vector(id).map(Some),
            _ => return wrong("more than one descriptor"),
        }
        if self.id == Some(id) {
            return wrong("its own goodbye");
        }
        if self.peers.remove(&id).is_none() {
            return wrong("the goodbye of somebody it was not told of");
        }
        if self.partial == Some(id) {
            self.partial = None;
        }
        self.gone.insert(id);
        Ok(None)
    }

    fn vector(&mut self, id: u16) -> Result<(u16, usize), String> {
        if self.gone.contains(&id) {
            return Err(format!("id {id} came back"));
        }
        if let Some(partial) = self.partial.filter(|&partial| partial != id) {
            return Err(format!("a vector of {id} before the last one of {partial}"));
        }
        let count = self.peers.entry(id).or_default();
        if *count == self.vectors {
            return Err(format!("one vector too many of {id}"));
        }
        *count += 1;
        self.partial = (*count < self.vectors).then_some(id);
        Ok((id, *count - 1))
    }

    pub(crate) fn id(&self) -> Option<u16> {
        self.id
    }

    /// Messages so far.
    pub(crate) fn told(&self) -> usize {
        self.told
    }

    /// Whether it has all its own vectors: what a QEMU waits for.
    pub(crate) fn is_greeted(&self) -> bool {
        self.id.is_some_and(|id| self.peers.get(&id) == Some(&self.vectors))
    }

    /// All peers of whom all vectors are known, itself included; an error if one is known in
    /// part.
    pub(crate) fn roster(&self) -> Result<BTreeSet<u16>, String> {
        match self.partial {
            Some(id) => Err(format!("{} of {} vectors of {id}", self.peers[&id], self.vectors)),
            None => Ok(self.peers.keys().copied().collect()),
        }
    }

    pub(crate) fn knows(&self, id: u16) -> bool {
        self.peers.contains_key(&id)
    }
}

/// What one read brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    Bytes(usize),
    Nothing,
    End,
}

/// A connection to a server, and the view at its end.
pub(crate) struct Member {
    stream: UnixStream,
    view: View,
    /// The start of a message, and the descriptors that came with it.
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
    /// The eventfds by peer, if they are to be kept.
    eventfds: Option<BTreeMap<u16, Vec<OwnedFd>>>,
    ended: bool,
}

impl Member {
    /// A client on this connection, which it makes non-blocking for its own side.
    pub(crate) fn new(stream: UnixStream, vectors: usize, keep_eventfds: bool) -> Self {
        stream.set_nonblocking(true).expect("fcntl on a socket of our own");
        Self {
            stream,
            view: View::new(vectors),
            bytes: Vec::new(),
            fds: Vec::new(),
            eventfds: keep_eventfds.then(BTreeMap::new),
            ended: false,
        }
    }

    pub(crate) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    pub(crate) fn view(&self) -> &View {
        &self.view
    }

    /// Whether the server has closed it.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended
    }

    /// Reads once, `limit` bytes at most, without waiting.
    pub(crate) fn hear(&mut self, limit: usize) -> Result<Heard, String> {
        if self.ended {
            return Ok(Heard::End);
        }
        let mut buffer = vec![0; limit];
        let mut part = [IoSliceMut::new(&mut buffer)];
        // Room for more than the one that is allowed: two must be seen as two.
        let mut space = cmsg_space!([RawFd; 4]);
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        let number = self.stream.as_raw_fd();
        let (count, fds) = match recvmsg::<()>(number, &mut part, Some(&mut space), flags) {
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(Heard::Nothing),
            // The server closed it with something of ours unread.
            Err(Errno::ECONNRESET) => (0, Vec::new()),
            Err(errno) => return Err(format!("recvmsg: {}", io::Error::from(errno))),
            Ok(received) => {
                let mut fds = Vec::new();
                for control in received.cmsgs().map_err(|_| "control data was cut off")? {
                    if let ControlMessageOwned::ScmRights(numbers) = control {
                        fds.extend(numbers.into_iter().map(own));
                    }
                }
                (received.bytes, fds)
            }
        };
        if count == 0 {
            self.ended = true;
            return match self.bytes.len() {
                0 => Ok(Heard::End),
                rest => Err(format!("the end after {rest} bytes of a message")),
            };
        }
        self.bytes.extend_from_slice(&buffer[..count]);
        self.take(fds)?;
        Ok(Heard::Bytes(count))
    }

    /// Takes the whole messages. A read ends with the message that brought descriptors, so
    /// they belong to the one that its last byte is of.
    fn take(&mut self, mut fds: Vec<OwnedFd>) -> Result<(), String> {
        let bytes = std::mem::take(&mut self.bytes);
        let last = (bytes.len() - 1) / 8;
        for (index, chunk) in bytes.chunks(8).enumerate() {
            if index == last {
                self.fds.append(&mut fds);
            }
            let Ok(value) = <[u8; 8]>::try_from(chunk) else {
                self.bytes = chunk.to_vec();
                break;
            };
            let value = i64::from_le_bytes(value);
            let mut fds = std::mem::take(&mut self.fds);
            let vector = self.view.note(value, fds.len())?;
            if let Some(kept) = &mut self.eventfds {
                match vector {
                    Some((id, _)) => kept.entry(id).or_default().extend(fds.pop()),
                    None if self.view.told() > 3 => drop(kept.remove(&(value as u16))),
                    None => {}
                }
            }
        }
        Ok(())
    }

    /// Reads until there is nothing more, or the end; how many bytes came.
    pub(crate) fn drain(&mut self) -> Result<usize, String> {
        let mut sum = 0;
        while let Heard::Bytes(count) = self.hear(256)? {
            sum += count;
        }
        Ok(sum)
    }

    /// Rings `vector` of a peer; `false` if its eventfd was not kept.
    pub(crate) fn ring(&self, id: u16, vector: usize) -> bool {
        let kept = self.eventfds.as_ref().and_then(|kept| kept.get(&id)?.get(vector));
        kept.is_some_and(|fd| unistd::write(fd.as_fd(), &1_u64.to_ne_bytes()) == Ok(8))
    }

    /// How often its own `vector` was rung since the last call.
    pub(crate) fn rung(&self, vector: usize) -> u64 {
        let mut count = [0; 8];
        let own = self.view.id().and_then(|id| self.eventfds.as_ref()?.get(&id)?.get(vector));
        match own.map(|fd| unistd::read(fd.as_fd(), &mut count)) {
            Some(Ok(8)) => u64::from_ne_bytes(count),
            _ => 0,
        }
    }
}

/// Takes over a descriptor that was just received.
#[expect(unsafe_code, reason = "nix hands received descriptors out as numbers")]
fn own(number: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for our recvmsg, and nobody else has
    // been told its number.
    unsafe { OwnedFd::from_raw_fd(number) }
}
