// SPDX-License-Identifier: GPL-2.0-or-later
//! A server in a tokio runtime, beside a timer and the end of stdin, which ends it.
//!
//! `cargo run --example tokio_server --features tokio -- /tmp/ivshmem_socket`

use std::time::Duration;

use ivshmem::{AsyncServer, Server};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).unwrap_or("/tmp/ivshmem_socket".into());
    let server = Server::builder().socket_path(&path).vectors(2).start()?;
    let mut server = AsyncServer::new(server)?;
    println!("listening at {path}");

    let mut second = tokio::time::interval(Duration::from_secs(1));
    let mut end = tokio::task::spawn_blocking(wait_for_end_of_stdin);
    loop {
        tokio::select! {
            event = server.next_event() => println!("{:?}", event?),
            _ = second.tick() => println!("tick: {} peers", server.get_ref().peers().len()),
            ended = &mut end => return Ok(ended??),
        }
    }
}

fn wait_for_end_of_stdin() -> std::io::Result<()> {
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).map(drop)
}
