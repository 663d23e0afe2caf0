// SPDX-License-Identifier: GPL-2.0-or-later
//! The process that asks to be admitted, as far as the kernel tells.

#![forbid(unsafe_code)]

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use nix::sys::socket::{getsockopt, sockopt};

use crate::sys;

/// The process at the other end of a connection, as it was when it connected (`SO_PEERCRED` of
/// `unix(7)`).
///
/// ```
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("socket");
/// # let mut server = ivshmem::Server::builder().socket_path(&path).start()?;
/// # let socket = std::os::unix::net::UnixStream::connect(&path)?;
/// # server.wait(None)?;
/// let credentials = server.peer(0).expect("it joined").credentials()?;
/// assert_eq!(credentials.pid, std::process::id() as i32);
/// println!("{credentials}"); // pid 4711, uid 1000, gid 1000
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Credentials {
    /// Process id. 0 for a process of a PID namespace that is not visible here.
    pub pid: i32,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

impl Credentials {
    pub(super) fn of(socket: BorrowedFd<'_>) -> io::Result<Self> {
        let credentials = getsockopt(&socket, sockopt::PeerCredentials)?;
        Ok(Self { pid: credentials.pid(), uid: credentials.uid(), gid: credentials.gid() })
    }

    /// The name of the program, from `/proc/PID/comm`, of at most 15 bytes. None if the process
    /// has ended.
    ///
    /// A process can give itself any name, and another process may have the number by now. Use it
    /// for log lines only.
    pub fn program(&self) -> Option<String> {
        let name = fs::read(format!("/proc/{}/comm", self.pid)).ok()?;
        Some(String::from_utf8_lossy(&name).trim_end().escape_debug().to_string())
    }
}

impl fmt::Display for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pid {}, uid {}, gid {}", self.pid, self.uid, self.gid)
    }
}

/// A process that has connected and asks to be admitted: see
/// [`Builder::admit`](super::Builder::admit).
///
/// ```
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("socket");
/// use ivshmem::{Event, Refusal, Server};
///
/// let mut server = Server::builder()
///     .socket_path(&path)
///     .admit(|applicant| match applicant.credentials().uid {
///         u32::MAX => Ok(()),
///         uid => Err(format!("uid {uid} is on no list")),
///     })
///     .start()?;
/// # let socket = std::os::unix::net::UnixStream::connect(&path)?;
/// let events = server.wait(None)?;
/// let [Event::Refused { reason: Refusal::NotPermitted(reason), .. }] = &events[..] else {
///     panic!("{events:?}")
/// };
/// assert!(reason.ends_with("is on no list"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Applicant<'a> {
    socket: BorrowedFd<'a>,
    credentials: Credentials,
}

impl<'a> Applicant<'a> {
    pub(super) fn new(socket: BorrowedFd<'a>, credentials: Credentials) -> Self {
        Self { socket, credentials }
    }

    /// Its process, user and group.
    pub fn credentials(&self) -> Credentials {
        self.credentials
    }

    /// Its supplementary groups.
    ///
    /// # Errors
    /// Those of `getsockopt(2)`; `ENOPROTOOPT` before Linux 4.13.
    pub fn groups(&self) -> io::Result<Vec<u32>> {
        sys::peer_groups(self.socket)
    }

    /// A descriptor of the process (`pidfd_open(2)`), which no other process can take over.
    ///
    /// # Errors
    /// Those of `getsockopt(2)`; `ENOPROTOOPT` before Linux 6.5, `ESRCH` or `EINVAL` if the
    /// process has ended.
    pub fn pidfd(&self) -> io::Result<OwnedFd> {
        Ok(getsockopt(&self.socket, sockopt::PeerPidfd)?)
    }

    /// The path of its program file, from `/proc/PID/exe`.
    ///
    /// # Errors
    /// Those of `readlink(2)`: the process may have ended, or belong to another user.
    pub fn executable(&self) -> io::Result<PathBuf> {
        fs::read_link(format!("/proc/{}/exe", self.credentials.pid))
    }
}

impl AsFd for Applicant<'_> {
    /// Its connection.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket
    }
}
