// SPDX-License-Identifier: GPL-2.0-or-later
//! The two ends of an interrupt: a doorbell to ring, and a vector to wait on.
//!
//! Both are an eventfd, shared with whoever else was given it, and so is its `O_NONBLOCK`. It
//! should be set, and is set here, but anybody can clear it, and QEMU does, on each that it
//! receives, for a moment. So nothing here relies on it to look at a vector.

#![forbid(unsafe_code)]

use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::stat::{SFlag, fstat};
use nix::unistd;

use super::Error;
use super::untrusted::Untrusted;
use crate::sys;

/// A vector of a peer, to be rung. It may be cloned, and moved to another thread.
///
/// It stays good to ring after its peer has left; nobody hears it then.
///
/// ```
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("socket");
/// # let mut server = ivshmem::Server::builder().socket_path(&path).vectors(2).start()?;
/// # let stopper = server.stopper()?;
/// # let serving = std::thread::spawn(move || server.run());
/// # let client = ivshmem::Client::connect(&path)?;
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
    pub(super) fn new(fd: Untrusted) -> nix::Result<Option<Self>> {
        if !is_eventfd(fd.as_fd())? {
            return Ok(None);
        }
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        if !flags.contains(OFlag::O_NONBLOCK) {
            fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        }
        Ok(Some(Self(Arc::new(fd.keep()))))
    }

    /// Interrupts the peer. A peer that sees the ring also sees what this thread wrote to the
    /// memory before it.
    ///
    /// It is one `write(2)`, and one `fcntl(2)` that checks that the write cannot block: any
    /// process that has the eventfd can fill it (by one write of 2^64 - 2) and make it blocking.
    /// An eventfd that is full counts as rung. One race remains: a process that fills the eventfd
    /// and makes it blocking between these two calls makes `ring` block until the eventfd is read.
    ///
    /// # Errors
    /// [`Error::System`] when the descriptor cannot be written, which an eventfd always can.
    pub fn ring(&self) -> Result<(), Error> {
        // The check is F_GETFL and not poll(2), which costs twice as much: QEMU and attackers make
        // an eventfd blocking, but it nearly always is not.
        let flags = fcntl(&self.0, FcntlArg::F_GETFL).map_err(cannot_ring)?;
        if !OFlag::from_bits_retain(flags).contains(OFlag::O_NONBLOCK) && !self.is_writable()? {
            return Ok(());
        }
        match unistd::write(&*self.0, &1u64.to_ne_bytes()) {
            Ok(_) => Ok(()),
            // It is full: it has been rung, and was not read since.
            Err(Errno::EAGAIN) => Ok(()),
            Err(errno) => Err(cannot_ring(errno)),
        }
    }

    /// Whether a write would not block.
    fn is_writable(&self) -> Result<bool, Error> {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLOUT)];
        loop {
            match poll(&mut fds, PollTimeout::ZERO) {
                Ok(_) => return Ok(fds[0].any().unwrap_or(true)),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(cannot_ring(errno)),
            }
        }
    }
}

/// Whether a descriptor is an eventfd. To write to anything else could block for ever, or raise a
/// signal; to wait for an epoll instance or a timer could return at once for ever.
fn is_eventfd(fd: BorrowedFd<'_>) -> nix::Result<bool> {
    // A file has a path there, which begins with a slash. So no file can have this name.
    match fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())) {
        Ok(name) => Ok(name.as_os_str() == "anon_inode:[eventfd]"),
        // Without /proc it is enough that it is no file, pipe or socket: these have a type.
        Err(_) => Ok(fstat(fd)?.st_mode & SFlag::S_IFMT.bits() == 0),
    }
}

