// SPDX-License-Identifier: GPL-2.0-or-later
//! A server for QEMU's `ivshmem-doorbell` devices, for production, and a client for programs of the
//! host.
//!
//! Virtual machines on one host share memory and interrupt each other through it. Each QEMU
//! connects to the server's UNIX socket. It gets the shared memory, and one eventfd for each
//! vector of each peer. From then on the guests interrupt each other without the server. A program
//! of the host can be a peer too: that is a [`Client`].
//!
//! # A server
//! ```
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path().join("socket");
//! use ivshmem::{MemorySource, Server};
//!
//! let mut server = Server::builder()
//!     .socket_path(&path)              // every process that can write to it may attach
//!     .memory(MemorySource::Sealed)    // no client can shrink the memory
//!     .size(4 << 20)
//!     .vectors(2)                      // interrupt vectors of each peer
//!     .start()?;
//! # server.stopper()?.stop();
//! server.run()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//! A QEMU attaches with `-chardev socket,path=PATH,id=ID -device
//! ivshmem-doorbell,vectors=2,chardev=ID`. In the guest, the device is the PCI device 1af4:1110.
//! BAR 0 has the guest's own id at offset 8, and the doorbell at offset 12: the guest writes
//! `peer << 16 | vector` there, with 32 bits. BAR 2 is the memory.
//!
//! # A client
//! ```
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path().join("socket");
//! # let mut server = ivshmem::Server::builder().socket_path(&path).start()?;
//! # let stopper = server.stopper()?;
//! # let serving = std::thread::spawn(move || server.run());
//! use std::time::Duration;
//! use ivshmem::client::{Client, Event};
//!
//! let mut client = Client::connect(&path)?;
//! client.memory().write(0, b"for all peers")?;
//! client.ring_all()?;
//! # client.ring(client.id(), 0)?;
//! for event in client.wait(Some(Duration::from_secs(1)))? {
//!     match event {
//!         Event::Joined { peer, .. } => client.ring(peer, 0)?,
//!         Event::Rung { vector, .. } => println!("interrupted on vector {vector}"),
//!         other => println!("{other:?}"),
//!     }
//! }
//! # stopper.stop();
//! # serving.join().unwrap()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//! The module [`client`] has more: doorbells and vectors for other threads, and what a hostile
//! server can do.
//!
//! # In an event loop
//! A [`Server`] and a [`Client`] are one pollable descriptor each ([`AsFd`](std::os::fd::AsFd)).
//! When it is readable, `dispatch` does what there is to do, and returns what happened. It never
//! waits. A level-triggered loop (poll, select, calloop, glib) needs no more than that:
//! ```
//! # use std::os::fd::AsFd;
//! # use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path().join("socket");
//! # let mut server = ivshmem::Server::builder().socket_path(&path).start()?;
//! # let _client = std::os::unix::net::UnixStream::connect(&path)?;
//! use ivshmem::Event;
//!
//! poll(&mut [PollFd::new(server.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE)?;
//! for event in server.dispatch()? {
//!     match event {
//!         Event::Joined { id, .. } => println!("{id} joined"),
//!         Event::Left { id, reason, .. } => println!("{id} left: {reason}"),
//!         Event::Refused { reason, .. } => println!("refused: {reason}"),
//!         other => println!("{other:?}"),
//!     }
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//! A loop that reports changes only (edge-triggered, such as mio) dispatches until `is_ready` is
//! false, and serves its other descriptors and timers between two dispatches:
//! `examples/mio_server.rs` is a whole program. Without that, a client that connects and closes
//! without end keeps the loop for ever.
//!
//! For tokio the feature `tokio` has `AsyncServer` and `AsyncClient`, which do all this:
//! `examples/tokio_server.rs` and `examples/tokio_client.rs`.
//!
//! # Restarts
//! A server with a [`Keeper`] can be killed, restarted or upgraded while clients are connected: the
//! next one goes on with the same connections, ids, eventfds and memory, and no client notices.
//! The keeper is systemd's file descriptor store, or another process that speaks its protocol.
//! ```
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path().join("socket");
//! use ivshmem::{Keeper, Server};
//!
//! let mut builder = Server::builder().socket_path(&path);
//! if let Some(keeper) = Keeper::from_environment()? {
//!     builder = builder.keeper(keeper);
//! }
//! let server = builder.start()?;
//! // At SIGTERM: the next server goes on. A drop would end the service for good.
//! server.hand_over();
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What it does not do
//! The library installs no signal handler, changes no limit, and prints nothing. It starts no
//! thread but one: on kernels before Linux 6.16, and with a listener that the caller gives, it
//! closes connections that have unread data.
//! It logs through the crate `log`. (`AsyncClient::connect` uses a thread of tokio's.) A server
//! needs one descriptor for each client, and one for each vector of each client. For many clients,
//! raise the limit `RLIMIT_NOFILE`.
//!
//! # Requirements
//! The library depends on libc, log, nix and thiserror only; with the feature `tokio`, also on
//! tokio. Rust 1.85 or newer, Linux with glibc.

pub mod client;
#[doc(hidden)]
pub mod directory;
mod error;
mod keeper;
mod listener;
mod lock_file;
mod memory;
mod protocol;
mod server;
mod sys;
#[cfg(feature = "tokio")]
mod tokio;

pub use client::Client;
pub use error::{Chain, Error, ErrorKind};
pub use keeper::{Keeper, inherited_listener};
pub use listener::{Error as ListenerError, PathListener};
pub use memory::{Error as MemoryError, MemorySource};
pub use protocol::{MAX_VECTORS, PROTOCOL_VERSION};
pub use server::{
    Applicant, Builder, Credentials, Event, LeaveReason, Peer, Refusal, Server, Stats, Stopper,
};
#[cfg(feature = "tokio")]
pub use tokio::{AsyncClient, AsyncServer};

// The examples of the README are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
