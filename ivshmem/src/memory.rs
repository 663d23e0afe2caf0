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
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use crate::directory::Entry;
use crate::error::{Chain, ErrorKind};

mod device;
mod error;
mod file;
mod given;
mod huge;
mod id_locks;
mod lock;
mod named;
mod numa;
mod posix;
mod sealed;
mod size;
mod unnamed;

pub use error::Error;
use id_locks::{IdLocks, Used};
pub(crate) use numa::Nodes;
use size::{Request, Rule};

/// The size of new memory if none is asked for: 4 MiB.
const DEFAULT_SIZE: u64 = 4 << 20;

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
    /// does not exist, and removed when the server is closed, unless
    /// [`keep_memory`](crate::Builder::keep_memory) says otherwise. The name need not be UTF-8.
    ///
    /// An existing object is served only if the server's effective user owns it, and if its mode
    /// lets no other users write than the mode of a new object would. If clients of a server that
    /// was killed may still use it, new clients get other ids, and the log says so.
    Posix(OsString),
    /// A file without a name in this directory, which may be a hugetlbfs.
    Directory(PathBuf),
    /// An anonymous memfd, sealed: no client can shrink it under the others, as it can with
    /// every other kind but devices. It may have [huge pages](crate::Builder::huge_pages).
    Sealed,
    /// The file or the device at this path, which is never removed. What is there keeps its
    /// content; if nothing is there, a file is made with mode 0600.
    ///
    /// Without a [size](crate::Builder::size), the memory has that of the object. A file that is
    /// smaller than the size asked for grows; one that is larger is refused. The file must belong
    /// to the server's effective user and have no second name; its mode must let no other users
    /// write than that of a new file would.
    ///
    /// A device is a block device or a DAX device. It keeps its size. QEMU cannot attach to a
    /// device, since it takes the size from `fstat(2)`.
    File(PathBuf),
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

/// What is asked of the memory, whatever its kind.
#[derive(Debug, Default)]
pub(crate) struct Options {
    /// In bytes.
    pub(crate) size: Option<u64>,
    /// The size is not rounded up.
    pub(crate) is_exact: bool,
    /// The mode of a new POSIX object or file.
    pub(crate) mode: Option<u32>,
    /// The group of a new POSIX object or file.
    pub(crate) group: Option<u32>,
    /// The size of huge pages that it must have.
    pub(crate) huge_page: Option<u64>,
    /// The nodes on which it is allocated.
    pub(crate) nodes: Nodes,
    /// It is not removed at the end.
    pub(crate) keeps: bool,
}

impl Options {
    /// The server itself must be able to open the object again.
    fn check_mode(&self) -> Result<(), Error> {
        match self.mode {
            Some(mode) if mode & !0o177 != 0o600 => Err(Error::Mode { mode }),
            _ => Ok(()),
        }
    }
}

/// One kind of memory: what it does at each step.
trait Kind: Debug + Send + Sync {
    /// The object that clients get.
    fn object(&self) -> &File;

    /// Clients get another open file description of the same object.
    fn replace_object(&mut self, _object: File) {}

    /// How errors and the log name it.
    fn label(&self) -> String;

    /// The size with which a server that did not end in order served this object last, in bytes.
    fn served(&self) -> Option<u64> {
        None
    }

    /// The size if none is asked for. None is to take the object as it is.
    fn usual_size(&self) -> Result<Option<u64>, Error> {
        Ok(Some(DEFAULT_SIZE))
    }

    /// The size that the object always has.
    fn fixed_size(&self) -> Option<u64> {
        None
    }

    /// The object has its final size.
    fn reserved(&mut self, _size: u64) -> Result<(), Error> {
        Ok(())
    }

    /// The server serves it from now on.
    fn finish(&mut self) {}

    /// The next server goes on with it.
    fn hand_over(&mut self) {}

    /// Whether another server can find it, so that it must be able to tell which ids are used.
    fn is_named(&self) -> bool {
        false
    }

    /// The ids that clients of servers that ended may have.
    fn take_used(&mut self) -> Option<Used> {
        None
    }

    /// Whether a new object may take the place of the one that was found.
    fn is_renewable(&self) -> bool {
        false
    }

    /// Makes a new object in place of the one that was found, which keeps its clients.
    fn renew(&mut self) -> Result<(), Error> {
        Ok(())
    }
}

fn find_used(object: &File, label: &str) -> Option<Used> {
    Used::find(object)
        .map_err(|error| {
            log::warn!("cannot tell whether clients still use shared memory {label}: {error}");
        })
        .ok()
}

/// Puts an object that clients have in place of the one that was found by its name, if both are the
/// same: clients have that description, and so the locks of their ids.
fn take_place(mut named: Box<dyn Kind>, object: File) -> Result<Box<dyn Kind>, Error> {
    let label = named.label();
    let failed = || Error::system::<io::Error>(&label, "look at");
    let found = Entry::of(named.object()).map_err(failed())?;
    if found.is(&Entry::of(&object).map_err(failed())?) {
        named.replace_object(object);
        return Ok(named);
    }
    log::warn!("shared memory {label} is not the memory that clients have; the name is left alone");
    Ok(Box::new(given::Given::new(object.into())))
}

/// The memory that is served. Dropping it removes a POSIX name that is ours.
#[derive(Debug)]
pub(crate) struct Memory {
    kind: Box<dyn Kind>,
    size: u64,
    id_locks: IdLocks,
}

