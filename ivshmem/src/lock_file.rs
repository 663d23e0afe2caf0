// SPDX-License-Identifier: GPL-2.0-or-later
//! A lock that only servers of the same user can take: an flock on a file of mode 0600.
//!
//! A process that has a descriptor of a file can lock it, and keep it locked. Clients have the
//! memory's descriptor, and can often read the socket's directory. So neither is used as a lock.
//! The lock is a file beside it that belongs to the server's user; no other user may open it. If
//! the file belongs to another user, the server fails with an error that names the owner.
//!
//! The holder removes the file before it releases the lock. A process that opened the file
//! before that checks, once it has the lock, that the file still has its name. A server that is
//! killed leaves the file, and the next server uses it.
//!
//! The length of the file is a note for the next holder. It takes no room on a full file system:
//! see [`LockFile::note`]. A hugetlbfs has lengths in pages only, so there it has a larger unit.

#![forbid(unsafe_code)]

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;

use crate::directory::{Directory, Entry};
use crate::sys;

/// How the names of lock files begin.
pub(crate) const PREFIX: &str = ".ivshmem-lock.";

/// The longest name in a directory, in bytes (`NAME_MAX`).
const NAME_MAX: usize = 255;

/// Lengths up to this one are a note; a file that is longer is no lock of ours.
const MAX_NOTE: u64 = 64;

/// The unit of notes on a hugetlbfs, where lengths are multiples of the page size. No page is
/// larger.
const HUGE_UNIT: u64 = 16 << 30;

/// No lock file is longer.
pub(crate) const MAX_NOTE_LENGTH: u64 = MAX_NOTE * HUGE_UNIT;

/// Why a lock cannot be had.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Another process has it.
    Held,
    /// The file is not one that a server of this user made.
    Foreign(Entry),
    /// A system call failed.
    System(io::Error),
}

impl<E: Into<io::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::System(error.into())
    }
}

/// A lock that is held, until one of its `release` functions is called.
#[derive(Debug)]
pub(crate) struct LockFile {
    lock: Option<File>,
    name: OsString,
    entry: Entry,
}

impl LockFile {
    /// The name of the lock file for an object of this name.
    pub(crate) fn name_for(object: &OsStr) -> OsString {
        let mut name = OsString::from(PREFIX);
        if PREFIX.len() + object.len() <= NAME_MAX {
            name.push(object);
            return name;
        }
        // FNV-1a, which tells apart names whose beginnings are the same.
        let hash = object.as_bytes().iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, &byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        name.push(OsStr::from_bytes(&object.as_bytes()[..200]));
        name.push(format!(".{hash:016x}"));
        name
    }

    /// Takes the lock; waits up to `patience` for another holder.
    pub(crate) fn acquire(
        directory: &Directory,
        name: &OsStr,
        patience: Duration,
    ) -> Result<Self, Failure> {
        let until = Instant::now() + patience;
        loop {
            let (file, created) = match directory.create(name, 0o600) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    // Looked at first, since to open a file of another user can have effects.
                    let Some(found) = directory.look(name)? else { continue };
                    check(&found)?;
                    match directory.open_existing(name) {
                        Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                        result => (result?, false),
                    }
                }
                result => (result?, true),
            };
            match Self::lock(directory, name, file, until) {
                Err(Failure::System(error)) => {
                    // If another process has opened it meanwhile, it sees that the name is gone.
                    if let (true, Ok(Some(entry))) = (created, directory.look(name)) {
                        let _ = directory.remove(name, &entry);
                    }
                    return Err(error.into());
                }
                Err(failure) => return Err(failure),
                Ok(Some(lock)) => return Ok(lock),
                Ok(None) => {}
            }
        }
    }

    /// Locks a file that was opened. None is to try again: another process holds the lock, but it
    /// is not yet late, or has removed the file meanwhile.
    fn lock(
        directory: &Directory,
        name: &OsStr,
        file: File,
        until: Instant,
    ) -> Result<Option<Self>, Failure> {
        let entry = Entry::of(&file)?;
        check(&entry)?;
        match sys::lock(&file) {
            Ok(()) => {}
            Err(Errno::EAGAIN) if Instant::now() < until => {
                thread::sleep(Duration::from_millis(2));
                return Ok(None);
            }
            Err(Errno::EAGAIN) => return Err(Failure::Held),
            Err(errno) => return Err(errno.into()),
        }
        let is_named = directory.look(name)?.is_some_and(|now| now.is(&entry));
        Ok(is_named.then(|| Self { lock: Some(file), name: name.to_owned(), entry }))
    }

    /// What a holder before noted, and did not take back: it was killed. 0 is nothing.
    pub(crate) fn noted(&self) -> u64 {
        note_of(self.entry.length).unwrap_or(0)
    }

    /// Leaves a number up to [`MAX_NOTE`] for the next holder.
    pub(crate) fn note(&self, number: u64) -> io::Result<()> {
        let Some(lock) = &self.lock else { return Ok(()) };
        match lock.set_len(number) {
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                lock.set_len(number * HUGE_UNIT)
            }
            result => result,
        }
    }

    /// Leaves a mark beside the note, as the file's time of modification, which takes no room
    /// either.
    pub(crate) fn mark(&self, mark: u32) -> io::Result<()> {
        match &self.lock {
            Some(lock) => lock.set_modified(time_of(mark)),
            None => Ok(()),
        }
    }

    /// Whether a holder before left this mark with its note.
    pub(crate) fn is_marked(&self, mark: u32) -> bool {
        let modified = |lock: &File| lock.metadata()?.modified();
        self.lock.as_ref().is_some_and(|lock| modified(lock).is_ok_and(|at| at == time_of(mark)))
    }

    /// Removes the file and releases the lock.
    pub(crate) fn release(&mut self, directory: &Directory) {
        let Some(lock) = self.lock.take() else { return };
        if let Err(error) = directory.remove(&self.name, &self.entry) {
            log::warn!("cannot remove the lock file {:?}: {error}", self.name);
        }
        // Explicitly, as closing does not unlock while a forked child has the descriptor.
        let _ = sys::unlock(&lock);
    }
}

