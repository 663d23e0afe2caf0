// SPDX-License-Identifier: GPL-2.0-or-later
//! The builder: configures and starts a server.

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use nix::errno::Errno;

use super::Server;
use super::admission::{Admission, new_vector};
use super::applicant::Applicant;
use super::broadcast::Broadcast;
use super::closing::Closer;
use super::core::Core;
use super::limits::Limits;
use super::reactor::Reactor;
use crate::listener::Listener;
use crate::memory::Memory;
use crate::{Error, MAX_VECTORS, MemorySource};

/// Where the listening socket comes from.
#[derive(Debug)]
enum Socket {
    Path(PathBuf),
    Given(UnixListener),
}

/// The configuration of a server. Made by [`Server::builder`].
///
/// ```
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("socket");
/// use std::os::unix::net::UnixListener;
/// use ivshmem::{MemorySource, Server};
///
/// // The caller supplies the socket and the memory.
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
    limits: Limits,
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
            limits: Limits::default(),
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

    /// Uses a stream socket that is already bound; it may be listening or not. Closing the server
    /// does not remove its path.
    pub fn listener(mut self, listener: UnixListener) -> Self {
        self.socket = Some(Socket::Given(listener));
        self
    }

    /// Where the shared memory comes from. Defaults to [`MemorySource::Sealed`].
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
    /// to the page size. Defaults to 4 MiB, and for a descriptor to the size of its object.
    pub fn size(mut self, bytes: u64) -> Self {
        self.size = Some(bytes);
        self
    }

    /// Interrupt vectors of each peer, 1 to [`MAX_VECTORS`]. Defaults to 1.
    pub fn vectors(mut self, vectors: u32) -> Self {
        self.vectors = vectors;
        self
    }

    /// The number of connections that may wait to be accepted. Defaults to 4096. The kernel limits
    /// it to `net.core.somaxconn`.
    pub fn backlog(mut self, connections: u32) -> Self {
        self.backlog = connections;
        self
    }

    /// The id of the first client. Defaults to 0. Later clients get the ids after it, modulo
    /// 65,536.
    pub fn first_id(mut self, id: u16) -> Self {
        self.first_id = id;
        self
    }

    /// The number of ids, 1 to 65,536. Defaults to 65,536. It limits the number of clients.
    /// An id is given again only when no connected client was told of its last owner, so the ids
    /// of departed clients may count too.
    pub fn id_space(mut self, ids: u32) -> Self {
        self.id_space = ids;
        self
    }

    /// Asks `rule` about each connection, before it is given an id or sent a byte. With an error
    /// the client is refused; the text is the reason for the log.
    ///
    /// The rule runs inside of [`Server::dispatch`]: it should not wait. See [`Applicant`] for
    /// an example.
    pub fn admit(
        mut self,
        rule: impl FnMut(&Applicant<'_>) -> Result<(), String> + Send + Sync + 'static,
    ) -> Self {
        self.limits.rule = Some(Box::new(rule));
        self
    }

    /// The number of clients that may be connected at the same time. Defaults to no limit but
    /// that of ids and descriptors.
    pub fn max_clients(mut self, clients: u32) -> Self {
        self.limits.clients = Some(clients);
        self
    }

    /// What one user may hold: connections, ended connections with unread messages, and ids that
    /// are remembered because a connected client was told of a client of this user that left.
    ///
    /// Defaults to no limit. Even then the last ids (1,024 of 65,536) and the descriptors of 16
    /// clients (a sixty-fourth of all, at most) are for users that hold few.
    pub fn max_clients_per_uid(mut self, clients: u32) -> Self {
        self.limits.clients_per_uid = Some(clients);
        self
    }

    /// Requires that `select(2)` can watch the server's descriptor: it must be smaller than
    /// `FD_SETSIZE` (1,024). Otherwise `start` fails with `EMFILE`.
    pub fn selectable(mut self) -> Self {
        self.selectable = true;
        self
    }

    /// Starts the server. If this fails, it leaves no file and no shared memory behind.
    ///
    /// # Errors
    /// Every kind of [`Error`]. The text names the wrong value and what would be right.
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

        // The steps that leave no trace when they fail come first. The memory is locked first, but
        // changed only after the socket is bound. The server listens only after the memory is
        // complete.
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
        let closer = Closer::new(listener.refuses_descriptors());
        let core = Core::new(reactor, closer, self.vectors, self.first_id, self.id_space);
        // This step is last: a server that listens has opened all its own descriptors.
        listener.listen(self.backlog)?;
        memory.finish();

        Ok(Server {
            core,
            admission: Admission::new(listener, spare, self.limits),
            broadcast: Broadcast::new(),
            memory,
        })
    }
}
