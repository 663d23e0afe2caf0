// SPDX-License-Identifier: GPL-2.0-or-later
//! The client's errors.
//!
//! Each message names the thing, its value, and what would be right. A message does not repeat the
//! text of its source: a caller that prints the whole chain (anyhow's `{:#}`) prints it once.

#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::{MAX_VECTORS, PROTOCOL_VERSION};

/// The kind of an [`Error`]. It tells whether another attempt makes sense, and where to look.
///
/// ```
/// use ivshmem::client::{Client, ErrorKind};
///
/// let error = Client::connect("/nowhere").unwrap_err();
/// assert_eq!(error.kind(), ErrorKind::Connect);
/// assert_eq!(error.kind().to_string(), "cannot connect");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The caller asked for something that does not exist or cannot be: a peer, a vector, an
    /// offset, a path.
    InvalidArgument,
    /// There is no server at the path, or it does not admit this process. Trying again later may
    /// help.
    Connect,
    /// The server did not answer in time. Trying again later may help.
    Timeout,
    /// The server closed the connection. Connecting again later may help.
    Closed,
    /// The server refused this client. Its log has the reason.
    Refused,
    /// The server broke the protocol. It is not an ivshmem server, or it has a bug.
    Protocol,
    /// The shared memory cannot be used.
    Memory,
    /// A system call of this process failed.
    System,
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::InvalidArgument => "invalid argument",
            Self::Connect => "cannot connect",
            Self::Timeout => "timed out",
            Self::Closed => "connection closed",
            Self::Refused => "refused by the server",
            Self::Protocol => "protocol violation",
            Self::Memory => "unusable shared memory",
            Self::System => "system call failed",
        })
    }
}