impl Memory {
    /// Opens, or makes, the memory, without changing its size yet.
    pub(crate) fn open(source: MemorySource, options: &Options) -> Result<Self, Error> {
        options.nodes.check()?;
        if let Some(page) = options.huge_page {
            huge::check_size(page)?;
        }
        let kind: Box<dyn Kind> = match source {
            MemorySource::Posix(name) => Box::new(posix::open(name, options)?),
            MemorySource::Directory(directory) => Box::new(unnamed::Unnamed::open(directory)?),
            MemorySource::Sealed => Box::new(sealed::Sealed::open(options.huge_page)?),
            MemorySource::File(path) => file::open(path, options)?,
            MemorySource::Descriptor(fd) => Box::new(given::Given::new(fd)),
        };
        if options.keeps && !kind.is_named() {
            return Err(Error::Nameless { memory: kind.label() });
        }
        if kind.fixed_size().is_some() && !options.nodes.is_empty() {
            return Err(Error::Unmovable { memory: kind.label() });
        }
        if let Some(page) = options.huge_page {
            huge::check_pages(kind.object(), &kind.label(), page)?;
        }
        Ok(Self { kind, size: 0, id_locks: IdLocks::default() })
    }

    /// Takes the memory of a server before, of `size` bytes. `source` says where it comes from,
    /// in case it has a name.
    pub(crate) fn resume(
        source: MemorySource,
        options: &Options,
        object: OwnedFd,
        size: u64,
    ) -> Result<Self, Error> {
        let object = File::from(object);
        let named: Option<Result<Box<dyn Kind>, Error>> = match source {
            MemorySource::Posix(name) => {
                Some(posix::open(name, options).map(|named| Box::new(named) as _))
            }
            MemorySource::File(path) => Some(file::open(path, options)),
            _ => None,
        };
        let mut kind: Box<dyn Kind> = match named {
            None => Box::new(given::Given::new(object.into())),
            Some(Ok(named)) => take_place(named, object)?,
            Some(Err(error)) if error.kind() == ErrorKind::InUse => return Err(error),
            // The name was removed, or is another user's now. That is no reason to end clients.
            Some(Err(error)) => {
                log::warn!("{}; clients go on with the memory that they have", Chain(&error));
                Box::new(given::Given::new(object.into()))
            }
        };
        let label = kind.label();
        let meta = kind.object().metadata().map_err(Error::system(&label, "look at"))?;
        // A device has its size.
        if meta.is_file() {
            // The server before has allocated the pages.
            let nodes = &Nodes::default();
            let request = Request { size, rule: Rule::AsBefore, served: Some(size), nodes };
            match size::reserve(kind.object(), &label, &request) {
                // A client has punched holes. All others can go on, so the server does.
                Err(error) if error.kind() == ErrorKind::NoRoom => {
                    log::warn!("{}; the server goes on without a reservation", Chain(&error));
                }
                result => drop(result?),
            }
        }
        kind.reserved(size)?;
        Ok(Self { kind, size, id_locks: IdLocks::default() })
    }

    /// The next server goes on with it: its name stays when this is dropped.
    pub(crate) fn hand_over(&mut self) {
        self.kind.hand_over();
    }

    /// Gives the memory its size and all of its room.
    pub(crate) fn reserve(&mut self, options: &Options) -> Result<(), Error> {
        let kind = &mut self.kind;
        let (label, is_exact) = (kind.label(), options.is_exact);
        let size = match options.size {
            None => kind.usual_size()?,
            size => size,
        };
        self.size = match (kind.fixed_size(), size) {
            (Some(has), _) => size::check_fixed(&label, has, options.size, is_exact)?,
            (None, None) => {
                let size = size::take(kind.object(), &label, is_exact)?;
                options.nodes.bind(kind.object(), &label, size)?;
                size
            }
            (None, Some(size)) => {
                let rule = if is_exact { Rule::Exact } else { Rule::RoundUp };
                let request = Request { size, rule, served: kind.served(), nodes: &options.nodes };
                size::reserve(kind.object(), &label, &request)?
            }
        };
        if !self.size.is_power_of_two() {
            log::warn!(
                "shared memory {label} has {} bytes, which is no power of two: a QEMU that attaches \
                 with ivshmem-doorbell, a PCI device, aborts; ivshmem-flat can use it",
                self.size
            );
        }
        kind.reserved(self.size)
    }

    /// Chooses ids that no client of a server that ended may have: the first id, and how many.
    /// They are `first` and `space` if no such client may use this memory. The log says
    /// otherwise.
    ///
    /// If all ids may be used, a new object takes the name. To refuse to start would let a client
    /// that locks all ids prevent each restart, and to give ids that clients have would let two
    /// machines overwrite each other's content. A user's file or device cannot be replaced, so
    /// there ids are given again: any client can bring that about anyway, by removing locks.
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
        let Some((chosen, ids)) = used.choose(first, space) else {
            if !self.kind.is_renewable() {
                log::warn!(
                    "clients of a server that ended may still use shared memory {label}, and all \
                     ids may be theirs; new clients may get their ids"
                );
                return Ok((first, space));
            }
            log::warn!(
                "clients of a server that ended may still use shared memory {label}, and all ids \
                 may be theirs; a new object takes its name, so new clients share nothing with them"
            );
            self.kind.renew()?;
            return Ok((first, space));
        };
        log::warn!(
            "clients of a server that ended may still use shared memory {label}; they and new \
             clients do not learn of each other; ids go on at {chosen}"
        );
        Ok((chosen, ids))
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
    pub(crate) fn identity(&self) -> io::Result<(u64, u64)> {
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
