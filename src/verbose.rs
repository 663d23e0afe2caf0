// SPDX-License-Identifier: GPL-2.0-or-later
//! The verbose lines of the reference server. Scripts search for them, so they stay as they are.
//!
//! The C library and the program `ivshmem-server` both compile this file. It only makes text: it
//! must not know where the text goes, nor whether somebody wants it.

#![forbid(unsafe_code)]

use std::ffi::OsStr;
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;

use ivshmem::Event;

/// One line.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Line<'a> {
    /// The shared memory is the POSIX object of this name.
    PosixMemory(&'a OsStr),
    /// The shared memory is a file in this directory.
    DirectoryMemory(&'a OsStr),
    /// The socket with this path is about to be made.
    Bind(&'a OsStr),
    /// A connection was accepted. This is its descriptor.
    Accepted(RawFd),
    /// A client was admitted with this id.
    NewPeer(u16),
    /// The client with this id was removed.
    FreePeer(u16),
    /// The server is about to close.
    Close,
}

impl Line<'_> {
    /// The text, without a newline. Paths and names are in it byte for byte.
    pub(crate) fn text(self) -> Vec<u8> {
        let path = |text: &str, path: &OsStr| [text.as_bytes(), path.as_bytes()].concat();
        match self {
            Self::PosixMemory(name) => path("Using POSIX shared memory: ", name),
            Self::DirectoryMemory(directory) => {
                path("Using file-backed shared memory: ", directory)
            }
            Self::Bind(socket) => path("create & bind socket ", socket),
            Self::Accepted(socket) => format!("accept()={socket}").into_bytes(),
            Self::NewPeer(id) => format!("new peer id = {id}").into_bytes(),
            Self::FreePeer(id) => format!("free peer {id}").into_bytes(),
            Self::Close => b"close server".to_vec(),
        }
    }
}

/// The lines for an event, in order. The reference has lines for joins and departures only.
pub(crate) fn lines_of(event: &Event) -> impl Iterator<Item = Line<'static>> {
    let (first, second) = match *event {
        Event::Joined { id, socket, .. } => (Some(Line::Accepted(socket)), Some(Line::NewPeer(id))),
        Event::Left { id, .. } => (Some(Line::FreePeer(id)), None),
        _ => (None, None),
    };
    first.into_iter().chain(second)
}
