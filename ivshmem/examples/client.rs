// SPDX-License-Identifier: GPL-2.0-or-later
//! A service for guests: whoever rings vector 0 finds the 32-bit number at offset 0 one larger,
//! and everybody is rung.
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
                    println!("rung; the number is {number}");
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
