// SPDX-License-Identifier: GPL-2.0-or-later
//! Why the shared memory cannot be served.

#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::io;

use nix::errno::Errno;

use super::size::MAX_SIZE;
use crate::error::{ErrorKind, errno_of};

/// Why the shared memory cannot be served.
///
/// ```
/// use ivshmem::{Error, MemoryError, MemorySource, Server};
///
/// let memory = MemorySource::Posix("a/b".into());
/// let error = Server::builder().socket_path("/nowhere").memory(memory).start().unwrap_err();
/// assert!(matches!(error, Error::Memory(MemoryError::Name { .. })));
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Another server serves this shared memory.
    #[error("shared memory {name:?} is in use by another server; stop it or choose another name")]
    InUse {
        /// The name of the POSIX shared memory object, or the path of the file.
        name: OsString,
    },
    /// The block device is in use.
    #[error(
        "shared memory {memory} is in use: it is mounted, or part of another device, or another \
         server serves it"
    )]
    Busy {
        /// Which memory.
        memory: String,
    },
    /// The name cannot be one of a POSIX shared memory object.
    #[error(
        "shared memory name {name:?} is not valid; it must be 1 to 254 bytes with no '/' but \
         at its start, and not \".\" or \"..\", and must not begin with \".ivshmem-lock.\""
    )]
    Name {
        /// The name as given.
        name: OsString,
    },
    /// The mode for shared memory cannot be used.
    #[error(
        "mode {mode:o} is not possible for shared memory; it must be 600 to 777 in octal and let its owner read and write"
    )]
    Mode {
        /// The mode as given.
        mode: u32,
    },
    /// The object is larger than asked for. To shrink it would kill, by SIGBUS, each process
    /// that has mapped what is cut off.
    #[error(
        "shared memory {memory} has {has} bytes already and would have to shrink to {wanted}; \
         ask for {has} bytes, or remove it if nobody uses it"
    )]
    Shrink {
        /// Which memory.
        memory: String,
        /// Its size, in bytes.
        has: u64,
        /// The size asked for, rounded up, in bytes.
        wanted: u64,
    },
    /// The device has another size than was asked for, and keeps it.
    #[error(
        "shared memory {memory} has {has} bytes, and a device keeps its size; {wanted} bytes are \
         not possible; ask for {has}, or for no size"
    )]
    FixedSize {
        /// Which memory.
        memory: String,
        /// Its size, in bytes.
        has: u64,
        /// The size asked for, rounded up unless it is exact, in bytes.
        wanted: u64,
    },
    /// No memory can have this size.
    #[error(
        "shared memory size {size} is not possible; it must be 1 to {MAX_SIZE} bytes and is \
         rounded up to a power of two"
    )]
    Size {
        /// The size asked for, in bytes.
        size: u64,
    },
    /// No memory can have exactly this size.
    #[error(
        "shared memory of exactly {size} bytes is not possible; it must be a multiple of the page \
         size, {page} bytes"
    )]
    Inexact {
        /// The size asked for, in bytes.
        size: u64,
        /// The page size, in bytes.
        page: u64,
    },
    /// The object has a size that QEMU cannot use for a PCI BAR.
    #[error(
        "shared memory {memory} has {size} bytes; its size must be a power of two, as it \
         becomes a PCI BAR, unless an exact size is asked for"
    )]
    NotPowerOfTwo {
        /// Which memory.
        memory: String,
        /// Its size, in bytes.
        size: u64,
    },
    /// Something that is not a memory object has its name.
    #[error(
        "shared memory {memory} is no regular file; remove what has that name, or choose another \
         name"
    )]
    NotAFile {
        /// Which memory.
        memory: String,
    },
    /// What the path leads to is no memory.
    #[error(
        "shared memory {memory} is {found}; it must be a regular file, a block device or a DAX \
         device"
    )]
    NotMemory {
        /// Which memory.
        memory: String,
        /// What it is.
        found: &'static str,
    },
    /// Another user could make the path lead elsewhere.
    #[error(
        "shared memory {memory} is a symbolic link of user id {owner}, which another user could \
         change; give the path that it leads to"
    )]
    Link {
        /// Which memory.
        memory: String,
        /// The user who owns the link.
        owner: u32,
    },
    /// The file has another name too, by which another server or user may reach it.
    #[error(
        "shared memory {memory} has a second name (a hard link); remove one of them, or make a copy"
    )]
    Linked {
        /// Which memory.
        memory: String,
    },
    /// The memory would have to stay at the end, and has no name.
    #[error(
        "shared memory {memory} has no name by which it could be kept; use a POSIX object or a file"
    )]
    Nameless {
        /// Which memory.
        memory: String,
    },
    /// The kernel has no huge pages of this size.
    #[error("huge pages of {page} are not possible; the kernel has the sizes {known}")]
    NoHugePages {
        /// The size asked for.
        page: String,
        /// The sizes that exist.
        known: String,
    },
    /// The memory has other pages than were asked for.
    #[error(
        "shared memory {memory} must have huge pages of {page}, but has {has}; use sealed memory, \
         or a hugetlbfs that is mounted with pagesize={page}"
    )]
    OtherPages {
        /// Which memory.
        memory: String,
        /// The pages that it has.
        has: String,
        /// The size asked for.
        page: String,
    },
    /// There are not enough free huge pages.
    #[error(
        "shared memory {memory} of {wanted} bytes does not fit: it needs {needed} huge pages of \
         {page}, and {free} are free; ask for less, or run: {remedy}"
    )]
    FewHugePages {
        /// Which memory.
        memory: String,
        /// The size asked for, rounded up, in bytes.
        wanted: u64,
        /// How many pages are missing in the object.
        needed: u64,
        /// The size of a page.
        page: String,
        /// How many can be had.
        free: u64,
        /// The command that makes enough pages.
        remedy: String,
    },
    /// The machine does not have this NUMA node.
    #[error("NUMA node {node} does not exist; the nodes with memory are {nodes}")]
    NoNode {
        /// The number of the node.
        node: u32,
        /// The nodes that exist, as ranges.
        nodes: String,
    },
    /// The memory of a device cannot be allocated elsewhere.
    #[error("shared memory {memory} is a device, which cannot be bound to NUMA nodes")]
    Unmovable {
        /// Which memory.
        memory: String,
    },
    /// Another user owns the object, and so could change or remove it at any time.
    #[error(
        "{memory} belongs to user id {owner} and has mode {mode:04o}, but the server runs as user \
         id {user} and uses only what that user owns; remove it, or choose another name"
    )]
    Foreign {
        /// Which object.
        memory: String,
        /// The user who owns it.
        owner: u32,
        /// Its mode.
        mode: u32,
        /// The user that the server runs as.
        user: u32,
    },
    /// Other users may write the object, and nobody told the server that they may.
    #[error(
        "{memory} of user id {owner} has mode {mode:04o}, so others may write it, but the mode for \
         shared memory is {allowed:04o}; change the mode of the object, or allow it to the server"
    )]
    Writable {
        /// Which object.
        memory: String,
        /// The user who owns it.
        owner: u32,
        /// Its mode.
        mode: u32,
        /// The mode that a new object would get.
        allowed: u32,
    },
    /// Another group than the one that was asked for may write the object.
    #[error(
        "{memory} belongs to group id {group} and has mode {mode:04o}, so that group may write it, \
         but the group for shared memory is {wanted}; change the group of the object, or remove it"
    )]
    OtherGroup {
        /// Which object.
        memory: String,
        /// Its group.
        group: u32,
        /// Its mode.
        mode: u32,
        /// The group that a new object would get.
        wanted: u32,
    },
    /// The new object could not be given to this group.
    #[error(
        "cannot give shared memory {memory} to group id {group}; only root may name a group that \
         it is not in"
    )]
    Group {
        /// Which memory.
        memory: String,
        /// The group as given.
        group: u32,
        /// Why it failed.
        source: io::Error,
    },
    /// The file system has no room for the memory.
    #[error(
        "shared memory {memory} of {wanted} bytes does not fit: its file system has {available} \
         bytes left; ask for less, or make room"
    )]
    NoRoom {
        /// Which memory.
        memory: String,
        /// The size asked for, rounded up, in bytes.
        wanted: u64,
        /// What the file system has left, in bytes.
        available: u64,
    },
    /// The process may not make a file as large as the memory.
    #[error(
        "shared memory {memory} of {wanted} bytes is above the limit of file sizes, {limit} bytes; \
         ask for less, or raise the limit (RLIMIT_FSIZE)"
    )]
    Limit {
        /// Which memory.
        memory: String,
        /// The size asked for, rounded up, in bytes.
        wanted: u64,
        /// The limit, in bytes.
        limit: u64,
    },
    /// A system call for the memory failed.
    #[error("cannot {action} shared memory {memory}")]
    System {
        /// Which memory.
        memory: String,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

impl Error {
    /// The kind of the reason.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::InUse { .. } | Self::Busy { .. } => ErrorKind::InUse,
            Self::NotAFile { .. }
            | Self::NotMemory { .. }
            | Self::Shrink { .. }
            | Self::FixedSize { .. } => ErrorKind::Occupied,
            Self::Foreign { .. }
            | Self::Writable { .. }
            | Self::OtherGroup { .. }
            | Self::Link { .. }
            | Self::Linked { .. } => ErrorKind::Untrusted,
            Self::NoRoom { .. } | Self::Limit { .. } | Self::FewHugePages { .. } => {
                ErrorKind::NoRoom
            }
            Self::Name { .. }
            | Self::Mode { .. }
            | Self::Size { .. }
            | Self::Inexact { .. }
            | Self::NotPowerOfTwo { .. }
            | Self::Nameless { .. }
            | Self::NoHugePages { .. }
            | Self::OtherPages { .. }
            | Self::NoNode { .. }
            | Self::Unmovable { .. } => ErrorKind::InvalidInput,
            Self::Group { .. } | Self::System { .. } => ErrorKind::System,
        }
    }

    /// The `errno` that says this in C.
    pub fn errno(&self) -> i32 {
        let errno = match self {
            Self::Limit { .. } => Errno::EFBIG,
            Self::Group { source, .. } | Self::System { source, .. } => return errno_of(source),
            _ => match self.kind() {
                ErrorKind::InUse => Errno::EBUSY,
                ErrorKind::Occupied => Errno::EEXIST,
                ErrorKind::Untrusted => Errno::EACCES,
                ErrorKind::NoRoom => Errno::ENOSPC,
                _ => Errno::EINVAL,
            },
        };
        errno as i32
    }

    /// For `map_err`: the call that does `action` to `memory` failed.
    pub(super) fn system<E: Into<io::Error>>(
        memory: &str,
        action: &'static str,
    ) -> impl FnOnce(E) -> Self {
        let memory = memory.to_owned();
        move |source| Self::System { memory, action, source: source.into() }
    }
}
