// SPDX-License-Identifier: GPL-2.0-or-later
//! A further listening socket of a program, with the guarantees of the server's own.
//!
//! It knows a path and connections. It does not know what they are for.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::{Error, Listener, Permissions};

/// Connections that may wait to be accepted.
const BACKLOG: u32 = 64;

/// A non-blocking UNIX stream socket that listens at a path: for a program that needs one beside
/// that of its server, for example for management.
///
/// It has the guarantees of the server's socket: a socket that a killed process left is replaced; a
/// live one, and anything else, is left alone and is an error; no symbolic link and no other user
/// of the directory redirects it. Dropping it removes the path if that still is this socket.
///
/// ```
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("management");
/// use std::io::Write;
/// use std::os::unix::net::UnixStream;
/// use ivshmem::PathListener;
///
/// let listener = PathListener::bind(&path, 0o600)?;
/// let client = UnixStream::connect(&path)?;
/// listener.accept()?.write_all(b"hello")?;
/// drop(listener);
/// assert!(!path.exists());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct PathListener(Listener);

impl PathListener {
    /// Listens at `path`, of at most 107 bytes. Processes that may write to it by `mode`, such as
    /// `0o600`, may connect.
    ///
    /// # Errors
    /// As [`Builder::start`](crate::Builder::start) for its socket.
    pub fn bind(path: impl AsRef<Path>, mode: u32) -> Result<Self, Error> {
        Self::bind_for(path, mode, None)
    }

    /// As [`bind`](Self::bind), with the owner of the socket, a user id. Without an owner it is this
    /// process's.
    ///
    /// # Errors
    /// As [`bind`](Self::bind).
    pub fn bind_for(path: impl AsRef<Path>, mode: u32, owner: Option<u32>) -> Result<Self, Error> {
        let permissions = Permissions { mode: Some(mode), owner, group: None };
        let listener = Listener::bind(path.as_ref(), permissions)?;
        listener.listen(BACKLOG)?;
        Ok(Self(listener))
    }

    /// Accepts a connection. The connection is non-blocking.
    ///
    /// # Errors
    /// Those of `accept(2)`: `WouldBlock` when no connection waits.
    pub fn accept(&self) -> io::Result<UnixStream> {
        let (connection, _) = self.0.socket.accept()?;
        connection.set_nonblocking(true)?;
        Ok(connection)
    }

    /// Its path, absolute.
    pub fn path(&self) -> &Path {
        self.0.path().unwrap_or(Path::new(""))
    }
}

impl AsFd for PathListener {
    /// Readable when a connection waits.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_socket_of_a_killed_process_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("socket");
        // Closed without the removal of its path, as by SIGKILL.
        drop(UnixListener::bind(&path).expect("the place is new"));
        let first = PathListener::bind(&path, 0o600).expect("a dead socket is replaced");
        let mode = std::fs::metadata(&path).expect("it is there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let error = PathListener::bind(&path, 0o600).expect_err("it is in use");
        assert!(matches!(error, Error::InUse { .. }), "{error}");
        let _client = UnixStream::connect(&path).expect("the first one still listens");
        first.accept().expect("a connection waits");
        assert_eq!(first.accept().expect_err("no other").kind(), io::ErrorKind::WouldBlock);
        drop(first);
        assert!(!path.exists());
    }
}
