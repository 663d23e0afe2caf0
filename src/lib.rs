// SPDX-License-Identifier: GPL-2.0-or-later
//! The C API: the seven functions of QEMU's `contrib/ivshmem-server/ivshmem-server.h`, with its
//! names and its memory layout, so that C code written for that one links with this library
//! unchanged. `include/ivshmem-server.h` is made of this module by cbindgen.
//!
//! It is a thin skin on [`Server`](ivshmem::Server), which knows nothing of it. A Rust program
//! has no use for it.
//!
//! # Where the server is
//! The C structure is the caller's: it may be scribbled on, copied, or cease to be. So nothing
//! in it is ever believed while a server runs. What runs is kept in a table of this process, by
//! the structure's address; the structure and its list of peers are only written, for the
//! caller to read. Two things are read: at start, what is to be started; and `verbose`, always.
//!
//! # Why select is enough
//! The descriptor of the server itself goes into the caller's `fd_set`, besides those that the
//! caller expects. It is an epoll instance, so it is *readable* also when a client's full
//! socket has room again, when a timer ran out, and when something happens at a descriptor that
//! is too large for an `fd_set`.
//!
//! # What it does not do
//! Nothing runs at the end of the process: a parent that forked (as `daemon(3)` does) may
//! `exit` without harm to its child's server.

mod abi;
mod fdset;
mod functions;
mod list;
mod registry;
mod report;
mod state;

pub use abi::{
    EventNotifier, IVSHMEM_PROTOCOL_VERSION, IVSHMEM_SERVER_MAX_VECTORS, IvshmemServer,
    IvshmemServerLink, IvshmemServerPeer, IvshmemServerPeerEntry, IvshmemServerPeerList,
    IvshmemServerTailLink,
};
pub use functions::{
    ivshmem_server_close, ivshmem_server_dump, ivshmem_server_get_fds, ivshmem_server_handle_fds,
    ivshmem_server_init, ivshmem_server_search_peer, ivshmem_server_start,
};
