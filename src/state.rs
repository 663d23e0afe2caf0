// SPDX-License-Identifier: GPL-2.0-or-later
//! A running server, and the copy of its state in the C structure.

use std::collections::HashMap;
use std::ffi::{CStr, OsString, c_char, c_int};
use std::mem::{Discriminant, discriminant};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use nix::errno::Errno;

use super::abi::{IVSHMEM_SERVER_MAX_VECTORS, IvshmemServer, IvshmemServerPeer};
use super::fdset::FdSet;
use super::list::{self, List};
use super::report::{self, Failure, RateLimit, say};
use super::verbose::{self, Line};
use ivshmem::{Chain, Event, MemorySource, Refusal, Server};

/// A server that runs. Dropped, it is closed, and the structure is left as it is.
#[derive(Debug)]
pub(super) struct State {
    server: Server,
    list: List,
    /// The server's descriptor and the clients', as far as they fit. The listening socket
    /// comes and goes by itself.
    watched: FdSet,
    /// Rate limits of the lines about refused clients: a client can connect as often as it likes.
    refusals: HashMap<Discriminant<Refusal>, RateLimit>,
}

/// Whether the caller wants verbose lines.
///
/// # Safety
/// `server` is valid for reads.
pub(super) unsafe fn is_verbose(server: *const IvshmemServer) -> bool {
    // SAFETY: the caller vouches for the structure. Read as a byte, since C may have written
    // one that is no Rust `bool`.
    unsafe { (&raw const (*server).verbose).cast::<u8>().read() != 0 }
}

/// The string in the array of the structure that has this name.
///
/// # Safety
/// `array` is valid for reads.
unsafe fn string_in(array: *const [c_char; 4096], name: &str) -> Result<Vec<u8>, Failure> {
    // SAFETY: the caller vouches for the array, and a `c_char` has the layout of a `u8`.
    let bytes = unsafe { array.cast::<[u8; 4096]>().read() };
    let string = CStr::from_bytes_until_nul(&bytes).map_err(|_| {
        let text = format!("{name} has no NUL; it must be a string of at most 4095 bytes");
        Failure::new(Errno::ENAMETOOLONG, text)
    })?;
    Ok(string.to_bytes().to_vec())
}

/// Shows that no server runs: no descriptors, no peers.
///
/// # Safety
/// `server` is valid for writes.
pub(super) unsafe fn write_closed(server: *mut IvshmemServer) {
    // SAFETY: the caller vouches for the structure.
    unsafe {
        (&raw mut (*server).sock_fd).write(-1);
        (&raw mut (*server).shm_fd).write(-1);
        list::write_empty(server);
    }
}

impl State {
    /// Starts the server that the structure configures, and updates the structure.
    ///
    /// # Safety
    /// `server` is valid for reads and writes, and was initialised.
    pub(super) unsafe fn start(server: *mut IvshmemServer) -> Result<Self, Failure> {
        // SAFETY: the caller vouches for the structure. The bool is read as a byte, as C may
        // have written one that is no Rust `bool`.
        let (socket, memory, is_name, size, vectors, first_id, verbose) = unsafe {
            (
                string_in(&raw const (*server).unix_sock_path, "unix_sock_path")?,
                string_in(&raw const (*server).shm_path, "shm_path")?,
                (&raw const (*server).use_shm_open).cast::<u8>().read() != 0,
                (&raw const (*server).shm_size).read(),
                (&raw const (*server).n_vectors).read(),
                (&raw const (*server).cur_id).read(),
                is_verbose(server),
            )
        };
        check_vectors(vectors)?;
        let say = |line: Line<'_>| {
            if verbose {
                say(line.text());
            }
        };
        let memory = OsString::from_vec(memory);
        let source = if is_name {
            say(Line::PosixMemory(&memory));
            MemorySource::Posix(memory)
        } else {
            say(Line::DirectoryMemory(&memory));
            MemorySource::Directory(memory.into())
        };
        let socket = OsString::from_vec(socket);
        say(Line::Bind(&socket));
        let started = Server::builder()
            .socket_path(PathBuf::from(socket))
            .memory(source)
            .size(size as u64)
            .vectors(vectors)
            .first_id(first_id)
            .selectable()
            .start();
        let running = started.map_err(|error| {
            if verbose {
                report::say(format!("cannot start: {}", Chain(&error)));
            }
            Failure::from(&error)
        })?;

