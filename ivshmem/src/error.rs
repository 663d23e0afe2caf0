// SPDX-License-Identifier: GPL-2.0-or-later
//! Why a server cannot start or cannot go on.
//!
//! Each room has an error of its own; [`Error`] is composed of them. No text repeats the text of
//! its source, so a program prints the whole chain: [`Chain`] does that.

#![forbid(unsafe_code)]

use std::fmt;
use std::io;

use nix::errno::Errno;

use crate::listener::Error as ListenerError;
use crate::memory::Error as MemoryError;

/// Why a server could not be started, or cannot go on.
///
/// Every message names the thing, its value, and what would be right. The reason that the
/// system gave is the [`source`](std::error::Error::source), and not a part of the message:
/// [`chain`](Self::chain) prints both.
///
/// ```
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("socket");
/// use ivshmem::{Error, ErrorKind, ListenerError, Server};
///
/// let first = Server::builder().socket_path(&path).start()?;
/// let error = Server::builder().socket_path(&path).start().unwrap_err();
/// assert_eq!(error.kind(), ErrorKind::InUse);
/// assert!(matches!(error, Error::Listener(ListenerError::InUse { .. })));
/// println!("{}", error.chain());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The shared memory cannot be served.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The socket cannot be used.
    #[error(transparent)]
    Listener(#[from] ListenerError),
    /// The builder has no socket.
    #[error("no socket was given; give a socket path, or a listening socket")]
    NoSocket,
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
    /// The state of a server whose process has ended cannot be used to go on. It was left as it
    /// was.
    #[error("cannot go on with the state of the server before: {problem}")]
    State {
        /// What is wrong with it.
        problem: String,
    },
    /// A system call that the server itself needs failed.
    #[error("cannot {action}")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// What kind of reason an [`Error`] has, for a program that acts on it.
///
/// ```
/// use ivshmem::{ErrorKind, Server};
///
/// let error = Server::builder().socket_path("socket").vectors(0).start().unwrap_err();
/// match error.kind() {
///     ErrorKind::InvalidInput => println!("the configuration is wrong: {error}"),
///     ErrorKind::InUse => println!("there is a server already: {error}"),
///     _ => println!("{}", error.chain()),
/// }
/// # assert_eq!(error.kind(), ErrorKind::InvalidInput);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A value that the caller gave cannot be used.
    InvalidInput,
    /// Another process uses the socket or the memory.
    InUse,
    /// Something else has the name of the socket or the memory.
    Occupied,
    /// Another user owns it, or can change it.
    Untrusted,
    /// The memory does not fit in its file system, in the machine, or below a limit.
    NoRoom,
    /// The state of a server before cannot be used.
    State,
    /// A system call failed; the source says why.
    System,
}

impl Error {
    /// The kind of the reason.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Memory(error) => error.kind(),
            Self::Listener(error) => error.kind(),
            Self::NoSocket | Self::Vectors { .. } | Self::IdSpace { .. } => ErrorKind::InvalidInput,
            Self::State { .. } => ErrorKind::State,
            Self::System { .. } => ErrorKind::System,
        }
    }

    /// The `errno` that says this in C.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Memory(error) => error.errno(),
            Self::Listener(error) => error.errno(),
            Self::NoSocket | Self::Vectors { .. } | Self::IdSpace { .. } => Errno::EINVAL as i32,
            Self::State { .. } => Errno::EBADMSG as i32,
            Self::System { source, .. } => errno_of(source),
        }
    }

    /// This error and its sources, for printing on one line.
    pub fn chain(&self) -> Chain<'_> {
        Chain(self)
    }
}

/// The `errno` of what the system said.
pub(crate) fn errno_of(source: &io::Error) -> i32 {
    source.raw_os_error().unwrap_or(Errno::EIO as i32)
}

/// Prints an error and its sources, each once, separated by `": "`.
///
/// ```
/// use ivshmem::{Chain, MemorySource, Server};
///
/// let memory = MemorySource::Directory("/nowhere".into());
/// let error = Server::builder().socket_path("socket").memory(memory).start().unwrap_err();
/// let text = Chain(&error).to_string();
/// assert!(text.ends_with("\"/nowhere\": No such file or directory (os error 2)"), "{text}");
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Chain<'a>(pub &'a (dyn std::error::Error + 'a));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}
