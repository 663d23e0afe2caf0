// SPDX-License-Identifier: GPL-2.0-or-later
//! Descriptors that the process got from the one that started it (sd_listen_fds(3)), and what
//! identifies a descriptor.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;

/// The first inherited descriptor.
const FIRST: RawFd = 3;

/// They have been taken.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// Takes the `count` inherited descriptors, and makes them close-on-exec. The second call in a
/// process gets none. Numbers that are not open are left out.
///
/// Only the process that was started with them may call this: the caller compares `LISTEN_PID`.
pub(crate) fn take_inherited(count: usize) -> Vec<Option<OwnedFd>> {
    if TAKEN.swap(true, Ordering::AcqRel) {
        return Vec::new();
    }
    (FIRST..)
        .take(count)
        .map(|number| {
            // SAFETY: fcntl with F_SETFD takes an int, and touches no memory.
            let set = unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } == 0;
            let open = set || Errno::last() != Errno::EBADF;
            // SAFETY: the descriptor is open, was there when the process started, by the promise
            // of LISTEN_FDS, and is made an owned one once in a process.
            open.then(|| unsafe { OwnedFd::from_raw_fd(number) })
        })
        .collect()
}

/// The number of a socket that no other socket has had since the machine started (`SO_COOKIE`).
pub(crate) fn socket_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, which `cookie` has, and the length.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}
