// SPDX-License-Identifier: GPL-2.0-or-later
//! The lock by which exactly one live server serves a memory object that has a name.
//!
//! It is a lock file (`lock_file.rs`) in the directory of the object, `.ivshmem-lock.NAME`. If
//! the server may not make files in that directory, as in /dev, the lock file is in /dev/shm, and
//! its name has the numbers of the object.
//!
//! The object itself cannot be the lock: clients have a descriptor of it, so a client could lock
//! it, outlive the server, and keep the server from starting again. Two other ways were considered.
//! Any user can take an abstract socket, and a service in another network namespace does not see
//! it. /proc/locks does not tell whether a holder is a server.
//!
//! This file knows names and lock files. It must not know what the memory is.

#![forbid(unsafe_code)]

use std::ffi::{OsStr, OsString};
use std::io;
use std::path::Path;
use std::time::Duration;

use nix::unistd::geteuid;

use super::Error;
use super::posix::SHM_DIRECTORY;
use crate::directory::{Directory, Entry};
use crate::lock_file::{Failure, LockFile};

/// A lock that is held.
#[derive(Debug)]
pub(super) struct Lock {
    file: LockFile,
    /// The directory of the lock file, if it is not that of the object.
    elsewhere: Option<Directory>,
}

impl Lock {
    /// Takes the lock of the object `name` in `directory`, whose path is `path`. `given` is what
    /// the user calls it.
    pub(super) fn beside(
        directory: &Directory,
        path: &Path,
        name: &OsStr,
        given: &OsStr,
    ) -> Result<Self, Error> {
        let file = LockFile::name_for(name);
        match LockFile::acquire(directory, &file, Duration::ZERO) {
            Ok(file) => Ok(Self { file, elsewhere: None }),
            Err(failure) => Err(refused(failure, &path.join(file), given)),
        }
    }

    /// As [`beside`](Self::beside), but in /dev/shm if the server may not make files in
    /// `directory`, and the object exists.
    pub(super) fn near(
        directory: &Directory,
        path: &Path,
        name: &OsStr,
        given: &OsStr,
    ) -> Result<Self, Error> {
        let beside = Self::beside(directory, path, name, given);
        match (&beside, directory.look(name)) {
            (Err(Error::System { source, .. }), Ok(Some(entry))) if is_forbidden(source) => {
                let (device, inode) = entry.identity();
                Self::by_number(&format!("file-{device}-{inode}"), given)
            }
            _ => beside,
        }
    }

    /// Takes the lock of an object that has these numbers.
    pub(super) fn by_number(numbers: &str, given: &OsStr) -> Result<Self, Error> {
        let path = Path::new(SHM_DIRECTORY);
        let directory = Directory::open(path)
            .map_err(Error::system(&format!("{given:?}"), "find the directory of locks for"))?;
        let lock = Self::beside(&directory, path, OsStr::new(numbers), given)?;
        Ok(Self { elsewhere: Some(directory.park()), ..lock })
    }

    /// The note that a server left which did not end in order. 0 is nothing.
    pub(super) fn noted(&self) -> u64 {
        self.file.noted()
    }

    /// Leaves a note for the next server.
    pub(super) fn note(&self, number: u64) -> io::Result<()> {
        self.file.note(number)
    }

    /// Says that the note is about this object.
    pub(super) fn mark(&self, object: &Entry) -> io::Result<()> {
        self.file.mark(mark_of(object))
    }

    /// Whether the note was about this object, and not about another one that had its name.
    pub(super) fn is_about(&self, object: &Entry) -> bool {
        self.file.is_marked(mark_of(object))
    }

    /// Removes the lock file and releases the lock. `directory` is that of the object, for a lock
    /// [beside](Self::beside) it.
    pub(super) fn release(&mut self, directory: Option<&Directory>) {
        match self.elsewhere.as_ref().or(directory) {
            Some(directory) => self.file.release(directory),
            None => self.file.release_and_keep(),
        }
    }

    /// Releases the lock, and leaves the file with its note.
    pub(super) fn release_and_keep(&mut self) {
        self.file.release_and_keep();
    }
}

/// The upper bits of a product with a large odd number depend on all bits (Fibonacci hashing).
fn mark_of(object: &Entry) -> u32 {
    let (device, inode) = object.identity();
    let mix = |number: u64| number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mix(mix(device).rotate_left(32) ^ inode) >> 32) as u32
}

fn is_forbidden(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem)
}

fn refused(failure: Failure, file: &Path, given: &OsStr) -> Error {
    match failure {
        Failure::Held => Error::InUse { name: OsString::from(given) },
        Failure::Foreign(entry) => foreign(&entry, file, given),
        Failure::System(source) => {
            Error::System { memory: format!("{given:?}"), action: "lock", source }
        }
    }
}

fn foreign(entry: &Entry, file: &Path, given: &OsStr) -> Error {
    Error::Foreign {
        memory: format!("the lock file {file:?} of shared memory {given:?}"),
        owner: entry.owner,
        mode: entry.permissions(),
        user: geteuid().as_raw(),
    }
}
