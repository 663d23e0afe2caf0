// SPDX-License-Identifier: GPL-2.0-or-later
//! A mapping of shared memory, and accesses to it that are sound while other threads and other
//! processes read and write the same bytes.
//!
//! A plain copy would be a data race, which is undefined behaviour, as soon as two threads of
//! this process copy to and from the same bytes. So every access here is either an atomic or
//! inline assembly, which the compiler treats like the access of another processor.
//!
//! This module knows addresses and bytes. It must not know what the memory is for, or what a
//! client is.

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

/// A shared, readable and writable mapping of a whole object. Unmapped when dropped.
#[derive(Debug)]
pub(crate) struct Mapping {
    address: ptr::NonNull<c_void>,
    len: usize,
}

// SAFETY: the address is valid from every thread, and stays so until the one owner drops it.
unsafe impl Send for Mapping {}
// SAFETY: every method that takes `&self` accesses the bytes by atomics or by assembly that acts
// like relaxed atomics, so threads that share a mapping make no data race.
unsafe impl Sync for Mapping {}

/// A method of [`Mapping`] that gives one number of the memory. It gives None if the number would
/// not lie in the mapping, or not at a multiple of its size.
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

    /// `N` numbers of the memory from `offset` on. None if they do not all lie in the mapping, or if
    /// `offset` is not a multiple of their size.
    pub(crate) fn words<const N: usize>(&self, offset: usize) -> Option<&[AtomicU64; N]> {
        if offset % size_of::<u64>() != 0 || !self.contains(offset, size_of::<[u64; N]>()) {
            return None;
        }
        // SAFETY: all `N` numbers lie in the mapping, which lives as long as `self` and starts at a
        // page, so they are aligned; any bytes are a value of them, and atomics may be changed by
        // others at any time.
        Some(unsafe { &*self.as_ptr().add(offset).cast::<[AtomicU64; N]>() })
    }

    /// Whether `len` bytes at `offset` lie in the mapping.
    pub(crate) fn contains(&self, offset: usize, len: usize) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.len)
    }

    /// Copies out of the memory. Returns false, and copies nothing, if the bytes do not all lie in
    /// the mapping.
    pub(crate) fn read(&self, offset: usize, buffer: &mut [u8]) -> bool {
        if !self.contains(offset, buffer.len()) {
            return false;
        }
        // SAFETY: the source lies in the mapping, as was just checked, and all accesses to it are
        // atomic or assembly. `buffer` is borrowed exclusively, and no slice of safe Rust lies
        // in the mapping, so the two do not overlap.
        unsafe { copy_out(self.as_ptr().add(offset), buffer.as_mut_ptr(), buffer.len()) };
        true
    }

    /// Copies into the memory. Returns false, and copies nothing, if the bytes do not all lie in
    /// the mapping.
    pub(crate) fn write(&self, offset: usize, bytes: &[u8]) -> bool {
        if !self.contains(offset, bytes.len()) {
            return false;
        }
        // SAFETY: the destination lies in the mapping, as was just checked, which is writable, and
        // all accesses to it are atomic or assembly. `bytes` is not part of it, as for `read`.
        unsafe { copy_in(bytes.as_ptr(), self.as_ptr().add(offset), bytes.len()) };
        true
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `new` made this mapping with this length, and it is unmapped only here.
        unsafe { libc::munmap(self.address.as_ptr(), self.len) };
    }
}

/// Bytes of the words that a copy moves.
const WORD: usize = size_of::<u64>();

/// From this length on, the string instruction of x86-64 is faster than a loop over words, on a
/// processor that has it in its fast form (ERMSB).
#[cfg(target_arch = "x86_64")]
const LONG: usize = 1024;

/// The bytes before the first aligned word at `address`, of `len` bytes in all.
fn bytes_before_word(address: *const u8, len: usize) -> usize {
    ((address as usize).wrapping_neg() % WORD).min(len)
}

/// Copies `len` bytes from shared memory to private memory.
///
/// # Safety
/// `shared` is valid for reads of `len` bytes, and every access to those bytes meanwhile, by any
/// thread, is atomic or by these functions. `private` is valid for writes of `len` bytes, and no
/// other thread accesses it.
unsafe fn copy_out(shared: *const u8, private: *mut u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    if len >= LONG && std::arch::is_x86_feature_detected!("ermsb") {
        // SAFETY: both are valid for `len` bytes, by the caller's promise.
        return unsafe { copy_long(shared, private, len) };
    }
    let (shared, private) = (shared.cast_mut(), private);
    let byte = |at: usize| {
        // SAFETY: `at` is less than `len`, so both bytes are valid by the caller's promise; the
        // shared one is only ever accessed atomically.
        unsafe {
            private.add(at).write(AtomicU8::from_ptr(shared.add(at)).load(Ordering::Relaxed));
        }
    };
    let mut at = bytes_before_word(shared, len);
    (0..at).for_each(byte);
    while len - at >= WORD {
        // SAFETY: the word at `at` ends within `len`; in the shared memory it is aligned, since
        // the loop starts at an aligned word; in the private memory it need not be.
        unsafe {
            let word = AtomicU64::from_ptr(shared.add(at).cast()).load(Ordering::Relaxed);
            private.add(at).cast::<u64>().write_unaligned(word);
        }
        at += WORD;
    }
    (at..len).for_each(byte);
}