/// Why a client could not connect, lost its server, or could not do what it was asked to do.
///
/// Every message names the thing, its value, and what would be right. It does not contain the text
/// of the [`source`](std::error::Error::source), so print both.
///
/// ```
/// use std::error::Error as _;
/// use ivshmem::client::{Client, Error};
///
/// let error = Client::connect("/nowhere").unwrap_err();
/// assert!(matches!(error, Error::Connect { .. }));
/// assert_eq!(error.to_string(), "cannot connect to a server at \"/nowhere\"");
/// assert!(error.source().unwrap().to_string().starts_with("No such file or directory"));
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
    /// There is no server at the path, or it does not admit this process.
    #[error("cannot connect to a server at {path:?}")]
    Connect {
        /// The path as given.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The server did not complete the greeting in time.
    #[error(
        "the server did not complete its greeting within {limit:?}: {missing} is missing; the \
         server may be stopped, or another program may listen at this path"
    )]
    Timeout {
        /// The time limit.
        limit: Duration,
        /// What the client was waiting for.
        missing: String,
    },
    /// The server closed the connection.
    #[error("the server closed the connection")]
    Closed,
    /// The server closed the connection in the middle of a message.
    #[error("the server closed the connection {bytes} bytes into a message; a message has 8")]
    CutShort {
        /// Bytes of the message that were received.
        bytes: usize,
    },
    /// The server refused this client: it sent a value that no client accepts, in place of the
    /// protocol version (1), or of the id or the memory (-2).
    #[error(
        "the server refused this client (it sent {value} in place of {what}); its log has the \
         reason: it may have no id or descriptor left, apply a limit or an access rule, or be \
         ending"
    )]
    Refused {
        /// The value that it sent.
        value: i64,
        /// What was due.
        what: &'static str,
    },
    /// The connection failed.
    #[error("cannot receive from the server")]
    Receive {
        /// What the system said.
        source: io::Error,
    },
    /// The server speaks another version of the protocol, or another protocol.
    #[error("the server speaks protocol version {version}; this client knows {PROTOCOL_VERSION}")]
    Version {
        /// The first number that it sent.
        version: i64,
    },
    /// The server sent a number that is not allowed at this point.
    #[error("the server sent {value} where {expected} was expected")]
    Unexpected {
        /// The number.
        value: i64,
        /// What is allowed.
        expected: &'static str,
    },
    /// A message came without the descriptor that it must have.
    #[error("the server sent {value}, {what}, without a descriptor; it must come with one")]
    NoDescriptor {
        /// The number in the message.
        value: i64,
        /// What the message is.
        what: &'static str,
    },
    /// A message came with more descriptors than it may have.
    #[error("the server sent {value}, {what}, with {count} descriptors; it must come with {right}")]
    SurplusDescriptors {
        /// The number in the message.
        value: i64,
        /// What the message is.
        what: &'static str,
        /// How many descriptors came.
        count: usize,
        /// How many it must have.
        right: usize,
    },
    /// The kernel did not pass on all descriptors that the server sent.
    #[error(
        "the kernel could not give this process a descriptor that the server sent: the process has \
         too many open files (raise RLIMIT_NOFILE), or a security module such as SELinux or \
         AppArmor forbids it"
    )]
    Truncated,
    /// The descriptor of a vector is not an eventfd.
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
    /// The server said that a peer left that had not joined.
    #[error("the server says that peer {peer} left, but that peer had not joined")]
    UnknownLeft {
        /// The peer's id.
        peer: u16,
    },
    /// The server said that this client itself left.
    #[error("the server says that peer {peer} left, but that is this client itself")]
    SelfLeft {
        /// This client's id.
        peer: u16,
    },
    /// The descriptor of the shared memory is not a file, or the file is empty.
    #[error("the server's shared memory is {kind}; it must be a file of at least 1 byte")]
    MemoryKind {
        /// What it is, with its article.
        kind: &'static str,
    },
    /// The shared memory does not have the size that the caller asked for.
    #[error("the server's shared memory has {size} bytes; {wanted} were asked for")]
    MemorySize {
        /// Its size, in bytes.
        size: u64,
        /// The size that was asked for, in bytes.
        wanted: u64,
    },
    /// A peer or the server truncated the shared memory after it was mapped. An access behind its
    /// new end would raise SIGBUS.
    #[error(
        "the shared memory shrank from {mapped} to {size} bytes; a peer or the server \
         truncated it (memory that is sealed, --memfd, cannot be truncated)"
    )]
    MemoryShrank {
        /// Bytes that are mapped.
        mapped: u64,
        /// Bytes that the object still has.
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
    /// The offset of a number must be a multiple of its size.
    #[error("offset {offset} is not a multiple of {size}, the size of the number there")]
    MemoryAlignment {
        /// The offset.
        offset: usize,
        /// Bytes of the number.
        size: usize,
    },
    /// A system call for the memory failed.
    #[error("cannot {action} the shared memory")]
    Memory {
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// No peer has this id.
    #[error("there is no peer {peer}")]
    UnknownPeer {
        /// The id asked for.
        peer: u16,
    },
    /// The peer does not have this vector.
    #[error("peer {peer} has no vector {vector}; it has {has}, counted from 0")]
    UnknownVector {
        /// The peer.
        peer: u16,
        /// The vector asked for.
        vector: u32,
        /// How many vectors it has.
        has: u32,
    },
    /// There is a [`Vector`](super::Vector) for this vector already.
    #[error("vector {vector} is taken already; use that `Vector`, or drop it first")]
    VectorTaken {
        /// The vector asked for.
        vector: u32,
    },
    /// A system call that the client itself needs failed.
    #[error("cannot {action}")]
    System {
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

impl Error {
    /// The kind of the error.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::SocketPathLength { .. }
            | Self::MemoryBounds { .. }
            | Self::MemoryAlignment { .. }
            | Self::UnknownPeer { .. }
            | Self::UnknownVector { .. }
            | Self::VectorTaken { .. } => ErrorKind::InvalidArgument,
            Self::Connect { .. } => ErrorKind::Connect,
            Self::Timeout { .. } => ErrorKind::Timeout,
            Self::Closed => ErrorKind::Closed,
            Self::Refused { .. } => ErrorKind::Refused,
            Self::CutShort { .. }
            | Self::Version { .. }
            | Self::Unexpected { .. }
            | Self::NoDescriptor { .. }
            | Self::SurplusDescriptors { .. }
            | Self::NotAnEventfd { .. }
            | Self::TooManyVectors { .. }
            | Self::UnknownLeft { .. }
            | Self::SelfLeft { .. } => ErrorKind::Protocol,
            Self::MemoryKind { .. }
            | Self::MemorySize { .. }
            | Self::MemoryShrank { .. }
            | Self::Memory { .. } => ErrorKind::Memory,
            Self::Receive { .. } | Self::Truncated | Self::System { .. } => ErrorKind::System,
        }
    }

    /// Whether the server just closed the connection, between two messages. A client that connects
    /// again later may have success.
    ///
    /// ```
    /// use ivshmem::client::{Client, Error};
    ///
    /// let (client, server) = std::os::unix::net::UnixStream::pair()?;
    /// drop(server);
    /// let error = Client::adopt(client).unwrap_err();
    /// assert!(error.is_closed() && matches!(error, Error::Closed));
    /// # Ok::<(), std::io::Error>(())
    /// ```
    pub fn is_closed(&self) -> bool {
        matches!(self, Self::Closed)
    }
}
