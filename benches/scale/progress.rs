// SPDX-License-Identifier: GPL-2.0-or-later
//! The messages that a client has received, checked one by one; and the figures of all clients.
//!
//! The clients run in their own process, so that the server's CPU time includes nothing of them, and
//! the same readers serve the floor and each server. No client leaves, so each client must receive
//! the ids 0, 1, 2, … in this order, each once per vector and each time with a descriptor. So each
//! message can be checked by counting.

#![forbid(unsafe_code)]

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::process::Failure;
use crate::sys::{self, Received};

/// If nothing comes for this time, the missing messages count as lost.
pub(crate) const SILENCE: Duration = Duration::from_secs(10);

/// The number of messages before the vectors: version, id, memory.
const GREETING: u64 = 3;

/// The number of messages that `clients` clients together must read.
pub(crate) fn expected(clients: u64, vectors: u64) -> u64 {
    clients * (GREETING + clients * vectors)
}

/// Times since a client began to connect.
#[derive(Clone, Copy)]
pub(crate) struct Times {
    /// Until the memory came.
    greeted: Duration,
    /// Until the last of its own vectors came.
    complete: Duration,
}

/// The messages that one client has received so far.
pub(crate) struct Progress {
    started: Instant,
    id: u64,
    got: u64,
    /// The time until the memory came. A QEMU is blocked until then.
    greeted: Duration,
    /// The times, once the last of its own vectors has come.
    pub(crate) complete: Option<Times>,
}

impl Progress {
    pub(crate) fn new(started: Instant) -> Self {
        Self { started, id: 0, got: 0, greeted: Duration::ZERO, complete: None }
    }

    /// Checks the next message.
    pub(crate) fn check(&mut self, message: &Received, vectors: u64) -> Result<(), Failure> {
        if message.bytes != sys::MESSAGE {
            return Err(format!("a message has 8 bytes, not {}", message.bytes).into());
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
        if self.got == GREETING {
            self.greeted = self.started.elapsed();
        }
        if self.complete.is_none() && self.got == GREETING + (self.id + 1) * vectors {
            let complete = self.started.elapsed();
            self.complete = Some(Times { greeted: self.greeted, complete });
        }
        Ok(())
    }
}

/// Connects a client. Waits if the listener does not exist yet or its backlog is full.
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

/// Prints the figures of one line.
pub(crate) fn answer(
    messages: u64,
    lost: u64,
    took: Duration,
    times: Vec<Times>,
) -> Result<(), Failure> {
    let sorted = |of: fn(&Times) -> Duration| {
        let mut times: Vec<Duration> = times.iter().map(of).collect();
        times.sort_unstable();
        times
    };
    let complete = sorted(|times| times.complete);
    let greeted = sorted(|times| times.greeted);
    let at = |times: &[Duration], part: f64| {
        let time = times.get((times.len() as f64 * part) as usize);
        time.map_or(0.0, Duration::as_secs_f64)
    };
    println!(
        "messages {messages} lost {lost} seconds {} median {} p99 {} greeted {} longest {}",
        took.as_secs_f64(),
        at(&complete, 0.5),
        at(&complete, 0.99),
        at(&greeted, 0.5),
        greeted.last().map_or(0.0, Duration::as_secs_f64),
    );
    Ok(io::stdout().flush()?)
}
