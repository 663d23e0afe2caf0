// SPDX-License-Identifier: GPL-2.0-or-later
//! A keeper for tests: it does for a server what a service manager does, in the test's own thread.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::collections::BTreeMap;
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ivshmem::Keeper;
use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

/// How long anything may take that is waited for.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Receives one message with descriptors. None if there is none now, or at the end of the stream.
pub(crate) fn receive(socket: RawFd) -> Option<(String, Vec<OwnedFd>)> {
    let mut buffer = [0; 4096];
    let mut space = cmsg_space!([RawFd; 253]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let mut part = [IoSliceMut::new(&mut buffer)];
    let received = match recvmsg::<()>(socket, &mut part, Some(&mut space), flags) {
        Err(Errno::EAGAIN) => return None,
        result => result.expect("a message"),
    };
    let mut fds = Vec::new();
    for control in received.cmsgs().expect("the space is large enough") {
        if let ControlMessageOwned::ScmRights(numbers) = control {
            // SAFETY: the kernel made these descriptors in this call, and nothing else owns
            // them.
            fds.extend(numbers.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    let bytes = received.bytes;
    let text = String::from_utf8_lossy(&buffer[..bytes]).into_owned();
    (bytes > 0).then_some((text, fds))
}

/// What a service manager does for a server.
pub(crate) struct Holder {
    pub(crate) socket: UnixDatagram,
    path: PathBuf,
    pub(crate) stored: BTreeMap<String, Vec<OwnedFd>>,
}

impl Holder {
    pub(crate) fn new(directory: &Path) -> Self {
        let path = directory.join("notify");
        let socket = UnixDatagram::bind(&path).expect("the place is new");
        socket.set_nonblocking(true).expect("a socket");
        Self { socket, path, stored: BTreeMap::new() }
    }

    /// Handles the messages that have come.
    pub(crate) fn update(&mut self) {
        while let Some((text, fds)) = receive(self.socket.as_raw_fd()) {
            let lines: Vec<&str> = text.lines().collect();
            let name = lines.iter().find_map(|line| line.strip_prefix("FDNAME="));
            if lines.contains(&"FDSTORE=1") {
                assert!(lines.contains(&"FDPOLL=0"), "{text:?}");
                let name = name.expect("each descriptor has a name");
                assert!(name.len() <= 5, "{name:?}");
                self.stored.entry(name.to_owned()).or_default().extend(fds);
            } else if lines.contains(&"FDSTOREREMOVE=1") {
                self.stored.remove(name.expect("it says which"));
            }
        }
    }

    pub(crate) fn copies(&self) -> Vec<OwnedFd> {
        // Not in the order in which they were stored.
        let all = self.stored.values().rev().flatten();
        all.map(|fd| fd.try_clone().expect("a descriptor")).collect()
    }

    pub(crate) fn len(&self) -> usize {
        self.stored.values().map(Vec::len).sum()
    }

    pub(crate) fn keeper(&self, capacity: u64) -> Keeper {
        Keeper::new(&self.path, capacity, self.copies()).expect("the socket is there")
    }
}
