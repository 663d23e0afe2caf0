// SPDX-License-Identifier: GPL-2.0-or-later
//! The server's one descriptor: an epoll instance with typed sources, and a timer.
//!
//! It knows descriptors and tokens. It does not know what they mean to the server. To add an event
//! source: add a variant to [`Source`] and its token here, watch it, and handle it where
//! `Server::wait` matches on the sources.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::PollTimeout;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::rate_limit::RateLimit;
use super::roster::Key;
use crate::Error;

/// The number of events that one call takes from epoll, at most.
const READY: usize = 256;

/// The delay before a retry, for conditions whose end no event reports.
const RETRY: Duration = Duration::from_millis(10);

/// The events that end a client: data from it, and any kind of hang-up.
const CLIENT: EpollFlags = EpollFlags::EPOLLIN.union(EpollFlags::EPOLLRDHUP);

/// An event source that is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// Connections wait to be accepted.
    Listener,
    /// The retry timer has expired.
    Timer,
    /// The last dispatch left work to do.
    Due,
    /// A `Stopper` was used.
    Stop,
    /// A descriptor of the caller's is readable.
    Caller { token: u64 },
    /// A client's socket is writable, and nothing else.
    Writable(Key),
    /// A client sent something, or hung up.
    Ended(Key),
}

const LISTENER: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;
const DUE: u64 = u64::MAX - 2;
const STOP: u64 = u64::MAX - 3;
/// Tokens from this value on are descriptors of the caller. Smaller tokens are keys of clients.
const CALLER: u64 = 1 << 63;

pub(super) struct Reactor {
    epoll: Epoll,
    timer: TimerFd,
    armed: bool,
    /// Readable while work is left.
    due: EventFd,
    is_due: bool,
    stop: Option<Arc<EventFd>>,
    /// The tokens of the callers' descriptors.
    tokens: Vec<u64>,
    /// The buffer for events, reused by every call.
    ready: Vec<EpollEvent>,
    cannot_arm: RateLimit,
}

fn failed(action: &'static str) -> impl Fn(Errno) -> Error {
    move |errno| Error::System { action, source: errno.into() }
}

fn event_fd() -> nix::Result<EventFd> {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
}

