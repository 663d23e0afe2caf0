// SPDX-License-Identifier: GPL-2.0-or-later
//! What can go wrong at the client's end, said so that whoever reads it knows what to do.

#![forbid(unsafe_code)]

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::{MAX_VECTORS, PROTOCOL_VERSION};

/// Why a client could not connect, could not go on listening to its server, or could not do
/// what it was asked to.
///
/// Every message names the thing, its value, and what would be right.
///
/// ```
/// use ivshmem::client::{Client, Error};
///
/// let error = Client::connect("/nowhere").unwrap_err();
/// assert!(matches!(error, Error::Connect { .. }));
/// assert!(error.to_string().starts_with("cannot connect to a server at \"/nowhere\""));
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The socket's path does not fit in a socket address (`sun_path` of `unix(7)`).
    #[error(
        "socket path {path:?} is {} bytes long; it must have 1 to 107 (use a shorter \
         directory, or a relative path)", path.as_os_str().len()
    )]
    SocketPathLength {
        /// The path as given.
        path: PathBuf,
    },
    /// There is no server at the path, or it does not let this process in.
    #[error("cannot connect to a server at {path:?}: {source}")]
    Connect {
        /// The path as given.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The server did not complete the greeting in time.
    #[error(
        "the server did not complete its greeting within {limit:?}: {missing} is missing; it \
         may be stopped, or something else may listen there"
    )]
    Timeout {
        /// The time that it had.
        limit: Duration,
        /// What would have come next.
        missing: String,
    },
    /// The server closed the connection.
    #[error("the server closed the connection")]
    Closed,
    /// The server closed the connection in the middle of a message.
    #[error("the server closed the connection {bytes} bytes into a message; a message has 8")]
    CutShort {
        /// Bytes of the message that came.
        bytes: usize,
    },
    /// The connection failed.
    #[error("cannot receive from the server: {source}")]
    Receive {
        /// Why it failed.
        source: io::Error,
    },
    /// The server speaks another version of the protocol, or another protocol.
    #[error("the server speaks protocol version {version}; this client knows {PROTOCOL_VERSION}")]
    Version {
        /// The first number that it sent.
        version: i64,
    },
    /// A number that means nothing in this place.
    #[error("the server sent {value} where {expected} was expected")]
    Unexpected {
        /// The number.
        value: i64,
        /// What would have been right.
        expected: &'static str,
    },
    /// A message came without the descriptor that belongs to it.
    #[error("the server sent {value}, {what}, without a descriptor; it must come with one")]
    NoDescriptor {
        /// The number in the message.
        value: i64,
        /// What the message is.
        what: &'static str,
    },
    /// A message came with more descriptors than belong to it.
    #[error("the server sent {value}, {what}, with {count} descriptors; it must come with {right}")]
    SurplusDescriptors {
        /// The number in the message.
        value: i64,
        /// What the message is.
        what: &'static str,
        /// The descriptors that came.
        count: usize,
        /// The descriptors that belong to it.
        right: usize,
    },
    /// Descriptors were lost on the way.
    #[error(
        "descriptors that the server sent were cut off: it sent more than one with a message, or \
         this process has no descriptor left (then raise RLIMIT_NOFILE)"
    )]
    Truncated,
    /// What came as a vector is no eventfd.
    #[error("the descriptor for vector {vector} of peer {peer} is not an eventfd")]
    NotAnEventfd {
        /// Whose vector.
        peer: u16,
        /// Which vector.
        vector: u32,
    },
    /// A peer has more vectors than MSI-X can have.
    #[error(
        "the server sent more than {MAX_VECTORS} vectors of peer {peer}, the most that it can have"
    )]
    TooManyVectors {
        /// Whose vectors.
        peer: u16,
    },
    /// A peer left who was never here.
    #[error("the server says that peer {peer} left, but it was not here")]
    UnknownLeft {
        /// Who.
        peer: u16,
    },
    /// The server says that this very client left.
    #[error("the server says that peer {peer} left, but that is this client, and it is here")]
    SelfLeft {
        /// This client's id.
        peer: u16,
    },
    /// What came as shared memory cannot be that.
    #[error("the server's shared memory is {kind}; it must be a file of at least 1 byte")]
    MemoryKind {
        /// What it is, with its article.
        kind: &'static str,
    },
    /// The shared memory is not of this size.
    #[error("the server's shared memory has {size} bytes; {wanted} were asked for")]
    MemorySize {
        /// Its size, in bytes.
        size: u64,
        /// The size that was asked for, in bytes.
        wanted: u64,
    },
    /// Somebody cut the shared memory off since it was mapped: what lies behind its end
    /// cannot be touched any more, since that is SIGBUS.
    #[error(
        "the shared memory shrank from {mapped} to {size} bytes; some client or the server \
         truncated it (a server whose memory is sealed, --memfd, does not let them)"
    )]
    MemoryShrank {
        /// Bytes that are mapped.
        mapped: u64,
        /// Bytes that are left.
        size: u64,
    },
    /// An access that does not lie in the shared memory.
    #[error("{len} bytes at offset {offset} do not lie in the shared memory of {size} bytes")]
    MemoryBounds {
        /// Where the access starts.
        offset: usize,
        /// Bytes of it.
        len: usize,
        /// Bytes of the memory.
        size: usize,
    },
    /// A number in the shared memory lies at a multiple of its size.
    #[error("offset {offset} is not a multiple of {size}, the size of the number there")]
    MemoryAlignment {
        /// The offset.
        offset: usize,
        /// Bytes of the number.
        size: usize,
    },
    /// A system call for the memory failed.
    #[error("cannot {action} the shared memory: {source}")]
    Memory {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// There is no peer of this id.
    #[error("there is no peer {peer}")]
    UnknownPeer {
        /// The id asked for.
        peer: u16,
    },
    /// The peer has no such vector.
    #[error("peer {peer} has no vector {vector}; it has {has}, counted from 0")]
    UnknownVector {
        /// The peer.
        peer: u16,
        /// The vector asked for.
        vector: u32,
        /// How many it has.
        has: u32,
    },
    /// The vector is waited on elsewhere.
    #[error("vector {vector} is taken already; share that `Vector`, or drop it first")]
    VectorTaken {
        /// The vector asked for.
        vector: u32,
    },
    /// A system call that the client itself needs failed.
    #[error("cannot {action}: {source}")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

impl Error {
    /// Whether it is the server's end, and not something that it did wrong: to connect again
    /// later may help.
    pub fn is_closed(&self) -> bool {
        matches!(self, Self::Closed)
    }
}
