// SPDX-License-Identifier: GPL-2.0-or-later
//! A server in tokio's loop, beside whatever else is in it: here, the end of stdin ends it.
//!
//! `cargo run --example tokio_server -- /tmp/ivshmem_socket`

use std::os::fd::AsFd;

use ivshmem::Server;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).unwrap_or("/tmp/ivshmem_socket".into());
    let server = Server::builder().socket_path(&path).vectors(2).start()?;
    println!("listening at {path}");
    tokio::select! {
        ended = serve(server) => ended,
        ended = tokio::task::spawn_blocking(end_of_stdin) => Ok(ended??),
    }
}

/// Serves for ever. Dropped, the server is closed.
async fn serve(mut server: Server) -> Result<(), Box<dyn std::error::Error>> {
    // The server is one descriptor: readable when there is something to do.
    let descriptor = server.as_fd().try_clone_to_owned()?;
    // What newer versions have instead is an unsafe function, which asks that the descriptor
    // stay open: it does, being owned.
    #[allow(deprecated)]
    let ready = AsyncFd::with_interest(descriptor, Interest::READABLE)?;
    loop {
        ready.readable().await?.clear_ready();
        // `dispatch` never waits. tokio tells of a change only, so go on until nothing is left.
        while server.is_ready() {
            for event in server.dispatch()? {
                println!("{event:?}");
            }
        }
    }
}

fn end_of_stdin() -> std::io::Result<()> {
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).map(drop)
}
