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
mod posix;
mod sealed;
mod size;
mod unnamed;

pub use error::Error;

/// The mode of a new POSIX shared memory object, which the reference uses too.
pub(crate) const DEFAULT_MODE: u32 = 0o700;

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
    /// lets no other users write than the mode of a new object would.
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
}

/// The memory that is served. Dropping it removes a POSIX name that is ours.
#[derive(Debug)]
pub(crate) struct Memory {
    kind: Box<dyn Kind>,
    size: u64,
}

impl Memory {
    /// Opens, or makes, the memory, without changing its size yet. `mode` is that of a new POSIX
    /// object; without it, it is what the umask leaves of [`DEFAULT_MODE`].
    pub(crate) fn open(source: MemorySource, mode: Option<u32>) -> Result<Self, Error> {
        let kind: Box<dyn Kind> = match source {
            MemorySource::Posix(name) => Box::new(posix::Posix::open(name, mode)?),
            MemorySource::Directory(directory) => Box::new(unnamed::Unnamed::open(directory)?),
            MemorySource::Sealed => Box::new(sealed::Sealed::open()?),
            MemorySource::Descriptor(fd) => Box::new(given::Given::new(fd)),
        };
        Ok(Self { kind, size: 0 })
    }

    /// Takes the memory of a server before, of `size` bytes. `source` says where it comes from,
    /// in case it has a name.
    pub(crate) fn resume(
        source: MemorySource,
        mode: Option<u32>,
        object: OwnedFd,
        size: u64,
    ) -> Result<Self, Error> {
        let object = File::from(object);
        let mut kind: Box<dyn Kind> = match source {
            MemorySource::Posix(name) => {
                let named = posix::Posix::open(name, mode)?;
                if named.is(&object).map_err(Error::system(&named.label(), "look at"))? {
                    Box::new(named)
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
        Ok(Self { kind, size })
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
