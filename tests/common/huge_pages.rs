// SPDX-License-Identifier: GPL-2.0-or-later
//! Huge pages that the host is asked for, and a hugetlbfs.
//!
//! The number of pages is one for the whole host, so a lock keeps other tests from changing it meanwhile.

#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::fcntl::{Flock, FlockArg};

use super::{PATIENCE, wait_up_to};

/// The number of huge pages, which is given back when dropped.
pub(crate) struct HugePages {
    before: u64,
    _lock: Flock<File>,
}

impl HugePages {
    const NUMBER: &str = "/proc/sys/vm/nr_hugepages";

    fn now() -> u64 {
        let text = fs::read_to_string(Self::NUMBER).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    }

    /// Makes so many more. None if the kernel gives fewer, or does not let this user.
    pub(crate) fn reserve(pages: u64) -> Option<Self> {
        let file = File::open(Self::NUMBER).ok()?;
        let lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno);
        let this = Self { before: Self::now(), _lock: lock.expect("flock works") };
        fs::write(Self::NUMBER, (this.before + pages).to_string()).ok()?;
        if Self::now() < this.before + pages {
            return None;
        }
        // Pages of processes that have just ended may still be on their way back.
        let are_free = || (Self::number("free_hugepages") >= pages).then_some(());
        wait_up_to(PATIENCE, are_free).map(|()| this)
    }

    /// Takes away all that are free, until this is dropped.
    pub(crate) fn take_free(&self) {
        fs::write(Self::NUMBER, "0").expect("it was written before");
        assert_eq!(Self::number("free_hugepages"), 0);
    }

    /// The number of pages that are there.
    pub(crate) fn total(&self) -> u64 {
        Self::now()
    }

    /// A number in the kernel's file about pages of the usual size.
    pub(crate) fn number(name: &str) -> u64 {
        let kib = Self::size() >> 10;
        let path = format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB/{name}");
        fs::read_to_string(path).expect("Linux with sysfs").trim().parse().expect("a number")
    }

    /// The size of a page, in bytes.
    pub(crate) fn size() -> u64 {
        let text = fs::read_to_string("/proc/meminfo").expect("Linux with /proc");
        let line = text.lines().find_map(|line| line.strip_prefix("Hugepagesize:"));
        let line = line.expect("the kernel has huge pages");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("kilobytes") << 10
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(Self::NUMBER, self.before.to_string());
    }
}

/// A hugetlbfs with pages of the usual size, which is unmounted when dropped.
pub(crate) struct HugeMount(PathBuf);

impl HugeMount {
    /// Mounts it at a new directory. None if this user may not.
    pub(crate) fn new(path: PathBuf) -> Option<Self> {
        fs::create_dir(&path).expect("the directory is new");
        let mut mount = Command::new("mount");
        let mount = mount.args(["-t", "hugetlbfs", "none"]).arg(&path).output();
        mount.expect("mount (Debian package mount)").status.success().then(|| Self(path))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for HugeMount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
