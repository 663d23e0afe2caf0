// SPDX-License-Identifier: GPL-2.0-or-later
//! The shared memory: where it comes from and how large it is.
//!
//! Each kind has a file of its own and goes through the same three steps: *open* finds or makes
//! the object, *reserve* gives it its size by the rule of `size.rs`, *finish* tells it that the
//! server serves. Before `finish`, dropping the memory leaves everything as it was.
//!
//! To add a kind: a variant of [`MemorySource`], a file with a type that is a [`Kind`], and a line
//! in [`Memory::open`].

#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::fmt::Debug;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

mod error;
mod given;
mod id_locks;
mod posix;
mod sealed;
mod size;
mod unnamed;

pub use error::Error;
use id_locks::{IdLocks, Used};

/// The mode of a new POSIX shared memory object, which the reference uses too.
pub(crate) const DEFAULT_MODE: u32 = 0o700;

/// Who may use a new POSIX object; what is not given is as the kernel makes it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Access {
    pub(crate) mode: Option<u32>,
    pub(crate) group: Option<u32>,
}

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
    /// does not exist, and removed when the server is closed. The name need not be UTF-8.
    ///
    /// An existing object is served only if the server's effective user owns it, and if its mode
    /// lets no other users write than the mode of a new object would. If clients of a server that
    /// was killed may still use it, new clients get other ids, and the log says so.
    Posix(OsString),
    /// A file without a name in this directory, which may be a hugetlbfs.
    Directory(PathBuf),
    /// An anonymous memfd, sealed: no client can shrink it under the others, as it can with
    /// every other kind.
    Sealed,
    /// An object that the caller has, with its content. Its size must be a power of two, or
    /// smaller than the one asked for.
    Descriptor(OwnedFd),
}

impl MemorySource {
    /// The POSIX shared memory object of this name: [`Posix`](Self::Posix).
    ///
    /// ```
    /// use ivshmem::MemorySource;
    ///
    /// assert!(matches!(MemorySource::posix("name"), MemorySource::Posix(name) if name == "name"));
    /// ```
    pub fn posix(name: impl Into<OsString>) -> Self {
        Self::Posix(name.into())
    }
}

/// One kind of memory: what it does at each step.
trait Kind: Debug + Send + Sync {
    /// The object that clients get.
    fn object(&self) -> &File;

    /// How errors and the log name it.
    fn label(&self) -> String;

    /// The size with which a server that did not end in order served this object last, in bytes.
    fn served(&self) -> Option<u64> {
        None
    }

    /// The object has its final size.
    fn reserved(&mut self, _size: u64) -> Result<(), Error> {
        Ok(())
    }

    /// The server serves it from now on.
    fn finish(&mut self) {}

    /// Its name stays when this is dropped.
    fn keep(&mut self) {}

    /// Whether another server can find it, so that it must be able to tell which ids are used.
    fn is_named(&self) -> bool {
        false
    }

    /// The ids that clients of servers that ended may have.
    fn take_used(&mut self) -> Option<Used> {
        None
    }

    /// Makes a new object in place of the one that was found, which keeps its clients.
    fn renew(&mut self) -> Result<(), Error> {
        Ok(())
    }
}

/// The memory that is served. Dropping it removes a POSIX name that is ours.
#[derive(Debug)]
pub(crate) struct Memory {
    kind: Box<dyn Kind>,
    size: u64,
    id_locks: IdLocks,
}

impl Memory {
    /// Opens, or makes, the memory, without changing its size yet. `access` is for a new
    /// POSIX object; without a mode, it is what the umask leaves of [`DEFAULT_MODE`].
    pub(crate) fn open(source: MemorySource, access: Access) -> Result<Self, Error> {
        let kind: Box<dyn Kind> = match source {
            MemorySource::Posix(name) => Box::new(posix::Posix::open(name, access)?),
            MemorySource::Directory(directory) => Box::new(unnamed::Unnamed::open(directory)?),
            MemorySource::Sealed => Box::new(sealed::Sealed::open()?),
            MemorySource::Descriptor(fd) => Box::new(given::Given::new(fd)),
        };
        Ok(Self { kind, size: 0, id_locks: IdLocks::default() })
    }

