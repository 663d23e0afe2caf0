// SPDX-License-Identifier: GPL-2.0-or-later
//! The clients, each read by a thread of its own, which sleeps until something comes.
//!
//! So it is with virtual machines, each of which is a process: telling a client that sleeps is
//! to wake it, and that costs the server as much as the message does. Here is where it shows
//! that those who come together are told of together.

#![forbid(unsafe_code)]

use std::io::{self, BufRead};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::book::{self, Book, SILENCE, Times, answer};
use crate::process::Failure;
use crate::sys::{self, Wait};

/// Messages that all threads together have read.
static GOT: AtomicU64 = AtomicU64::new(0);

/// The thread of a client needs little.
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
                read(book::connect(path)?, started, vectors, &completed)?;
                if !await_one(&complete, &mut times)? {
                    break;
                }
            }
        } else {
            let mut sockets = Vec::new();
            for _ in 0..count {
                sockets.push((Instant::now(), book::connect(path)?));
            }
            for (started, socket) in sockets {
                read(socket, started, vectors, &completed)?;
            }
            while times.len() < count && await_one(&complete, &mut times)? {}
        }
        clients += count as u64;
        let expected = book::expected(clients, vectors);
        let got = await_rest(expected);
        answer(got - before, expected - got, start.elapsed(), times)?;
    }
    Ok(())
}

/// Starts the reader of a client; it says when the client is complete.
fn read(
    socket: UnixStream,
    started: Instant,
    vectors: u64,
    completed: &Sender<Times>,
) -> Result<(), Failure> {
    let completed = completed.clone();
    let mut book = Book::new(started);
    thread::Builder::new().stack_size(STACK).spawn(move || {
        let mut said = false;
        // The end of the stream is a message of no bytes, and so an error: the server ended.
        while let Ok(message) = sys::receive(socket.as_fd(), Wait::Yes) {
            if message.bytes == 0 {
                return;
            }
            if let Err(error) = book.note(&message, vectors) {
                eprintln!("scale: {error}");
                return;
            }
            drop(message);
            GOT.fetch_add(1, Ordering::Relaxed);
            if let (false, Some(time)) = (said, book.complete) {
                said = true;
                let _ = completed.send(time);
            }
        }
    })?;
    Ok(())
}

/// Waits for one more to be complete; false when none is for long.
fn await_one(complete: &Receiver<Times>, times: &mut Vec<Times>) -> Result<bool, Failure> {
    match complete.recv_timeout(SILENCE) {
        Ok(time) => {
            times.push(time);
            Ok(true)
        }
        Err(_) => Ok(false),
    }
}

/// Waits until `expected` messages have come, or nothing comes any more; returns how many came.
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
