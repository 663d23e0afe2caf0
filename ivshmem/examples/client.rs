// SPDX-License-Identifier: GPL-2.0-or-later
//! A service for guests: when vector 0 is interrupted, it adds 1 to the 32-bit number at offset 0
//! of the memory, and interrupts all peers.
//!
//! `cargo run --example client -- /tmp/ivshmem_socket`

use std::sync::atomic::Ordering;

use ivshmem::client::{Client, Event};

fn main() -> Result<(), ivshmem::client::Error> {
    let path = std::env::args().nth(1).unwrap_or("/tmp/ivshmem_socket".into());
    let mut client = Client::connect(&path)?;
    println!("peer {}, {} bytes of memory", client.id(), client.memory().len());
    loop {
        for event in client.wait(None)? {
            match event {
                Event::Rung { vector: 0, .. } => {
                    let number = client.memory().atomic_u32(0)?.fetch_add(1, Ordering::AcqRel) + 1;
                    println!("interrupted; the number is {number}");
                    client.ring_all()?;
                }
                Event::Joined { peer, .. } => println!("{peer} joined"),
                Event::Left { peer } => println!("{peer} left"),
                Event::Disconnected { reason } if reason.is_closed() => return Ok(()),
                Event::Disconnected { reason } => return Err(reason),
                _ => {}
            }
        }
    }
}
