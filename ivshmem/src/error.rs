// SPDX-License-Identifier: GPL-2.0-or-later
//! What can go wrong, said so that whoever reads it knows what to do.

#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::path::PathBuf;

use nix::errno::Errno;

/// Why a server could not be started, or cannot go on.
///
/// Every message names the thing, its value, and what would be right.
///
/// ```
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("socket");
/// use ivshmem::{Error, Server};
///
/// let first = Server::builder().socket_path(&path).start()?;
/// let second = Server::builder().socket_path(&path).start();
/// assert!(matches!(second, Err(Error::SocketInUse { .. })));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The socket's path does not fit in a socket address (`sun_path` of `unix(7)`).
    #[error(
        "socket path {path:?} is {} bytes long; it must have 1 to {limit} (use a shorter \
         directory, or a relative path)", path.as_os_str().len()
    )]
    SocketPathLength {
        /// The path as given.
        path: PathBuf,
        /// The largest length that fits, in bytes.
        limit: usize,
    },
    /// Another process holds the socket.
    #[error("socket {path:?} is in use by a running process; stop it or choose another path")]
    SocketInUse {
        /// The path as given.
        path: PathBuf,
    },
    /// Something that is not a socket is in the socket's place.
    #[error(
        "{path:?} exists and is {kind}, not a socket left over by a server; it is left alone: \
         remove it, or choose another path"
    )]
    NotASocket {
        /// The path as given.
        path: PathBuf,
        /// What is there, with its article.
        kind: &'static str,
    },
    /// A system call for the socket failed.
    #[error("cannot {action} socket {path:?}: {source}")]
    Socket {
        /// The path as given.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The server was told of no socket.
    #[error("no socket was given; give a socket path, or a listening socket")]
    NoSocket,
    /// Another server serves this shared memory.
    #[error("shared memory {name:?} is in use by another server; stop it or choose another name")]
    MemoryInUse {
        /// The name of the POSIX shared memory object.
        name: String,
    },
    /// The name cannot be one of a POSIX shared memory object.
    #[error(
        "shared memory name {name:?} is not valid; it must be 1 to 254 bytes with no '/' but \
         at its start, and not \".\" or \"..\""
    )]
    MemoryName {
        /// The name as given.
        name: String,
    },
    /// The object is larger than asked for. Shrinking it would kill, by SIGBUS, whoever
    /// has mapped what is cut off.
    #[error(
        "shared memory {memory} has {has} bytes already and would have to shrink to {wanted}; \
         ask for {has} bytes, or remove it if nobody uses it"
    )]
    MemoryShrink {
        /// Which memory.
        memory: String,
        /// Its size, in bytes.
        has: u64,
        /// The size asked for, rounded up, in bytes.
        wanted: u64,
    },
    /// No memory can have this size.
    #[error(
        "shared memory size {size} is not possible; it must be 1 to {} bytes and is rounded \
         up to a power of two",
        crate::memory::MAX_SIZE
    )]
    MemorySize {
        /// The size asked for, in bytes.
        size: u64,
    },
    /// The object given has a size that QEMU cannot use for a PCI BAR.
    #[error(
        "shared memory {memory} has {size} bytes; its size must be a power of two, as it \
         becomes a PCI BAR"
    )]
    MemoryNotPowerOfTwo {
        /// Which memory.
        memory: String,
        /// Its size, in bytes.
        size: u64,
    },
    /// What has the name of the memory is something else.
    #[error(
        "shared memory {memory} is no regular file; remove what has that name, or take another one"
    )]
    MemoryKind {
        /// Which memory.
        memory: String,
    },
    /// The file system has no room for the memory.
    #[error(
        "shared memory {memory} of {wanted} bytes does not fit: its file system has {available} \
         bytes left; ask for less, or make room"
    )]
    MemoryNoRoom {
        /// Which memory.
        memory: String,
        /// The size asked for, rounded up, in bytes.
        wanted: u64,
        /// What the file system has left, in bytes.
        available: u64,
    },
    /// The process may not make a file as large as the memory.
    #[error(
        "shared memory {memory} of {wanted} bytes is above the limit of file sizes, {limit} bytes; \
         ask for less, or raise the limit (RLIMIT_FSIZE)"
    )]
    MemoryLimit {
        /// Which memory.
        memory: String,
        /// The size asked for, rounded up, in bytes.
        wanted: u64,
        /// The limit, in bytes.
        limit: u64,
    },
    /// A system call for the memory failed.
    #[error("cannot {action} shared memory {memory}: {source}")]
    Memory {
        /// Which memory.
        memory: String,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The number of vectors is out of range.
    #[error(
        "{vectors} vectors are not possible; it must be 1 to {} (the limit of MSI-X)",
        crate::MAX_VECTORS
    )]
    Vectors {
        /// The number asked for.
        vectors: u32,
    },
    /// The number of ids is out of range.
    #[error("an id space of {ids} is not possible; it must be 1 to 65536")]
    IdSpace {
        /// The number asked for.
        ids: u32,
    },
    /// A system call that the server itself needs failed.
    #[error("cannot {action}: {source}")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

impl Error {
    /// The `errno` that says this in C.
    pub fn errno(&self) -> i32 {
        let errno = match self {
            Self::SocketPathLength { .. } => Errno::ENAMETOOLONG,
            Self::SocketInUse { .. } => Errno::EADDRINUSE,
            Self::NotASocket { .. } => Errno::EEXIST,
            Self::MemoryInUse { .. } => Errno::EBUSY,
            Self::MemoryKind { .. } | Self::MemoryShrink { .. } => Errno::EEXIST,
            Self::MemoryNoRoom { .. } => Errno::ENOSPC,
            Self::MemoryLimit { .. } => Errno::EFBIG,
            Self::NoSocket
            | Self::MemoryName { .. }
            | Self::MemorySize { .. }
            | Self::MemoryNotPowerOfTwo { .. }
            | Self::Vectors { .. }
            | Self::IdSpace { .. } => Errno::EINVAL,
            Self::Socket { source, .. }
            | Self::Memory { source, .. }
            | Self::System { source, .. } => {
                return source.raw_os_error().unwrap_or(Errno::EIO as i32);
            }
        };
        errno as i32
    }
}

/// Prints an error and its sources on one line: "cannot bind socket: Permission denied". A source
/// that the text before it ends with is not repeated.
///
/// ```
/// use std::io;
/// use ivshmem::{Chain, Error};
///
/// let source = io::Error::from(io::ErrorKind::PermissionDenied);
/// let error = Error::System { action: "make a timer", source };
/// assert_eq!(Chain(&error).to_string(), "cannot make a timer: permission denied");
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Chain<'a>(pub &'a (dyn std::error::Error + 'a));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = self.0.to_string();
        let mut source = self.0.source();
        while let Some(error) = source {
            let more = error.to_string();
            if !text.ends_with(&more) {
                text = format!("{text}: {more}");
            }
            source = error.source();
        }
        f.write_str(&text)
    }
}
