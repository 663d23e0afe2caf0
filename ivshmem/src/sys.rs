// SPDX-License-Identifier: GPL-2.0-or-later
//! System calls that nix does not cover, or covers only with an unsafe function, and the form
//! in which the calls that wait want their time.
//!
//! This is the only file of the library that may say `unsafe`.
//! It knows bytes, descriptors and addresses; what a message means is for `wire`
//! to know, what a region is for is `memory`'s and `client`'s business.
//!
//! A run of messages goes out with one `sendmmsg`. nix has that call too, but gives
//! every message of a run the same control data, and here each one carries another
//! descriptor.

use std::ffi::c_void;
use std::io;
use std::marker::PhantomData;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64};
use std::time::Duration;

use nix::poll::PollTimeout;

use crate::protocol::MESSAGE;

/// A time as poll(2) and epoll_wait(2) want it, rounded up. None is no limit.
pub(crate) fn milliseconds(time: Option<Duration>) -> PollTimeout {
    time.map_or(PollTimeout::NONE, |time| {
        PollTimeout::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(PollTimeout::MAX)
    })
}

/// Control data for exactly one descriptor: what `CMSG_SPACE(sizeof(int))` bytes hold.
#[derive(Clone, Copy)]
#[repr(C)]
struct Control {
    header: libc::cmsghdr,
    fd: RawFd,
    padding: RawFd,
}

const DESCRIPTOR: u32 = size_of::<RawFd>() as u32;
const _: () = {
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

/// A shared, readable and writable mapping of a whole object. Unmapped when dropped.
#[derive(Debug)]
pub(crate) struct Mapping {
    address: ptr::NonNull<c_void>,
    len: usize,
}

// SAFETY: the address is valid from every thread, and stays so until the one owner drops it.
unsafe impl Send for Mapping {}
// SAFETY: the memory is shared with other processes anyway: nothing here makes a reference
// to it but to atomics, so threads of this process are no worse than those.
unsafe impl Sync for Mapping {}

/// A method of [`Mapping`] that gives one number of the memory; none where it would not lie
/// in the mapping, or not at a multiple of its size.
macro_rules! atomic {
    ($name:ident, $atomic:ty) => {
        pub(crate) fn $name(&self, offset: usize) -> Option<&$atomic> {
            const SIZE: usize = size_of::<$atomic>();
            let end = offset.checked_add(SIZE)?;
            if end > self.len || offset.next_multiple_of(SIZE) != offset {
                return None;
            }
            // SAFETY: the number lies whole in the mapping, which lives as long as `self`;
            // a mapping starts at a page, so it is aligned; any bytes are a value of it;
            // and an atomic may be changed by others, other processes too, at any time.
            Some(unsafe { &*self.as_ptr().add(offset).cast::<$atomic>() })
        }
    };
}

impl Mapping {
    /// Maps `len` bytes of `fd` from its start; `len` must not be 0.
    pub(crate) fn new(fd: BorrowedFd<'_>, len: usize) -> io::Result<Self> {
        // SAFETY: no address is asked for, so no mapping that exists is replaced.
        let address = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        match ptr::NonNull::new(address) {
            Some(address) => Ok(Self { address, len }),
            None => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.address.as_ptr().cast()
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    atomic!(atomic_u8, AtomicU8);
    atomic!(atomic_u16, AtomicU16);
    atomic!(atomic_u32, AtomicU32);
    atomic!(atomic_u64, AtomicU64);

    /// Whether `len` bytes from `offset` on lie in the mapping.
    pub(crate) fn has(&self, offset: usize, len: usize) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.len)
    }

    /// Copies out of the memory; false, and nothing is done, where it does not reach that far.
    pub(crate) fn read(&self, offset: usize, buffer: &mut [u8]) -> bool {
        if !self.has(offset, buffer.len()) {
            return false;
        }
        // SAFETY: the source lies in the mapping, as was just checked; `buffer` is borrowed
        // exclusively and, being safe Rust's, is no part of the mapping, of which no
        // reference but to atomics is ever made. Whoever writes the memory meanwhile makes
        // the bytes a mixture, each of which is still a byte.
        unsafe {
            ptr::copy_nonoverlapping(self.as_ptr().add(offset), buffer.as_mut_ptr(), buffer.len());
        }
        true
    }

    /// Copies into the memory; false, and nothing is done, where it does not reach that far.
    pub(crate) fn write(&self, offset: usize, bytes: &[u8]) -> bool {
        if !self.has(offset, bytes.len()) {
            return false;
        }
        // SAFETY: the destination lies in the mapping, as was just checked, which is mapped
        // writable; `bytes` is no part of it, as for `read`. Whoever reads or writes the
        // same bytes meanwhile sees or makes a mixture of bytes.
        unsafe {
            ptr::copy_nonoverlapping(bytes.as_ptr(), self.as_ptr().add(offset), bytes.len());
        }
        true
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `new` made this mapping with this length, and it is unmapped only here.
        unsafe { libc::munmap(self.address.as_ptr(), self.len) };
    }
}
