// SPDX-License-Identifier: GPL-2.0-or-later
//! The clients, read by one thread that takes whatever comes as it comes.
//!
//! While the server sends, such a reader is awake nearly all the time, so the figures are of
//! sending; `apart` has the readers that sleep.

use std::io::{self, BufRead};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::book::{self, Book, SILENCE, answer};
use crate::process::Failure;
use crate::sys::{self, Wait};

struct Client {
    socket: UnixStream,
    book: Book,
}

struct Crowd<'a> {
    path: &'a Path,
    vectors: u64,
    epoll: Epoll,
    clients: Vec<Client>,
    got: u64,
}

/// Does what the lines of stdin say: `one N` joins N clients one after another, each when the
/// one before it is complete; `all N` joins N at once. Answers with a line of figures each.
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
        // What the newest have been told of, the oldest may still have to read.
        let complete = complete && crowd.read_until(|crowd| crowd.got == crowd.expected())?;
        let took = start.elapsed();
        let times: Vec<_> =
            crowd.clients[first..].iter().filter_map(|client| client.book.complete).collect();
        let lost = if complete { 0 } else { crowd.expected() - crowd.got };
        answer(crowd.got - before, lost, took, times)?;
    }
    Ok(())
}

impl Crowd<'_> {
    /// Messages that all clients together must have read when all is quiet.
    fn expected(&self) -> u64 {
        book::expected(self.clients.len() as u64, self.vectors)
    }

    fn one_after_another(&mut self, count: usize) -> Result<bool, Failure> {
        for _ in 0..count {
            self.connect()?;
            let newest = self.clients.len() - 1;
            if !self.read_until(|crowd| crowd.clients[newest].book.complete.is_some())? {
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
            while crowd.clients.get(next).is_some_and(|client| client.book.complete.is_some()) {
                next += 1;
            }
            next == crowd.clients.len()
        })
    }

    /// Connects one more. A door that is not there yet, or is full, is waited for.
    fn connect(&mut self) -> Result<(), Failure> {
        let started = Instant::now();
        let socket = book::connect(self.path)?;
        let event = EpollEvent::new(EpollFlags::EPOLLIN, self.clients.len() as u64);
        self.epoll.add(&socket, event)?;
        self.clients.push(Client { socket, book: Book::new(started) });
        Ok(())
    }

    /// Reads until `done`; false when nothing comes any more.
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

    /// Reads what has come for one client.
    fn read(&mut self, index: usize) -> Result<(), Failure> {
        let vectors = self.vectors;
        let client = &mut self.clients[index];
        loop {
            let message = match sys::receive(client.socket.as_fd(), Wait::No) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                result => result?,
            };
            client.book.note(&message, vectors)?;
            self.got += 1;
        }
    }
}
