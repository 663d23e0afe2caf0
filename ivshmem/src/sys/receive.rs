// SPDX-License-Identifier: GPL-2.0-or-later
//! Bytes and descriptors out of a socket.
//!
//! nix has `recvmsg` too, but gives descriptors as numbers, which nobody owns. This module knows
//! bytes and descriptors, and not what a message means.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// What one `recvmsg` brought.
#[derive(Debug)]
pub(crate) struct Received {
    /// Bytes written to the buffer; 0 is the end of the stream.
    pub(crate) bytes: usize,
    /// The descriptors that came with them, all close-on-exec.
    pub(crate) fds: Vec<OwnedFd>,
    /// Control data was cut off: there were more descriptors than could be taken.
    pub(crate) truncated: bool,
}

/// Descriptors that one `recvmsg` has room for. A server sends at most one with a message;
/// the rest is room to see, and close, what a broken server sends.
const RECEIVE_FDS: usize = 16;

/// Receives bytes and the descriptors that come with them.
///
/// # Errors
/// As `recvmsg(2)`; a socket that is non-blocking and empty gives `WouldBlock`.
pub(crate) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Received> {
    #[repr(C)]
    struct Room {
        header: libc::cmsghdr,
        fds: [RawFd; RECEIVE_FDS],
    }
    // SAFETY: Room is integers only; all zeroes is a value of it.
    let mut room: Room = unsafe { mem::zeroed() };
    let mut iovec = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: msghdr is integers and raw pointers; all zeroes is a value of it.
    let mut header: libc::msghdr = unsafe { mem::zeroed() };
    header.msg_iov = &raw mut iovec;
    header.msg_iovlen = 1;
    header.msg_control = (&raw mut room).cast();
    header.msg_controllen = size_of::<Room>();
    // SAFETY: the header names one iovec over `buffer` and the bytes of `room`, both
    // exclusively borrowed here until the call returns.
    let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_CMSG_CLOEXEC) };
    let bytes = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;

    let mut fds = Vec::new();
    // SAFETY: `header` still names `room`, and msg_controllen is what the kernel filled.
    let mut control = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
    while !control.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR give only whole headers inside `room`.
        let (level, kind, len) =
            unsafe { ((*control).cmsg_level, (*control).cmsg_type, (*control).cmsg_len) };
        if level == libc::SOL_SOCKET && kind == libc::SCM_RIGHTS {
            // SAFETY: arithmetic on its argument; it touches no memory.
            let payload = len.saturating_sub(unsafe { libc::CMSG_LEN(0) } as usize);
            for i in 0..payload / size_of::<RawFd>() {
                // SAFETY: the kernel wrote `payload` bytes of descriptors here, each one
                // new in this process and owned by nobody else.
                fds.push(unsafe {
                    let data: *const RawFd = libc::CMSG_DATA(control).cast();
                    OwnedFd::from_raw_fd(data.add(i).read_unaligned())
                });
            }
        }
        // SAFETY: `control` lies inside the room that `header` names.
        control = unsafe { libc::CMSG_NXTHDR(&raw const header, control) };
    }
    Ok(Received { bytes, fds, truncated: header.msg_flags & libc::MSG_CTRUNC != 0 })
}
