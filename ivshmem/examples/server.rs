// SPDX-License-Identifier: GPL-2.0-or-later
//! A whole server: `cargo run --example server -- /tmp/ivshmem_socket`
use ivshmem::{MemorySource, Server};

fn main() -> Result<(), ivshmem::Error> {
    let path = std::env::args().nth(1).unwrap_or("/tmp/ivshmem_socket".into());
    let mut server = Server::builder()
        .socket_path(&path)
        .memory(MemorySource::Sealed)
        .size(4 << 20)
        .vectors(2)
        .start()?;
    println!("listening at {path}");
    server.run()
}
