// SPDX-License-Identifier: GPL-2.0-or-later
//! Huge pages: which sizes the kernel has, and how many pages are free.
//!
//! A page that is missing kills a guest by SIGBUS at its first access, and fallocate(2) says only
//! "No space left on device". So the pages are counted before, and the error says what to do.
//!
//! This file reads /sys and /proc. It must not know where memory comes from.

#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};

use super::Error;
use super::numa::Nodes;

const POOLS: &str = "/sys/kernel/mm/hugepages";

/// The sizes of huge pages that the kernel has, in bytes, the smallest first.
fn sizes() -> Vec<u64> {
    let Ok(entries) = fs::read_dir(POOLS) else { return Vec::new() };
    let kib = |name: &str| -> Option<u64> {
        name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()
    };
    let mut sizes: Vec<u64> =
        entries.filter_map(|entry| Some(kib(entry.ok()?.file_name().to_str()?)? << 10)).collect();
    sizes.sort_unstable();
    sizes
}

/// A size as an option has it.
fn text_of(size: u64) -> String {
    let units = [(30, "G"), (20, "M"), (10, "K")];
    let unit = units.iter().find(|(shift, _)| size != 0 && size % (1 << shift) == 0);
    unit.map_or_else(|| size.to_string(), |(shift, unit)| format!("{}{unit}", size >> shift))
}

/// Refuses a size of pages that the kernel does not have. Where /sys does not tell, the kernel
/// itself has to.
pub(super) fn check_size(page: u64) -> Result<(), Error> {
    let sizes = sizes();
    if page.is_power_of_two() && (sizes.is_empty() || sizes.contains(&page)) {
        return Ok(());
    }
    let known: Vec<String> = sizes.into_iter().map(text_of).collect();
    Err(Error::NoHugePages { page: text_of(page), known: known.join(", ") })
}

/// The size of the huge pages of this object; none if it has usual pages.
pub(super) fn page_of(object: &File, label: &str) -> Result<Option<u64>, Error> {
    let system = fstatfs(object).map_err(Error::system(label, "look at"))?;
    let is_huge = system.filesystem_type() == HUGETLBFS_MAGIC;
    Ok(is_huge.then(|| system.block_size() as u64))
}

/// Refuses an object whose pages have another size.
pub(super) fn check_pages(object: &File, label: &str, page: u64) -> Result<(), Error> {
    let has = match page_of(object, label)? {
        Some(has) if has == page => return Ok(()),
        Some(has) => format!("pages of {}", text_of(has)),
        None => "usual pages".to_owned(),
    };
    Err(Error::OtherPages { memory: label.to_owned(), has, page: text_of(page) })
}

/// Refuses memory that needs more pages than are free. `missing` is what is not allocated yet, in
/// bytes.
pub(super) fn check_free(
    label: &str,
    wanted: u64,
    missing: u64,
    page: u64,
    nodes: &Nodes,
) -> Result<(), Error> {
    let needed = missing.div_ceil(page);
    match Pool::of(page, nodes).free() {
        Some(free) if free < needed => Err(too_few(label, wanted, missing, page, nodes)),
        _ => Ok(()),
    }
}

/// The error of an allocation that failed.
pub(super) fn too_few(label: &str, wanted: u64, missing: u64, page: u64, nodes: &Nodes) -> Error {
    let needed = missing.div_ceil(page);
    let pool = Pool::of(page, nodes);
    let free = pool.free().unwrap_or(0);
    let memory = label.to_owned();
    let remedy = pool.remedy(needed.saturating_sub(free).max(1), page, nodes);
    Error::FewHugePages { memory, wanted, needed, page: text_of(page), free, remedy }
}

/// The pages of one size, on all nodes or on some.
struct Pool {
    directories: Vec<PathBuf>,
    is_global: bool,
}

impl Pool {
    fn of(page: u64, nodes: &Nodes) -> Self {
        let name = format!("hugepages-{}kB", page >> 10);
        let node = |node: &u32| {
            Path::new("/sys/devices/system/node").join(format!("node{node}/hugepages/{name}"))
        };
        if nodes.is_empty() {
            return Self { directories: vec![Path::new(POOLS).join(name)], is_global: true };
        }
        Self { directories: nodes.iter().map(node).collect(), is_global: false }
    }

    /// The sum of a number. None if one cannot be read.
    fn sum(&self, name: &str) -> Option<u64> {
        let read = |directory: &PathBuf| number(&directory.join(name));
        self.directories.iter().map(read).sum()
    }

    /// The pages that can be had. Some are promised to others already, and the kernel may be
    /// allowed to make more. A node's files do not tell either.
    fn free(&self) -> Option<u64> {
        let free = self.sum("free_hugepages")?;
        if !self.is_global {
            return Some(free);
        }
        let promised = self.sum("resv_hugepages").unwrap_or(0);
        let surplus = self.sum("surplus_hugepages").unwrap_or(0);
        let more = self.sum("nr_overcommit_hugepages").unwrap_or(0).saturating_sub(surplus);
        Some(free.saturating_sub(promised) + more)
    }

    /// The command that makes so many pages more.
    fn remedy(&self, more: u64, page: u64, nodes: &Nodes) -> String {
        let total = self.sum("nr_hugepages").unwrap_or(0) + more;
        match (self.is_global, nodes.iter().next()) {
            (true, _) if usual_size() == Some(page) => format!("sysctl vm.nr_hugepages={total}"),
            (false, Some(_)) => {
                let now = number(&self.directories[0].join("nr_hugepages")).unwrap_or(0);
                let file = self.directories[0].join("nr_hugepages");
                format!("echo {} > {}", now + more, file.display())
            }
            _ => {
                let file = self.directories[0].join("nr_hugepages");
                format!("echo {total} > {}", file.display())
            }
        }
    }
}

fn number(file: &Path) -> Option<u64> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

/// The size of pages that the sysctl is about.
fn usual_size() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix("Hugepagesize:"))?;
    Some(value.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_printed_as_they_are_given() {
        for (size, text) in
            [(2 << 20, "2M"), (1 << 30, "1G"), (64 << 10, "64K"), (1000, "1000"), (0, "0")]
        {
            assert_eq!(text_of(size), text);
        }
    }

    #[test]
    fn a_size_of_pages_that_the_kernel_does_not_have_is_refused() {
        for page in [0, 3 << 20, 1 << 40] {
            let error = check_size(page).expect_err("there are no such pages");
            assert!(error.to_string().contains(&text_of(page)), "{error}");
        }
    }
}