fn cannot_ring(errno: Errno) -> Error {
    Error::System { action: "ring a doorbell", source: errno.into() }
}

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Doorbell {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// The most waits that sleep at once before another one looks.
const MOST_SLEEPY: u32 = 1024;

/// A vector of the client's own, taken out of it to be waited on by itself: the fast way, and
/// if need be in a thread of its own. Made by [`Client::vector`](super::Client::vector).
///
/// While there is one, [`Client::wait`](super::Client::wait) does not tell of this vector;
/// when it is dropped, the client does so again, also of what nobody had seen.
///
/// # What a wait costs
/// A wait that sleeps is one system call and being woken. It does not take the count out of
/// the eventfd, since that would be one more: so it can tell that the vector was rung, and not
/// how often.
///
/// Most of the time goes into being woken. Where a processor can be spared, a wait that first
/// [looks](Self::spin) for a while saves that.
///
/// ```
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("socket");
/// # let mut server = ivshmem::Server::builder().socket_path(&path).start()?;
/// # let stopper = server.stopper()?;
/// # let serving = std::thread::spawn(move || server.run());
/// use std::time::Duration;
/// use ivshmem::Client;
///
/// let client = Client::connect(&path)?;
/// let mut vector = client.vector(0)?;
/// let waiting = std::thread::spawn(move || vector.wait(Some(Duration::from_secs(10))));
/// client.ring(client.id(), 0)?;
/// assert!(waiting.join().expect("no panic")?);
/// # stopper.stop();
/// # serving.join().unwrap()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Vector {
    eventfd: Doorbell,
    number: u32,
    /// The client's, which this vector goes back to.
    home: Arc<Epoll>,
    /// What a wait sleeps on, made by the first: an epoll that tells of each ring once, read or
    /// not (edge-triggered).
    edge: Option<Epoll>,
    /// The longest that a wait looks before it sleeps.
    longest: Duration,
    /// Waits that are to sleep at once.
    sleepy: u32,
    /// What `sleepy` becomes when looking is in vain once more.
    penalty: u32,
}

impl Vector {
    /// Takes a vector out of the client that watches it by `home`.
    pub(super) fn new(eventfd: Doorbell, number: u32, home: Arc<Epoll>) -> Result<Self, Error> {
        match home.delete(&eventfd) {
            Ok(()) => {}
            Err(Errno::ENOENT) => return Err(Error::VectorTaken { vector: number }),
            Err(errno) => return Err(failed(errno)),
        }
        Ok(Self {
            eventfd,
            number,
            home,
            edge: None,
            longest: Duration::ZERO,
            sleepy: 0,
            penalty: 1,
        })
    }

    /// Its number, from 0.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Has each wait look again and again, for `longest` at most, before it sleeps; 0, which it
    /// is if it is not said, is to sleep at once. Some 20 µs are enough for a peer that answers
    /// at once.
    ///
    /// It needs a processor for itself: on one that the peer has to wait for, it is slower. So
    /// each time that it was in vain, twice as many of the waits that follow sleep at once, up
    /// to 1,024.
    pub fn spin(mut self, longest: Duration) -> Self {
        self.longest = longest;
        self
    }

    /// How often it was rung since the last time that this was asked, without waiting. What a
    /// [`wait`](Self::wait) told of counts as well. To wait by asking again and again is
    /// quicker still, and takes a processor.
    ///
    /// # Errors
    /// [`Error::System`] when the descriptor cannot be read, which an eventfd always can.
    pub fn take(&self) -> Result<u64, Error> {
        take(&self.eventfd)
    }

    /// Waits until it is rung; whether it was, within `timeout`, which is rounded up to
    /// milliseconds. No timeout is no limit. What was rung since the last `wait` or
    /// [`take`](Self::take) counts.
    ///
    /// # Errors
    /// [`Error::System`]: at the first wait when no descriptor is left, else for no reason that
    /// is known. A signal is none.
    pub fn wait(&mut self, timeout: Option<Duration>) -> Result<bool, Error> {
        let start = timeout.map(|_| Instant::now());
        let edge = match &mut self.edge {
            Some(edge) => edge,
            edge => edge.insert(watch(&self.eventfd)?),
        };
        if self.longest.is_zero() {
        } else if self.sleepy > 0 {
            self.sleepy -= 1;
        } else {
            let start = Instant::now();
            loop {
                if look(edge, &self.eventfd, EpollTimeout::ZERO)? {
                    self.penalty = 1;
                    return Ok(true);
                }
                if start.elapsed() >= self.longest {
                    break;
                }
            }
            self.sleepy = self.penalty;
            self.penalty = MOST_SLEEPY.min(2 * self.penalty);
        }
        loop {
            let left = match (timeout, start) {
                (Some(timeout), Some(start)) => Some(timeout.saturating_sub(start.elapsed())),
                _ => None,
            };
            if look(edge, &self.eventfd, sys::milliseconds(left))? {
                return Ok(true);
            }
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(false);
            }
        }
    }
}

