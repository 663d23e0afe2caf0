// SPDX-License-Identifier: GPL-2.0-or-later
//! The memory layout that C sees. The comments are those of the C header.
//!
//! The `cfg`s are never set for rustc: cbindgen turns them into `#if !defined(…)`, so that the
//! header uses QEMU's own definitions where these came first.

#![forbid(unsafe_code)]

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::mem::offset_of;

/// The version of the protocol. It is the first message that a client is sent.
#[cfg(not(protocol_version_is_qemus))]
pub const IVSHMEM_PROTOCOL_VERSION: i32 = 0;

/// The largest number of vectors that a peer can have in this API.
pub const IVSHMEM_SERVER_MAX_VECTORS: usize = 64;

/// A vector of a peer: an eventfd. Writing to it interrupts the peer.
#[cfg(not(event_notifier_is_qemus))]
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct EventNotifier {
    /// The eventfd, to read from; -1 if there is none.
    pub rfd: c_int,
    /// The eventfd, to write to; the same descriptor.
    pub wfd: c_int,
    /// Whether there is one.
    pub initialized: bool,
}

/// One end of a backward link in the list of peers.
#[cfg(not(tail_queue_is_qemus))]
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct IvshmemServerTailLink {
    /// The next peer, or NULL.
    pub tql_next: *mut c_void,
    /// The link that points here; in a list's head, the last link.
    pub tql_prev: *mut IvshmemServerTailLink,
}

/// What QEMU calls a QTailQLink; it is QEMU's own where that was defined before.
#[cfg(not(tail_queue_is_qemus))]
pub type IvshmemServerLink = IvshmemServerTailLink;

/// A peer's place in the list: what QTAILQ_ENTRY of QEMU's queue.h makes.
#[derive(Clone, Copy)]
#[repr(C)]
pub union IvshmemServerPeerEntry {
    /// The next peer, or NULL.
    pub tqe_next: *mut IvshmemServerPeer,
    /// The link, for walking backward.
    pub tqe_circ: IvshmemServerLink,
}

/// The list of peers: what QTAILQ_HEAD of QEMU's queue.h makes. QEMU's macros work on it.
#[derive(Clone, Copy)]
#[repr(C)]
pub union IvshmemServerPeerList {
    /// The first peer, or NULL.
    pub tqh_first: *mut IvshmemServerPeer,
    /// The link, for walking backward.
    pub tqh_circ: IvshmemServerLink,
}

/// A client that is connected.
///
/// It belongs to the library: read it, but do not write it, close its descriptors or free it. It
/// stays until the ivshmem_server_handle_fds() or ivshmem_server_dispatch() that removes the
/// client, or until ivshmem_server_close().
#[repr(C)]
pub struct IvshmemServerPeer {
    /// Its place in the list.
    pub next: IvshmemServerPeerEntry,
    /// The connection.
    pub sock_fd: c_int,
    /// Its id, 0 to 65535.
    pub id: i64,
    /// Its vectors.
    pub vectors: [EventNotifier; IVSHMEM_SERVER_MAX_VECTORS],
    /// How many vectors it has.
    pub vectors_count: c_uint,
}

/// A server.
///
/// The library knows a server by the address of its structure, so the structure must not move
/// while the server runs.
///
/// The fields that ivshmem_server_init() sets may be changed until ivshmem_server_start(), and
/// `verbose` also later, in the thread that serves. Which thread may read which field when:
/// - `unix_sock_path`, `shm_path`, `use_shm_open`, `shm_size`, `n_vectors`: any thread, at any
///   time after ivshmem_server_init(). The library only reads them.
/// - `sock_fd`, `shm_fd`: any thread, but not while another thread is in ivshmem_server_start()
///   or ivshmem_server_close(), which write them.
/// - `cur_id`, `peer_list` and the peers: as above, and not while another thread is in
///   ivshmem_server_handle_fds() or ivshmem_server_dispatch() either.
#[repr(C)]
pub struct IvshmemServer {
    /// Path of the UNIX socket.
    pub unix_sock_path: [c_char; 4096],
    /// The listening socket; -1 while the server does not run.
    pub sock_fd: c_int,
    /// Name of the POSIX shared memory, or directory of its file.
    pub shm_path: [c_char; 4096],
    /// Whether shm_path is a name, and not a directory.
    pub use_shm_open: bool,
    /// Size of the shared memory in bytes, before it is rounded up.
    pub shm_size: usize,
    /// The shared memory; -1 while the server does not run.
    pub shm_fd: c_int,
    /// Vectors of each peer.
    pub n_vectors: c_uint,
    /// The id that the next client gets.
    pub cur_id: u16,
    /// Whether to print joins, departures and the like to stdout.
    pub verbose: bool,
    /// The peers, in the order in which they joined.
    pub peer_list: IvshmemServerPeerList,
}

/// What programs that were compiled with QEMU's header rely on (x86-64 and every other LP64).
#[cfg(target_pointer_width = "64")]
const _: () = {
    assert!(size_of::<EventNotifier>() == 12);
    assert!(offset_of!(EventNotifier, rfd) == 0);
    assert!(offset_of!(EventNotifier, wfd) == 4);
    assert!(offset_of!(EventNotifier, initialized) == 8);

    assert!(size_of::<IvshmemServerLink>() == 16);
    assert!(offset_of!(IvshmemServerLink, tql_next) == 0);
    assert!(offset_of!(IvshmemServerLink, tql_prev) == 8);

    assert!(size_of::<IvshmemServerPeer>() == 808);
    assert!(offset_of!(IvshmemServerPeer, next) == 0);
    assert!(offset_of!(IvshmemServerPeer, sock_fd) == 16);
    assert!(offset_of!(IvshmemServerPeer, id) == 24);
    assert!(offset_of!(IvshmemServerPeer, vectors) == 32);
    assert!(offset_of!(IvshmemServerPeer, vectors_count) == 800);

    assert!(size_of::<IvshmemServer>() == 8240);
    assert!(offset_of!(IvshmemServer, unix_sock_path) == 0);
    assert!(offset_of!(IvshmemServer, sock_fd) == 4096);
    assert!(offset_of!(IvshmemServer, shm_path) == 4100);
    assert!(offset_of!(IvshmemServer, use_shm_open) == 8196);
    assert!(offset_of!(IvshmemServer, shm_size) == 8200);
    assert!(offset_of!(IvshmemServer, shm_fd) == 8208);
    assert!(offset_of!(IvshmemServer, n_vectors) == 8212);
    assert!(offset_of!(IvshmemServer, cur_id) == 8216);
    assert!(offset_of!(IvshmemServer, verbose) == 8218);
    assert!(offset_of!(IvshmemServer, peer_list) == 8224);
};

const _: () = assert!(IVSHMEM_PROTOCOL_VERSION as i64 == ivshmem::PROTOCOL_VERSION);
