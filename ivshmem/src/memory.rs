// SPDX-License-Identifier: GPL-2.0-or-later
//! The shared memory: where it comes from, how large it is, and whose it is.
//!
//! # The size rule
//! The size asked for is rounded up to a power of two, as a PCI BAR needs it, and on
//! hugetlbfs up to the page size. An object that exists keeps its content; it may grow, but
//! never shrinks, since that kills by SIGBUS whoever has mapped what is cut off. All of it is
//! reserved at the start, so that a file system that is too small is found out here and not
//! by a guest.
//!
//! # Whose a named object is
//! A POSIX name belongs to one server at a time: it holds an flock on it. Clients get a
//! descriptor of the object that was opened apart, since a lock belongs to the open file
//! description, and theirs may outlive the server.

#![forbid(unsafe_code)]

use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, SealFlag, fallocate, fcntl, open};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{shm_open, shm_unlink};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::stat::Mode;
use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};
use nix::unistd::{ftruncate, geteuid, unlink};

use crate::Error;
use crate::sys;

/// The largest power of two that a file's length can be.
pub(crate) const MAX_SIZE: u64 = 1 << 62;

/// Where shm_open(3) of Linux's C libraries has its names.
const SHM_DIRECTORY: &str = "/dev/shm";

/// Where the shared memory comes from.
///
/// ```
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("socket");
/// use ivshmem::{MemorySource, Server};
///
/// let source = MemorySource::Directory(dir.path().into());
/// let server = Server::builder().socket_path(&path).memory(source).size(3 << 20).start()?;
/// assert_eq!(server.memory_size(), 4 << 20, "a power of two");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[non_exhaustive]
pub enum MemorySource {
    /// The POSIX shared memory object of this name (`shm_open(3)`), made with mode 0700 if it
    /// does not exist, and removed when the server is closed.
    Posix(String),
    /// A file without a name in this directory, which may be a hugetlbfs.
    Directory(PathBuf),
    /// An anonymous memfd, sealed: no client can shrink it under the others, as it can with
    /// every other kind.
    Sealed,
    /// An object that the caller has, with its content. Its size must be a power of two, or
    /// smaller than the one asked for.
    Descriptor(OwnedFd),
}

/// The memory that is served. Dropping it removes a POSIX name that is ours.
#[derive(Debug)]
pub(crate) struct Memory {
    /// What clients get.
    object: File,
    /// Holds the lock of a named object.
    lock: Option<File>,
    name: Option<String>,
    /// Whether the name goes when this is dropped.
    removes_name: bool,
    /// How errors call it.
    label: String,
    size: u64,
}

impl Memory {
    /// Opens, or makes, the memory, without changing its size yet.
    pub(crate) fn open(source: MemorySource) -> Result<Self, Error> {
        let unnamed = |fd: OwnedFd, label| Self {
            object: File::from(fd),
            lock: None,
            name: None,
            removes_name: false,
            label,
            size: 0,
        };
        match source {
            MemorySource::Posix(name) => Self::posix(name),
            MemorySource::Directory(directory) => {
                let fd = temporary(&directory)?;
                Ok(unnamed(fd, format!("in directory {directory:?}")))
            }
            MemorySource::Sealed => {
                let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
                let fd = memfd_create(c"ivshmem", flags).map_err(|errno| Error::Memory {
                    memory: "(memfd)".into(),
                    action: "create",
                    source: errno.into(),
                })?;
                Ok(unnamed(fd, "(memfd)".into()))
            }
            MemorySource::Descriptor(fd) => Ok(unnamed(fd, "(given descriptor)".into())),
        }
    }

