// SPDX-License-Identifier: GPL-2.0-or-later
//! How a server is started.

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

use super::flight::Flight;
use super::{LISTENER, Server, TIMER, new_timer, new_vector};
use crate::listener::Listener;
use crate::memory::Memory;
use crate::server::limit::LogLimit;
use crate::server::roster::Roster;
use crate::server::wire::Sender;
use crate::{Error, MAX_VECTORS, MemorySource};

/// Events that one `dispatch` takes from epoll.
pub(super) const READY: usize = 256;

#[derive(Debug)]
enum Door {
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
    door: Option<Door>,
    memory: Option<MemorySource>,
    size: Option<u64>,
    vectors: u32,
    socket_mode: Option<u32>,
    backlog: u32,
    first_id: u16,
    id_space: u32,
    selectable: bool,
}

impl Default for Builder {
    fn default() -> Self {
        Self {
            door: None,
            memory: None,
            size: None,
            vectors: 1,
            socket_mode: None,
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
        self.door = Some(Door::Path(path.into()));
        self
    }

    /// The mode of the socket's path, such as `0o660`: who may write to it may connect. What
    /// the umask leaves of 0777 if it is not said.
    pub fn socket_mode(mut self, mode: u32) -> Self {
        self.socket_mode = Some(mode);
        self
    }

    /// Listens on a stream socket that is bound already, and listening or not. Its path stays
    /// when the server is closed.
    pub fn listener(mut self, listener: UnixListener) -> Self {
        self.door = Some(Door::Given(listener));
        self
    }

    /// Where the shared memory comes from; [`MemorySource::Sealed`] if it is not said.
    pub fn memory(mut self, source: MemorySource) -> Self {
        self.memory = Some(source);
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
        let sealed = matches!(source, MemorySource::Sealed);
        let size = match source {
            MemorySource::Descriptor(_) => self.size,
            _ => Some(self.size.unwrap_or(4 << 20)),
        };

        // What can fail without a trace comes first. The memory is locked, but not changed
        // before the socket is ours; nobody is let in before the memory is right.
        let failed = |action| move |errno: Errno| Error::System { action, source: errno.into() };
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)
            .map_err(failed("make an epoll instance"))?;
        if self.selectable && epoll.0.as_raw_fd() >= libc::FD_SETSIZE as i32 {
            return Err(failed("get a descriptor that fits in an fd_set")(Errno::EMFILE));
        }
        let timer = new_timer().map_err(failed("make a timer"))?;
        let spare: OwnedFd = new_vector().map_err(failed("make a spare descriptor"))?;
        let mut memory = Memory::open(source)?;
        let listener = match self.door {
            Some(Door::Path(path)) => Listener::bind(&path)?,
            Some(Door::Given(listener)) => Listener::given(listener)?,
            None => return Err(Error::NoSocket),
        };
        if let Some(mode) = self.socket_mode {
            listener.set_mode(mode)?;
        }
        memory.resize(size)?;
        if sealed {
            memory.seal()?;
        }
        let watch = |fd, token| {
            epoll
                .add(fd, EpollEvent::new(EpollFlags::EPOLLIN, token))
                .map_err(failed("watch a descriptor"))
        };
        watch(listener.as_fd(), LISTENER)?;
        watch(timer.as_fd(), TIMER)?;
        let flight = Flight::new(self.vectors);
        // Last: whoever sees it listen sees all the descriptors that it has of its own.
        listener.listen(self.backlog)?;
        memory.adopt();

        Ok(Server {
            epoll,
            timer,
            armed: false,
            spare: Some(spare),
            listening: true,
            listener,
            memory,
            roster: Roster::new(self.vectors, self.first_id, self.id_space),
            sender: Sender::new(),
            flight,
            ready: vec![EpollEvent::empty(); READY],
            stop: None,
            woken: false,
            refusals: LogLimit::default(),
        })
    }
}
