// SPDX-License-Identifier: GPL-2.0-or-later
//! A client that checks each message that it receives.
//!
//! It passes the messages of one connection to a [`View`]. Each read may have any length: a part
//! of a message, or many messages. It returns errors and does not panic, so that a fuzzer, a soak
//! test and a fault test can add their own context.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::unistd;

use super::view::{Ids, View};

/// The result of one read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Received {
    /// The number of bytes.
    Bytes(usize),
    /// No data is available now.
    Nothing,
    /// The server has closed the connection.
    End,
}

/// A connection to a server, and the view of its messages.
pub(crate) struct CheckedClient {
    stream: UnixStream,
    view: View,
    vectors: u32,
    /// The bytes of an incomplete message, and the descriptors that came with them.
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
    /// The eventfds of each peer, if they are kept.
    eventfds: Option<BTreeMap<u16, Vec<OwnedFd>>>,
    ended: bool,
}

impl CheckedClient {
    /// A client on this connection. Makes the client's end non-blocking.
    pub(crate) fn new(stream: UnixStream, vectors: usize, keep_eventfds: bool) -> Self {
        stream.set_nonblocking(true).expect("fcntl on a socket of our own");
        Self {
            stream,
            view: View::default(),
            vectors: vectors as u32,
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

    /// Whether the greeting is complete, and the client knows exactly the peers `expected`, each
    /// with all its vectors.
    pub(crate) fn knows_exactly(&self, expected: &BTreeSet<u16>) -> bool {
        let mut ids = Ids::default();
        for &id in expected {
            ids.insert(id);
        }
        self.view.is_greeting_complete() && self.view.knows_exactly(&ids)
    }

    /// Whether the server has closed the connection.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended
    }

    /// Reads once, at most `limit` bytes, without waiting.
    pub(crate) fn receive(&mut self, limit: usize) -> Result<Received, String> {
        if self.ended {
            return Ok(Received::End);
        }
        let mut buffer = vec![0; limit];
        let mut part = [IoSliceMut::new(&mut buffer)];
        // There is space for more than the one allowed descriptor, so that a second one is noticed.
        let mut space = cmsg_space!([RawFd; 4]);
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        let number = self.stream.as_raw_fd();
        let (count, fds) = match recvmsg::<()>(number, &mut part, Some(&mut space), flags) {
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(Received::Nothing),
            // The server closed the connection before it read what this client sent.
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
                0 => Ok(Received::End),
                rest => Err(format!("the stream ended after {rest} bytes of a message")),
            };
        }
        self.bytes.extend_from_slice(&buffer[..count]);
        self.take(fds)?;
        Ok(Received::Bytes(count))
    }

    /// Checks the complete messages. The kernel ends a read with the message that carries
    /// descriptors, so they belong to the message of the last byte.
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
            if fds.len() > 1 {
                return Err(format!("{} descriptors with message {value}", fds.len()));
            }
            self.view.record(value, !fds.is_empty(), self.vectors)?;
            let (id, peers) = (value as u16, self.view.messages() > 3);
            match (&mut self.eventfds, fds.pop()) {
                (Some(kept), Some(fd)) if peers => kept.entry(id).or_default().push(fd),
                (Some(kept), None) if peers => drop(kept.remove(&id)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Reads until no data is available or the stream ends. Returns the number of bytes.
    pub(crate) fn drain(&mut self) -> Result<usize, String> {
        let mut sum = 0;
        while let Received::Bytes(count) = self.receive(256)? {
            sum += count;
        }
        Ok(sum)
    }

    /// Rings `vector` of a peer. Returns `false` if its eventfd was not kept.
    pub(crate) fn ring(&self, id: u16, vector: usize) -> bool {
        let kept = self.eventfds.as_ref().and_then(|kept| kept.get(&id)?.get(vector));
        kept.is_some_and(|fd| unistd::write(fd.as_fd(), &1_u64.to_ne_bytes()) == Ok(8))
    }

    /// Returns how often its own `vector` was rung since the last call.
    pub(crate) fn rung(&self, vector: usize) -> u64 {
        let mut count = [0; 8];
        let own = self.view.id().and_then(|id| self.eventfds.as_ref()?.get(&id)?.get(vector));
        match own.map(|fd| unistd::read(fd.as_fd(), &mut count)) {
            Some(Ok(8)) => u64::from_ne_bytes(count),
            _ => 0,
        }
    }
}

/// Takes ownership of a descriptor that was just received.
#[expect(unsafe_code, reason = "nix hands received descriptors out as numbers")]
fn own(number: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for our recvmsg, and no other code knows
    // its number.
    unsafe { OwnedFd::from_raw_fd(number) }
}
