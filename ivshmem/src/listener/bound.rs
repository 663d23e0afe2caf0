// SPDX-License-Identifier: GPL-2.0-or-later
//! A socket at a path: how it gets there, and how it goes.
//!
//! # Exactly one of many starters wins, and a live server is never touched
//!
//! `bind` is atomic: with nothing in the path's place one starter gets it and the others get
//! `EADDRINUSE`. What is left is a socket that a killed server left behind. A *datagram* socket
//! that is connected to it tells whether it is dead: the kernel answers `EPROTOTYPE` where a
//! stream socket is bound, listening or not, and `ECONNREFUSED` where none is, and the server at
//! the other end never notices. (A stream connection would count as a client; the reference even
//! ends because of it.)
//!
//! Between finding it dead and removing it, another starter could have replaced it; so this
//! happens under a lock (`lock_file.rs`), a file beside the socket that exists only meanwhile. Only a
//! socket found dead under the lock is removed, and each starter that removes one holds the lock.
//!
//! At the end the path is removed before the socket is closed, and only if it still is this
//! socket: while it is open its inode number can belong to no other.
//!
//! # Directories that others may write
//!
//! All of this goes through one descriptor of the directory (`directory.rs`). In a safe directory
//! the socket is bound at the path as given, which is then also the address that `ss -x` shows. In
//! any other directory the socket is bound in a private directory, gets its mode there, and is then
//! moved to its name, which must be free. `ss -x` then shows an address in `/proc/self/fd`, which
//! means nothing; connecting to the path works as usual.

#![forbid(unsafe_code)]

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, bind, connect, socket};
use nix::unistd::geteuid;

use super::{Error, Permissions};
use crate::directory::{Directory, Entry, Pinned};
use crate::lock_file::{Failure, LockFile};

/// How long to wait for another starter that replaces a left-over socket.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// The place of a bound socket. Dropped, it removes the path if that still is the socket, which
/// must be open until then.
#[derive(Debug)]
pub(super) struct Bound {
    /// Absolute where that can be known: the process may change its directory.
    path: PathBuf,
    directory: Directory,
    name: OsString,
    entry: Entry,
    /// Whether the path goes when this is dropped.
    removes_path: bool,
}

impl Bound {
    /// Binds `socket` to `path`. A dead socket in its place is replaced.
    pub(super) fn bind(
        socket: &OwnedFd,
        path: &Path,
        permissions: Permissions,
    ) -> Result<Self, Error> {
        let (directory, name) =
            Directory::of(path).map_err(failed(path, "open the directory of"))?;
        let place = Place { path, directory: &directory, name: &name };
        let entry = if directory.is_safe() {
            place.bind_here(socket, permissions)?
        } else {
            place.bind_apart(socket, permissions)?
        };
        let path = std::path::absolute(path).unwrap_or_else(|_| path.into());
        Ok(Self { path, directory: directory.park(), name, entry, removes_path: true })
    }

    /// The place of a socket that a server before has bound. None if something else is there.
    /// Dropping it leaves the path alone until [`keep`](Self::keep) says otherwise.
    pub(super) fn find(path: &Path, identity: (u64, u64)) -> Result<Option<Self>, Error> {
        let (directory, name) =
            Directory::of(path).map_err(failed(path, "open the directory of"))?;
        let found = directory.look(&name).map_err(failed(path, "look at"))?;
        let Some(entry) = found.filter(|entry| entry.identity() == identity) else {
            return Ok(None);
        };
        let path = std::path::absolute(path).unwrap_or_else(|_| path.into());
        Ok(Some(Self { path, directory: directory.park(), name, entry, removes_path: false }))
    }

    /// Whether the path stays when this is dropped.
    pub(super) fn keep(&mut self, keep: bool) {
        self.removes_path = !keep;
    }

    /// Device and inode.
    pub(super) fn identity(&self) -> (u64, u64) {
        self.entry.identity()
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        if !self.removes_path {
            return;
        }
        if let Err(error) = self.directory.remove(&self.name, &self.entry) {
            log::warn!("cannot remove socket {:?}: {error}", self.path);
        }
    }
}

/// For `map_err`: the call that does `action` to the socket at `path` failed.
fn failed(path: &Path, action: &'static str) -> impl Fn(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Socket { path: path.clone(), action, source }
}

/// Where a socket is to be bound.
#[derive(Clone, Copy)]
struct Place<'a> {
    path: &'a Path,
    directory: &'a Directory,
    name: &'a OsStr,
}

