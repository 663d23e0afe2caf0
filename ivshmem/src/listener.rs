// SPDX-License-Identifier: GPL-2.0-or-later
//! The listening socket: its path, and whose it is.
//!
//! # Exactly one of many starters wins, and a live server is never touched
//!
//! `bind` is atomic: with nothing in the path's place one starter gets it and the others get
//! `EADDRINUSE`. What is left is a socket that a killed server left behind. Whether one is
//! dead is found out by connecting a *datagram* socket to it: the kernel answers `EPROTOTYPE`
//! where a stream socket is bound, listening or not, and `ECONNREFUSED` where nobody is, and
//! the server at the other end never notices. (A stream connect would count as a client; the
//! reference even dies of it.)
//!
//! Between finding it dead and removing it, another starter could have replaced it; so this
//! happens under an flock of the directory, which leaves nothing behind. Only a socket found
//! dead under the lock is removed, and everybody who removes a dead one holds the lock.
//!
//! At the end the path is removed before the socket is closed, and only if it still is this
//! socket: while it is open its inode number can belong to no other.

#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket,
};

use crate::Error;
use crate::protocol::MAX_SOCKET_PATH;
use crate::sys;

/// How long to wait for another starter to be done with a left-over socket.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// A listening socket, and its path if it is ours to remove.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: UnixListener,
    bound: Option<Bound>,
}

