// SPDX-License-Identifier: GPL-2.0-or-later
//! The library's client with the server program, with a server in C, with many peers, and with a guest of stock QEMU.

// Only common::peer has unsafe code: for descriptors and bytes that were received. Every other module forbids it.
#![deny(unsafe_code)]

#[path = "../common/mod.rs"]
mod common;

mod connecting;
mod memory;
mod peers;
mod vectors;

use std::time::Instant;

use ivshmem::client::{Client, Event};

use crate::common::PATIENCE;

/// Waits for the next events.
#[track_caller]
fn next(client: &mut Client) -> Vec<Event> {
    let events = client.wait(Some(PATIENCE)).expect("it can wait");
    assert!(!events.is_empty(), "nothing happened within {PATIENCE:?}");
    events
}

/// Waits for an event that `looked_for` accepts, and skips the others.
#[track_caller]
fn until(client: &mut Client, what: &str, looked_for: impl Fn(&Event) -> bool) {
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        if next(client).iter().any(&looked_for) {
            return;
        }
    }
    panic!("not within {PATIENCE:?}: {what}");
}
