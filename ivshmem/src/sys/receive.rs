// SPDX-License-Identifier: GPL-2.0-or-later
//! Bytes and descriptors out of a socket.
//!
//! nix has `recvmsg` too, but gives descriptors as numbers, which nobody owns. This module knows
//! bytes and descriptors, and not what a message means.

use std::io;
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// What one `recvmsg` brought.
#[derive(Debug)]
pub(crate) struct Received {
    /// Bytes written to the buffer; 0 is the end of the stream.
    pub(crate) bytes: usize,
    /// The descriptors that came with them, in their order, all close-on-exec.
    pub(crate) fds: Vec<OwnedFd>,
    /// The kernel closed some descriptors: this process can have no more, or a security module
    /// forbids it to have them.
    pub(crate) truncated: bool,
}

/// Descriptors that one `recvmsg` has room for: as many as one message can have, the kernel's
/// `SCM_MAX_FD`. The kernel itself closes what does not fit, and that can sleep.
pub(crate) const RECEIVE_FDS: usize = 253;

/// Bytes for other control data, which a socket of another process can be set to receive:
/// credentials, a security label, times. The kernel writes them before the descriptors.
const OTHER_CONTROL: usize = 4096;

/// A message with a pidfd of its sender. libc does not have it.
const SCM_PIDFD: i32 = 4;

/// Receives bytes and the descriptors that come with them, without waiting.
///
/// # Errors
/// As `recvmsg(2)`; a socket that is empty gives `WouldBlock`, whatever its `O_NONBLOCK` says.
pub(crate) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Received> {
    receive_with(socket, buffer, 0)
}

/// As [`receive`], but leaves the bytes and the descriptors in the socket. The result has copies of
/// the descriptors.
///
/// # Errors
/// As [`receive`].
pub(crate) fn peek(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Received> {
    receive_with(socket, buffer, libc::MSG_PEEK)
}

fn receive_with(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    more_flags: i32,
) -> io::Result<Received> {
    #[repr(C)]
    struct Room {
        header: libc::cmsghdr,
        fds: [RawFd; RECEIVE_FDS],
        other: [u8; OTHER_CONTROL],
    }
    let mut room = MaybeUninit::<Room>::uninit();
    let mut iovec = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: msghdr is integers and raw pointers; all zeroes is a value of it.
    let mut header: libc::msghdr = unsafe { mem::zeroed() };
    header.msg_iov = &raw mut iovec;
    header.msg_iovlen = 1;
    header.msg_control = room.as_mut_ptr().cast();
    header.msg_controllen = size_of::<Room>();
    let flags = libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT | more_flags;
    // SAFETY: the header names one iovec over `buffer` and the bytes of `room`, both
    // exclusively borrowed here until the call returns. The kernel only writes to `room`.
    let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) };
    let bytes = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;

    let mut fds = Vec::new();
    // SAFETY: `header` still names `room`, and msg_controllen is what the kernel filled.
    let mut control = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
    while !control.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR give only whole headers inside `room`.
        let (level, kind, len) =
            unsafe { ((*control).cmsg_level, (*control).cmsg_type, (*control).cmsg_len) };
        if level == libc::SOL_SOCKET && matches!(kind, libc::SCM_RIGHTS | SCM_PIDFD) {
            // SAFETY: arithmetic on its argument; it touches no memory.
            let payload = len.saturating_sub(unsafe { libc::CMSG_LEN(0) } as usize);
            for i in 0..payload / size_of::<RawFd>() {
                // SAFETY: the kernel wrote `payload` bytes of descriptors here.
                let fd = unsafe {
                    let data: *const RawFd = libc::CMSG_DATA(control).cast();
                    data.add(i).read_unaligned()
                };
                // Without a free number, the kernel gives an error number in place of a pidfd.
                if fd >= 0 {
                    // SAFETY: the kernel made this descriptor in this call; nobody else owns it.
                    fds.push(unsafe { OwnedFd::from_raw_fd(fd) });
                }
            }
        }
        // SAFETY: `control` lies inside the room that `header` names.
        control = unsafe { libc::CMSG_NXTHDR(&raw const header, control) };
    }
    Ok(Received { bytes, fds, truncated: header.msg_flags & libc::MSG_CTRUNC != 0 })
}
