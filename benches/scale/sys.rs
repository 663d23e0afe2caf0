// SPDX-License-Identifier: GPL-2.0-or-later
//! The bare system calls of the floor.
//!
//! A safe interface would make the floor slower and so the servers look better. So this is the only
//! file of the benchmark with `unsafe` code.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

/// Bytes of one message.
pub(crate) const MESSAGE: usize = 8;

#[derive(Clone, Copy)]
#[repr(C)]
struct Control {
    header: libc::cmsghdr,
    fd: RawFd,
    padding: RawFd,
}

impl Control {
    fn new(fd: RawFd) -> Self {
        let header = libc::cmsghdr {
            cmsg_len: mem::offset_of!(Self, fd) + size_of::<RawFd>(),
            cmsg_level: libc::SOL_SOCKET,
            cmsg_type: libc::SCM_RIGHTS,
        };
        Self { header, fd, padding: 0 }
    }
}

/// A batch of messages of eight bytes and one descriptor each, prepared before the clock starts.
pub(crate) struct Run {
    values: Box<[i64]>,
    controls: Box<[Control]>,
    /// Not used by this program again, but the kernel reads them through `headers`.
    _iovecs: Box<[libc::iovec]>,
    headers: Box<[libc::mmsghdr]>,
}

impl Run {
    /// `length` messages whose values and descriptors are not set yet.
    pub(crate) fn new(length: usize) -> Self {
        let mut values: Box<[i64]> = vec![0; length].into();
        let mut controls: Box<[Control]> = vec![Control::new(-1); length].into();
        let mut iovecs: Box<[libc::iovec]> = values
            .iter_mut()
            .map(|value| libc::iovec { iov_base: (&raw mut *value).cast(), iov_len: MESSAGE })
            .collect();
        let headers = iovecs
            .iter_mut()
            .zip(&mut controls)
            .map(|(iovec, control)| {
                // SAFETY: mmsghdr is integers and raw pointers; all zeroes is a value of it.
                let mut header: libc::mmsghdr = unsafe { mem::zeroed() };
                header.msg_hdr.msg_iov = &raw mut *iovec;
                header.msg_hdr.msg_iovlen = 1;
                header.msg_hdr.msg_control = (&raw mut *control).cast();
                header.msg_hdr.msg_controllen = size_of::<Control>();
                header
            })
            .collect();
        Self { values, controls, _iovecs: iovecs, headers }
    }

    pub(crate) fn len(&self) -> usize {
        self.values.len()
    }

    /// Sets the value and the descriptor of message `index`.
    pub(crate) fn set(&mut self, index: usize, value: i64, fd: RawFd) {
        self.values[index] = value.to_le();
        self.controls[index].fd = fd;
    }

    /// Sends the first `count` messages with one `sendmmsg`. Returns how many were sent.
    pub(crate) fn send_run(&mut self, socket: RawFd, count: usize) -> io::Result<usize> {
        let headers = &mut self.headers[..count];
        // SAFETY: each header names one iovec over one value and one whole Control, which the
        // boxes in `self` keep in place; the kernel writes `msg_len` only.
        let sent = unsafe {
            libc::sendmmsg(socket, headers.as_mut_ptr(), headers.len() as u32, libc::MSG_DONTWAIT)
        };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }

    /// Sends message `index` with one `sendmsg`.
    pub(crate) fn send_one(&self, socket: RawFd, index: usize) -> io::Result<()> {
        // SAFETY: as in `send_run`; sendmsg writes nothing.
        let sent = unsafe {
            libc::sendmsg(socket, &raw const self.headers[index].msg_hdr, libc::MSG_DONTWAIT)
        };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// The result of one read.
pub(crate) struct Received {
    pub(crate) bytes: usize,
    pub(crate) value: i64,
    pub(crate) fd: Option<OwnedFd>,
}

/// Whether to wait for a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    Yes,
    No,
}

/// Reads one message.
pub(crate) fn receive(socket: BorrowedFd<'_>, wait: Wait) -> io::Result<Received> {
    let mut value = 0_i64;
    let mut control = Control::new(-1);
    let mut iovec = libc::iovec { iov_base: (&raw mut value).cast(), iov_len: MESSAGE };
    // SAFETY: msghdr is integers and raw pointers; all zeroes is a value of it.
    let mut header: libc::msghdr = unsafe { mem::zeroed() };
    header.msg_iov = &raw mut iovec;
    header.msg_iovlen = 1;
    header.msg_control = (&raw mut control).cast();
    header.msg_controllen = size_of::<Control>();
    let flags = match wait {
        Wait::Yes => libc::MSG_CMSG_CLOEXEC,
        Wait::No => libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT,
    };
    // SAFETY: the header names `value` and `control`, which outlive the call.
    let bytes = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) };
    let bytes = usize::try_from(bytes).map_err(|_| io::Error::last_os_error())?;
    let fd = (header.msg_controllen > 0 && control.fd >= 0)
        // SAFETY: there was room for one descriptor; the kernel made it for this call.
        .then(|| unsafe { OwnedFd::from_raw_fd(control.fd) });
    Ok(Received { bytes, value: i64::from_le(value), fd })
}

/// Pins this process to one CPU. Children inherit this.
pub(crate) fn pin(cpu: usize) -> io::Result<()> {
    // SAFETY: cpu_set_t is integers only; all zeroes is the empty set.
    let mut set: libc::cpu_set_t = unsafe { mem::zeroed() };
    // SAFETY: the index is checked by CPU_SET, which touches `set` only.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: the set is as large as is said, and only read.
    let failed = unsafe { libc::sched_setaffinity(0, size_of_val(&set), ptr::from_ref(&set)) };
    if failed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
