// SPDX-License-Identifier: GPL-2.0-or-later
//! A server for QEMU's `ivshmem-doorbell` devices, for production.
//!
//! Virtual machines on one host share memory and interrupt each other through it. Every QEMU
//! connects to the server's UNIX socket and gets the shared memory and everybody's eventfds;
//! from then on the guests ring each other without the server.

pub mod capi;
pub mod client;
mod error;
mod listener;
mod memory;
mod roster;
mod server;
mod sys;
mod wire;

pub use client::Client;
pub use error::Error;
pub use memory::MemorySource;
pub use server::{Builder, Credentials, Event, Peer, Refusal, Server, Stopper};
pub use wire::PROTOCOL_VERSION;

/// The largest number of vectors that a peer can have: MSI-X has no more.
pub const MAX_VECTORS: u32 = 2048;
