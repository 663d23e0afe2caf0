// SPDX-License-Identifier: GPL-2.0-or-later
//! System calls that nix does not cover, or covers only with an unsafe function: one file for
//! each subject. This directory is the only place of the library where `unsafe` is allowed.
//!
//! It knows bytes, descriptors and addresses. It must not know what a message means or what a
//! region of memory is for.

mod eventfd;
mod inherited;
mod mapping;
mod numa;
mod receive;
mod send;
mod socket;

pub(crate) use eventfd::take_count;
pub(crate) use inherited::{socket_cookie, take_inherited};
pub(crate) use mapping::Mapping;
pub(crate) use numa::{MAX_NODES, PolicyBefore, bind_to_nodes, read_in};
pub(crate) use receive::{RECEIVE_FDS, Received, peek, receive};
pub(crate) use send::{Run, SendBuffer};
pub(crate) use socket::{peer_groups, refuse_descriptors, unread_bytes};

use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::fcntl::FlockArg;
use nix::poll::PollTimeout;

/// A time as poll(2) and epoll_wait(2) want it, rounded up. None is no limit.
pub(crate) fn milliseconds(time: Option<Duration>) -> PollTimeout {
    time.map_or(PollTimeout::NONE, |time| {
        PollTimeout::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(PollTimeout::MAX)
    })
}

/// Takes an exclusive flock without waiting; `EAGAIN` if another open file has it. It ends with
/// the last descriptor of the open file, or by [`unlock`].
#[expect(deprecated, reason = "its successor panics where unlocking fails")]
pub(crate) fn lock(file: &impl AsRawFd) -> nix::Result<()> {
    nix::fcntl::flock(file.as_raw_fd(), FlockArg::LockExclusiveNonblock)
}

/// Ends a lock, also where a forked child has a copy of the descriptor.
#[expect(deprecated, reason = "its successor panics where unlocking fails")]
pub(crate) fn unlock(file: &impl AsRawFd) -> nix::Result<()> {
    nix::fcntl::flock(file.as_raw_fd(), FlockArg::Unlock)
}