impl Reactor {
    pub(super) fn new() -> Result<Self, Error> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)
            .map_err(failed("make an epoll instance"))?;
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        let timer =
            TimerFd::new(ClockId::CLOCK_MONOTONIC, flags).map_err(failed("make a timer"))?;
        let due = event_fd().map_err(failed("make an eventfd"))?;
        for (fd, token) in [(timer.as_fd(), TIMER), (due.as_fd(), DUE)] {
            epoll
                .add(fd, EpollEvent::new(EpollFlags::EPOLLIN, token))
                .map_err(failed("watch a descriptor"))?;
        }
        Ok(Self {
            epoll,
            timer,
            armed: false,
            due,
            is_due: false,
            stop: None,
            tokens: Vec::new(),
            ready: vec![EpollEvent::empty(); READY],
            cannot_arm: RateLimit::default(),
        })
    }

    /// Waits until a source is ready, for `timeout` at most, and returns the ready sources. A
    /// caught signal ends the wait.
    pub(super) fn wait(
        &mut self,
        timeout: PollTimeout,
    ) -> Result<impl Iterator<Item = Source> + '_, Error> {
        let count = match self.epoll.wait(&mut self.ready, timeout) {
            Err(Errno::EINTR) => 0,
            result => result.map_err(failed("wait for events"))?,
        };
        let tokens = &self.tokens;
        Ok(self.ready[..count].iter().map(|event| source(event, tokens)))
    }

    pub(super) fn watch_listener(&self, fd: BorrowedFd<'_>) -> Result<(), Error> {
        self.epoll
            .add(fd, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))
            .map_err(failed("watch the listening socket"))
    }

    /// Starts or stops reporting that connections wait.
    pub(super) fn listen(&self, fd: BorrowedFd<'_>, listening: bool) -> io::Result<()> {
        let flags = if listening { EpollFlags::EPOLLIN } else { EpollFlags::empty() };
        Ok(self.epoll.modify(fd, &mut EpollEvent::new(flags, LISTENER))?)
    }

    pub(super) fn watch_caller(&mut self, fd: BorrowedFd<'_>, token: u64) -> Result<(), Error> {
        let event = EpollEvent::new(EpollFlags::EPOLLIN, CALLER + self.tokens.len() as u64);
        self.epoll.add(fd, event).map_err(failed("wait for the given descriptor"))?;
        self.tokens.push(token);
        Ok(())
    }

    pub(super) fn watch_client(&self, fd: BorrowedFd<'_>, key: Key) -> io::Result<()> {
        Ok(self.epoll.add(fd, EpollEvent::new(CLIENT, key.to_u64()))?)
    }

    /// Starts or stops reporting that a client's socket is writable.
    pub(super) fn watch_writable(
        &self,
        fd: BorrowedFd<'_>,
        key: Key,
        writable: bool,
    ) -> io::Result<()> {
        let flags = if writable { CLIENT | EpollFlags::EPOLLOUT } else { CLIENT };
        Ok(self.epoll.modify(fd, &mut EpollEvent::new(flags, key.to_u64()))?)
    }

    /// Reports a client that was removed once more each time that it reads, or when it ends.
    pub(super) fn watch_end(&self, fd: BorrowedFd<'_>, key: Key) -> io::Result<()> {
        // Its socket is shut down, so it is ready for ever. Only changes are of interest.
        let flags = EpollFlags::EPOLLOUT | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
        Ok(self.epoll.modify(fd, &mut EpollEvent::new(flags, key.to_u64()))?)
    }

    /// Reports a client that was refused each time that it reads, and when it ends.
    pub(super) fn watch_refused(&self, fd: BorrowedFd<'_>, key: Key) -> io::Result<()> {
        let flags = EpollFlags::EPOLLOUT | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
        Ok(self.epoll.add(fd, EpollEvent::new(flags, key.to_u64()))?)
    }

    /// Stops watching a descriptor. Closing it is not enough if a forked child has a copy.
    pub(super) fn forget(&self, fd: BorrowedFd<'_>) {
        let _ = self.epoll.delete(fd);
    }

    /// Sets the retry timer if it is not running. Returns whether it is running now.
    pub(super) fn arm(&mut self) -> bool {
        if !self.armed {
            let once = Expiration::OneShot(TimeSpec::from_duration(RETRY));
            match self.timer.set(once, TimerSetTimeFlags::empty()) {
                Ok(()) => self.armed = true,
                Err(errno) => {
                    self.cannot_arm.warn(format_args!("cannot set the retry timer: {errno}"));
                }
            }
        }
        self.armed
    }

    /// Records that the timer has expired.
    pub(super) fn disarm(&mut self) {
        let _ = self.timer.wait();
        self.armed = false;
    }

    /// Makes the server's descriptor readable if `due` is true, until it is called with false.
    pub(super) fn set_due(&mut self, due: bool) {
        if self.is_due != due {
            // The count is 0 or 1. What fails all the same is repeated at the next call: a descriptor
            // that stayed readable would keep the loop busy.
            let done = if due { self.due.write(1).is_ok() } else { self.due.read().is_ok() };
            if done {
                self.is_due = due;
            }
        }
    }

    /// Returns the eventfd of the stoppers. The first call makes it.
    pub(super) fn stopper(&mut self) -> Result<Arc<EventFd>, Error> {
        if let Some(stop) = &self.stop {
            return Ok(Arc::clone(stop));
        }
        let stop = event_fd().map_err(failed("make an eventfd to stop by"))?;
        self.epoll
            .add(&stop, EpollEvent::new(EpollFlags::EPOLLIN, STOP))
            .map_err(failed("watch a descriptor"))?;
        Ok(Arc::clone(self.stop.insert(Arc::new(stop))))
    }

    /// Clears a stop request.
    pub(super) fn clear_stop(&self) {
        if let Some(stop) = &self.stop {
            let _ = stop.read();
        }
    }
}

impl AsFd for Reactor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}

impl AsRawFd for Reactor {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.epoll.0.as_raw_fd()
    }
}

fn source(event: &EpollEvent, tokens: &[u64]) -> Source {
    match event.data() {
        LISTENER => Source::Listener,
        TIMER => Source::Timer,
        DUE => Source::Due,
        STOP => Source::Stop,
        token if token >= CALLER => Source::Caller { token: tokens[(token - CALLER) as usize] },
        key if event.events() == EpollFlags::EPOLLOUT => Source::Writable(Key::from_u64(key)),
        key => Source::Ended(Key::from_u64(key)),
    }
}
