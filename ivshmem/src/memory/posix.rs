// SPDX-License-Identifier: GPL-2.0-or-later
//! A POSIX shared memory object: a name in /dev/shm, which every user may write.
//!
//! # Exactly one live server serves a name
//! The server holds the lock of a file beside the object, `/dev/shm/.ivshmem-lock.NAME`, of mode
//! 0600 (`lock_file.rs`). The object itself cannot be the lock: clients have a descriptor of it,
//! so a client could lock it, outlive the server, and keep the server from starting again.
//!
//! Two other ways were considered. Any user can take an abstract socket, and a service in another
//! network namespace does not see it. /proc/locks does not tell whether a holder is a server.
//!
//! # A client can change the size
//! A client has a writable descriptor, so it may truncate the object. A server that is killed
//! leaves its lock file; the file's length is 1 plus the binary logarithm of the size that was
//! served. If the object is larger at the next start, a client has made it larger. The server
//! then truncates it to the requested size, unless that is below the size that was served.
//! Without the note, an object that is larger than requested is refused: it may have been made
//! with that size on purpose.
//!
//! # Clients of a server that was killed
//! They may still use the object. Locks far behind its end tell which ids they may have
//! (`id_locks.rs`).
//!
//! # The owner of an object
//! Any user may make an object of this name before the server does. The server uses it only if
//! the server's user owns it, and if its mode lets no other users write than the mode of a new
//! object would. /dev/shm is sticky, so no other user can exchange such an object.

#![forbid(unsafe_code)]

use std::ffi::{OsStr, OsString};
use std::fs::{File, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, fchown};
use std::path::Path;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit};
use nix::unistd::geteuid;

use super::{Access, DEFAULT_MODE, Error, Kind, Used};
use crate::directory::{Directory, Entry};
use crate::lock_file::{self, Failure, LockFile, MAX_NOTE};

/// Where shm_open(3) of Linux's C libraries has its names.
const SHM_DIRECTORY: &str = "/dev/shm";

/// Write permission for others than the owner.
const OTHERS_WRITE: u32 = 0o022;

/// Write permission for the group.
const GROUP_WRITE: u32 = 0o020;

#[derive(Debug)]
pub(super) struct Posix {
    directory: Directory,
    lock: LockFile,
    object: File,
    entry: Entry,
    /// In the directory.
    name: OsString,
    label: String,
    /// As given, for another object.
    access: Access,
    used: Option<Used>,
    /// Whether the name goes when this is dropped.
    removes_name: bool,
}

impl Posix {
    pub(super) fn open(given: OsString, access: Access) -> Result<Self, Error> {
        let Some(name) = valid_name(&given) else {
            return Err(Error::Name { name: given });
        };
        if let Some(mode) = access.mode.filter(|mode| mode & !0o177 != 0o600) {
            return Err(Error::Mode { mode });
        }
        let label = format!("{given:?}");
        let directory =
            Directory::open(Path::new(SHM_DIRECTORY)).map_err(Error::system(&label, "find"))?;
        let mut lock = acquire(&directory, &name, &given)?;
        match find_or_make(&directory, &name, &label, access) {
            Ok((object, entry, removes_name)) => {
                let directory = directory.park();
                // A new object has no clients.
                let used = if removes_name { None } else { find_used(&object, &label) };
                Ok(Self { directory, lock, object, entry, name, label, access, used, removes_name })
            }
            Err(error) => {
                end(&directory, &mut lock, false);
                Err(error)
            }
        }
    }
}

impl Posix {
    /// Whether the name is that of this object.
    pub(super) fn is(&self, object: &File) -> io::Result<bool> {
        Ok(self.entry.is(&Entry::of(object)?))
    }

    /// Serves another open file description of the same object.
    pub(super) fn with_object(mut self, object: File) -> Self {
        self.object = object;
        self
    }
}

/// The bare name, if it can be one. Slashes at the start do not count, as for shm_open(3).
fn valid_name(given: &OsStr) -> Option<OsString> {
    let bytes = given.as_bytes();
    let start = bytes.iter().position(|&byte| byte != b'/')?;
    let bare = &bytes[start..];
    let is_valid = bare.len() <= 254
        && !matches!(bare, b"." | b"..")
        && !bare.iter().any(|byte| matches!(byte, b'/' | b'\0'))
        && !bare.starts_with(lock_file::PREFIX.as_bytes());
    is_valid.then(|| OsStr::from_bytes(bare).to_owned())
}

fn find_used(object: &File, label: &str) -> Option<Used> {
    Used::find(object)
        .map_err(|error| {
            log::warn!("cannot tell whether clients still use shared memory {label}: {error}");
        })
        .ok()
}

fn acquire(directory: &Directory, name: &OsStr, given: &OsStr) -> Result<LockFile, Error> {
    let lock = LockFile::name_for(name);
    LockFile::acquire(directory, &lock, Duration::ZERO).map_err(|failure| match failure {
        Failure::Held => Error::InUse { name: given.to_owned() },
        Failure::Foreign(entry) => Error::Foreign {
            memory: format!("the lock file {:?} of shared memory {given:?}", lock_path(&lock)),
            owner: entry.owner,
            mode: entry.permissions(),
            user: geteuid().as_raw(),
        },
        Failure::System(source) => {
            Error::System { memory: format!("{given:?}"), action: "lock", source }
        }
    })
}

fn lock_path(lock: &OsStr) -> std::path::PathBuf {
    Path::new(SHM_DIRECTORY).join(lock)
}

