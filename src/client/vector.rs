// SPDX-License-Identifier: GPL-2.0-or-later
//! The two ends of an interrupt: a doorbell to ring, and a vector to wait on.
//!
//! Both are an eventfd, shared with whoever else was given it, and so is its `O_NONBLOCK`. It
//! should be set, and is set here, but anybody can clear it, and QEMU does, on each that it
//! receives, for a moment. So nothing here relies on it to look at a vector.

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::{SFlag, fstat};
use nix::unistd;

use super::Error;
use crate::sys;

/// A vector of a peer, to be rung. It may be cloned, and moved to another thread.
///
/// It stays good to ring after its peer has left; nobody hears it then.
///
/// ```
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("socket");
/// # let mut server = ivshmem_server::Server::builder().socket_path(&path).vectors(2).start()?;
/// # let stopper = server.stopper()?;
/// # let serving = std::thread::spawn(move || server.run());
/// # let client = ivshmem_server::Client::connect(&path)?;
/// # let peer = client.id();
/// let doorbell = client.doorbell(peer, 1)?;
/// std::thread::spawn(move || doorbell.ring()).join().expect("no panic")?;
/// assert_eq!(client.vector(1)?.take()?, 1);
/// # stopper.stop();
/// # serving.join().unwrap()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Doorbell(Arc<OwnedFd>);

impl Doorbell {
    /// Takes a descriptor that came as a vector, if it is an eventfd. None if it is not.
    pub(super) fn new(fd: OwnedFd) -> nix::Result<Option<Self>> {
        // To write to what is no eventfd could block for ever, or raise a signal. No file,
        // pipe or socket has a mode without a type, but an eventfd has.
        if fstat(&fd)?.st_mode & SFlag::S_IFMT.bits() != 0 {
            return Ok(None);
        }
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        if !flags.contains(OFlag::O_NONBLOCK) {
            fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        }
        Ok(Some(Self(Arc::new(fd))))
    }

    /// Interrupts the peer. It is one `write(2)`.
    ///
    /// It would wait only for a peer that made its own eventfd a blocking one and filled it up
    /// (2^64 - 2 rings, or one write of that number): the kernel knows no other way to write it.
    ///
    /// # Errors
    /// [`Error::System`] when the descriptor cannot be written to, which an eventfd always can.
    pub fn ring(&self) -> Result<(), Error> {
        match unistd::write(&*self.0, &1u64.to_ne_bytes()) {
            Ok(_) => Ok(()),
            // Nobody takes what was rung, and 2^64 - 2 of it is there: one more is not missed.
            Err(Errno::EAGAIN) => Ok(()),
            Err(errno) => Err(Error::System { action: "ring a doorbell", source: errno.into() }),
        }
    }
}

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The longest that a wait looks before it sleeps, if it is not said.
const SPIN: Duration = Duration::from_micros(20);

/// A vector of the client's own, to wait on: the fast way, for one vector, and if need be in
/// a thread of its own. Made by [`Client::vector`](super::Client::vector).
///
/// What is rung is seen once: by this, or by [`Client::wait`](super::Client::wait), or by
/// another `Vector` of the same number, whichever looks first.
///
/// # What a wait costs
/// A wait that sleeps is two system calls, `poll(2)` and `preadv2(2)`, and being woken. Most of
/// the time goes into the latter, so a wait first looks (reads) for up to 20 µs, as long as
/// that is worth while: each time that it was in vain, twice as many of the waits that follow
/// sleep at once, up to 1,024. [`spin`](Self::spin) says how long, 0 for never.
///
/// ```
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("socket");
/// # let mut server = ivshmem_server::Server::builder().socket_path(&path).start()?;
/// # let stopper = server.stopper()?;
/// # let serving = std::thread::spawn(move || server.run());
/// use std::time::Duration;
/// use ivshmem_server::Client;
///
/// let client = Client::connect(&path)?;
/// let mut vector = client.vector(0)?;
/// let waiting = std::thread::spawn(move || vector.wait(Some(Duration::from_secs(10))));
/// client.ring(client.id(), 0)?;
/// assert_eq!(waiting.join().unwrap()?, Some(1));
/// # stopper.stop();
/// # serving.join().unwrap()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Vector {
    eventfd: Doorbell,
    number: u32,
    /// The longest that a wait looks before it sleeps.
    longest: Duration,
    /// Waits that are to sleep at once.
    sleepy: u32,
    /// What `sleepy` becomes when looking is in vain once more.
    penalty: u32,
}

/// The most waits that sleep at once before another one looks.
const MOST_SLEEPY: u32 = 1024;

impl Vector {
    pub(super) fn new(eventfd: Doorbell, number: u32) -> Self {
        Self { eventfd, number, longest: SPIN, sleepy: 0, penalty: 1 }
    }

    /// Its number, from 0.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Looks for `longest` before it sleeps, where that is worth while; 0 is never.
    pub fn spin(mut self, longest: Duration) -> Self {
        self.longest = longest;
        self
    }

    /// How often it was rung since it was last looked at, without waiting; 0 if it was not.
    ///
    /// # Errors
    /// [`Error::System`] when the descriptor cannot be read, which an eventfd always can.
    pub fn take(&self) -> Result<u64, Error> {
        take(&self.eventfd)
    }

    /// Waits until it is rung, and returns how often it was; none if it was not within
    /// `timeout`, which is rounded up to milliseconds. No timeout is no limit.
    ///
    /// # Errors
    /// As [`take`](Self::take); a signal is none.
    pub fn wait(&mut self, timeout: Option<Duration>) -> Result<Option<u64>, Error> {
        let start = Instant::now();
        if self.longest.is_zero() {
        } else if self.sleepy > 0 {
            self.sleepy -= 1;
        } else {
            loop {
                let count = self.take()?;
                if count > 0 {
                    self.penalty = 1;
                    return Ok(Some(count));
                }
                if start.elapsed() >= self.longest {
                    break;
                }
            }
            self.sleepy = self.penalty;
            self.penalty = MOST_SLEEPY.min(2 * self.penalty);
        }
        loop {
            let left = timeout.map(|timeout| timeout.saturating_sub(start.elapsed()));
            let mut fds = [PollFd::new(self.eventfd.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, milliseconds(left)) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => {
                    return Err(Error::System { action: "wait on a vector", source: errno.into() });
                }
            }
            let count = self.take()?;
            if count > 0 {
                return Ok(Some(count));
            }
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(None);
            }
        }
    }
}

impl AsFd for Vector {
    /// Readable when it was rung. Read it by [`take`](Vector::take).
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }
}

/// How often an eventfd was written to; 0 if it was not.
pub(super) fn take(eventfd: &Doorbell) -> Result<u64, Error> {
    sys::take_count(eventfd.as_fd())
        .map_err(|source| Error::System { action: "read a vector", source })
}

/// A time as poll(2) wants it, rounded up.
pub(super) fn milliseconds(time: Option<Duration>) -> PollTimeout {
    time.map_or(PollTimeout::NONE, |time| {
        PollTimeout::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(PollTimeout::MAX)
    })
}
