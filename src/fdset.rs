// SPDX-License-Identifier: GPL-2.0-or-later
//! Descriptors in the form of `select(2)`: a bit for each of the first 1,024.

use std::ffi::{c_int, c_ulong};
use std::os::fd::RawFd;

/// Descriptors from this one on have no bit, whatever size the caller's `fd_set` may have.
const LIMIT: usize = libc::FD_SETSIZE;
const WORD: usize = c_ulong::BITS as usize;
type Words = [c_ulong; LIMIT / WORD];

const _: () = {
    assert!(size_of::<libc::fd_set>() == size_of::<Words>());
    assert!(align_of::<libc::fd_set>() == align_of::<Words>());
};

/// A set of descriptors. It leaves out descriptors that are too large for it; this is no error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FdSet(Words);

impl FdSet {
    pub(super) fn new() -> Self {
        Self([0; LIMIT / WORD])
    }

    pub(super) fn add(&mut self, fd: RawFd) {
        if let Some((word, bit)) = place(fd) {
            self.0[word] |= bit;
        }
    }

    pub(super) fn remove(&mut self, fd: RawFd) {
        if let Some((word, bit)) = place(fd) {
            self.0[word] &= !bit;
        }
    }

    /// One more than the largest that is in it.
    fn end(&self) -> c_int {
        let top = self.0.iter().rposition(|&word| word != 0);
        top.map_or(0, |top| ((top + 1) * WORD) as c_int - self.0[top].leading_zeros() as c_int)
    }

    /// Adds all of it to a caller's set, and raises its `maxfd`.
    ///
    /// # Safety
    /// Both are valid for reads and writes, and no other thread uses them meanwhile.
    pub(super) unsafe fn add_to(&self, fds: *mut libc::fd_set, maxfd: *mut c_int) {
        // SAFETY: an fd_set has the size and the alignment of Words (asserted above), and is
        // nothing but integers; the caller vouches for the pointer.
        let theirs = unsafe { &mut *fds.cast::<Words>() };
        for (theirs, ours) in theirs.iter_mut().zip(&self.0) {
            *theirs |= ours;
        }
        // SAFETY: the caller vouches for the pointer.
        unsafe { *maxfd = self.end().max(*maxfd) };
    }

    /// Whether one of it is in a caller's set, below `maxfd`.
    ///
    /// # Safety
    /// `fds` is valid for reads.
    pub(super) unsafe fn meets(&self, fds: *const libc::fd_set, maxfd: c_int) -> bool {
        // SAFETY: as in `add_to`.
        let theirs = unsafe { &*fds.cast::<Words>() };
        let maxfd = usize::try_from(maxfd).unwrap_or(0);
        self.0.iter().zip(theirs).enumerate().any(|(index, (ours, theirs))| {
            let below = match maxfd.saturating_sub(index * WORD) {
                0 => 0,
                bits if bits < WORD => (1 << bits) - 1,
                _ => c_ulong::MAX,
            };
            ours & theirs & below != 0
        })
    }
}

/// The word and the bit of a descriptor.
fn place(fd: RawFd) -> Option<(usize, c_ulong)> {
    let fd = usize::try_from(fd).ok().filter(|&fd| fd < LIMIT)?;
    Some((fd / WORD, 1 << (fd % WORD)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_c(fds: &[RawFd]) -> libc::fd_set {
        // SAFETY: an fd_set is integers only; all zeroes is the empty one.
        let mut set: libc::fd_set = unsafe { std::mem::zeroed() };
        for &fd in fds {
            // SAFETY: the set is initialised, and each fd below FD_SETSIZE.
            unsafe { libc::FD_SET(fd, &raw mut set) };
        }
        set
    }

    #[test]
    fn bits_and_maxfd_are_those_of_the_c_macros() {
        let mut ours = FdSet::new();
        for fd in [3, 63, 64, 1023, 1024, 5000, -1] {
            ours.add(fd);
        }
        let (mut theirs, mut maxfd) = (of_c(&[7]), 8);
        // SAFETY: both are ours.
        unsafe { ours.add_to(&raw mut theirs, &raw mut maxfd) };
        // SAFETY: the set is initialised and each fd below FD_SETSIZE.
        let set: Vec<_> = (0..1024).filter(|&fd| unsafe { libc::FD_ISSET(fd, &theirs) }).collect();
        assert_eq!((set, maxfd), (vec![3, 7, 63, 64, 1023], 1024));

        ours.remove(1023);
        ours.remove(4096);
        let mut maxfd = -5;
        // SAFETY: both are ours.
        unsafe { ours.add_to(&raw mut theirs, &raw mut maxfd) };
        assert_eq!(maxfd, 65);
    }

    #[test]
    fn a_set_meets_only_what_is_in_both_and_below_maxfd() {
        let mut ours = FdSet::new();
        ours.add(64);
        ours.add(5);
        // SAFETY: the sets are initialised.
        let meets = |fds: &[RawFd], maxfd| unsafe { ours.meets(&of_c(fds), maxfd) };
        assert!(meets(&[64], 65) && meets(&[5], 6) && meets(&[64], c_int::MAX));
        assert!(!meets(&[64], 64) && !meets(&[5], 5) && !meets(&[5], 0) && !meets(&[5], -1));
        assert!(!meets(&[], 1024) && !meets(&[6, 63, 65, 1023], 1024));
    }
}
