// SPDX-License-Identifier: GPL-2.0-or-later
//! Reads of an eventfd that never block, whatever other processes did to its flags.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Takes the count out of an eventfd without waiting, whatever its `O_NONBLOCK` says; 0 if it
/// was not written to.
///
/// The flag cannot be relied on: it belongs to all who share the eventfd, and QEMU clears it on
/// what it receives, for a moment. A kernel that cannot be asked not to wait (before 5.12) is
/// asked first whether there is anything.
///
/// # Errors
/// As `preadv2(2)`, `poll(2)` and `read(2)`; what is no eventfd may give `UnexpectedEof`.
pub(crate) fn take_count(eventfd: BorrowedFd<'_>) -> io::Result<u64> {
    let mut count = 0u64;
    let room = libc::iovec { iov_base: (&raw mut count).cast(), iov_len: size_of::<u64>() };
    let fd = eventfd.as_raw_fd();
    loop {
        // SAFETY: `room` names the 8 bytes of `count`, which nothing else uses until the call
        // returns, and any bytes are a u64.
        let mut got = unsafe { libc::preadv2(fd, &raw const room, 1, -1, libc::RWF_NOWAIT) };
        if got < 0 && matches!(errno(), libc::EOPNOTSUPP | libc::ENOSYS) {
            let mut ask = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
            // SAFETY: `ask` is one pollfd, borrowed until the call returns.
            got = match unsafe { libc::poll(&raw mut ask, 1, 0) } {
                0 => return Ok(0),
                // SAFETY: as for preadv2: the 8 bytes of `count`.
                1 => unsafe { libc::read(fd, room.iov_base, room.iov_len) },
                _ => -1,
            };
        }
        match got {
            8 => return Ok(count),
            0.. => return Err(io::ErrorKind::UnexpectedEof.into()),
            _ => match errno() {
                libc::EINTR => {}
                libc::EAGAIN => return Ok(0),
                error => return Err(io::Error::from_raw_os_error(error)),
            },
        }
    }
}

fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}
