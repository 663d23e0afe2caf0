// SPDX-License-Identifier: GPL-2.0-or-later
//! The listening socket, bound here or given by the caller.
//!
//! It knows paths, sockets and the results of `accept`. It does not know what the server does with
//! a connection.

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, listen, socket};

use crate::protocol::MAX_SOCKET_PATH;
use crate::sys;

mod accept;
mod bound;
mod error;
mod path;

pub(crate) use accept::Accept;
use bound::Bound;
pub use error::Error;
pub use path::PathListener;

/// What the path of a new socket gets; what is not given is as the kernel makes it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Permissions {
    pub(crate) mode: Option<u32>,
    pub(crate) owner: Option<u32>,
    pub(crate) group: Option<u32>,
}

/// A listening socket, and its path if it is ours to remove.
#[derive(Debug)]
pub(crate) struct Listener {
    // Dropped before the socket, which it needs open.
    bound: Option<Bound>,
    socket: UnixListener,
    refuses_descriptors: bool,
}

impl Listener {
    /// Takes `path` without listening there yet. A dead socket in its place is replaced. The
    /// permissions decide which users may connect. Without a mode it is 0777 minus the umask.
    pub(crate) fn bind(path: &Path, permissions: Permissions) -> Result<Self, Error> {
        let length = path.as_os_str().len();
        if length == 0 || length > MAX_SOCKET_PATH {
            return Err(Error::PathLength { path: path.into(), limit: MAX_SOCKET_PATH });
        }
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None).map_err(|errno| {
            Error::Socket { path: path.into(), action: "create", source: errno.into() }
        })?;
        let bound = Bound::bind(&fd, path, permissions)?;
        // Connections inherit it.
        let refuses_descriptors = sys::refuse_descriptors(fd.as_fd()).is_ok();
        Ok(Self { bound: Some(bound), socket: UnixListener::from(fd), refuses_descriptors })
    }

    /// Takes a socket that the caller has bound; its path, if any, stays the caller's, and so do
    /// its permissions: to ask for some is an error.
    pub(crate) fn given(socket: UnixListener, permissions: Permissions) -> Result<Self, Error> {
        let Permissions { mode, owner, group } = permissions;
        if let Some(mode) = mode {
            return Err(Error::ModeOfGiven { mode });
        }
        if owner.is_some() || group.is_some() {
            return Err(Error::OwnerOfGiven { owner, group });
        }
        socket.set_nonblocking(true).map_err(|source| Error::System {
            action: "make the given socket non-blocking",
            source,
        })?;
        // A connection that waits already may have got descriptors before.
        let _ = sys::refuse_descriptors(socket.as_fd());
        Ok(Self { bound: None, socket, refuses_descriptors: false })
    }

    /// Takes the socket of a server before, which listens. `path` is where it was bound, with the
    /// device and inode of the entry. None if something else is there now. The path stays until
    /// [`finish`](Self::finish) is called.
    pub(crate) fn resume(
        socket: UnixListener,
        path: &Path,
        identity: (u64, u64),
    ) -> Result<Option<Self>, Error> {
        let Some(bound) = Bound::find(path, identity)? else { return Ok(None) };
        let refuses_descriptors = sys::refuse_descriptors(socket.as_fd()).is_ok();
        Ok(Some(Self { bound: Some(bound), socket, refuses_descriptors }))
    }

    /// The server serves: from now on the path is removed at the end.
    pub(crate) fn finish(&mut self) {
        self.bound.iter_mut().for_each(|bound| bound.keep(false));
    }

    /// The path stays at the end.
    pub(crate) fn keep(&mut self) {
        self.bound.iter_mut().for_each(|bound| bound.keep(true));
    }

    /// Device and inode of the path; zeroes without one.
    pub(crate) fn path_identity(&self) -> (u64, u64) {
        self.bound.as_ref().map(Bound::identity).unwrap_or_default()
    }

    /// Begins to listen, with room for `backlog` connections that wait to be accepted (the
    /// kernel caps it at `net.core.somaxconn`).
    pub(crate) fn listen(&self, backlog: u32) -> Result<(), Error> {
        let backlog = i32::try_from(backlog).unwrap_or(i32::MAX);
        Backlog::new(backlog)
            .and_then(|backlog| listen(&self.socket, backlog))
            .map_err(|errno| Error::System { action: "listen on the socket", source: errno.into() })
    }

    /// Accepts one connection without waiting.
    pub(crate) fn accept(&self) -> Accept {
        match self.socket.accept() {
            Ok((stream, _)) => Accept::Accepted(stream),
            Err(error) => Accept::of(error, || self.is_shut_down()),
        }
    }

    /// Whether shutdown(2) was called on it, by any process that shares it.
    fn is_shut_down(&self) -> bool {
        let mut fds =
            [PollFd::new(self.socket.as_fd(), PollFlags::from_bits_retain(libc::POLLRDHUP))];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Whether a connection waits to be accepted. A tenth of the price of an `accept` that finds
    /// none: that one makes a socket and a file first.
    pub(crate) fn has_waiting(&self) -> bool {
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        // What poll cannot tell, accept will.
        poll(&mut fds, PollTimeout::ZERO) != Ok(0)
    }

    /// Whether no connection can have descriptors of its client.
    pub(crate) fn refuses_descriptors(&self) -> bool {
        self.refuses_descriptors
    }

    /// The path that was bound here; none for a socket that the caller gave.
    pub(crate) fn path(&self) -> Option<&Path> {
        self.bound.as_ref().map(Bound::path)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{Shutdown, shutdown};
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    fn given() -> (tempfile::TempDir, UnixListener) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let socket = UnixListener::bind(dir.path().join("socket")).expect("the place is new");
        (dir, socket)
    }

    #[test]
    fn a_listener_that_was_shut_down_is_dead() {
        let (dir, socket) = given();
        let listener = Listener::given(socket, Permissions::default()).expect("it can be used");
        assert!(matches!(listener.accept(), Accept::None));
        let _client = UnixStream::connect(dir.path().join("socket")).expect("it listens");
        assert!(matches!(listener.accept(), Accept::Accepted(_)));
        shutdown(listener.as_fd().as_raw_fd(), Shutdown::Both).expect("it is a socket");
        for _ in 0..2 {
            assert!(matches!(listener.accept(), Accept::Dead));
        }
    }

    #[test]
    fn a_mode_for_a_given_listener_is_refused() {
        let (_dir, socket) = given();
        let permissions = Permissions { mode: Some(0o660), ..Permissions::default() };
        let error = Listener::given(socket, permissions).expect_err("its mode is the caller's");
        assert!(error.to_string().contains("660"), "{error}");
        assert_eq!(error.errno(), libc::EINVAL);
    }

    #[test]
    fn an_owner_or_a_group_for_a_given_listener_is_refused() {
        let (owner, group) = (Some(70_001), Some(70_002));
        for (owner, group) in [(owner, None), (None, group), (owner, group)] {
            let (_dir, socket) = given();
            let permissions = Permissions { mode: None, owner, group };
            let error = Listener::given(socket, permissions).expect_err("they are the caller's");
            for number in [owner, group].into_iter().flatten() {
                assert!(error.to_string().contains(&number.to_string()), "{error}");
            }
            assert_eq!(error.errno(), libc::EINVAL);
        }
    }
}