impl AsFd for Vector {
    /// The eventfd, for a loop of the caller's own: readable from the first ring until
    /// [`take`](Vector::take), which is to be called then. [`wait`](Vector::wait) does not make it
    /// unreadable. Read it by `take` only: another process can make the eventfd blocking.
    ///
    /// ```
    /// # use std::os::fd::AsFd;
    /// # use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("socket");
    /// # let mut server = ivshmem::Server::builder().socket_path(&path).start()?;
    /// # let stopper = server.stopper()?;
    /// # let serving = std::thread::spawn(move || server.run());
    /// # let client = ivshmem::Client::connect(&path)?;
    /// let vector = client.vector(0)?;
    /// client.ring(client.id(), 0)?;
    /// poll(&mut [PollFd::new(vector.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE)?;
    /// assert_eq!(vector.take()?, 1);
    /// # stopper.stop();
    /// # serving.join().unwrap()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }
}

impl AsRawFd for Vector {
    /// The descriptor of [`as_fd`](AsFd::as_fd), for a loop that takes numbers.
    fn as_raw_fd(&self) -> RawFd {
        self.eventfd.as_raw_fd()
    }
}

impl Drop for Vector {
    fn drop(&mut self) {
        if let Some(edge) = &self.edge {
            // What was waited for is still in the count, and not to be told of again. But a ring
            // may come after the look, and be taken: then the count has grown.
            let before = count(&self.eventfd).unwrap_or(0);
            let unseen = look(edge, &self.eventfd, EpollTimeout::ZERO).unwrap_or(false);
            let taken = self.take().unwrap_or(0);
            if unseen || taken > before {
                let _ = self.eventfd.ring();
            }
        }
        let event = EpollEvent::new(EpollFlags::EPOLLIN, u64::from(self.number));
        if let Err(errno) = self.home.add(&self.eventfd, event) {
            log::error!("cannot watch vector {} again: {errno}", self.number);
        }
    }
}

fn failed(errno: Errno) -> Error {
    Error::System { action: "wait on a vector", source: errno.into() }
}

/// An epoll that tells once of each time that `eventfd` is written to.
fn watch(eventfd: &Doorbell) -> Result<Epoll, Error> {
    let edge = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed)?;
    // Whether it can be written to is how `look` knows that it is full.
    let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
    edge.add(eventfd, EpollEvent::new(flags, 0)).map_err(failed)?;
    Ok(edge)
}

/// Sleeps for `time` at most; whether `eventfd` was written to since the last time.
#[inline]
fn look(edge: &Epoll, eventfd: &Doorbell, time: impl Into<EpollTimeout>) -> Result<bool, Error> {
    let mut events = [EpollEvent::empty()];
    let flags = match edge.wait(&mut events, time) {
        Ok(0) | Err(Errno::EINTR) => return Ok(false),
        Ok(_) => events[0].events(),
        Err(errno) => return Err(failed(errno)),
    };
    if !flags.contains(EpollFlags::EPOLLOUT) {
        // A full one takes no more rings, so nobody would be woken again. Only somebody who
        // means it can fill it.
        take(eventfd)?;
    }
    Ok(flags.contains(EpollFlags::EPOLLIN))
}

/// How often an eventfd was written to; 0 if it was not.
pub(super) fn take(eventfd: &Doorbell) -> Result<u64, Error> {
    sys::take_count(eventfd.as_fd())
        .map_err(|source| Error::System { action: "read a vector", source })
}

/// What `take` would find, left there. None where /proc does not tell (`proc_pid_fdinfo(5)`).
fn count(eventfd: &Doorbell) -> Option<u64> {
    let path = format!("/proc/self/fdinfo/{}", eventfd.0.as_raw_fd());
    let text = fs::read_to_string(path).ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix("eventfd-count:"))?;
    u64::from_str_radix(value.trim(), 16).ok()
}