    fn posix(name: String) -> Result<Self, Error> {
        // As shm_open(3) does: slashes at the start do not count.
        let bare = name.trim_start_matches('/');
        if bare.is_empty()
            || bare.len() > 254
            || bare == "."
            || bare == ".."
            || bare.contains(['/', '\0'])
        {
            return Err(Error::MemoryName { name });
        }
        let path = format!("/{bare}");
        let label = format!("{name:?}");
        let failed = |action| {
            let memory = label.clone();
            move |errno: Errno| Error::Memory { memory, action, source: errno.into() }
        };
        // Whoever closes a server removes the name while it holds the lock, so the object
        // that was opened may have lost its name by the time it is locked: then again.
        loop {
            let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC;
            let new = flags | OFlag::O_CREAT | OFlag::O_EXCL;
            let (created, fd) = match shm_open(path.as_str(), new, Mode::S_IRWXU) {
                Ok(fd) => (true, fd),
                Err(Errno::EEXIST) => match shm_open(path.as_str(), flags, Mode::empty()) {
                    Ok(fd) => (false, fd),
                    Err(Errno::ENOENT) => continue,
                    Err(errno) => return Err(failed("open")(errno)),
                },
                Err(errno) => return Err(failed("create")(errno)),
            };
            let lock = File::from(fd);
            match sys::lock(&lock) {
                Ok(()) => {}
                Err(Errno::EAGAIN) => return Err(Error::MemoryInUse { name }),
                Err(errno) => {
                    // It is ours to remove, unless somebody has made use of it already.
                    if created && lock.metadata().is_ok_and(|meta| meta.len() == 0) {
                        let _ = shm_unlink(path.as_str());
                    }
                    return Err(failed("lock")(errno));
                }
            }
            let meta = lock.metadata().map_err(|source| {
                if created {
                    let _ = shm_unlink(path.as_str());
                }
                Error::Memory { memory: label.clone(), action: "look at", source }
            })?;
            if !meta.is_file() {
                return Err(Error::MemoryKind { memory: label });
            }
            // Of two starters one may make the object and the other lock it. The maker is
            // refused then, and must leave it alone; so the other has to remove it should it
            // fail itself. It is known by its being as it was made: no server has given it a
            // size, and somebody else would hardly have given it this mode.
            let as_made = meta.len() == 0
                && meta.mode() & 0o7777 == Mode::S_IRWXU.bits()
                && meta.uid() == geteuid().as_raw();
            let created = created || as_made;
            let object = match shm_open(path.as_str(), flags, Mode::empty()) {
                Ok(fd) => File::from(fd),
                Err(Errno::ENOENT) => continue,
                Err(errno) => {
                    if created {
                        let _ = shm_unlink(path.as_str());
                    }
                    return Err(failed("open")(errno));
                }
            };
            if !object.metadata().is_ok_and(|object| is_same(&meta, &object)) {
                continue;
            }
            return Ok(Self {
                object,
                lock: Some(lock),
                name: Some(path),
                removes_name: created,
                label,
                size: 0,
            });
        }
    }

    /// Gives the memory its size, in bytes: the size rule at the head of this file.
    ///
    /// Without a size, the object's own is taken as it is.
    pub(crate) fn resize(&mut self, size: Option<u64>) -> Result<(), Error> {
        self.size = self.reserve(size)?;
        Ok(())
    }

    fn reserve(&self, size: Option<u64>) -> Result<u64, Error> {
        let label = &self.label;
        let memory = || label.clone();
        let failed = |action| {
            move |source: io::Error| Error::Memory { memory: label.clone(), action, source }
        };
        let meta = self.object.metadata().map_err(failed("look at"))?;
        let has = meta.len();
        let Some(size) = size else {
            if !has.is_power_of_two() {
                return Err(Error::MemoryNotPowerOfTwo { memory: memory(), size: has });
            }
            return Ok(has);
        };
        let system = fstatfs(&self.object).map_err(|errno| failed("look at")(errno.into()))?;
        let huge = system.filesystem_type() == HUGETLBFS_MAGIC;
        let page = if huge { system.block_size() as u64 } else { 1 };
        let wanted = round_up(size, page).ok_or(Error::MemorySize { size })?;
        if has > wanted {
            return Err(Error::MemoryShrink { memory: memory(), has, wanted });
        }
        // The kernel does not only refuse what is beyond this limit, it kills by SIGXFSZ.
        let (limit, _) = getrlimit(Resource::RLIMIT_FSIZE)
            .map_err(|errno| failed("find the limit for")(errno.into()))?;
        if wanted > has && wanted > limit {
            return Err(Error::MemoryLimit { memory: memory(), wanted, limit });
        }
        // Asked first, since filling a file system to the brim, to find out that it is too
        // small, would fail everybody else who writes to it meanwhile. A file system
        // without a limit says 0 blocks.
        let allocated = meta.blocks() * 512;
        let available = |free: u64| free.saturating_add(allocated);
        let no_room = |available| Error::MemoryNoRoom { memory: memory(), wanted, available };
        let left = system.blocks_available() as u64 * system.block_size() as u64;
        let file_system = (system.blocks() > 0).then_some(left);
        // Sealed memory has no such limit, and a tmpfs may have one above what the machine has:
        // then the kernel would kill other processes until it fits.
        let tmpfs = system.filesystem_type() == TMPFS_MAGIC;
        let machine = if tmpfs { free_memory() } else { None };
        match file_system.into_iter().chain(machine).min().map(available) {
            Some(available) if wanted > available => return Err(no_room(available)),
            _ => {}
        }
        let length = wanted as i64;
        let reserved = loop {
            match fallocate(&self.object, FallocateFlags::empty(), 0, length) {
                Err(Errno::EINTR) => {}
                result => break result,
            }
        };
        match reserved {
            Ok(()) => {}
            Err(Errno::EOPNOTSUPP) => ftruncate(&self.object, length)
                .map_err(|errno| failed("set the size of")(errno.into()))?,
            Err(Errno::ENOSPC) => return Err(no_room(available(left))),
            Err(Errno::EFBIG) => return Err(Error::MemorySize { size }),
            Err(errno) => return Err(failed("reserve")(errno.into())),
        }
        Ok(wanted)
    }

