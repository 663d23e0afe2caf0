// SPDX-License-Identifier: GPL-2.0-or-later
//! Messages out of a socket: a run of them goes out with one `sendmmsg`.
//!
//! nix has that call too, but gives every message of a run the same control data; here each
//! message carries another descriptor. This module knows bytes and descriptors, and not what a
//! message means.

use std::io;
use std::marker::PhantomData;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::ptr;

use crate::protocol::MESSAGE;

/// Control data for exactly one descriptor: what `CMSG_SPACE(sizeof(int))` bytes hold.
#[derive(Clone, Copy)]
#[repr(C)]
struct Control {
    header: libc::cmsghdr,
    fd: RawFd,
    padding: RawFd,
}

const _: () = {
    // In here, because Rust 1.85 takes it for unused elsewhere.
    const DESCRIPTOR: u32 = size_of::<RawFd>() as u32;
    // SAFETY: both are arithmetic on their argument; they touch no memory.
    let (space, len) = unsafe { (libc::CMSG_SPACE(DESCRIPTOR), libc::CMSG_LEN(DESCRIPTOR)) };
    assert!(size_of::<Control>() == space as usize);
    assert!(mem::offset_of!(Control, fd) + size_of::<RawFd>() == len as usize);
};

/// Room for a run of messages, made once and used for every run.
pub(crate) struct SendBuffer {
    values: Box<[[u8; MESSAGE]]>,
    controls: Box<[Control]>,
    iovecs: Box<[libc::iovec]>,
    headers: Box<[libc::mmsghdr]>,
}

// SAFETY: the raw pointers in `iovecs` and `headers` are dead between calls: `Run::send`
// writes every one that the kernel will look at before it makes the call.
unsafe impl Send for SendBuffer {}
// SAFETY: a shared reference gives no access to the pointers: every method takes `&mut self`.
unsafe impl Sync for SendBuffer {}

impl SendBuffer {
    pub(crate) fn new(capacity: usize) -> Self {
        let control = Control {
            header: libc::cmsghdr {
                cmsg_len: mem::offset_of!(Control, fd) + size_of::<RawFd>(),
                cmsg_level: libc::SOL_SOCKET,
                cmsg_type: libc::SCM_RIGHTS,
            },
            fd: -1,
            padding: 0,
        };
        let iovec = libc::iovec { iov_base: ptr::null_mut(), iov_len: MESSAGE };
        // SAFETY: mmsghdr is integers and raw pointers; all zeroes is a value of it.
        let header: libc::mmsghdr = unsafe { mem::zeroed() };
        Self {
            values: vec![[0; MESSAGE]; capacity].into(),
            controls: vec![control; capacity].into(),
            iovecs: vec![iovec; capacity].into(),
            headers: vec![header; capacity].into(),
        }
    }

    /// Begins an empty run. `'fd` is how long the descriptors pushed to it stay open.
    pub(crate) fn run<'fd>(&mut self) -> Run<'_, 'fd> {
        Run { buffer: self, len: 0, open: PhantomData }
    }
}

/// A run being gathered, to go out with one call.
pub(crate) struct Run<'b, 'fd> {
    buffer: &'b mut SendBuffer,
    len: usize,
    open: PhantomData<BorrowedFd<'fd>>,
}

/// What went out of a run: whole messages, and the bytes of one more that went in part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sent {
    pub(crate) messages: usize,
    pub(crate) bytes_of_next: usize,
}

impl<'fd> Run<'_, 'fd> {
    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn value(&self, index: usize) -> [u8; MESSAGE] {
        self.buffer.values[index]
    }

    /// Adds a message. The run must not be full.
    pub(crate) fn push(&mut self, value: [u8; MESSAGE], fd: Option<BorrowedFd<'fd>>) {
        self.buffer.values[self.len] = value;
        self.buffer.controls[self.len].fd = fd.map_or(-1, |fd| fd.as_raw_fd());
        self.len += 1;
    }

    /// Sends the run, never waiting and never raising SIGPIPE.
    ///
    /// An error means that nothing went out.
    pub(crate) fn send(&mut self, socket: BorrowedFd<'_>) -> io::Result<Sent> {
        let SendBuffer { values, controls, iovecs, headers } = self.buffer;
        for i in 0..self.len {
            iovecs[i].iov_base = values[i].as_mut_ptr().cast();
            let header = &mut headers[i].msg_hdr;
            header.msg_iov = &raw mut iovecs[i];
            header.msg_iovlen = 1;
            if controls[i].fd < 0 {
                header.msg_control = ptr::null_mut();
                header.msg_controllen = 0;
            } else {
                header.msg_control = (&raw mut controls[i]).cast();
                header.msg_controllen = size_of::<Control>();
            }
        }
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        let bytes = if self.len == 1 {
            // SAFETY: the header was just filled in: one iovec over 8 initialised bytes and
            // at most one whole Control, all borrowed by this function until it returns;
            // the descriptor in it is open for 'fd, which outlives `self`.
            let sent =
                unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const headers[0].msg_hdr, flags) };
            usize::try_from(sent).map_err(|_| io::Error::last_os_error())?
        } else {
            // SAFETY: as above, for each of the first `len` headers; the kernel writes
            // `msg_len` of those and nothing else.
            let sent = unsafe {
                libc::sendmmsg(socket.as_raw_fd(), headers.as_mut_ptr(), self.len as u32, flags)
            };
            let sent = usize::try_from(sent).map_err(|_| io::Error::last_os_error())?;
            // Only the last one can be short: the kernel ends the run there.
            match sent.checked_sub(1) {
                Some(last) => last * MESSAGE + headers[last].msg_len as usize,
                None => 0,
            }
        };
        Ok(Sent { messages: bytes / MESSAGE, bytes_of_next: bytes % MESSAGE })
    }
}
