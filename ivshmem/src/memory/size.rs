// SPDX-License-Identifier: GPL-2.0-or-later
//! The size rule of the shared memory, one for all kinds.
//!
//! The size asked for is rounded up to a power of two, as a PCI BAR needs it, and on hugetlbfs up
//! to the page size. An exact size is not rounded. An object that exists keeps its content. It may grow, but it never shrinks
//! below what a server has served: that kills by SIGBUS each process that has mapped what is cut
//! off. All of it is reserved at the start, so that a file system that is too small makes the
//! start fail, and not a guest.
//!
//! This file knows an object and its file system; it does not know where the object comes from.

#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};
use nix::unistd::ftruncate;

use super::numa::Nodes;
use super::{Error, huge};

/// The size of a usual page; larger ones are multiples of it.
const PAGE: u64 = 4096;

/// The largest power of two that a file's length can be.
pub(crate) const MAX_SIZE: u64 = 1 << 62;

/// How the size asked for becomes that of the object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rule {
    /// Up to a power of two, and to the page size.
    RoundUp,
    /// It must be a multiple of the page size.
    Exact,
    /// A server before has served it so.
    AsBefore,
}

/// The size that is asked for.
#[derive(Debug)]
pub(super) struct Request<'a> {
    /// In bytes.
    pub(super) size: u64,
    pub(super) rule: Rule,
    /// The size with which a server served this object last, if that is known: growth beyond it
    /// is not a server's, and is cut off.
    pub(super) served: Option<u64>,
    pub(super) nodes: &'a Nodes,
}

/// Takes an object as it is, and returns its size.
pub(super) fn take(object: &File, label: &str, is_exact: bool) -> Result<u64, Error> {
    let size = object.metadata().map_err(Error::system(label, "look at"))?.len();
    check_fit(label, size, is_exact)?;
    Ok(size)
}

/// Whether a device, of `has` bytes, has the size that is asked for. Returns that size.
pub(super) fn check_fixed(
    label: &str,
    has: u64,
    size: Option<u64>,
    is_exact: bool,
) -> Result<u64, Error> {
    if let Some(size) = size {
        let wanted = if is_exact { Some(size) } else { round_up(size, 1) };
        let wanted = wanted.ok_or(Error::Size { size })?;
        if wanted != has {
            return Err(Error::FixedSize { memory: label.to_owned(), has, wanted });
        }
    }
    check_fit(label, has, is_exact)?;
    Ok(has)
}

fn check_fit(label: &str, size: u64, is_exact: bool) -> Result<(), Error> {
    if size.is_power_of_two() || (is_exact && size != 0) {
        return Ok(());
    }
    Err(Error::NotPowerOfTwo { memory: label.to_owned(), size })
}

/// Gives `object` its size and returns it.
pub(super) fn reserve(object: &File, label: &str, request: &Request<'_>) -> Result<u64, Error> {
    let &Request { size, rule, served, nodes } = request;
    let memory = || label.to_owned();
    let failed = |action| Error::system::<io::Error>(label, action);
    let meta = object.metadata().map_err(failed("look at"))?;
    let has = meta.len();
    let system = fstatfs(object).map_err(Error::system(label, "look at"))?;
    let huge = system.filesystem_type() == HUGETLBFS_MAGIC;
    let page = if huge { system.block_size() as u64 } else { 1 };
    let wanted = match rule {
        Rule::RoundUp => round_up(size, page).ok_or(Error::Size { size })?,
        Rule::Exact => exact(size, page.max(PAGE))?,
        Rule::AsBefore => size,
    };
    let length = wanted as i64;
    if has > wanted {
        if served.is_none_or(|served| served > wanted) {
            return Err(Error::Shrink { memory: memory(), has, wanted });
        }
        ftruncate(object, length).map_err(Error::system(label, "cut back"))?;
        log::warn!(
            "shared memory {label} had grown to {has} bytes since a server served it; it is cut \
             back to {wanted}"
        );
    }
    // The kernel does not only refuse what is beyond this limit, it kills by SIGXFSZ.
    let (limit, _) =
        getrlimit(Resource::RLIMIT_FSIZE).map_err(Error::system(label, "find the limit for"))?;
    if wanted > has && wanted > limit {
        return Err(Error::Limit { memory: memory(), wanted, limit });
    }
    // Asked first: to fill a file system to the brim, only to learn that it is too small, would
    // make other programs fail that write to it meanwhile. A file system without a limit
    // says 0 blocks.
    let allocated = meta.blocks().saturating_mul(512);
    let available = |free: u64| free.saturating_add(allocated);
    let no_room = |available| Error::NoRoom { memory: memory(), wanted, available };
    let left = bytes_of(system.blocks_available() as u64, system.block_size() as u64);
    let file_system = (system.blocks() > 0).then_some(left);
    // Sealed memory has no such limit, and a tmpfs may have one above what the machine has:
    // then the kernel would kill other processes until it fits.
    let tmpfs = system.filesystem_type() == TMPFS_MAGIC;
    let machine = if tmpfs { free_memory() } else { None };
    match file_system.into_iter().chain(machine).min().map(available) {
        Some(available) if wanted > available => return Err(no_room(available)),
        _ => {}
    }
    let missing = wanted.saturating_sub(allocated);
    if huge {
        huge::check_free(label, wanted, missing, page, nodes)?;
    }
    if tmpfs {
        nodes.bind(object, label, wanted)?;
    }
    let policy = nodes.for_this_thread(label)?;
    let reserved = loop {
        match fallocate(object, FallocateFlags::empty(), 0, length) {
            Err(Errno::EINTR) => {}
            result => break result,
        }
    };
    match reserved {
        Ok(()) => {}
        Err(Errno::EOPNOTSUPP) if has == wanted => {}
        Err(Errno::EOPNOTSUPP) => {
            ftruncate(object, length).map_err(Error::system(label, "set the size of"))?;
        }
        Err(Errno::ENOSPC | Errno::ENOMEM) if huge => {
            return Err(huge::too_few(label, wanted, missing, page, nodes));
        }
        Err(Errno::ENOSPC) => return Err(no_room(available(left))),
        Err(Errno::EFBIG) => return Err(Error::Size { size }),
        Err(errno) => return Err(Error::system(label, "reserve")(errno)),
    }
    if !tmpfs && !huge {
        nodes.read_in(object, label, wanted)?;
    }
    drop(policy);
    Ok(wanted)
}