/// Copies `len` bytes from private memory to shared memory.
///
/// # Safety
/// `private` is valid for reads of `len` bytes, and no other thread writes it. `shared` is valid
/// for writes of `len` bytes, and every access to those bytes meanwhile, by any thread, is atomic
/// or by these functions.
unsafe fn copy_in(private: *const u8, shared: *mut u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    if len >= LONG && std::arch::is_x86_feature_detected!("ermsb") {
        // SAFETY: both are valid for `len` bytes, by the caller's promise.
        return unsafe { copy_long(private, shared, len) };
    }
    let byte = |at: usize| {
        // SAFETY: `at` is less than `len`, so both bytes are valid by the caller's promise; the
        // shared one is only ever accessed atomically.
        unsafe {
            AtomicU8::from_ptr(shared.add(at)).store(private.add(at).read(), Ordering::Relaxed);
        }
    };
    let mut at = bytes_before_word(shared, len);
    (0..at).for_each(byte);
    while len - at >= WORD {
        // SAFETY: the word at `at` ends within `len`; in the shared memory it is aligned, since
        // the loop starts at an aligned word; in the private memory it need not be.
        unsafe {
            let word = private.add(at).cast::<u64>().read_unaligned();
            AtomicU64::from_ptr(shared.add(at).cast()).store(word, Ordering::Relaxed);
        }
        at += WORD;
    }
    (at..len).for_each(byte);
}

/// Copies `len` bytes by `rep movsb`, as the C library's memcpy does for long copies.
///
/// The compiler does not look into assembly: it must assume that the block does what some code
/// could do that is sound, and a loop of relaxed atomic loads and stores of single bytes would be.
///
/// # Safety
/// `from` is valid for reads, and `to` for writes, of `len` bytes, and they do not overlap. Where
/// other threads access the bytes meanwhile, they do so by atomics or by this function.
#[cfg(target_arch = "x86_64")]
unsafe fn copy_long(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: the instruction reads `len` bytes at rsi and writes them at rdi, as the caller
    // allows, upwards, since the ABI keeps the direction flag clear. It changes these three
    // registers, which are declared as changed, and neither the stack nor the flags.
    unsafe {
        std::arch::asm!(
            "rep movsb",
            inout("rcx") len => _,
            inout("rsi") from => _,
            inout("rdi") to => _,
            options(nostack, preserves_flags)
        );
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_copy_moves_exactly_the_bytes_asked_for_at_every_alignment() {
        let file = tempfile::tempfile().expect("a temporary file");
        file.set_len(4096).expect("it grows");
        let mapping = Mapping::new(file.as_fd(), 4096).expect("it can be mapped");
        let pattern: Vec<u8> = (0..3000u32).map(|number| (number % 251) as u8 + 1).collect();
        for len in (0..40).chain([1023, 1024, 1025, 2999]) {
            for offset in 0..9 {
                for start in 0..2 {
                    assert!(mapping.write(0, &[0; 4096]));
                    let bytes = &pattern[start..start + len];
                    assert!(mapping.write(offset, bytes));
                    let mut all = [0; 4096];
                    assert!(mapping.read(0, &mut all));
                    assert_eq!(&all[offset..offset + len], bytes);
                    let others = all[..offset].iter().chain(&all[offset + len..]);
                    assert_eq!(others.filter(|&&byte| byte != 0).count(), 0, "{offset} {len}");
                    let mut back = vec![0; start + len + 1];
                    assert!(mapping.read(offset, &mut back[start..start + len]));
                    assert_eq!(&back[start..start + len], bytes);
                    assert_eq!(back[start + len], 0, "one more byte was written");
                }
            }
        }
    }

    #[test]
    fn words_lie_in_the_mapping_or_there_are_none() {
        let file = tempfile::tempfile().expect("a temporary file");
        file.set_len(4096).expect("it grows");
        let mapping = Mapping::new(file.as_fd(), 4096).expect("it can be mapped");
        let words = mapping.words::<2>(4080).expect("the last two");
        words[1].store(7, Ordering::Relaxed);
        assert_eq!(mapping.atomic_u64(4088).expect("the last one").load(Ordering::Relaxed), 7);
        for offset in [4, 4088, 4096, usize::MAX - 7] {
            assert!(mapping.words::<2>(offset).is_none(), "{offset}");
        }
    }

    #[test]
    fn a_copy_that_does_not_lie_in_the_mapping_is_not_made() {
        let file = tempfile::tempfile().expect("a temporary file");
        file.set_len(4096).expect("it grows");
        let mapping = Mapping::new(file.as_fd(), 4096).expect("it can be mapped");
        let mut buffer = [7; 2];
        for offset in [4095, 4096, usize::MAX] {
            assert!(!mapping.read(offset, &mut buffer));
            assert!(!mapping.write(offset, &buffer));
        }
        assert_eq!(buffer, [7; 2]);
        assert_eq!(mapping.atomic_u8(4095).expect("the last byte").load(Ordering::Relaxed), 0);
    }
}
