// SPDX-License-Identifier: GPL-2.0-or-later
//! Why a server cannot listen.

#![forbid(unsafe_code)]

use std::io;
use std::path::PathBuf;

use nix::errno::Errno;

use crate::error::{ErrorKind, errno_of};

/// Why a server cannot listen.
///
/// ```
/// use ivshmem::{Error, ListenerError, Server};
///
/// let error = Server::builder().socket_path("x".repeat(200)).start().unwrap_err();
/// assert!(matches!(error, Error::Listener(ListenerError::PathLength { limit: 107, .. })));
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The socket's path does not fit in a socket address (`sun_path` of `unix(7)`).
    #[error(
        "socket path {path:?} is {} bytes long; it must have 1 to {limit} (use a shorter \
         directory, or a relative path)", path.as_os_str().len()
    )]
    PathLength {
        /// The path as given.
        path: PathBuf,
        /// The largest length that fits, in bytes.
        limit: usize,
    },
    /// Another process holds the socket.
    #[error("socket {path:?} is in use by a running process; stop it or choose another path")]
    InUse {
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
    /// The lock that orders starters is a file of another user, or of other properties than a
    /// lock of ours has.
    #[error(
        "cannot replace the left-over socket {path:?}: its lock file {lock:?} belongs to user id \
         {owner} and has mode {mode:04o}, but must be an empty file of user id {user} that nobody \
         else may open; remove it"
    )]
    ForeignLock {
        /// The path as given.
        path: PathBuf,
        /// The name of the lock file, in the same directory.
        lock: PathBuf,
        /// The user who owns it.
        owner: u32,
        /// Its mode.
        mode: u32,
        /// The user that the server runs as.
        user: u32,
    },
    /// A mode was given together with a socket of the caller's, whose mode is the caller's
    /// business too.
    #[error(
        "socket mode {mode:03o} cannot be applied to a given listening socket; set the mode where \
         it is bound, or give a socket path"
    )]
    ModeOfGiven {
        /// The mode as given.
        mode: u32,
    },
    /// An owner or a group was given together with a socket of the caller's.
    #[error(
        "{} cannot be applied to a given listening socket; set it where the socket is bound, or \
         give a socket path", owner_and_group(*owner, *group)
    )]
    OwnerOfGiven {
        /// The user id as given.
        owner: Option<u32>,
        /// The group id as given.
        group: Option<u32>,
    },
    /// The socket could not be given to this owner or group.
    #[error(
        "cannot give socket {path:?} to {}; only root may give a file to another user, or to a \
         group that it is not in", owner_and_group(*owner, *group)
    )]
    Owner {
        /// The path as given.
        path: PathBuf,
        /// The user id as given.
        owner: Option<u32>,
        /// The group id as given.
        group: Option<u32>,
        /// Why it failed.
        source: io::Error,
    },
    /// A system call for the socket at this path failed.
    #[error("cannot {action} socket {path:?}")]
    Socket {
        /// The path as given.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// A system call for the listening socket failed.
    #[error("cannot {action}")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

impl Error {
    /// The kind of the reason.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::InUse { .. } => ErrorKind::InUse,
            Self::NotASocket { .. } => ErrorKind::Occupied,
            Self::ForeignLock { .. } => ErrorKind::Untrusted,
            Self::PathLength { .. } | Self::ModeOfGiven { .. } | Self::OwnerOfGiven { .. } => {
                ErrorKind::InvalidInput
            }
            Self::Owner { .. } | Self::Socket { .. } | Self::System { .. } => ErrorKind::System,
        }
    }

    /// The `errno` that says this in C.
    pub fn errno(&self) -> i32 {
        let errno = match self {
            Self::PathLength { .. } => Errno::ENAMETOOLONG,
            Self::InUse { .. } => Errno::EADDRINUSE,
            Self::NotASocket { .. } => Errno::EEXIST,
            Self::ForeignLock { .. } => Errno::EACCES,
            Self::ModeOfGiven { .. } | Self::OwnerOfGiven { .. } => Errno::EINVAL,
            Self::Owner { source, .. }
            | Self::Socket { source, .. }
            | Self::System { source, .. } => return errno_of(source),
        };
        errno as i32
    }
}

/// Names what was given.
fn owner_and_group(owner: Option<u32>, group: Option<u32>) -> String {
    let owner = owner.map(|id| format!("user id {id}"));
    let group = group.map(|id| format!("group id {id}"));
    [owner, group].into_iter().flatten().collect::<Vec<_>>().join(" and ")
}
