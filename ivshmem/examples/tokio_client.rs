// SPDX-License-Identifier: GPL-2.0-or-later
//! The same service for guests as `client.rs`, in a tokio runtime: when vector 0 is interrupted, it
//! adds 1 to the 32-bit number at offset 0 of the memory, and interrupts all peers.
//!
//! `cargo run --example tokio_client --features tokio -- /tmp/ivshmem_socket`

use std::sync::atomic::Ordering;

use ivshmem::AsyncClient;
use ivshmem::client::{Error, Event};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    let path = std::env::args().nth(1).unwrap_or("/tmp/ivshmem_socket".into());
    let mut client = AsyncClient::connect(&path).await?;
    println!("peer {}, {} bytes of memory", client.get_ref().id(), client.get_ref().memory().len());
    loop {
        match client.next_event().await? {
            Event::Rung { vector: 0, .. } => {
                let client = client.get_ref();
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
