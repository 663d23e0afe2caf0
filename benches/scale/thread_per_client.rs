// SPDX-License-Identifier: GPL-2.0-or-later
//! The clients, each read by its own thread, which sleeps until a message comes.
//!
//! This is like virtual machines, which are separate processes. A message to a sleeping client must
//! wake it, which costs the server as much as the message itself. So this measurement shows the
//! benefit of broadcasting simultaneous joins together.

#![forbid(unsafe_code)]

use std::io::{self, BufRead};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::process::Failure;
use crate::progress::{self, Progress, SILENCE, Times, answer};
use crate::sys::{self, Wait};

/// The number of messages that all threads together have read.
static GOT: AtomicU64 = AtomicU64::new(0);

/// The stack size of a client's thread.
const STACK: usize = 64 << 10;

/// As `crowd::run`.
pub(crate) fn run(path: &Path, vectors: u32) -> Result<(), Failure> {
    let vectors = u64::from(vectors);
    let (completed, complete) = channel();
    let mut clients = 0;
    for line in io::stdin().lock().lines() {
        let line = line?;
        let (how, count) = line.split_once(' ').ok_or("a line is `one N` or `all N`")?;
        let count: usize = count.parse()?;
        let before = GOT.load(Ordering::Relaxed);
        let start = Instant::now();
        let mut times = Vec::new();
        if how == "one" {
            for _ in 0..count {
                let started = Instant::now();
                read(progress::connect(path)?, started, vectors, &completed)?;
                if !await_one(&complete, &mut times)? {
                    break;
                }
            }
        } else {
            let mut sockets = Vec::new();
            for _ in 0..count {
                sockets.push((Instant::now(), progress::connect(path)?));
            }
            for (started, socket) in sockets {
                read(socket, started, vectors, &completed)?;
            }
            while times.len() < count && await_one(&complete, &mut times)? {}
        }
        clients += count as u64;
        let expected = progress::expected(clients, vectors);
        let got = await_rest(expected);
        answer(got - before, expected - got, start.elapsed(), times)?;
    }
    Ok(())
}

/// Starts the reader thread of a client, which reports when the client is complete.
fn read(
    socket: UnixStream,
    started: Instant,
    vectors: u64,
    completed: &Sender<Times>,
) -> Result<(), Failure> {
    let completed = completed.clone();
    let mut progress = Progress::new(started);
    thread::Builder::new().stack_size(STACK).spawn(move || {
        let mut reported = false;
        // At the end of the stream a message has no bytes: the server has ended.
        while let Ok(message) = sys::receive(socket.as_fd(), Wait::Yes) {
            if message.bytes == 0 {
                return;
            }
            if let Err(error) = progress.check(&message, vectors) {
                eprintln!("scale: {error}");
                return;
            }
            drop(message);
            GOT.fetch_add(1, Ordering::Relaxed);
            if let (false, Some(time)) = (reported, progress.complete) {
                reported = true;
                let _ = completed.send(time);
            }
        }
    })?;
    Ok(())
}

/// Waits until one more client is complete. Returns false if none is complete for a long time.
fn await_one(complete: &Receiver<Times>, times: &mut Vec<Times>) -> Result<bool, Failure> {
    match complete.recv_timeout(SILENCE) {
        Ok(time) => {
            times.push(time);
            Ok(true)
        }
        Err(_) => Ok(false),
    }
}

/// Waits until `expected` messages have come, or until nothing comes any more. Returns how many
/// came.
fn await_rest(expected: u64) -> u64 {
    let mut before = 0;
    let mut since = Instant::now();
    loop {
        let got = GOT.load(Ordering::Relaxed);
        if got > before {
            (before, since) = (got, Instant::now());
        }
        if got >= expected || since.elapsed() > SILENCE {
            return got;
        }
        thread::sleep(Duration::from_millis(1));
    }
}
