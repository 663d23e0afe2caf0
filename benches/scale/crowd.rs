// SPDX-License-Identifier: GPL-2.0-or-later
//! The clients, all read by one thread.
//!
//! While the server sends, this thread is awake nearly all the time, so the server's figures show
//! the cost of sending without waking readers. `thread_per_client` has sleeping readers.

use std::io::{self, BufRead};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::process::Failure;
use crate::progress::{self, Progress, SILENCE, answer};
use crate::sys::{self, Wait};

struct Client {
    socket: UnixStream,
    progress: Progress,
}

struct Crowd<'a> {
    path: &'a Path,
    vectors: u64,
    epoll: Epoll,
    clients: Vec<Client>,
    got: u64,
}

/// Executes the lines of stdin. `one N` connects N clients one after another, each when the previous
/// one is complete. `all N` connects N clients at once. Answers each line with a line of figures.
pub(crate) fn run(path: &Path, vectors: u32) -> Result<(), Failure> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let mut crowd = Crowd { path, vectors: u64::from(vectors), epoll, clients: Vec::new(), got: 0 };
    for line in io::stdin().lock().lines() {
        let line = line?;
        let (how, count) = line.split_once(' ').ok_or("a line is `one N` or `all N`")?;
        let count: usize = count.parse()?;
        let first = crowd.clients.len();
        let before = crowd.got;
        let start = Instant::now();
        let complete = match how {
            "one" => crowd.one_after_another(count)?,
            _ => crowd.all_at_once(count)?,
        };
        // The earlier clients may still have to read the newest ones.
        let complete = complete && crowd.read_until(|crowd| crowd.got == crowd.expected())?;
        let took = start.elapsed();
        let times: Vec<_> =
            crowd.clients[first..].iter().filter_map(|client| client.progress.complete).collect();
        let lost = if complete { 0 } else { crowd.expected() - crowd.got };
        answer(crowd.got - before, lost, took, times)?;
    }
    Ok(())
}

impl Crowd<'_> {
    /// The number of messages that all clients together must read.
    fn expected(&self) -> u64 {
        progress::expected(self.clients.len() as u64, self.vectors)
    }

    fn one_after_another(&mut self, count: usize) -> Result<bool, Failure> {
        for _ in 0..count {
            self.connect()?;
            let newest = self.clients.len() - 1;
            if !self.read_until(|crowd| crowd.clients[newest].progress.complete.is_some())? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn all_at_once(&mut self, count: usize) -> Result<bool, Failure> {
        let first = self.clients.len();
        for _ in 0..count {
            self.connect()?;
        }
        let mut next = first;
        self.read_until(|crowd| {
            while crowd.clients.get(next).is_some_and(|client| client.progress.complete.is_some()) {
                next += 1;
            }
            next == crowd.clients.len()
        })
    }

    /// Connects one more client. Waits if the listener does not exist yet or its backlog is full.
    fn connect(&mut self) -> Result<(), Failure> {
        let started = Instant::now();
        let socket = progress::connect(self.path)?;
        let event = EpollEvent::new(EpollFlags::EPOLLIN, self.clients.len() as u64);
        self.epoll.add(&socket, event)?;
        self.clients.push(Client { socket, progress: Progress::new(started) });
        Ok(())
    }

    /// Reads until `done` returns true. Returns false if nothing comes any more.
    fn read_until(&mut self, mut done: impl FnMut(&Self) -> bool) -> Result<bool, Failure> {
        let mut ready = vec![EpollEvent::empty(); 256];
        while !done(self) {
            let count = self.epoll.wait(&mut ready, EpollTimeout::try_from(SILENCE)?)?;
            if count == 0 {
                return Ok(false);
            }
            for event in &ready[..count] {
                self.read(event.data() as usize)?;
            }
        }
        Ok(true)
    }

    /// Reads all available messages of one client.
    fn read(&mut self, index: usize) -> Result<(), Failure> {
        let vectors = self.vectors;
        let client = &mut self.clients[index];
        loop {
            let message = match sys::receive(client.socket.as_fd(), Wait::No) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                result => result?,
            };
            client.progress.check(&message, vectors)?;
            self.got += 1;
        }
    }
}
