// SPDX-License-Identifier: GPL-2.0-or-later
//! The kind and the name of the shared memory, as the kernel tells them of its descriptor.
//!
//! It must not know the options of the command line: each kind of memory is described that has a
//! descriptor.

#![forbid(unsafe_code)]

use std::fs;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;

use nix::libc;
use nix::sys::stat::fstat;

/// The kind and the name.
pub(super) fn describe(memory: BorrowedFd<'_>) -> (&'static str, String) {
    let path = fs::read_link(format!("/proc/self/fd/{}", memory.as_raw_fd())).unwrap_or_default();
    let mode = fstat(memory).map_or(0, |stat| stat.st_mode & libc::S_IFMT);
    let is_device = mode == libc::S_IFCHR || mode == libc::S_IFBLK;
    kind_and_name(&path, is_device)
}

fn kind_and_name(path: &Path, is_device: bool) -> (&'static str, String) {
    let text = path.to_string_lossy();
    // The kernel adds this to a path that leads nowhere any more.
    let name = text.strip_suffix(" (deleted)").unwrap_or(&text);
    if is_device {
        return ("device", name.to_owned());
    }
    if let Some(name) = name.strip_prefix("/memfd:") {
        return ("memfd", name.to_owned());
    }
    if name.starts_with("/dev/shm/") && !name.contains("/#") {
        return ("posix", name.to_owned());
    }
    // A file that never had a name is called after its inode number.
    let directory = name.rsplit_once("/#").filter(|(_, inode)| inode.parse::<u64>().is_ok());
    ("file", directory.map_or(name, |(directory, _)| directory).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_told_from_its_path() {
        for (path, is_device, kind, name) in [
            ("/memfd:ivshmem (deleted)", false, "memfd", "ivshmem"),
            ("/dev/shm/red", false, "posix", "/dev/shm/red"),
            ("/dev/shm/red (deleted)", false, "posix", "/dev/shm/red"),
            ("/dev/hugepages/#1234 (deleted)", false, "file", "/dev/hugepages"),
            ("/dev/shm/#77 (deleted)", false, "file", "/dev/shm"),
            ("/srv/a#b", false, "file", "/srv/a#b"),
            ("/dev/dax0.0", true, "device", "/dev/dax0.0"),
        ] {
            assert_eq!(kind_and_name(Path::new(path), is_device), (kind, name.to_owned()));
        }
    }
}
