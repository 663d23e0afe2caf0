// SPDX-License-Identifier: GPL-2.0-or-later
//! How a server is started.

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use nix::errno::Errno;

use super::Server;
use super::admission::{Admission, new_vector};
use super::broadcast::Broadcast;
use super::core::Core;
use super::reactor::Reactor;
use crate::listener::Listener;
use crate::memory::Memory;
use crate::{Error, MAX_VECTORS, MemorySource};

/// Where connections come from.
#[derive(Debug)]
enum Socket {
    Path(PathBuf),
    Given(UnixListener),
}

/// What a server is to be. Made by [`Server::builder`].
///
/// ```
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("socket");
/// use std::os::unix::net::UnixListener;
/// use ivshmem::{MemorySource, Server};
///
/// // A socket and a memory of the caller's own.
/// let listener = UnixListener::bind(&path)?;
/// let memory = tempfile::tempfile()?;
/// let server = Server::builder()
///     .listener(listener)
///     .memory(MemorySource::Descriptor(memory.into()))
///     .size(1 << 20)
///     .start()?;
/// assert_eq!(server.memory_size(), 1 << 20);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Builder {
    socket: Option<Socket>,
    memory: Option<MemorySource>,
    size: Option<u64>,
    vectors: u32,
    socket_mode: Option<u32>,
    memory_mode: Option<u32>,
    backlog: u32,
    first_id: u16,
    id_space: u32,
    selectable: bool,
}

impl Default for Builder {
    fn default() -> Self {
        Self {
            socket: None,
            memory: None,
            size: None,
            vectors: 1,
            socket_mode: None,
            memory_mode: None,
            backlog: 4096,
            first_id: 0,
            id_space: crate::protocol::ID_SPACE,
            selectable: false,
        }
    }
}

impl Builder {
    /// Listens at this path, of at most 107 bytes. A socket left there by a server that was
    /// killed is replaced; a live one, and anything else, is left alone and is an error.
    pub fn socket_path(mut self, path: impl Into<PathBuf>) -> Self {
        self.socket = Some(Socket::Path(path.into()));
        self
    }

    /// The mode of the socket's path, such as `0o660`: a process that may write to it may connect.
    /// Defaults to 0777 without the bits of the umask. With a [`listener`](Self::listener) it is
    /// an error.
    pub fn socket_mode(mut self, mode: u32) -> Self {
        self.socket_mode = Some(mode);
        self
    }

    /// Listens on a stream socket that is bound already, and listening or not. Its path stays
    /// when the server is closed.
    pub fn listener(mut self, listener: UnixListener) -> Self {
        self.socket = Some(Socket::Given(listener));
        self
    }

    /// Where the shared memory comes from; [`MemorySource::Sealed`] if it is not said.
    pub fn memory(mut self, source: MemorySource) -> Self {
        self.memory = Some(source);
        self
    }

    /// The mode of a POSIX shared memory object that the server creates, such as `0o660`,
    /// whatever the umask is. An existing object is served only if no other user may write it
    /// beyond what this mode allows. Defaults to 0700 without the bits of the umask.
    pub fn memory_mode(mut self, mode: u32) -> Self {
        self.memory_mode = Some(mode);
        self
    }

    /// The size of the shared memory in bytes, rounded up to a power of two, and on hugetlbfs
    /// to the page size. 4 MiB if it is not said, but for a descriptor its object's own size.
    pub fn size(mut self, bytes: u64) -> Self {
        self.size = Some(bytes);
        self
    }

    /// Interrupt vectors of each peer, 1 to [`MAX_VECTORS`]; 1 if it is not said.
    pub fn vectors(mut self, vectors: u32) -> Self {
        self.vectors = vectors;
        self
    }

    /// Connections that may wait to be accepted; 4096 if it is not said. The kernel caps it at
    /// `net.core.somaxconn`.
    pub fn backlog(mut self, connections: u32) -> Self {
        self.backlog = connections;
        self
    }

    /// The id of the first client; 0 if it is not said. The next ones follow, modulo 65,536.
    pub fn first_id(mut self, id: u16) -> Self {
        self.first_id = id;
        self
    }

    /// How many ids there are, 1 to 65,536, which it is if it is not said. It bounds the
    /// clients, those that are remembered included: an id is given again only when nobody who
    /// is connected was told of its last owner.
    pub fn id_space(mut self, ids: u32) -> Self {
        self.id_space = ids;
        self
    }

    /// The server's own descriptor must be one that `select(2)` can watch: smaller than
    /// `FD_SETSIZE` (1,024). Else `start` fails with `EMFILE`.
    pub fn selectable(mut self) -> Self {
        self.selectable = true;
        self
    }

    /// Starts the server. On an error nothing is left behind.
    ///
    /// # Errors
    /// Every kind of [`Error`]; each says which thing is wrong and what would be right.
    pub fn start(self) -> Result<Server, Error> {
        if !(1..=MAX_VECTORS).contains(&self.vectors) {
            return Err(Error::Vectors { vectors: self.vectors });
        }
        if !(1..=crate::protocol::ID_SPACE).contains(&self.id_space) {
            return Err(Error::IdSpace { ids: self.id_space });
        }
        let source = self.memory.unwrap_or(MemorySource::Sealed);
        let size = match source {
            MemorySource::Descriptor(_) => self.size,
            _ => Some(self.size.unwrap_or(4 << 20)),
        };

        // What can fail without a trace comes first. The memory is locked, but not changed
        // before the socket is ours; no client is admitted before the memory is right.
        let failed = |action| move |source: std::io::Error| Error::System { action, source };
        let reactor = Reactor::new()?;
        if self.selectable && reactor.as_raw_fd() >= libc::FD_SETSIZE as i32 {
            let action = "get a descriptor that fits in an fd_set";
            return Err(failed(action)(Errno::EMFILE.into()));
        }
        let spare = new_vector().map_err(failed("make a spare descriptor"))?;
        let mut memory = Memory::open(source, self.memory_mode)?;
        let listener = match self.socket {
            Some(Socket::Path(path)) => Listener::bind(&path, self.socket_mode)?,
            Some(Socket::Given(listener)) => Listener::given(listener, self.socket_mode)?,
            None => return Err(Error::NoSocket),
        };
        memory.reserve(size)?;
        reactor.watch_listener(listener.as_fd())?;
        let core = Core::new(reactor, self.vectors, self.first_id, self.id_space);
        // Last: once it listens, the server opens no more descriptors of its own.
        listener.listen(self.backlog)?;
        memory.finish();

        Ok(Server {
            core,
            admission: Admission::new(listener, spare),
            broadcast: Broadcast::new(),
            memory,
        })
    }
}
