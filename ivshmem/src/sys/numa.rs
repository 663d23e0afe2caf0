// SPDX-License-Identifier: GPL-2.0-or-later
//! NUMA policies: mbind(2), set_mempolicy(2) and get_mempolicy(2), which libc has no functions
//! for.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use libc::{c_int, c_long, c_ulong, c_void};

/// Node numbers are smaller than this. No kernel is built for more.
pub(crate) const MAX_NODES: u32 = 1024;

/// `MPOL_BIND` of the kernel's `mempolicy.h`: these nodes and no others.
const MPOL_BIND: c_int = 2;

const BITS: usize = c_ulong::BITS as usize;

/// A set of nodes, as the kernel takes it.
type Mask = [c_ulong; MAX_NODES as usize / BITS];

/// How many bits the kernel is told of. It ignores the last one.
const MAX_NODE: c_ulong = MAX_NODES as c_ulong + 1;

/// The mask of numbers below [`MAX_NODES`]; others are left out.
fn mask_of(nodes: &[u32]) -> Mask {
    let mut mask = [0; MAX_NODES as usize / BITS];
    for &node in nodes.iter().filter(|&&node| node < MAX_NODES) {
        mask[node as usize / BITS] |= 1 << (node as usize % BITS);
    }
    mask
}

/// A mapping of an object that nothing accesses by its address.
struct Untouched {
    address: *mut c_void,
    len: usize,
}

impl Untouched {
    /// Maps `len` bytes for reading. A writable mapping would make a hugetlbfs file larger.
    fn new(object: BorrowedFd<'_>, len: usize) -> io::Result<Self> {
        // SAFETY: no address is asked for, so no mapping that exists is replaced.
        let address = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                object.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { address, len })
    }
}

impl Drop for Untouched {
    fn drop(&mut self) {
        // SAFETY: `new` made this mapping with this length, and nobody has its address.
        unsafe { libc::munmap(self.address, self.len) };
    }
}

fn checked(result: c_long) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Binds the first `len` bytes of an object to these nodes, for all processes. It has an effect on
/// objects of tmpfs only.
pub(crate) fn bind_to_nodes(object: BorrowedFd<'_>, len: usize, nodes: &[u32]) -> io::Result<()> {
    let mapping = Untouched::new(object, len)?;
    let mask = mask_of(nodes);
    // SAFETY: the range is the whole mapping. The kernel reads `MAX_NODE - 1` bits of the mask,
    // which has as many, and changes no memory of this process.
    checked(unsafe {
        libc::syscall(
            libc::SYS_mbind,
            mapping.address,
            mapping.len,
            MPOL_BIND,
            mask.as_ptr(),
            MAX_NODE,
            0,
        )
    })
}

/// Has the kernel read the first `len` bytes of a file into its page cache.
pub(crate) fn read_in(object: BorrowedFd<'_>, len: usize) -> io::Result<()> {
    let mapping = Untouched::new(object, len)?;
    // SAFETY: the range is the whole mapping, and the advice changes none of its bytes.
    checked(unsafe { libc::madvise(mapping.address, mapping.len, libc::MADV_POPULATE_READ).into() })
}

/// The policy that a thread had before; it has it again when this is dropped.
#[derive(Debug)]
pub(crate) struct PolicyBefore {
    mode: c_int,
    mask: Mask,
    /// It belongs to one thread.
    _not_send: PhantomData<*const ()>,
}

impl PolicyBefore {
    /// From now on this thread has pages allocated on these nodes only.
    pub(crate) fn replace(nodes: &[u32]) -> io::Result<Self> {
        let mut before = Self { mode: 0, mask: mask_of(&[]), _not_send: PhantomData };
        // SAFETY: the kernel writes an int, and `MAX_NODE - 1` bits to the mask, which has as many.
        checked(unsafe {
            libc::syscall(
                libc::SYS_get_mempolicy,
                &raw mut before.mode,
                before.mask.as_mut_ptr(),
                MAX_NODE,
                ptr::null::<c_void>(),
                0,
            )
        })?;
        set_policy(MPOL_BIND, &mask_of(nodes))?;
        Ok(before)
    }
}

impl Drop for PolicyBefore {
    fn drop(&mut self) {
        // It was this thread's, so the kernel takes it.
        let _ = set_policy(self.mode, &self.mask);
    }
}

/// Sets the policy of this thread.
fn set_policy(mode: c_int, mask: &Mask) -> io::Result<()> {
    // SAFETY: the kernel reads `MAX_NODE - 1` bits of the mask, which has as many.
    checked(unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, mask.as_ptr(), MAX_NODE) })
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn masks_have_the_bit_of_each_node() {
        let mask = mask_of(&[0, 63, 64, 1023, 1024]);
        assert_eq!((mask[0], mask[1], mask[15]), (1 << 63 | 1, 1, 1 << 63));
    }

    #[test]
    fn a_node_that_does_not_exist_is_an_error() {
        let file = tempfile::tempfile().expect("a temporary file");
        file.set_len(4096).expect("it grows");
        read_in(file.as_fd(), 4096).expect("all of it is there");
        for nodes in [&[0][..], &[1000]] {
            assert_eq!(bind_to_nodes(file.as_fd(), 4096, nodes).is_ok(), nodes == [0]);
            assert_eq!(PolicyBefore::replace(nodes).is_ok(), nodes == [0]);
        }
    }

    #[test]
    fn a_thread_has_its_policy_again() {
        let policy = || {
            let now = PolicyBefore::replace(&[0]).expect("there is a node");
            (now.mode, now.mask)
        };
        let usual = policy();
        let before = PolicyBefore::replace(&[0]).expect("there is a node");
        assert_eq!(policy(), (MPOL_BIND, mask_of(&[0])));
        drop(before);
        assert_eq!(policy(), usual);
    }
}