/// Returns the object, and whether a start that fails has to remove it.
fn find_or_make(
    directory: &Directory,
    name: &OsStr,
    label: &str,
    access: Access,
) -> Result<(File, Entry, bool), Error> {
    let failed = |action| Error::system::<io::Error>(label, action);
    let default = access.mode.unwrap_or(DEFAULT_MODE);
    loop {
        match directory.create(name, default) {
            Ok(object) => {
                let made = give(&object, label, access)
                    .and_then(|()| Entry::of(&object).map_err(failed("look at")));
                return match made {
                    Ok(entry) => Ok((object, entry, true)),
                    Err(error) => {
                        if let Ok(Some(entry)) = directory.look(name) {
                            let _ = directory.remove(name, &entry);
                        }
                        Err(error)
                    }
                };
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(failed("create")(error)),
        }
        // Looked at first, since to open a thing of another user can have effects.
        let Some(found) = directory.look(name).map_err(failed("look at"))? else { continue };
        check(&found, label, default, access.group)?;
        let object = match directory.open_existing(name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            result => result.map_err(failed("open"))?,
        };
        let entry = Entry::of(&object).map_err(failed("look at"))?;
        if !entry.is(&found) {
            continue;
        }
        check(&entry, label, default, access.group)?;
        // Probably a server that was killed right after it had made the object: it has no size
        // yet, and the mode of a new object.
        let as_made = entry.length == 0 && entry.permissions() == default;
        return Ok((object, entry, as_made));
    }
}

/// Gives a new object its group and mode. The group comes first: the one before never gets the mode.
fn give(object: &File, label: &str, access: Access) -> Result<(), Error> {
    if let Some(group) = access.group {
        fchown(object, None, Some(group)).map_err(|source| Error::Group {
            memory: label.to_owned(),
            group,
            source,
        })?;
    }
    match access.mode {
        // Without the umask.
        Some(mode) => object
            .set_permissions(Permissions::from_mode(mode))
            .map_err(Error::system(label, "set the mode of")),
        None => Ok(()),
    }
}

fn check(entry: &Entry, label: &str, allowed: u32, group: Option<u32>) -> Result<(), Error> {
    if !entry.is_type(libc::S_IFREG) {
        return Err(Error::NotAFile { memory: label.to_owned() });
    }
    let memory = format!("shared memory {label}");
    let (owner, mode) = (entry.owner, entry.permissions());
    if !entry.is_own() {
        return Err(Error::Foreign { memory, owner, mode, user: geteuid().as_raw() });
    }
    if mode & OTHERS_WRITE & !allowed != 0 {
        return Err(Error::Writable { memory, owner, mode, allowed });
    }
    if let Some(wanted) = group.filter(|&wanted| wanted != entry.group && mode & GROUP_WRITE != 0) {
        return Err(Error::OtherGroup { memory, group: entry.group, mode, wanted });
    }
    Ok(())
}

impl Kind for Posix {
    fn object(&self) -> &File {
        &self.object
    }

    fn label(&self) -> String {
        self.label.clone()
    }

    fn served(&self) -> Option<u64> {
        let logarithm = u32::try_from(self.lock.noted().checked_sub(1)?).ok()?;
        1u64.checked_shl(logarithm)
    }

    fn reserved(&mut self, size: u64) -> Result<(), Error> {
        // Beyond this limit the kernel would not only refuse, but kill.
        let limit = getrlimit(Resource::RLIMIT_FSIZE).map_or(u64::MAX, |(soft, _)| soft);
        if limit < MAX_NOTE {
            return Ok(());
        }
        let note = u64::from(size.ilog2()) + 1;
        self.lock.note(note).map_err(Error::system(&self.label, "note the size of"))
    }

    /// From now on the name is removed at the end, even if another program made the object. The
    /// reference does the same.
    fn finish(&mut self) {
        self.removes_name = true;
    }

    fn keep(&mut self) {
        self.removes_name = false;
    }

    fn is_named(&self) -> bool {
        true
    }

    fn take_used(&mut self) -> Option<Used> {
        self.used.take()
    }

    fn renew(&mut self) -> Result<(), Error> {
        let Self { directory, name, label, .. } = self;
        directory.remove(name, &self.entry).map_err(Error::system(label, "replace"))?;
        let (object, entry, removes_name) = find_or_make(directory, name, label, self.access)?;
        (self.object, self.entry, self.removes_name) = (object, entry, removes_name);
        Ok(())
    }
}

impl Drop for Posix {
    fn drop(&mut self) {
        if self.removes_name {
            if let Err(error) = self.directory.remove(&self.name, &self.entry) {
                log::warn!("cannot remove shared memory {}: {error}", self.label);
            }
        }
        end(&self.directory, &mut self.lock, self.removes_name);
    }
}

/// Gives up the lock. A start that failed keeps the note of the server before it for the next one.
fn end(directory: &Directory, lock: &mut LockFile, removes_name: bool) {
    if removes_name || lock.noted() == 0 {
        lock.release(directory);
    } else {
        lock.release_and_keep();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_shm_open_but_for_those_of_lock_files() {
        for (given, bare) in [("a", Some("a")), ("//a", Some("a")), (".a", Some(".a"))] {
            assert_eq!(valid_name(given.as_ref()).as_deref(), bare.map(OsStr::new), "{given}");
        }
        let long = "x".repeat(255);
        for given in ["", "/", "a/b", ".", "/..", "a\0b", ".ivshmem-lock.a", &long] {
            assert_eq!(valid_name(given.as_ref()), None, "{given:?}");
        }
        assert!(valid_name(OsStr::from_bytes(b"\xff")).is_some());
    }
}