    /// Seals the size of a sealed memory.
    pub(crate) fn seal(&self) -> Result<(), Error> {
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&self.object, FcntlArg::F_ADD_SEALS(seals)).map(drop).map_err(|errno| Error::Memory {
            memory: self.label.clone(),
            action: "seal",
            source: errno.into(),
        })
    }

    /// From now on the name is removed at the end, whoever made the object: the reference
    /// does so, and a region outlives its server in nobody's plan.
    pub(crate) fn adopt(&mut self) {
        self.removes_name = true;
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }
}

impl AsFd for Memory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.object.as_fd()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Some(name) = self.name.as_ref().filter(|_| self.removes_name) {
            if let Err(error) = remove(name, &self.object) {
                log::warn!("cannot remove shared memory {name:?}: {error}");
            }
        }
        // Said aloud, as closing does not unlock while a forked child has the descriptor.
        if let Some(lock) = &self.lock {
            let _ = sys::unlock(lock);
        }
    }
}

/// Removes the name of `object`, unless it is another's by now.
fn remove(name: &str, object: &File) -> io::Result<()> {
    // Not opened, as shm_open(3) would: there may be no descriptor left.
    let now = match fs::symlink_metadata(format!("{SHM_DIRECTORY}{name}")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        result => result?,
    };
    if is_same(&object.metadata()?, &now) {
        shm_unlink(name)?;
    }
    Ok(())
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

fn is_same(one: &Metadata, other: &Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

/// The size that memory of `size` bytes gets where pages have `page` bytes.
fn round_up(size: u64, page: u64) -> Option<u64> {
    if size == 0 {
        return None;
    }
    size.checked_next_power_of_two().map(|size| size.max(page)).filter(|&size| size <= MAX_SIZE)
}

/// A file without a name in `directory`.
fn temporary(directory: &Path) -> Result<OwnedFd, Error> {
    let failed = |errno: Errno| Error::Memory {
        memory: format!("in directory {directory:?}"),
        action: "create",
        source: errno.into(),
    };
    let mode = Mode::S_IRUSR | Mode::S_IWUSR;
    let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC;
    match open(directory, flags | OFlag::O_TMPFILE, mode) {
        // A file system, or a kernel, that has no such files: the usual way.
        Err(Errno::EOPNOTSUPP | Errno::EISDIR | Errno::EINVAL) => {}
        result => return result.map_err(failed),
    }
    let mut number = 0u32;
    loop {
        let path = directory.join(format!("ivshmem.{}.{number}", std::process::id()));
        match open(&path, flags | OFlag::O_CREAT | OFlag::O_EXCL, mode) {
            Err(Errno::EEXIST) => number += 1,
            Ok(fd) => {
                unlink(&path).map_err(failed)?;
                return Ok(fd);
            }
            Err(errno) => return Err(failed(errno)),
        }
    }
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
    fn impossible_sizes_are_refused() {
        assert_eq!(round_up(0, 4096), None);
        assert_eq!(round_up(MAX_SIZE + 1, 1), None);
        assert_eq!(round_up(u64::MAX, 1), None);
    }
}
