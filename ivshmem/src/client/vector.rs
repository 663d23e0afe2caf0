// SPDX-License-Identifier: GPL-2.0-or-later
//! The two ends of an interrupt: a doorbell to ring, and a vector to wait for.
//!
//! Both are an eventfd, which other processes share, and with it the flag `O_NONBLOCK`. The flag is
//! set here, but every process that has the eventfd can clear it. QEMU does so for a moment with
//! each eventfd that it receives. So nothing here relies on the flag.
//!
//! This module must not know peers, or how a descriptor came.

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

/// A handle that interrupts a peer on one vector. It can be cloned and sent to other threads.
///
/// It can be used after its peer has left; it has no effect then.
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
        // The check is F_GETFL because poll(2) costs twice as much, and is rarely needed: only QEMU
        // (for a moment) and attackers make an eventfd blocking.
        let flags = fcntl(&self.0, FcntlArg::F_GETFL).map_err(cannot_ring)?;
        if !OFlag::from_bits_retain(flags).contains(OFlag::O_NONBLOCK) && !self.is_writable()? {
            return Ok(());
        }
        match unistd::write(&*self.0, &1u64.to_ne_bytes()) {
            Ok(_) => Ok(()),
            // The eventfd is full: the peer was interrupted, and has not read it since.
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

/// Whether a descriptor is an eventfd. A write to another kind of file could block or raise a
/// signal. An epoll instance or a timer could be readable all the time.
fn is_eventfd(fd: BorrowedFd<'_>) -> nix::Result<bool> {
    // The name of a file on disk begins with a slash there, so no such file has this name.
    match fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())) {
        Ok(name) => Ok(name.as_os_str() == "anon_inode:[eventfd]"),
        // There is no /proc. Files, pipes and sockets have a type in their mode; an eventfd has
        // none, like an epoll instance or a timer.
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

/// At most so many waits sleep without a poll before one polls again.
const MOST_SLEEPY: u32 = 1024;

/// One vector of the client, taken out of it. This is the fastest way to wait for an interrupt, and
/// it works in a thread of its own. Made by [`Client::vector`](super::Client::vector).
///
/// While it exists, [`Client::wait`](super::Client::wait) does not report interrupts on this
/// vector. When it is dropped, the client reports them again, and also those that were not waited
/// for.
///
/// # What a wait costs
/// A wait is one system call, and the time until the kernel runs the thread again. It does not read
/// the eventfd, which would be a second system call. So it tells that there was an interrupt, and
/// not how many.
///
/// Most of the time passes until the thread runs again. If a processor is free,
/// [polling](Self::spin) before the sleep saves that time.
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
    /// The client's epoll instance, which watches the vector again when this is dropped.
    home: Arc<Epoll>,
    /// What a wait sleeps on; the first wait makes it. It is edge-triggered, so it reports each
    /// interrupt once, even if nobody reads the eventfd.
    edge: Option<Epoll>,
    /// How long a wait polls at most before it sleeps.
    longest: Duration,
    /// How many of the next waits sleep without a poll.
    sleepy: u32,
    /// The value of `sleepy` after the next poll that finds nothing.
    penalty: u32,
}

impl Vector {
    /// Takes a vector out of the client, which watches it with `home`.
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

    /// Lets each wait poll for `longest` at most before it sleeps. Defaults to 0: sleep without a
    /// poll. About 20 µs are enough for a peer that answers at once.
    ///
    /// ```
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("socket");
    /// # let mut server = ivshmem::Server::builder().socket_path(&path).start()?;
    /// # std::thread::spawn(move || server.run());
    /// use std::time::Duration;
    ///
    /// let client = ivshmem::Client::connect(&path)?;
    /// let mut vector = client.vector(0)?.spin(Duration::from_micros(20));
    /// client.ring(client.id(), 0)?;
    /// assert!(vector.wait(None)?);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// It needs a free processor. If the peer has to wait for that processor, polling is slower
    /// than sleeping. So after each poll that found nothing, twice as many of the next waits sleep
    /// without a poll, up to 1,024.
    pub fn spin(mut self, longest: Duration) -> Self {
        self.longest = longest;
        self
    }

    /// The number of interrupts since the last `take`, without waiting. It includes those that a
    /// [`wait`](Self::wait) has reported. A loop of calls reacts even faster than `wait`, and uses
    /// a whole processor.
    ///
    /// # Errors
    /// [`Error::System`] when the descriptor cannot be read, which an eventfd always can.
    pub fn take(&self) -> Result<u64, Error> {
        take(&self.eventfd)
    }

    /// Waits for an interrupt. Returns false if there was none within `timeout`, which is rounded
    /// up to milliseconds. None is no time limit. An interrupt since the last `wait` or
    /// [`take`](Self::take) counts.
    ///
    /// # Errors
    /// [`Error::System`]: at the first wait, if no descriptor is left; later, for no known reason.
    /// A signal is no error.
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
    /// The eventfd, for an event loop. It is readable from the first interrupt until
    /// [`take`](Vector::take) is called; [`wait`](Vector::wait) does not change that. Read it with
    /// `take` only: another process can make the eventfd blocking.
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
            // Interrupts that `wait` reported are still in the count, and the client must not
            // report them again. An interrupt may also come after `look`; then the count has grown.
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

/// Makes an epoll instance that reports each write to `eventfd` once.
fn watch(eventfd: &Doorbell) -> Result<Epoll, Error> {
    let edge = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed)?;
    // Without EPOLLOUT, `look` knows that the eventfd is full.
    let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
    edge.add(eventfd, EpollEvent::new(flags, 0)).map_err(failed)?;
    Ok(edge)
}

/// Sleeps for `time` at most. Returns whether `eventfd` was written to since the last call.
#[inline]
fn look(edge: &Epoll, eventfd: &Doorbell, time: impl Into<EpollTimeout>) -> Result<bool, Error> {
    let mut events = [EpollEvent::empty()];
    let flags = match edge.wait(&mut events, time) {
        Ok(0) | Err(Errno::EINTR) => return Ok(false),
        Ok(_) => events[0].events(),
        Err(errno) => return Err(failed(errno)),
    };
    if !flags.contains(EpollFlags::EPOLLOUT) {
        // A full eventfd takes no more writes, so there would be no more wake-ups. No peer fills
        // one by mistake.
        take(eventfd)?;
    }
    Ok(flags.contains(EpollFlags::EPOLLIN))
}

/// Reads an eventfd: how often it was written to, or 0.
pub(super) fn take(eventfd: &Doorbell) -> Result<u64, Error> {
    sys::take_count(eventfd.as_fd())
        .map_err(|source| Error::System { action: "read a vector", source })
}

/// What `take` would return, without reading the eventfd. None without /proc
/// (`proc_pid_fdinfo(5)`).
fn count(eventfd: &Doorbell) -> Option<u64> {
    let path = format!("/proc/self/fdinfo/{}", eventfd.0.as_raw_fd());
    let text = fs::read_to_string(path).ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix("eventfd-count:"))?;
    u64::from_str_radix(value.trim(), 16).ok()
}