#[derive(Debug)]
struct Bound {
    /// Absolute where that can be known: the process may change its directory.
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Listener {
    /// Takes `path` without listening there yet. A dead socket in its place is replaced.
    pub(crate) fn bind(path: &Path) -> Result<Self, Error> {
        let length = path.as_os_str().len();
        if length == 0 || length > MAX_SOCKET_PATH {
            return Err(Error::SocketPathLength { path: path.into(), limit: MAX_SOCKET_PATH });
        }
        let failed = |action| {
            move |errno: Errno| Error::Socket { path: path.into(), action, source: errno.into() }
        };
        let address = UnixAddr::new(path).map_err(failed("use the name of"))?;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd =
            socket(AddressFamily::Unix, SockType::Stream, flags, None).map_err(failed("create"))?;
        match bind(fd.as_raw_fd(), &address) {
            Err(Errno::EADDRINUSE) => {
                replace(path, &address, || bind(fd.as_raw_fd(), &address))?;
            }
            result => result.map_err(failed("bind"))?,
        }
        Self::bound(path, fd)
    }

    fn bound(path: &Path, fd: OwnedFd) -> Result<Self, Error> {
        let absolute = std::path::absolute(path).unwrap_or_else(|_| path.into());
        let meta = fs::symlink_metadata(path).map_err(|source| {
            // It was bound a moment ago, and whatever holds it now cannot be told apart; but if
            // it is gone, somebody else may be there by now.
            if source.kind() != io::ErrorKind::NotFound {
                let _ = fs::remove_file(path);
            }
            Error::Socket { path: path.into(), action: "find the newly bound", source }
        })?;
        Ok(Self {
            socket: UnixListener::from(fd),
            bound: Some(Bound { path: absolute, device: meta.dev(), inode: meta.ino() }),
        })
    }

    /// Takes a socket that the caller has bound; its path, if any, stays the caller's.
    pub(crate) fn given(socket: UnixListener) -> Result<Self, Error> {
        socket.set_nonblocking(true).map_err(|source| Error::System {
            action: "make the given socket non-blocking",
            source,
        })?;
        Ok(Self { socket, bound: None })
    }

    /// Begins to listen, with room for `backlog` connections that wait to be accepted (the
    /// kernel caps it at `net.core.somaxconn`).
    pub(crate) fn listen(&self, backlog: u32) -> Result<(), Error> {
        let backlog = i32::try_from(backlog).unwrap_or(i32::MAX);
        Backlog::new(backlog)
            .and_then(|backlog| listen(&self.socket, backlog))
            .map_err(|errno| Error::System { action: "listen on the socket", source: errno.into() })
    }

    /// Lets those in whom `mode` allows to write to the socket, whatever the umask said.
    pub(crate) fn set_mode(&self, mode: u32) -> Result<(), Error> {
        let Some(Bound { path, .. }) = &self.bound else {
            return Ok(());
        };
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(|source| {
            Error::Socket { path: path.clone(), action: "set the mode of", source }
        })
    }

    /// Accepts one connection, close-on-exec, without waiting.
    pub(crate) fn accept(&self) -> io::Result<UnixStream> {
        self.socket.accept().map(|(stream, _)| stream)
    }

    /// Whether somebody waits to be accepted. A tenth of the price of an `accept` that finds
    /// nobody: that one makes a socket and a file first.
    pub(crate) fn has_waiting(&self) -> bool {
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        // What poll cannot tell, accept will.
        poll(&mut fds, PollTimeout::ZERO) != Ok(0)
    }

    /// Whether shutdown(2) was called on it, by any process that shares it.
    pub(crate) fn is_shut_down(&self) -> bool {
        let hung_up = PollFlags::from_bits_retain(libc::POLLRDHUP);
        let mut fds = [PollFd::new(self.socket.as_fd(), hung_up)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// The path that was bound here; none for a socket that the caller gave.
    pub(crate) fn path(&self) -> Option<&Path> {
        self.bound.as_ref().map(|bound| bound.path.as_path())
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let Some(Bound { path, device, inode }) = &self.bound else { return };
        let ours = fs::symlink_metadata(path)
            .is_ok_and(|meta| (meta.dev(), meta.ino()) == (*device, *inode));
        if ours {
            if let Err(error) = fs::remove_file(path) {
                log::warn!("cannot remove socket {path:?}: {error}");
            }
        }
    }
}

/// Binds where something is already: removes it if it is a dead socket.
fn replace(
    path: &Path,
    address: &UnixAddr,
    bind: impl Fn() -> nix::Result<()>,
) -> Result<(), Error> {
    let _lock = lock_directory(path)?;
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(source) => {
            return Err(Error::Socket { path: path.into(), action: "look at", source });
        }
        Ok(meta) => {
            let kind = meta.file_type();
            if !kind.is_socket() {
                let kind = if kind.is_dir() {
                    "a directory"
                } else if kind.is_symlink() {
                    "a symbolic link"
                } else if kind.is_file() {
                    "a regular file"
                } else {
                    "a special file"
                };
                return Err(Error::NotASocket { path: path.into(), kind });
            }
            match holder(path, address)? {
                Holder::Alive => return Err(Error::SocketInUse { path: path.into() }),
                // Whoever finds the place empty now is as good as we are.
                Holder::Gone => {}
                Holder::Dead => fs::remove_file(path).map_err(|source| Error::Socket {
                    path: path.into(),
                    action: "remove the left-over",
                    source,
                })?,
            }
        }
    }
    match bind() {
        // Somebody who found the place empty was faster.
        Err(Errno::EADDRINUSE) => Err(Error::SocketInUse { path: path.into() }),
        result => result.map_err(|errno| Error::Socket {
            path: path.into(),
            action: "bind",
            source: errno.into(),
        }),
    }
}

/// Who holds the socket at a path.
enum Holder {
    Alive,
    Dead,
    /// It has removed its socket meanwhile.
    Gone,
}

/// Whether a process holds the socket at `path`; see the head of this file.
fn holder(path: &Path, address: &UnixAddr) -> Result<Holder, Error> {
    let failed = |errno: Errno| Error::Socket {
        path: path.into(),
        action: "find out who holds",
        source: errno.into(),
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let probe = socket(AddressFamily::Unix, SockType::Datagram, flags, None).map_err(failed)?;
    match connect(probe.as_raw_fd(), address) {
        Ok(()) | Err(Errno::EPROTOTYPE) => Ok(Holder::Alive),
        Err(Errno::ECONNREFUSED) => Ok(Holder::Dead),
        Err(Errno::ENOENT) => Ok(Holder::Gone),
        Err(errno) => Err(failed(errno)),
    }
}

fn lock_directory(path: &Path) -> Result<File, Error> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let failed = |source| Error::Socket {
        path: path.into(),
        action: "lock the directory of the existing",
        source,
    };
    let file = File::open(directory).map_err(failed)?;
    let patience = Instant::now() + LOCK_PATIENCE;
    loop {
        match sys::lock(&file) {
            Ok(()) => return Ok(file),
            Err(Errno::EAGAIN) if Instant::now() < patience => {
                thread::sleep(Duration::from_millis(2));
            }
            Err(Errno::EAGAIN) => {
                return Err(failed(io::Error::new(
                    io::ErrorKind::ResourceBusy,
                    "another process keeps it locked; end it, or remove the socket by hand if \
                     no server uses it",
                )));
            }
            Err(errno) => return Err(failed(errno.into())),
        }
    }
}
