// SPDX-License-Identifier: GPL-2.0-or-later
//! The builder: configures and starts a server.

#![forbid(unsafe_code)]

use std::fmt;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use nix::errno::Errno;

use super::Server;
use super::admission::{Admission, new_vector};
use super::applicant::Applicant;
use super::broadcast::Broadcast;
use super::closing::Closer;
use super::core::{Core, Turn};
use super::keeping::Keeping;
use super::limits::Limits;
use super::reactor::Reactor;
use super::resume::Resumed;
use super::roster::{Key, Roster};
use super::state::{State, Things};
use crate::listener::{Listener, Permissions};
use crate::memory::{Memory, Nodes, Options};
use crate::{Error, Keeper, MAX_VECTORS, MemorySource, sys};

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
    memory_options: Options,
    vectors: u32,
    permissions: Permissions,
    backlog: u32,
    first_id: u16,
    id_space: u32,
    selectable: bool,
    keeper: Option<Keeper>,
    limits: Limits,
    prepare: Option<Prepare>,
}

/// The function of [`Builder::before_listening`].
struct Prepare(Box<dyn FnOnce() -> Result<(), Error> + Send + Sync>);

impl fmt::Debug for Prepare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Prepare")
    }
}

impl Default for Builder {
    fn default() -> Self {
        Self {
            socket: None,
            memory: None,
            memory_options: Options::default(),
            vectors: 1,
            permissions: Permissions::default(),
            backlog: 4096,
            first_id: 0,
            id_space: crate::protocol::ID_SPACE,
            selectable: false,
            keeper: None,
            limits: Limits::default(),
            prepare: None,
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
        self.permissions.mode = Some(mode);
        self
    }

    /// The user that owns the socket's path. Defaults to the user of the process. Only root may
    /// give it to another user. With a [`listener`](Self::listener) it is an error.
    ///
    /// ```
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("socket");
    /// use std::os::unix::fs::MetadataExt;
    /// use ivshmem::Server;
    ///
    /// // The directory's are the process's own. Members of the group may connect.
    /// let (user, group) = (dir.path().metadata()?.uid(), dir.path().metadata()?.gid());
    /// let builder = Server::builder().socket_path(&path).socket_mode(0o660);
    /// let server = builder.socket_owner(user).socket_group(group).start()?;
    /// assert_eq!(path.metadata()?.gid(), group);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn socket_owner(mut self, uid: u32) -> Self {
        self.permissions.owner = Some(uid);
        self
    }

    /// The group of the socket's path, whose members may connect with a
    /// [`socket_mode`](Self::socket_mode) such as 0660. A process that is not root can name only
    /// groups that it is in. With a [`listener`](Self::listener) it is an error.
    pub fn socket_group(mut self, gid: u32) -> Self {
        self.permissions.group = Some(gid);
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

    /// The mode of a POSIX shared memory object or a file that the server creates, such as
    /// `0o660`, whatever the umask is. An existing one is served only if no other user may write it
    /// beyond what this mode allows. Defaults to 0700 without the bits of the umask, and for a
    /// file to 0600.
    pub fn memory_mode(mut self, mode: u32) -> Self {
        self.memory_options.mode = Some(mode);
        self
    }

    /// The group of a POSIX shared memory object or a file that the server creates; give a
    /// [`memory_mode`](Self::memory_mode) such as 0660 too. An existing object that another group
    /// may write is not served. Defaults to the group of the process.
    pub fn memory_group(mut self, gid: u32) -> Self {
        self.memory_options.group = Some(gid);
        self
    }

    /// The size of the shared memory in bytes, rounded up to a power of two, and on hugetlbfs
    /// to the page size. Defaults to the size of a descriptor's object, and of a file or device
    /// that exists; otherwise to 4 MiB.
    pub fn size(mut self, bytes: u64) -> Self {
        self.memory_options.size = Some(bytes);
        self
    }

    /// Does not round the size up to a power of two: it must be a multiple of the page size, 4,096
    /// bytes or that of huge pages. QEMU's `ivshmem-flat` needs exactly the size that it is
    /// configured with. A QEMU with `ivshmem-doorbell`, a PCI device, aborts if the size is no power
    /// of two.
    pub fn exact_size(mut self) -> Self {
        self.memory_options.is_exact = true;
        self
    }

    /// Requires huge pages of this size in bytes. [Sealed](MemorySource::Sealed) memory is made of
    /// them. A [directory](MemorySource::Directory) or a [file](MemorySource::File) must be on a
    /// hugetlbfs with pages of this size.
    pub fn huge_pages(mut self, bytes: u64) -> Self {
        self.memory_options.huge_page = Some(bytes);
        self
    }

    /// Allocates the memory on these NUMA nodes, and on no others. Pages of an object that exists
    /// stay where they are. A device cannot be bound. The pages of a file on a disk are read in
    /// on these nodes at the start, but may come to other nodes later.
    ///
    /// ```
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("socket");
    /// let server = ivshmem::Server::builder().socket_path(&path).numa_nodes([0]).start()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn numa_nodes(mut self, nodes: impl IntoIterator<Item = u32>) -> Self {
        self.memory_options.nodes = Nodes::new(nodes.into_iter().collect());
        self
    }