impl LockFile {
    /// Releases the lock, and leaves the file with its note.
    pub(crate) fn release_and_keep(&mut self) {
        if let Some(lock) = self.lock.take() {
            let _ = sys::unlock(&lock);
        }
    }
}

/// Whether a file is one that a server of this user made: nobody else can have opened it.
fn check(entry: &Entry) -> Result<(), Failure> {
    let ours = entry.is_type(libc::S_IFREG)
        && entry.is_own()
        && entry.mode & 0o077 == 0
        && !entry.is_linked
        && note_of(entry.length).is_some();
    if ours { Ok(()) } else { Err(Failure::Foreign(*entry)) }
}

/// The time of a mark, in whole seconds of the past, as every file system has them.
fn time_of(mark: u32) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::from(mark >> 2))
}

/// The note that a file of this length is.
fn note_of(length: u64) -> Option<u64> {
    let note = if length % HUGE_UNIT == 0 { length / HUGE_UNIT } else { length };
    (note <= MAX_NOTE).then_some(note)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_of_lock_files_fit_and_differ() {
        let long = |end: &str| OsString::from("x".repeat(254 - end.len()) + end);
        let names = [long("a"), long("b"), "a".into(), "b".into(), "x".repeat(200).into()];
        let locks: BTreeSet<_> = names.iter().map(|name| LockFile::name_for(name)).collect();
        assert_eq!(locks.len(), names.len());
        assert!(locks.iter().all(|lock| lock.len() <= NAME_MAX), "{locks:?}");
    }

    #[test]
    fn a_note_has_one_of_two_units() {
        for (length, note) in [
            (0, Some(0)),
            (1, Some(1)),
            (64, Some(64)),
            (65, None),
            (16 << 30, Some(1)),
            (23 * (16 << 30), Some(23)),
            ((16 << 30) + 1, None),
            (65 * (16 << 30), None),
        ] {
            assert_eq!(note_of(length), note, "{length}");
        }
    }

    #[test]
    fn one_holder_at_a_time_has_it_and_its_note_stays_until_it_is_released() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let directory = Directory::open(dir.path()).expect("it is there");
        let name = OsStr::new("lock");
        let acquire = || LockFile::acquire(&directory, name, Duration::ZERO);
        let mut first = acquire().expect("nobody has it");
        assert!(matches!(acquire(), Err(Failure::Held)));
        first.note(17).expect("it can be changed");
        first.mark(7 << 2).expect("it can be changed");
        // As if it was killed.
        drop(first.lock.take());
        let mut second = acquire().expect("nobody has it");
        assert_eq!(second.noted(), 17);
        assert!(second.is_marked(7 << 2) && !second.is_marked(8 << 2));
        second.release(&directory);
        assert_eq!(std::fs::read_dir(dir.path()).expect("it is there").count(), 0);
        assert_eq!(acquire().expect("nobody has it").noted(), 0);
    }
}
