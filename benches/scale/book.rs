// SPDX-License-Identifier: GPL-2.0-or-later
//! What a client has heard, checked as it comes; and what the process of the clients says of it.
//!
//! The clients are a process of their own so that the server's CPU is the server's, and so that
//! floor and servers are read by the very same reader. Nobody leaves here, so every client has
//! to hear of 0, 1, 2, …, each as often as there are vectors, each time with a descriptor; then
//! each message can be checked by counting.

#![forbid(unsafe_code)]

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::process::Failure;
use crate::sys::{self, Received};

/// With nothing read for so long, what has not come is lost.
pub(crate) const SILENCE: Duration = Duration::from_secs(10);

/// Version, id, memory.
const GREETING: u64 = 3;

/// Messages that so many clients together must have read when all is quiet.
pub(crate) fn expected(clients: u64, vectors: u64) -> u64 {
    clients * (GREETING + clients * vectors)
}

/// What one client has heard.
pub(crate) struct Book {
    started: Instant,
    id: u64,
    got: u64,
    /// How long it took until the last of its own vectors had come.
    pub(crate) complete: Option<Duration>,
}

impl Book {
    pub(crate) fn new(started: Instant) -> Self {
        Self { started, id: 0, got: 0, complete: None }
    }

    /// Checks the next message.
    pub(crate) fn note(&mut self, message: &Received, vectors: u64) -> Result<(), Failure> {
        if message.bytes != sys::MESSAGE {
            return Err(format!("{} bytes are no message", message.bytes).into());
        }
        let wanted = match self.got {
            0 => (0, false),
            1 => (message.value, false),
            2 => (-1, true),
            n => (((n - GREETING) / vectors) as i64, true),
        };
        if (message.value, message.fd.is_some()) != wanted {
            return Err(format!(
                "client {}: message {} is {} (descriptor: {}), not {}",
                self.id,
                self.got,
                message.value,
                message.fd.is_some(),
                wanted.0
            )
            .into());
        }
        if self.got == 1 {
            self.id = u64::try_from(message.value)?;
        }
        self.got += 1;
        if self.complete.is_none() && self.got == GREETING + (self.id + 1) * vectors {
            self.complete = Some(self.started.elapsed());
        }
        Ok(())
    }
}

/// Connects. A door that is not there yet, or is full, is waited for.
pub(crate) fn connect(path: &Path) -> Result<UnixStream, Failure> {
    let started = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Ok(socket) => return Ok(socket),
            Err(error) if started.elapsed() > SILENCE => {
                return Err(format!("cannot connect to {path:?}: {error}").into());
            }
            Err(_) => thread::sleep(Duration::from_millis(1)),
        }
    }
}

/// Says what came of a line.
pub(crate) fn answer(
    messages: u64,
    lost: u64,
    took: Duration,
    mut times: Vec<Duration>,
) -> Result<(), Failure> {
    times.sort_unstable();
    let at = |part: f64| {
        let time = times.get((times.len() as f64 * part) as usize);
        time.map_or(0.0, Duration::as_secs_f64)
    };
    println!(
        "messages {messages} lost {lost} seconds {} median {} p99 {}",
        took.as_secs_f64(),
        at(0.5),
        at(0.99),
    );
    Ok(io::stdout().flush()?)
}