    /// Does not remove a POSIX shared memory object at the end. A file is never removed. For
    /// memory without a name it is an error.
    pub fn keep_memory(mut self) -> Self {
        self.memory_options.keeps = true;
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
    ///
    /// If clients of a server that was killed may still use a [POSIX
    /// object](MemorySource::Posix), the ids that they may have are not given. Then the ids begin
    /// behind those if less than half of all ids follow this one unused.
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

    /// Calls `prepare` when the socket has its path, before a client can connect. A program opens
    /// there what belongs to the socket, such as a socket for its own management: of several
    /// servers that start with the same path, only the one that gets the path calls it.
    ///
    /// With an error the start fails. Clients of a server before stay as they are.
    ///
    /// ```
    /// # let dir = tempfile::tempdir()?;
    /// # let (path, beside) = (dir.path().join("socket"), dir.path().join("beside"));
    /// use ivshmem::{PathListener, Server};
    ///
    /// let (sender, receiver) = std::sync::mpsc::channel();
    /// let prepare = move || {
    ///     let _ = sender.send(PathListener::bind(&beside, 0o600)?);
    ///     Ok(())
    /// };
    /// let server = Server::builder().socket_path(&path).before_listening(prepare).start()?;
    /// let management: PathListener = receiver.recv()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn before_listening(
        mut self,
        prepare: impl FnOnce() -> Result<(), Error> + Send + Sync + 'static,
    ) -> Self {
        self.prepare = Some(Prepare(Box::new(prepare)));
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

    /// Stores at `keeper` what a restart needs: the listening socket, the memory, the connection
    /// and the eventfds of each client, and a state file.
    ///
    /// If that keeper has given back the state of a server before, `start` goes on with it: the
    /// same memory, clients, ids and pending messages. First id, id space and memory size are then
    /// those of before; the number of vectors must be the same. A client that the server before
    /// may have been sending to when it was killed is ended, and the log names it.
    ///
    /// A server that is dropped ends for good, with everything that is stored.
    /// [`Server::hand_over`] leaves it to the next.
    pub fn keeper(mut self, keeper: Keeper) -> Self {
        self.keeper = Some(keeper);
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
        let options = self.memory_options;

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
        let mut keeper = self.keeper;
        let mut resumed = match &mut keeper {
            Some(keeper) => Resumed::find(keeper)?,
            None => None,
        };
        let mut memory = match &mut resumed {
            Some(resumed) => {
                resumed.check(self.vectors)?;
                let size = resumed.things().memory_size;
                Memory::resume(source, &options, resumed.take_memory()?, size)?
            }
            None => Memory::open(source, &options)?,
        };
        let kept = resumed.as_mut().and_then(Resumed::take_listener).map(UnixListener::from);
        let path_before = resumed.as_ref().map(|resumed| resumed.things().path).unwrap_or_default();
        let mut listener = match (self.socket, kept) {
            (Some(Socket::Path(path)), Some(kept)) => {
                match Listener::resume(kept, &path, path_before)? {
                    Some(listener) => listener,
                    None => Listener::bind(&path, self.permissions)?,
                }
            }
            (Some(Socket::Path(path)), None) => Listener::bind(&path, self.permissions)?,
            (Some(Socket::Given(listener)), _) => Listener::given(listener, self.permissions)?,
            (None, Some(kept)) => Listener::given(kept, self.permissions)?,
            (None, None) => return Err(Error::NoSocket),
        };
        let (mut first, mut space) = (self.first_id, self.id_space);
        if resumed.is_none() {
            (first, space) = memory.unused_ids(first, space)?;
            memory.reserve(&options)?;
        }
        reactor.watch_listener(listener.as_fd())?;
        let closer = Closer::new(listener.refuses_descriptors());
        let keeper = match keeper {
            Some(keeper) => {
                let things = Things {
                    memory: memory.identity().map_err(failed("look at the memory"))?,
                    memory_size: memory.size(),
                    listener: sys::socket_cookie(listener.as_fd())
                        .map_err(failed("identify the listening socket"))?,
                    path: listener.path_identity(),
                };
                Some((keeper, things))
            }
            None => None,
        };
        if let Some(Prepare(prepare)) = self.prepare {
            prepare()?;
        }
        // This step is last: a server that listens has opened all its own descriptors.
        listener.listen(self.backlog)?;
        let mut broadcast = Broadcast::new();
        let restarts = resumed.as_ref().map_or(0, Resumed::count_restart);
        let (clients, keeping) = match (keeper, resumed) {
            (Some((mut keeper, things)), Some(resumed)) => {
                let before = resumed.things();
                let (state, clients) = resumed.finish(&mut keeper);
                let mut keeping = Keeping::new(keeper, state);
                if (before.listener, before.path) != (things.listener, things.path) {
                    keeping
                        .replace_listener(listener.as_fd(), &things)
                        .map_err(failed("store the listening socket at the keeper"))?;
                }
                memory.mark_resumed(clients.iter().map(|(id, _)| id));
                log::info!("resumed with {} peers", clients.len());
                broadcast.start_round();
                (clients, Some(keeping))
            }
            (Some((keeper, things)), None) => {
                let state = State::create(self.vectors, first, space, &things)
                    .map_err(failed("make the state file"))?;
                let mut keeping = Keeping::new(keeper, state);
                keeping
                    .store_things(memory.as_fd(), listener.as_fd())
                    .map_err(failed("store descriptors at the keeper"))?;
                (Roster::new(self.vectors, first, space), Some(keeping))
            }
            (None, _) => (Roster::new(self.vectors, first, space), None),
        };
        let mut core = Core::new(reactor, closer, clients, keeping);
        core.stats.restarts = restarts;
        let mut turn = Turn::new();
        core.watch_all().map_err(failed("watch the clients that go on"))?;
        // They were blocked in their greeting when the server before ended.
        let blocked: Vec<Key> = (0..core.clients.len())
            .filter(|&index| core.clients.greeting_left(index) > 0)
            .map(|index| core.clients.key(index))
            .collect();
        for key in blocked {
            broadcast.greet(&mut core, key, memory.as_fd(), &mut turn);
        }
        for (key, reason) in std::mem::take(&mut turn.broken) {
            core.remove(key, Some(reason), &mut turn);
        }
        core.reactor.set_due(broadcast.has_work());
        memory.finish();
        listener.finish();

        Ok(Server {
            core,
            admission: Admission::new(listener, spare, self.limits),
            broadcast,
            memory,
            hands_over: false,
        })
    }
}