    /// Takes the memory of a server before, of `size` bytes. `source` says where it comes from,
    /// in case it has a name.
    pub(crate) fn resume(
        source: MemorySource,
        access: Access,
        object: OwnedFd,
        size: u64,
    ) -> Result<Self, Error> {
        let object = File::from(object);
        let mut kind: Box<dyn Kind> = match source {
            MemorySource::Posix(name) => {
                let named = posix::Posix::open(name, access)?;
                if named.is(&object).map_err(Error::system(&named.label(), "look at"))? {
                    // Clients have the description that came back, and so the locks of their ids.
                    Box::new(named.with_object(object))
                } else {
                    log::warn!(
                        "shared memory {} is not the memory that clients have; the name is left \
                         alone",
                        named.label()
                    );
                    Box::new(given::Given::new(object.into()))
                }
            }
            _ => Box::new(given::Given::new(object.into())),
        };
        let size = size::reserve(kind.object(), &kind.label(), Some(size), Some(size))?;
        kind.reserved(size)?;
        Ok(Self { kind, size, id_locks: IdLocks::default() })
    }

    /// Its name stays when this is dropped.
    pub(crate) fn keep(&mut self) {
        self.kind.keep();
    }

    /// Gives the memory its size, in bytes, and all of its room. Without a size, the object's
    /// own is taken as it is.
    pub(crate) fn reserve(&mut self, size: Option<u64>) -> Result<(), Error> {
        let kind = &mut self.kind;
        self.size = size::reserve(kind.object(), &kind.label(), size, kind.served())?;
        kind.reserved(self.size)
    }

    /// Chooses ids that no client of a server that ended may have: the first id, and how many.
    /// They are `first` and `space` if no such client may use this memory. The log says
    /// otherwise.
    ///
    /// If all ids may be used, a new object takes the name. To refuse to start would let a client
    /// that locks all ids prevent each restart, and to give ids that clients have would let two
    /// machines overwrite each other's content.
    pub(crate) fn unused_ids(&mut self, first: u16, space: u32) -> Result<(u16, u32), Error> {
        let Some(used) = self.kind.take_used() else { return Ok((first, space)) };
        let label = self.kind.label();
        if used.is_uncertain {
            log::warn!(
                "another program has locked shared memory {label}; if clients of a server that \
                 ended still use it, new clients may get their ids"
            );
        }
        if used.is_empty() {
            return Ok((first, space));
        }
        let Some((first, space)) = used.choose(first, space) else {
            log::warn!(
                "clients of a server that ended may still use shared memory {label}, and all ids \
                 may be theirs; a new object takes its name, so new clients share nothing with them"
            );
            self.kind.renew()?;
            return Ok((first, space));
        };
        log::warn!(
            "clients of a server that ended may still use shared memory {label}; they and new \
             clients do not learn of each other; ids go on at {first}"
        );
        Ok((first, space))
    }

    /// An id is about to be sent. `connected` are the ids of all clients.
    pub(crate) fn mark_used(&mut self, id: u16, connected: impl Iterator<Item = u16>) {
        if self.kind.is_named() && !self.id_locks.has(id) {
            self.id_locks.add(self.kind.object(), &self.kind.label(), id, connected);
        }
    }

    /// The clients of the server before go on, and have these ids.
    pub(crate) fn mark_resumed(&mut self, connected: impl Iterator<Item = u16>) {
        if self.kind.is_named() {
            self.id_locks.resume(self.kind.object(), &self.kind.label(), connected);
        }
    }

    /// The server serves it from now on.
    pub(crate) fn finish(&mut self) {
        self.kind.finish();
    }

    /// Device and inode.
    pub(crate) fn identity(&self) -> std::io::Result<(u64, u64)> {
        let meta = self.kind.object().metadata()?;
        Ok((meta.dev(), meta.ino()))
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }
}

impl AsFd for Memory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.kind.object().as_fd()
    }
}