/// The size that memory of exactly `size` bytes gets.
fn exact(size: u64, page: u64) -> Result<u64, Error> {
    if size == 0 || size > MAX_SIZE {
        return Err(Error::Size { size });
    }
    if size % page != 0 {
        return Err(Error::Inexact { size, page });
    }
    Ok(size)
}

/// Bytes in so many blocks. A file system without a real limit (FUSE, network) may report any
/// number of blocks.
fn bytes_of(blocks: u64, block_size: u64) -> u64 {
    blocks.saturating_mul(block_size)
}

/// Bytes that the machine's memory and swap have room for, where /proc tells.
fn free_memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let kib = |name: &str| -> Option<u64> {
        let value = text.lines().find_map(|line| line.strip_prefix(name))?;
        value.trim().strip_suffix(" kB")?.parse().ok()
    };
    Some((kib("MemAvailable:")? + kib("SwapFree:")?) * 1024)
}

/// The size that memory of `size` bytes gets where pages have `page` bytes.
fn round_up(size: u64, page: u64) -> Option<u64> {
    if size == 0 {
        return None;
    }
    size.checked_next_power_of_two().map(|size| size.max(page)).filter(|&size| size <= MAX_SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_rounded_up_to_a_power_of_two_and_to_the_page() {
        assert_eq!(round_up(1, 1), Some(1));
        assert_eq!(round_up(3 << 30, 1), Some(4 << 30));
        assert_eq!(round_up((4 << 30) + 1, 1), Some(8 << 30));
        assert_eq!(round_up(1, 2 << 20), Some(2 << 20));
        assert_eq!(round_up(3 << 20, 2 << 20), Some(4 << 20));
        assert_eq!(round_up(MAX_SIZE, 1), Some(MAX_SIZE));
    }

    #[test]
    fn exact_sizes_are_multiples_of_the_page_size() {
        assert_eq!(exact(3 << 20, PAGE).expect("a multiple"), 3 << 20);
        assert!(matches!(exact(100, PAGE), Err(Error::Inexact { size: 100, page: PAGE })));
        assert!(matches!(exact(3 << 20, 2 << 20), Err(Error::Inexact { .. })));
        for size in [0, MAX_SIZE + PAGE] {
            assert!(matches!(exact(size, PAGE), Err(Error::Size { .. })));
        }
    }

    #[test]
    fn a_device_keeps_its_size() {
        let check = |size, is_exact| check_fixed("(test)", 4096, size, is_exact);
        for size in [None, Some(4096), Some(4000)] {
            assert_eq!(check(size, false).expect("it fits"), 4096);
        }
        let error = check(Some(64), false).expect_err("it cannot shrink");
        assert!(matches!(error, Error::FixedSize { has: 4096, wanted: 64, .. }));
        assert!(matches!(check(Some(4000), true), Err(Error::FixedSize { .. })));
        let uneven = |is_exact| check_fixed("(test)", 3 << 12, None, is_exact);
        assert!(matches!(uneven(false), Err(Error::NotPowerOfTwo { .. })));
        assert_eq!(uneven(true).expect("exactly"), 3 << 12);
    }

    #[test]
    fn impossible_sizes_are_refused() {
        assert_eq!(round_up(0, 4096), None);
        assert_eq!(round_up(MAX_SIZE + 1, 1), None);
        assert_eq!(round_up(u64::MAX, 1), None);
    }

    #[test]
    fn a_file_system_that_reports_any_number_of_blocks_does_not_overflow() {
        assert_eq!(bytes_of(3, 4096), 12288);
        assert_eq!(bytes_of(u64::MAX, 4096), u64::MAX);
        assert_eq!(bytes_of(1 << 60, 1 << 20), u64::MAX);
    }

    #[test]
    fn growth_since_it_was_served_is_cut_off_and_other_large_objects_are_refused() {
        let file = tempfile::tempfile().expect("a temporary file");
        let nodes = Nodes::default();
        let reserve = |size, served| {
            let request = Request { size, rule: Rule::RoundUp, served, nodes: &nodes };
            super::reserve(&file, "(test)", &request)
        };
        file.set_len(1 << 20).expect("it can grow");
        for served in [None, Some(128 << 10)] {
            let error = reserve(64 << 10, served).expect_err("it would have to shrink");
            assert!(matches!(error, Error::Shrink { has: 0x10_0000, wanted: 0x1_0000, .. }));
        }
        assert_eq!(file.metadata().expect("fstat works").len(), 1 << 20);
        for served in [64 << 10, 4096] {
            file.set_len((1 << 20) + 1).expect("it can grow");
            assert_eq!(reserve(64 << 10, Some(served)).expect("it is cut back"), 64 << 10);
            assert_eq!(file.metadata().expect("fstat works").len(), 64 << 10);
        }
    }
}
