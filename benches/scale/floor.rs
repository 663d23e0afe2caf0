// SPDX-License-Identifier: GPL-2.0-or-later
//! The kernel's floor: a server whose measured time is only its sends.
//!
//! It sends the same messages to the same clients in the same order, from headers prepared
//! beforehand. Its clock runs only while it sends: accepting, making eventfds and waiting are not
//! counted. It sends either with one `sendmsg` per message, or with one `sendmmsg` per batch to
//! one socket.

use std::io::{self, BufRead, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime};

use crate::process::Failure;
use crate::sys::Run;

/// The most messages in a batch: slightly fewer than a socket of the default size holds.
const RUN: usize = 256;

/// How the floor sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    /// One call per message.
    Sendmsg,
    /// One call per batch of messages to one socket.
    Sendmmsg,
}

impl How {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Sendmsg => "sendmsg",
            Self::Sendmmsg => "sendmmsg",
        }
    }

    pub(crate) fn from_name(name: &str) -> Option<Self> {
        [Self::Sendmsg, Self::Sendmmsg].into_iter().find(|how| how.name() == name)
    }
}

struct Floor {
    how: How,
    vectors: usize,
    run: Run,
    clients: Vec<UnixStream>,
    /// The eventfds of all clients, in the order in which they are sent.
    eventfds: Vec<EventFd>,
    cpu: Duration,
    /// CPU time of the current broadcast that was spent waiting for a writable socket.
    waited: Duration,
}

/// Reads the same lines from stdin as the crowd. Answers each with its CPU time.
pub(crate) fn run(path: &Path, vectors: u32, how: How) -> Result<(), Failure> {
    let listener = UnixListener::bind(path)?;
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(4096)?)?;
    let run = Run::new(RUN);
    let vectors = vectors as usize;
    let mut floor = Floor {
        how,
        vectors,
        run,
        clients: Vec::new(),
        eventfds: Vec::new(),
        cpu: Duration::ZERO,
        waited: Duration::ZERO,
    };
    for line in io::stdin().lock().lines() {
        let line = line?;
        let (how, count) = line.split_once(' ').ok_or("a line is `one N` or `all N`")?;
        let count: usize = count.parse()?;
        let turns = if how == "one" { count } else { 1 };
        floor.cpu = Duration::ZERO;
        for _ in 0..turns {
            let first = floor.clients.len();
            for _ in 0..count / turns {
                floor.clients.push(listener.accept()?.0);
                for _ in 0..vectors {
                    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
                    floor.eventfds.push(EventFd::from_flags(flags)?);
                }
            }
            floor.send_new_clients(first)?;
        }
        println!("cpu {}", floor.cpu.as_nanos());
        io::stdout().flush()?;
    }
    Ok(())
}

/// The CPU time of this process, which has one thread.
fn now() -> nix::Result<Duration> {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(|time: TimeSpec| time.into())
}

impl Floor {
    /// Sends the clients from index `first` on to the earlier clients, and then all clients to the
    /// new ones.
    fn send_new_clients(&mut self, first: usize) -> Result<(), Failure> {
        let start = now()?;
        self.waited = Duration::ZERO;
        let all = self.clients.len() * self.vectors;
        for index in 0..first {
            self.send_vectors(index, first * self.vectors, all)?;
        }
        for index in first..self.clients.len() {
            self.greet(index)?;
            self.send_vectors(index, 0, all)?;
        }
        self.cpu += now()? - start - self.waited;
        Ok(())
    }

    fn greet(&mut self, index: usize) -> Result<(), Failure> {
        let mut socket = &self.clients[index];
        socket.write_all(&0_i64.to_le_bytes())?;
        socket.write_all(&(index as i64).to_le_bytes())?;
        self.run.set(0, -1, self.eventfds[0].as_raw_fd());
        self.run.send_one(socket.as_raw_fd(), 0)?;
        Ok(())
    }

    /// Sends one client the eventfds `from..to`.
    fn send_vectors(&mut self, index: usize, mut from: usize, to: usize) -> Result<(), Failure> {
        let socket = self.clients[index].as_raw_fd();
        while from < to {
            let count = (to - from).min(self.run.len());
            for n in 0..count {
                let vector = from + n;
                let fd = self.eventfds[vector].as_raw_fd();
                self.run.set(n, (vector / self.vectors) as i64, fd);
            }
            let sent = match self.how {
                How::Sendmmsg => self.run.send_run(socket, count),
                How::Sendmsg => {
                    let mut result = Ok(count);
                    for n in 0..count {
                        if let Err(error) = self.run.send_one(socket, n) {
                            result = if n == 0 { Err(error) } else { Ok(n) };
                            break;
                        }
                    }
                    result
                }
            };
            match sent {
                Ok(sent) => from += sent,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let stopped = now()?;
                    let room = PollFd::new(self.clients[index].as_fd(), PollFlags::POLLOUT);
                    poll(&mut [room], PollTimeout::NONE)?;
                    self.waited += now()? - stopped;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}
