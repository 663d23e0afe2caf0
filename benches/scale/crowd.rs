// SPDX-License-Identifier: GPL-2.0-or-later
//! The clients: one process that joins, reads whatever comes as it comes, and checks it.
//!
//! It is a process of its own so that the server's CPU is the server's, and so that floor and
//! servers are read by the very same reader. Nobody leaves here, so every client has to hear
//! of 0, 1, 2, …, each as often as there are vectors, each time with a descriptor; then each
//! message can be checked by counting.

use std::io::{self, BufRead, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::process::Failure;
use crate::sys;

/// With nothing read for so long, what has not come is lost.
const SILENCE: Duration = Duration::from_secs(3);

/// Version, id, memory.
const GREETING: u64 = 3;

struct Client {
    socket: UnixStream,
    started: Instant,
    id: u64,
    got: u64,
    complete: Option<Duration>,
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
        let mut times: Vec<Duration> =
            crowd.clients[first..].iter().filter_map(|client| client.complete).collect();
        times.sort_unstable();
        let at = |part: f64| times.get(((times.len() as f64 * part) as usize).min(times.len() - 1));
        println!(
            "messages {} lost {} seconds {} median {} p99 {}",
            crowd.got - before,
            if complete { 0 } else { crowd.expected() - crowd.got },
            took.as_secs_f64(),
            at(0.5).map_or(0.0, Duration::as_secs_f64),
            at(0.99).map_or(0.0, Duration::as_secs_f64),
        );
        io::stdout().flush()?;
    }
    Ok(())
}

impl Crowd<'_> {
    /// Messages that all clients together must have read when all is quiet.
    fn expected(&self) -> u64 {
        let clients = self.clients.len() as u64;
        clients * (GREETING + clients * self.vectors)
    }

    fn one_after_another(&mut self, count: usize) -> Result<bool, Failure> {
        for _ in 0..count {
            self.connect()?;
            let newest = self.clients.len() - 1;
            if !self.read_until(|crowd| crowd.clients[newest].complete.is_some())? {
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
            while crowd.clients.get(next).is_some_and(|client| client.complete.is_some()) {
                next += 1;
            }
            next == crowd.clients.len()
        })
    }

    /// Connects one more. A door that is not there yet, or is full, is waited for.
    fn connect(&mut self) -> Result<(), Failure> {
        let started = Instant::now();
        let socket = loop {
            match UnixStream::connect(self.path) {
                Ok(socket) => break socket,
                Err(error) if started.elapsed() > SILENCE => {
                    return Err(format!("cannot connect to {:?}: {error}", self.path).into());
                }
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
        };
        let event = EpollEvent::new(EpollFlags::EPOLLIN, self.clients.len() as u64);
        self.epoll.add(&socket, event)?;
        self.clients.push(Client { socket, started, id: 0, got: 0, complete: None });
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
            let message = match sys::receive(client.socket.as_fd()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                result => result?,
            };
            if message.bytes != sys::MESSAGE {
                return Err(format!("{} bytes are no message", message.bytes).into());
            }
            let wanted = match client.got {
                0 => (0, false),
                1 => (message.value, false),
                2 => (-1, true),
                n => (((n - GREETING) / vectors) as i64, true),
            };
            if (message.value, message.fd.is_some()) != wanted {
                return Err(format!(
                    "client {}: message {} is {} (descriptor: {}), not {}",
                    client.id,
                    client.got,
                    message.value,
                    message.fd.is_some(),
                    wanted.0
                )
                .into());
            }
            if client.got == 1 {
                client.id = u64::try_from(message.value)?;
            }
            client.got += 1;
            self.got += 1;
            if client.complete.is_none() && client.got == GREETING + (client.id + 1) * vectors {
                client.complete = Some(client.started.elapsed());
            }
        }
    }
}