        let mut watched = FdSet::new();
        watched.add(running.as_fd().as_raw_fd());
        // SAFETY: the caller vouches for the structure.
        unsafe {
            list::write_empty(server);
            (&raw mut (*server).sock_fd).write(running.listener().as_raw_fd());
            (&raw mut (*server).shm_fd).write(running.memory().as_raw_fd());
        }
        Ok(Self { server: running, list: List::default(), watched, refusals: HashMap::new() })
    }

    /// Whether the structure still shows this server, as far as the library writes it.
    ///
    /// # Safety
    /// `server` is valid for reads; what is there may be anything.
    pub(super) unsafe fn is_shown_by(&self, server: *mut IvshmemServer) -> bool {
        // SAFETY: the caller vouches for the structure. The read is volatile because the memory
        // may hold other data, about which the compiler must assume nothing.
        unsafe {
            (&raw const (*server).sock_fd).read_volatile() == self.server.listener().as_raw_fd()
                && (&raw const (*server).shm_fd).read_volatile() == self.server.memory().as_raw_fd()
                && self.list.is_headed_by(server)
        }
    }

    /// The descriptors that are to be watched for reading.
    pub(super) fn descriptors(&self) -> FdSet {
        let mut all = self.watched.clone();
        // While no descriptor is left to accept with, it would wake the caller for nothing.
        if self.server.is_listening() {
            all.add(self.server.listener().as_raw_fd());
        }
        all
    }

    /// Whether one of our descriptors is in the set.
    ///
    /// # Safety
    /// `fds` is valid for reads.
    pub(super) unsafe fn is_called(&self, fds: *const libc::fd_set, maxfd: c_int) -> bool {
        // SAFETY: the caller vouches for the set.
        unsafe { self.descriptors().meets(fds, maxfd) }
    }

    /// Does the work that is due, and updates the structure.
    ///
    /// # Safety
    /// `server` is valid for reads and writes, and it is the one that was started.
    pub(super) unsafe fn dispatch(&mut self, server: *mut IvshmemServer) -> Result<(), Failure> {
        let events = self.server.dispatch().map_err(|error| Failure::from(&error))?;
        // SAFETY: the caller vouches for the structure.
        let verbose = unsafe { is_verbose(server) };
        // The ids of the clients that joined in this dispatch and are still here. One that left
        // in the same dispatch is never in the list. Its id may be given again at once, so an
        // id can come more than once.
        let mut joined: Vec<u16> = Vec::new();
        for event in events {
            if verbose {
                verbose::lines_of(&event).for_each(|line| say(line.text()));
            }
            match event {
                Event::Joined { id, .. } => joined.push(id),
                Event::Left { id, .. } => {
                    // The latest of that id: those before it have left. These are the few
                    // clients of one dispatch, not all.
                    if let Some(index) = joined.iter().rposition(|&other| other == id) {
                        joined.remove(index);
                    // SAFETY: the caller vouches for the structure.
                    } else if let Some(socket) = unsafe { self.list.remove(server, id) } {
                        self.watched.remove(socket);
                    }
                }
                Event::Refused { reason, .. } if verbose => {
                    let line = format!("client refused: {}", Chain(&reason));
                    let limit = self.refusals.entry(discriminant(&reason)).or_default();
                    limit.pass(line).into_iter().for_each(say);
                }
                _ => {}
            }
        }
        for peer in joined.into_iter().filter_map(|id| self.server.peer(id)) {
            // SAFETY: the caller vouches for the structure.
            let socket = unsafe { self.list.push(server, &peer) };
            self.watched.add(socket);
        }
        if let Some(next) = self.server.next_id() {
            // SAFETY: the caller vouches for the structure.
            unsafe { (&raw mut (*server).cur_id).write(next) };
        }
        Ok(())
    }

    /// The node of a peer, for C.
    pub(super) fn peer(&self, id: i64) -> Option<*mut IvshmemServerPeer> {
        u16::try_from(id).ok().and_then(|id| self.list.find(id))
    }

    /// Prints the peers and their vectors.
    pub(super) fn dump(&self) {
        for peer in self.server.peers() {
            say(format!("peer_id = {}", peer.id()));
            for (number, vector) in peer.vectors().enumerate() {
                say(format!("  vector {number} is enabled (fd={})", vector.as_raw_fd()));
            }
        }
    }

    /// The server's one descriptor.
    pub(super) fn descriptor(&self) -> c_int {
        self.server.as_raw_fd()
    }

    /// Whether a dispatch has something to do now.
    pub(super) fn is_ready(&self) -> bool {
        self.server.is_ready()
    }

    /// Closes the server. Returns the ids that were connected, in join order.
    pub(super) fn close(self) -> Vec<u16> {
        self.server.peers().map(|peer| peer.id()).collect()
    }
}

/// Checks that peers can have this number of vectors in this API.
pub(super) fn check_vectors(vectors: u32) -> Result<(), Failure> {
    if (1..=IVSHMEM_SERVER_MAX_VECTORS as u32).contains(&vectors) {
        return Ok(());
    }
    let text = format!("n_vectors is {vectors}; it must be 1 to {IVSHMEM_SERVER_MAX_VECTORS}");
    Err(Failure::new(Errno::EINVAL, text))
}
