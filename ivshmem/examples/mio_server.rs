// SPDX-License-Identifier: GPL-2.0-or-later
//! A server in a loop by mio, beside whatever else is in it: here, the end of stdin ends it.
//!
//! `cargo run --example mio_server -- /tmp/ivshmem_socket`

use std::os::fd::{AsFd, AsRawFd};

use ivshmem::{Event, Server};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};

const SERVER: Token = Token(0);
const STDIN: Token = Token(1);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).unwrap_or("/tmp/ivshmem_socket".into());
    let mut server = Server::builder().socket_path(&path).vectors(2).start()?;
    println!("listening at {path}");

    let mut poll = Poll::new()?;
    let registry = poll.registry();
    registry.register(&mut SourceFd(&server.as_fd().as_raw_fd()), SERVER, Interest::READABLE)?;
    registry.register(&mut SourceFd(&0), STDIN, Interest::READABLE)?;
    let mut ready = Events::with_capacity(16);
    loop {
        poll.poll(&mut ready, None)?;
        for event in &ready {
            match event.token() {
                SERVER => serve(&mut server)?,
                _ if event.is_read_closed() => return Ok(()),
                _ => {}
            }
        }
    }
}

/// Does what there is to do. mio tells of a change only, so it goes on until nothing is left.
fn serve(server: &mut Server) -> Result<(), ivshmem::Error> {
    while server.is_ready() {
        for event in server.dispatch()? {
            match event {
                Event::Joined { id, .. } => println!("{id} joined"),
                Event::Left { id, .. } => println!("{id} left"),
                other => println!("{other:?}"),
            }
        }
    }
    Ok(())
}
