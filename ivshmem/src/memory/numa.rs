// SPDX-License-Identifier: GPL-2.0-or-later
//! The NUMA nodes that the memory is on.
//!
//! The kernel keeps the policy of a tmpfs file (so of a memfd and a POSIX object too) with the
//! file, for all that ever map it. So the object is mapped for a moment, bound, and unmapped. Pages
//! that exist stay where they are.
//!
//! Other files have no policy of their own: pages go by the policy of the thread that allocates
//! them. So the server's thread has that policy while it reserves the memory. On a hugetlbfs all
//! pages are allocated then, and stay. The pages of a file on a disk are the page cache's: the
//! server reads all of them in, but the kernel may drop such pages and read them again elsewhere.

#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;

use super::Error;
use crate::sys::{self, PolicyBefore};

/// The numbers of nodes; none is no choice.
#[derive(Clone, Debug, Default)]
pub(crate) struct Nodes(Vec<u32>);

impl Nodes {
    pub(crate) fn new(nodes: Vec<u32>) -> Self {
        Self(nodes)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &u32> {
        self.0.iter()
    }

    /// Refuses nodes that the machine does not have. Where /sys does not tell, the kernel itself
    /// has to.
    pub(super) fn check(&self) -> Result<(), Error> {
        let Some(has) = with_memory() else { return Ok(()) };
        let exists = |node: &u32| has.iter().any(|&(first, last)| (first..=last).contains(node));
        match self.0.iter().find(|node| !exists(node) || **node >= sys::MAX_NODES) {
            Some(&node) => Err(Error::NoNode { node, nodes: text_of(&has) }),
            None => Ok(()),
        }
    }

    /// Binds a tmpfs file to the nodes: pages that are allocated from now on.
    pub(super) fn bind(&self, object: &File, label: &str, size: u64) -> Result<(), Error> {
        if self.is_empty() {
            return Ok(());
        }
        let size = length(size).map_err(Error::system(label, "map"))?;
        sys::bind_to_nodes(object.as_fd(), size, &self.0)
            .map_err(Error::system(label, "bind to NUMA nodes"))
    }

    /// Has pages that this thread allocates on the nodes, until the result is dropped.
    pub(super) fn for_this_thread(&self, label: &str) -> Result<Option<PolicyBefore>, Error> {
        if self.is_empty() {
            return Ok(None);
        }
        let before = PolicyBefore::replace(&self.0);
        before.map(Some).map_err(Error::system(label, "choose NUMA nodes for"))
    }

    /// Reads all pages of a file on a disk in, by the policy of this thread.
    pub(super) fn read_in(&self, object: &File, label: &str, size: u64) -> Result<(), Error> {
        if self.is_empty() {
            return Ok(());
        }
        let size = length(size).map_err(Error::system(label, "map"))?;
        sys::read_in(object.as_fd(), size).map_err(Error::system(label, "read in"))?;
        log::warn!(
            "shared memory {label} is on a disk: its pages are on the NUMA nodes now, but pages \
             that the kernel drops and reads again may come to other nodes"
        );
        Ok(())
    }
}

fn length(size: u64) -> io::Result<usize> {
    usize::try_from(size).map_err(|_| io::ErrorKind::OutOfMemory.into())
}

/// The nodes that have memory: the first and the last of each range.
fn with_memory() -> Option<Vec<(u32, u32)>> {
    let read = |name| fs::read_to_string(format!("/sys/devices/system/node/{name}")).ok();
    parse(&read("has_memory").or_else(|| read("online"))?)
}

/// Parses a list as the kernel prints it: `0-1,4`.
fn parse(text: &str) -> Option<Vec<(u32, u32)>> {
    let range = |text: &str| {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        Some((first.parse().ok()?, last.parse().ok()?))
    };
    text.trim().split(',').map(range).collect()
}

fn text_of(ranges: &[(u32, u32)]) -> String {
    let text = |&(first, last): &(u32, u32)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    };
    ranges.iter().map(text).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_nodes_are_read_as_the_kernel_prints_them() {
        for text in ["0", "0-1", "0,2-3,7"] {
            assert_eq!(text_of(&parse(&format!("{text}\n")).expect("a list")), text);
        }
        assert!(parse("").is_none() && parse("0-x").is_none());
    }
}
