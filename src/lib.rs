// SPDX-License-Identifier: GPL-2.0-or-later
//! The C API: the seven functions of QEMU's `contrib/ivshmem-server/ivshmem-server.h`, with the
//! same names and memory layout, so that C code written for it links with this library unchanged;
//! and some functions more. cbindgen makes `include/ivshmem-server.h` from this crate.
//!
//! It is a thin layer over [`Server`](ivshmem::Server), which does not know of it. A Rust program
//! uses the package `ivshmem` instead.
//!
//! # Where the server is
//! The C structure is the caller's: the caller can overwrite it, copy it, or free its memory. So
//! the library trusts nothing in it while a server runs. It keeps the running servers in a table,
//! by the address of their structure, and only writes the structure and its list of peers, for
//! the caller to read. It reads the configuration at start, and `verbose`, and nothing else.
//!
//! # Why select is enough
//! The server's own descriptor goes into the caller's `fd_set`, besides those that the caller
//! expects. It is an epoll instance, so it is *readable* also when a client's full socket is
//! writable again, when a timer ran out, and when something happens at a descriptor that is too
//! large for an `fd_set`.
//!
//! # What it does not do
//! It prints nothing by itself (`verbose` and `ivshmem_server_dump` ask for lines on stdout),
//! and installs no signal handler. It starts no thread but one, which closes connections on kernels
//! before Linux 6.16. Nothing runs at the end of the process: a parent that forked (as `daemon(3)`
//! does) may `exit` without harm to its child's server.

mod abi;
mod additions;
mod fdset;
mod functions;
mod list;
mod logging;
mod registry;
mod report;
mod state;
mod verbose;

pub use abi::{
    EventNotifier, IVSHMEM_PROTOCOL_VERSION, IVSHMEM_SERVER_MAX_VECTORS, IvshmemServer,
    IvshmemServerLink, IvshmemServerPeer, IvshmemServerPeerEntry, IvshmemServerPeerList,
    IvshmemServerTailLink,
};
pub use additions::{
    ivshmem_server_dispatch, ivshmem_server_get_fd, ivshmem_server_last_error,
    ivshmem_server_set_log, ivshmem_server_version,
};
pub use functions::{
    ivshmem_server_close, ivshmem_server_dump, ivshmem_server_get_fds, ivshmem_server_handle_fds,
    ivshmem_server_init, ivshmem_server_search_peer, ivshmem_server_start,
};
