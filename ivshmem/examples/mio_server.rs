// SPDX-License-Identifier: GPL-2.0-or-later
//! A server in a loop by mio, beside a timer and the end of stdin, which ends it.
//!
//! `cargo run --example mio_server -- /tmp/ivshmem_socket`

use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use ivshmem::Server;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};

const SERVER: Token = Token(0);
const STDIN: Token = Token(1);
const SECOND: Duration = Duration::from_secs(1);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).unwrap_or("/tmp/ivshmem_socket".into());
    let mut server = Server::builder().socket_path(&path).vectors(2).start()?;
    println!("listening at {path}");

    let mut poll = Poll::new()?;
    let registry = poll.registry();
    registry.register(&mut SourceFd(&server.as_raw_fd()), SERVER, Interest::READABLE)?;
    registry.register(&mut SourceFd(&0), STDIN, Interest::READABLE)?;
    let mut ready = Events::with_capacity(16);
    let mut tick = Instant::now();
    loop {
        // mio reports changes only. So the loop does not wait while the server has work left, and
        // dispatches once in each turn: an inner loop of dispatches could keep it for ever.
        let left = tick.saturating_duration_since(Instant::now());
        let timeout = if server.is_ready() { Duration::ZERO } else { left };
        match poll.poll(&mut ready, Some(timeout)) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            result => result?,
        }
        if ready.iter().any(|event| event.token() == STDIN && event.is_read_closed()) {
            return Ok(());
        }
        for event in server.dispatch()? {
            println!("{event:?}");
        }
        if Instant::now() >= tick {
            println!("tick: {} peers", server.peers().len());
            tick += SECOND;
        }
    }
}
