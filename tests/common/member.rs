// SPDX-License-Identifier: GPL-2.0-or-later
//! A client that reads as little as it likes, and judges all that it is told.
//!
//! It is a [`View`] at the end of a connection, fed by reads of any length: part of a message,
//! or many. It does not panic but says what is wrong, so that a fuzzer, a soak and a fault run
//! can put their own history beside it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::unistd;

use super::view::{Ids, View};

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
    vectors: u32,
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

    /// Whether it has all its own vectors, and knows `who`, all of them whole, and nobody else.
    pub(crate) fn knows_exactly(&self, who: &BTreeSet<u16>) -> bool {
        let mut ids = Ids::default();
        for &id in who {
            ids.insert(id);
        }
        self.view.is_welcomed() && self.view.knows_exactly(&ids)
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
            if fds.len() > 1 {
                return Err(format!("{} descriptors with message {value}", fds.len()));
            }
            self.view.note(value, !fds.is_empty(), self.vectors)?;
            let (id, peers) = (value as u16, self.view.messages() > 3);
            match (&mut self.eventfds, fds.pop()) {
                (Some(kept), Some(fd)) if peers => kept.entry(id).or_default().push(fd),
                (Some(kept), None) if peers => drop(kept.remove(&id)),
                _ => {}
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
