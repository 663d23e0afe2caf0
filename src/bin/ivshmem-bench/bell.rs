// SPDX-License-Identifier: GPL-2.0-or-later
//! Two ways to ring and to be rung: the library, and bare system calls on eventfds.
//!
//! The measuring loop is generic over both, so the compiler makes the same loop for each.

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use ivshmem::client::{Doorbell, Vector};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd;

use crate::Failure;

/// The time limit for an answer. After it the other peer counts as dead.
const PATIENCE: Duration = Duration::from_secs(10);

/// The number of polls after which a busy receiver gives up: about ten seconds.
const LOOKS: u64 = 1 << 26;

/// How a receiver waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Receiver {
    /// It sleeps until it is rung.
    Blocking,
    /// It polls in a loop.
    Busy,
}

impl Receiver {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Blocking => "blocking",
            Self::Busy => "busy",
        }
    }

    pub(crate) fn from_name(name: &str) -> Option<Self> {
        [Self::Blocking, Self::Busy].into_iter().find(|receiver| receiver.name() == name)
    }
}

/// One peer's side: the doorbell of the other peer, and its own vector.
pub(crate) trait Bell {
    /// Rings the other peer.
    fn ring(&self) -> Result<(), Failure>;

    /// Takes a pending ring. Returns whether there was one.
    fn take(&self) -> Result<bool, Failure>;

    /// Sleeps until it is rung, for `limit` at most. Returns whether it was rung.
    fn sleep(&mut self, limit: Option<Duration>) -> Result<bool, Failure>;

    /// Waits until it is rung.
    fn wait(&mut self, receiver: Receiver) -> Result<(), Failure> {
        let rung = match receiver {
            Receiver::Blocking => self.sleep(Some(PATIENCE))?,
            Receiver::Busy => {
                let mut rung = self.take()?;
                let mut looks = 1;
                while !rung && looks < LOOKS {
                    rung = self.take()?;
                    looks += 1;
                }
                rung
            }
        };
        if rung { Ok(()) } else { Err("the other peer does not answer".into()) }
    }
}

/// The library.
pub(crate) struct Library {
    pub(crate) other: Doorbell,
    pub(crate) own: Vector,
}

impl Bell for Library {
    fn ring(&self) -> Result<(), Failure> {
        Ok(self.other.ring()?)
    }

    fn take(&self) -> Result<bool, Failure> {
        Ok(self.own.take()? > 0)
    }

    fn sleep(&mut self, limit: Option<Duration>) -> Result<bool, Failure> {
        Ok(self.own.wait(limit)?)
    }
}

/// `write`, `poll` and `read` on non-blocking eventfds, like those of the protocol.
pub(crate) struct Bare {
    pub(crate) other: OwnedFd,
    pub(crate) own: OwnedFd,
}

impl Bell for Bare {
    fn ring(&self) -> Result<(), Failure> {
        unistd::write(&self.other, &1_u64.to_ne_bytes())?;
        Ok(())
    }

    fn take(&self) -> Result<bool, Failure> {
        match unistd::read(&self.own, &mut [0; 8]) {
            Ok(_) => Ok(true),
            Err(Errno::EAGAIN) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    fn sleep(&mut self, limit: Option<Duration>) -> Result<bool, Failure> {
        let limit = limit.map_or(Ok(PollTimeout::NONE), PollTimeout::try_from)?;
        poll(&mut [PollFd::new(self.own.as_fd(), PollFlags::POLLIN)], limit)?;
        self.take()
    }
}
