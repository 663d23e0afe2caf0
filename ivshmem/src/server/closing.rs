// SPDX-License-Identifier: GPL-2.0-or-later
//! Closes connections without ever waiting.
//!
//! `close(2)` can sleep for as long as a client likes: if data is unread that the client sent,
//! and with it the last descriptor of a TCP socket with `SO_LINGER` and unsent data. Since Linux
//! 6.16 a socket can refuse descriptors (`SO_PASSRIGHTS`); the listener does, and each connection
//! inherits that. On older kernels, and for connections that waited at a socket of the caller's,
//! a connection with unread data is closed by a thread of its own. This is the only place where
//! the library starts a thread. The server reads nothing from clients, so to receive the
//! descriptors is no way out: a UNIX socket among them can hold more of them.

#![forbid(unsafe_code)]

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use nix::sys::signal::{SigSet, SigmaskHow};

use super::connection::has_unread;

/// The threads that may sleep in close(2) at the same time. More connections stay open until one
/// of these ends.
const THREADS: usize = 64;

#[derive(Debug)]
pub(super) struct Closer {
    /// The kernel refuses descriptors from clients.
    is_safe: bool,
    sleeping: Arc<AtomicUsize>,
    parked: Vec<UnixStream>,
}

impl Closer {
    pub(super) fn new(is_safe: bool) -> Self {
        Self { is_safe, sleeping: Arc::default(), parked: Vec::new() }
    }

    /// Connections that are still open because too many threads sleep.
    pub(super) fn parked(&self) -> usize {
        self.parked.len()
    }

    /// Closes a connection on which both directions are shut down, or that is refused.
    pub(super) fn close(&mut self, socket: UnixStream) {
        if self.is_safe {
            return;
        }
        // After this the client can send nothing more.
        let _ = socket.shutdown(std::net::Shutdown::Both);
        if has_unread(&socket) {
            self.parked.push(socket);
        }
        while self.sleeping.load(Ordering::Relaxed) < THREADS {
            let Some(socket) = self.parked.pop() else { return };
            if let Err(socket) = self.close_apart(socket) {
                self.parked.push(socket);
                return;
            }
        }
    }

    /// Closes a connection in a thread. Fails with the connection if no thread can be started.
    fn close_apart(&self, socket: UnixStream) -> Result<(), UnixStream> {
        let sleeping = Arc::clone(&self.sleeping);
        // The closure is dropped, and the socket closed, if the thread cannot be started. So the
        // socket is passed only once the thread runs.
        let (pass, passed) = std::sync::mpsc::sync_channel::<UnixStream>(1);
        sleeping.fetch_add(1, Ordering::Relaxed);
        let count = Arc::clone(&sleeping);
        // The thread inherits the mask: signals are for the threads of the caller. A call that fails
        // leaves the mask as it is.
        let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK);
        let started = thread::Builder::new()
            .name("ivshmem-close".into())
            .stack_size(64 << 10)
            .spawn(move || {
                drop(passed.recv());
                count.fetch_sub(1, Ordering::Relaxed);
            });
        if let Ok(before) = before {
            let _ = before.thread_set_mask();
        }
        match started {
            Ok(_) => pass.send(socket).map_err(|error| error.0),
            Err(_) => {
                sleeping.fetch_sub(1, Ordering::Relaxed);
                Err(socket)
            }
        }
    }
}

impl Drop for Closer {
    fn drop(&mut self) {
        for socket in std::mem::take(&mut self.parked) {
            if let Err(socket) = self.close_apart(socket) {
                // Better one descriptor too many than a caller that sleeps.
                std::mem::forget(socket);
            }
        }
    }
}
