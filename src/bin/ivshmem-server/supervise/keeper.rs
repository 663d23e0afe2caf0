// SPDX-License-Identifier: GPL-2.0-or-later
//! The socket at which the server notifies the supervisor ($NOTIFY_SOCKET).
//!
//! It is a path in a private directory. Any local user could send to an abstract address, also descriptors that take
//! long to close, and the queue of a datagram socket has only some ten places. Messages of other processes than the
//! server are ignored all the same.

#![forbid(unsafe_code)]

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::sys::socket::{setsockopt, sockopt};
use nix::unistd::{Pid, geteuid, getuid};

use super::sys::{self, Received};
use crate::Failure;

/// systemd takes messages up to this size.
const MESSAGE_BYTES: usize = 4096;

/// How the names of the directories begin.
const PREFIX: &str = "ivshmem-server.";

/// The name of the socket in its directory.
const SOCKET: &str = "notify";

/// The socket; its directory is removed when this is dropped.
#[derive(Debug)]
pub(super) struct Keeper {
    socket: UnixDatagram,
    directory: PathBuf,
    /// The user that the server becomes, besides this process's own.
    user: Option<u32>,
}

impl Keeper {
    /// `user` is the one as which the server goes on.
    pub(super) fn new(user: Option<u32>) -> Result<Self, Failure> {
        let places = places();
        let mut errors = Vec::new();
        for place in &places {
            match Self::within(place, user) {
                Ok(keeper) => return Ok(keeper),
                Err(error) => errors.push(format!("in {place:?}: {error}")),
            }
        }
        let errors = errors.join("; ");
        Err(format!(
            "cannot make the socket of the supervisor ({errors}); set TMPDIR to a directory where files can be made"
        )
        .into())
    }

    fn within(place: &Path, user: Option<u32>) -> io::Result<Self> {
        remove_stale(place);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_nanos());
        let directory = place.join(format!("{PREFIX}{}.{now:x}", std::process::id()));
        DirBuilder::new().mode(0o700).create(&directory)?;
        let bind = || {
            let socket = UnixDatagram::bind(directory.join(SOCKET))?;
            setsockopt(&socket, sockopt::PassCred, &true)?;
            Ok(socket)
        };
        match bind() {
            Ok(socket) => Ok(Self { socket, directory, user }),
            Err(error) => {
                let _ = fs::remove_dir_all(&directory);
                Err(error)
            }
        }
    }

    /// For $NOTIFY_SOCKET.
    pub(super) fn path(&self) -> PathBuf {
        self.directory.join(SOCKET)
    }

    /// The next message of process `pid` and its descriptors; `None` if there is none now.
    pub(super) fn next(&self, pid: Pid) -> io::Result<Option<(String, Received)>> {
        let mut buffer = [0; MESSAGE_BYTES];
        loop {
            let received = match sys::receive(self.socket.as_fd(), &mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                received => received?,
            };
            let is_server = received.sender.is_some_and(|(sender, uid)| {
                sender == pid && (uid == getuid().as_raw() || Some(uid) == self.user)
            });
            if !is_server {
                let sender = received.sender.map_or(0, |(pid, _)| pid.as_raw());
                log::warn!("ignored a notification of process {sender}: it is not the server");
                continue;
            }
            // The text is used even so: what it names is what was lost.
            let text = String::from_utf8_lossy(&buffer[..received.bytes]).into_owned();
            return Ok(Some((text, received)));
        }
    }
}

impl AsFd for Keeper {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.directory) {
            log::warn!("cannot remove {:?}: {error}", self.directory);
        }
    }
}

/// Removes the directories of supervisors that were killed. What fails can stay.
fn remove_stale(place: &Path) {
    let Ok(entries) = fs::read_dir(place) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        let ours = entry.file_name().as_encoded_bytes().starts_with(PREFIX.as_bytes())
            && entry
                .metadata()
                .is_ok_and(|metadata| metadata.is_dir() && metadata.uid() == geteuid().as_raw());
        // A socket that is bound takes a connection, also that of a supervisor of another pid namespace.
        let is_dead = || {
            let socket = UnixDatagram::unbound()?;
            socket.connect(path.join(SOCKET))
        };
        if ours && is_dead().is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused) {
            let _ = fs::remove_file(path.join(SOCKET)).and_then(|()| fs::remove_dir(&path));
        }
    }
}

/// Directories in which no other user can replace what this process makes, the best first.
fn places() -> Vec<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let runtime = variable("RUNTIME_DIRECTORY");
    let first = runtime.iter().flat_map(std::env::split_paths).next();
    let mut places: Vec<_> = first.into_iter().collect();
    places.extend(variable("XDG_RUNTIME_DIR").map(PathBuf::from));
    places.extend(variable("TMPDIR").map(PathBuf::from));
    places.extend(["/run", "/tmp"].map(PathBuf::from));
    places
}
