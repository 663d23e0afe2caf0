// SPDX-License-Identifier: GPL-2.0-or-later
//! A mapping of shared memory, and access to it that is sound while others write to it.
//!
//! This module knows addresses and bytes, and not what they are for.

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64};

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