impl Place<'_> {
    fn failed(&self, action: &'static str) -> impl Fn(io::Error) -> Error {
        failed(self.path, action)
    }

    fn in_use(&self) -> Error {
        Error::InUse { path: self.path.into() }
    }

    /// Binds at the path itself, in a directory where nobody else can exchange it.
    fn bind_here(self, socket: &OwnedFd, permissions: Permissions) -> Result<Entry, Error> {
        let address = UnixAddr::new(self.path)
            .map_err(|errno| self.failed("use the name of")(errno.into()))?;
        let bind = || bind(socket.as_raw_fd(), &address);
        let result = match bind() {
            Err(Errno::EADDRINUSE) => {
                let _lock = self.make_way()?;
                bind()
            }
            result => result,
        };
        match result {
            // Another starter that found the place empty was faster.
            Err(Errno::EADDRINUSE) => return Err(self.in_use()),
            result => result.map_err(|errno| self.failed("bind")(errno.into()))?,
        }
        let find = self.failed("find the newly bound");
        let made = match self.directory.pin(self.name) {
            Ok(Some(made)) => made,
            // Another server may be there by now.
            Ok(None) => return Err(find(io::ErrorKind::NotFound.into())),
            Err(error) => {
                // It was bound a moment ago, and what is there now cannot be told apart.
                if let Ok(Some(entry)) = self.directory.look(self.name) {
                    let _ = self.directory.remove(self.name, &entry);
                }
                return Err(find(error));
            }
        };
        self.finish(&made, permissions).inspect_err(|_| {
            let _ = self.directory.remove(self.name, &made.entry);
        })
    }

    /// Binds in a private directory, and moves the socket to its name.
    fn bind_apart(self, socket: &OwnedFd, permissions: Permissions) -> Result<Entry, Error> {
        let private =
            self.directory.private().map_err(self.failed("make a private directory for"))?;
        let address = UnixAddr::new(&private.entry_path())
            .map_err(|errno| self.failed("use the name of")(errno.into()))?;
        bind(socket.as_raw_fd(), &address).map_err(|errno| self.failed("bind")(errno.into()))?;
        let publish = || {
            let find = self.failed("find the newly bound");
            let made = match private.pin() {
                Ok(Some(made)) => made,
                Ok(None) => return Err(find(io::ErrorKind::NotFound.into())),
                Err(error) => return Err(find(error)),
            };
            let entry = self.finish(&made, permissions)?;
            let is_taken = |error: &io::Error| error.kind() == io::ErrorKind::AlreadyExists;
            let result = match private.publish(self.directory, self.name) {
                Err(error) if is_taken(&error) => {
                    let _lock = self.make_way()?;
                    private.publish(self.directory, self.name)
                }
                result => result,
            };
            match result {
                Err(error) if is_taken(&error) => Err(self.in_use()),
                result => result.map_err(self.failed("name")),
            }?;
            Ok(entry)
        };
        publish().inspect_err(|_| {
            let _ = private.discard();
        })
    }

    /// Gives the socket that was made its mode, owner and group. Nobody can connect to it yet.
    fn finish(&self, made: &Pinned, permissions: Permissions) -> Result<Entry, Error> {
        let entry = made.entry;
        if !entry.is_type(libc::S_IFSOCK) || !entry.is_own() {
            let text = "another process exchanged it";
            let error = io::Error::new(io::ErrorKind::PermissionDenied, text);
            return Err(self.failed("find the newly bound")(error));
        }
        let Permissions { mode, owner, group } = permissions;
        if let Some(mode) = mode {
            made.set_mode(mode).map_err(self.failed("set the mode of"))?;
        }
        if owner.is_none() && group.is_none() {
            return Ok(entry);
        }
        // Last, as only an owner may set the mode. In a sticky directory the new owner may exchange
        // it from now on, so the entry says whose it is.
        made.set_owner(owner, group).map_err(|source| Error::Owner {
            path: self.path.into(),
            owner,
            group,
            source,
        })
    }

    /// Makes the name free: removes what has it, if that is a dead socket. The lock that this
    /// returns is to be held until the name is taken.
    fn make_way(&self) -> Result<Lock<'_>, Error> {
        let lock = self.lock()?;
        let Some(found) = self.directory.pin(self.name).map_err(self.failed("look at"))? else {
            return Ok(lock);
        };
        if !found.entry.is_type(libc::S_IFSOCK) {
            let kind = match found.entry.mode & libc::S_IFMT {
                libc::S_IFDIR => "a directory",
                libc::S_IFLNK => "a symbolic link",
                libc::S_IFREG => "a regular file",
                _ => "a special file",
            };
            return Err(Error::NotASocket { path: self.path.into(), kind });
        }
        if is_alive(&found).map_err(self.failed("find out who holds"))? {
            return Err(self.in_use());
        }
        // If it is another one by now it stays, and the name is not free.
        self.directory
            .remove(self.name, &found.entry)
            .map_err(self.failed("remove the left-over"))?;
        Ok(lock)
    }

    fn lock(&self) -> Result<Lock<'_>, Error> {
        let name = LockFile::name_for(self.name);
        let file = LockFile::acquire(self.directory, &name, LOCK_PATIENCE);
        let file = file.map_err(|failure| match failure {
            Failure::Held => {
                let text = "another process keeps it locked; end it, or remove the socket by hand \
                            if no server uses it";
                let error = io::Error::new(io::ErrorKind::ResourceBusy, text);
                self.failed("lock the left-over")(error)
            }
            Failure::Foreign(entry) => Error::ForeignLock {
                path: self.path.into(),
                lock: name.into(),
                owner: entry.owner,
                mode: entry.permissions(),
                user: geteuid().as_raw(),
            },
            Failure::System(error) => self.failed("lock the existing")(error),
        })?;
        Ok(Lock { file, directory: self.directory })
    }
}

/// The lock under which a dead socket is replaced.
struct Lock<'a> {
    file: LockFile,
    directory: &'a Directory,
}

impl Drop for Lock<'_> {
    fn drop(&mut self) {
        self.file.release(self.directory);
    }
}

/// Whether a process holds this very socket; see the head of this file.
fn is_alive(found: &Pinned) -> io::Result<bool> {
    let address = UnixAddr::new(&found.path())?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let probe = socket(AddressFamily::Unix, SockType::Datagram, flags, None)?;
    match connect(probe.as_raw_fd(), &address) {
        Ok(()) | Err(Errno::EPROTOTYPE) => Ok(true),
        Err(Errno::ECONNREFUSED) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}
