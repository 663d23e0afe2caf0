// SPDX-License-Identifier: GPL-2.0-or-later
//! What the server told the client: its id, the memory, and the vectors of each peer.
//!
//! All rules of the protocol for a server are here. A message that breaks one is an error, and its
//! descriptors are closed. This module must not know the socket.
//!
//! After the version and the id, the server may choose the order, as with QEMU's device. The
//! reference sends the memory, then the other peers, then the client's own vectors.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use super::connection::Message;
use super::vector::Doorbell;
use super::{Error, Memory};
use crate::protocol::{MAX_VECTORS, MEMORY, PROTOCOL_VERSION, REFUSED_VALUE, REFUSED_VERSION};

#[cfg(test)]
mod tests;

/// The vectors of a peer, and whether the peer was reported to the caller.
#[derive(Debug, Default)]
pub(super) struct Entry {
    pub(super) vectors: Vec<Doorbell>,
    pub(super) announced: bool,
}

/// What a message changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Version, id or memory.
    Greeting,
    /// A vector of this client's own was added.
    Own,
    /// A vector of a peer was added.
    Peer(u16),
    /// A peer left. The flag says whether it had been reported.
    Left(u16, bool),
}

#[derive(Debug, Default)]
pub(super) struct PeerTable {
    greeted: bool,
    pub(super) id: Option<u16>,
    /// None again when the client has taken it.
    pub(super) memory: Option<Memory>,
    /// Whether the memory has come. There is only one.
    has_memory: bool,
    pub(super) own: Vec<Doorbell>,
    pub(super) peers: BTreeMap<u16, Entry>,
    /// The number of peers that have a given number of vectors. Without it, each message of the
    /// greeting would need a look at all peers.
    with_vectors: BTreeMap<usize, usize>,
}

impl PeerTable {
    /// The largest number of vectors of a peer, without this client. None without a peer.
    pub(super) fn most_vectors(&self) -> Option<usize> {
        self.with_vectors.last_key_value().map(|(&vectors, _)| vectors)
    }

    /// Counts a peer under the number of its vectors.
    fn count(&mut self, vectors: usize) {
        *self.with_vectors.entry(vectors).or_default() += 1;
    }

    /// Removes a peer from the count.
    fn discount(&mut self, vectors: usize) {
        if let Some(peers) = self.with_vectors.get_mut(&vectors) {
            *peers -= 1;
            if *peers == 0 {
                self.with_vectors.remove(&vectors);
            }
        }
    }

    /// What the client is waiting for, for the message of a timeout. `vectors` is the number that
    /// the caller asked for.
    pub(super) fn missing(&self, vectors: Option<u32>) -> String {
        let own = self.own.len();
        match vectors {
            _ if !self.greeted => "the protocol version".into(),
            _ if self.id.is_none() => "the client's id".into(),
            _ if !self.has_memory => "the shared memory".into(),
            _ if own == 0 => "the client's own first vector".into(),
            None => "another one of the client's own vectors".into(),
            Some(vectors) => format!(
                "the client's own vector {own}, of {vectors} asked for, counted from 0 (the server \
                 may have no more than {own})"
            ),
        }
    }

    pub(super) fn apply(&mut self, message: Message) -> Result<Change, Error> {
        let value = message.value;
        if !self.greeted {
            const WHAT: &str = "the protocol version";
            match value {
                PROTOCOL_VERSION => message.bare(WHAT)?,
                REFUSED_VERSION => return Err(Error::Refused { value, what: WHAT }),
                version => return Err(Error::Version { version }),
            }
            self.greeted = true;
            return Ok(Change::Greeting);
        }
        let Some(own) = self.id else {
            const WHAT: &str = "the client's id";
            if value == REFUSED_VALUE {
                return Err(Error::Refused { value, what: WHAT });
            }
            let id = u16::try_from(value).map_err(|_| Error::Unexpected {
                value,
                expected: "the client's id (0 to 65535)",
            })?;
            message.bare(WHAT)?;
            self.id = Some(id);
            return Ok(Change::Greeting);
        };
        if value == MEMORY {
            return self.apply_memory(message);
        }
        if value == REFUSED_VALUE && !self.has_memory {
            return Err(Error::Refused { value, what: "the shared memory" });
        }
        let peer = u16::try_from(value).map_err(|_| Error::Unexpected {
            value,
            expected: "a peer's id (0 to 65535), or -1 with the shared memory,",
        })?;
        match message.descriptor("a peer's id")? {
            None if peer == own => Err(Error::SelfLeft { peer }),
            None => match self.peers.remove(&peer) {
                Some(entry) => {
                    self.discount(entry.vectors.len());
                    Ok(Change::Left(peer, entry.announced))
                }
                None => Err(Error::UnknownLeft { peer }),
            },
            Some(fd) => {
                let doorbell = Doorbell::new(fd).map_err(|errno| Error::System {
                    action: "look at a vector's descriptor",
                    source: errno.into(),
                })?;
                let known = match peer == own {
                    true => Some(&self.own),
                    false => self.peers.get(&peer).map(|entry| &entry.vectors),
                };
                let vector = known.map_or(0, |vectors| vectors.len() as u32);
                if vector == MAX_VECTORS {
                    return Err(Error::TooManyVectors { peer });
                }
                // A peer is added only with its first vector.
                let doorbell = doorbell.ok_or(Error::NotAnEventfd { peer, vector })?;
                if peer == own {
                    self.own.push(doorbell);
                    return Ok(Change::Own);
                }
                let vectors = &mut self.peers.entry(peer).or_default().vectors;
                vectors.push(doorbell);
                let has = vectors.len();
                self.discount(has - 1);
                self.count(has);
                Ok(Change::Peer(peer))
            }
        }
    }

    fn apply_memory(&mut self, message: Message) -> Result<Change, Error> {
        const WHAT: &str = "the shared memory";
        let value = message.value;
        let Some(fd) = message.descriptor(WHAT)? else {
            return Err(Error::NoDescriptor { value, what: WHAT });
        };
        if self.has_memory {
            return Err(Error::Unexpected { value, expected: "a peer's id (0 to 65535)" });
        }
        self.memory = Some(Memory::new(fd)?);
        self.has_memory = true;
        Ok(Change::Greeting)
    }

    /// The vectors of a peer, or of the client itself.
    #[inline]
    pub(super) fn vectors(&self, peer: u16) -> Result<&[Doorbell], Error> {
        if let Some(entry) = self.peers.get(&peer) {
            return Ok(&entry.vectors);
        }
        if Some(peer) == self.id { Ok(&self.own) } else { Err(Error::UnknownPeer { peer }) }
    }

    /// One vector of a peer, or of the client itself.
    #[inline]
    pub(super) fn vector(&self, peer: u16, vector: u32) -> Result<&Doorbell, Error> {
        let vectors = self.vectors(peer)?;
        let has = vectors.len() as u32;
        vectors.get(vector as usize).ok_or(Error::UnknownVector { peer, vector, has })
    }
}
