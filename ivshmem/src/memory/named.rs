// SPDX-License-Identifier: GPL-2.0-or-later
//! A memory object that has a name in a directory: one of `shm_open(3)`, or a file.
//!
//! Exactly one live server serves it (`lock.rs`).
//!
//! # A client can change the size
//! A client has a writable descriptor, so it may truncate the object. A server that is killed
//! leaves its lock file; the file's length is 1 plus the binary logarithm of the size that was
//! served, rounded up. If the object is larger at the next start, a client has made it larger. The
//! server then truncates it to the requested size, unless that is below the size that was served.
//! Without the note, an object that is larger than requested is refused: it may have been made
//! with that size on purpose. A file may also have been replaced by a larger one, so the note about
//! a file says which one it is. A server that ends in order, and keeps the object, truncates it
//! to the size that was served.
//!
//! # Clients of a server that was killed
//! They may still use the object. Locks far behind its end tell which ids they may have
//! (`id_locks.rs`).
//!
//! # The owner of an object
//! Other users may be able to make an object of this name before the server does. The server uses
//! it only if the server's user owns it, and if its mode lets no other users write than the mode
//! of a new object would.
//!
//! This file must not know which directory it is, or why it was chosen.

#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::fs::{File, Permissions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{PermissionsExt, fchown};
use std::path::PathBuf;

use nix::sys::resource::{Resource, getrlimit};
use nix::unistd::geteuid;

use super::lock::Lock;
use super::{DEFAULT_SIZE, Error, Kind, Options, Used, find_used};
use crate::directory::{Directory, Entry};
use crate::lock_file::MAX_NOTE_LENGTH;
use crate::sys::Mapping;

/// Write permission for others than the owner.
const OTHERS_WRITE: u32 = 0o022;

/// Write permission for the group.
const GROUP_WRITE: u32 = 0o020;

/// Where the object is.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) directory: Directory,
    /// Of the directory.
    pub(super) path: PathBuf,
    /// In the directory.
    pub(super) name: OsString,
    /// What the user calls the object.
    pub(super) given: OsString,
}

/// What a drop has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The start has failed.
    Starting,
    /// The server has ended in order.
    Serving,
    /// Clients go on with the next server.
    HandedOver,
}

#[derive(Debug)]
pub(super) struct Named {
    place: Place,
    lock: Lock,
    object: File,
    entry: Entry,
    label: String,
    settings: Settings,
    /// The size with which a server that was killed served this object.
    served: Option<u64>,
    used: Option<Used>,
    /// Whether a start that fails removes the object.
    is_new: bool,
    stage: Stage,
    /// The size that is served.
    size: u64,
}

/// How objects in this place are treated.
#[derive(Clone, Copy, Debug)]
struct Settings {
    /// As given, for a new object.
    mode: Option<u32>,
    /// The group of a new object.
    group: Option<u32>,
    /// That of a new object without `mode`, less the umask.
    default_mode: u32,
    /// The object stays at the end.
    keeps: bool,
    /// A file that a user made for this: it gives its size, and no other takes its place.
    is_file: bool,
    is_exact: bool,
}

impl Settings {
    fn allowed(&self) -> u32 {
        self.mode.unwrap_or(self.default_mode)
    }
}

impl Named {
    /// An object that the server makes, and removes at the end unless `options` say otherwise.
    pub(super) fn open_object(
        place: Place,
        options: &Options,
        default_mode: u32,
    ) -> Result<Self, Error> {
        let lock = Lock::beside(&place.directory, &place.path, &place.name, &place.given)?;
        let Options { mode, group, keeps, is_exact, .. } = *options;
        let settings = Settings { mode, group, default_mode, keeps, is_file: false, is_exact };
        Self::open(place, lock, settings)
    }

    /// A file of the user's, which is never removed.
    pub(super) fn open_file(
        place: Place,
        options: &Options,
        default_mode: u32,
    ) -> Result<Self, Error> {
        let lock = Lock::near(&place.directory, &place.path, &place.name, &place.given)?;
        let Options { mode, group, is_exact, .. } = *options;
        let settings = Settings { mode, group, default_mode, keeps: true, is_file: true, is_exact };
        Self::open(place, lock, settings)
    }

    fn open(place: Place, mut lock: Lock, settings: Settings) -> Result<Self, Error> {
        let label = format!("{:?}", place.given);
        match find_or_make(&place, &label, settings) {
            Ok((object, entry, is_new)) => {
                let place = Place { directory: place.directory.park(), ..place };
                // A new object has no clients.
                let used = if is_new { None } else { find_used(&object, &label) };
                let stage = Stage::Starting;
                // A file may have been replaced since, so the note must be about this one.
                let is_noted = !settings.is_file || lock.is_about(&entry);
                let served = if is_noted { size_of(lock.noted()) } else { None };
                Ok(Self {
                    place,
                    lock,
                    object,
                    entry,
                    label,
                    settings,
                    served,
                    used,
                    is_new,
                    stage,
                    size: 0,
                })
            }
            Err(error) => {
                give_up(&place.directory, &mut lock);
                Err(error)
            }
        }
    }
}

/// Returns the object, and whether a start that fails has to remove it.
fn find_or_make(
    place: &Place,
    label: &str,
    settings: Settings,
) -> Result<(File, Entry, bool), Error> {
    let Place { directory, name, .. } = place;
    let failed = |action| Error::system::<io::Error>(label, action);
    let default = settings.allowed();
    loop {
        match directory.create(name, default) {
            Ok(object) => {
                let made = give(&object, label, settings)
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
            // A file may exist where the server can make none.
            Err(error) => match directory.look(name) {
                Ok(Some(_)) if settings.is_file => {}
                _ => return Err(failed("create")(error)),
            },
        }
        // Looked at first, since to open a thing of another user can have effects.
        let Some(found) = directory.look(name).map_err(failed("look at"))? else { continue };
        check(&found, label, settings)?;
        let object = match directory.open_existing(name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            result => result.map_err(failed("open"))?,
        };
        let entry = Entry::of(&object).map_err(failed("look at"))?;
        if !entry.is(&found) {
            continue;
        }
        check(&entry, label, settings)?;
        // Probably a server that was killed right after it had made the object: it has no size
        // yet, and the mode of a new object.
        let as_made = !settings.is_file && entry.length == 0 && entry.permissions() == default;
        return Ok((object, entry, as_made));
    }
}

/// Gives a new object its group and mode. The group comes first: the one before never gets the mode.
fn give(object: &File, label: &str, settings: Settings) -> Result<(), Error> {
    if let Some(group) = settings.group {
        fchown(object, None, Some(group)).map_err(|source| Error::Group {
            memory: label.to_owned(),
            group,
            source,
        })?;
    }
    match settings.mode {
        // The mode is independent of the umask.
        Some(mode) => object
            .set_permissions(Permissions::from_mode(mode))
            .map_err(Error::system(label, "set the mode of")),
        None => Ok(()),
    }
}

/// The size that a note is about.
fn size_of(note: u64) -> Option<u64> {
    1u64.checked_shl(u32::try_from(note.checked_sub(1)?).ok()?)
}

/// Whether clients can map the object. Some file systems have files that cannot be mapped.
pub(super) fn check_mapping(object: &File, size: u64) -> io::Result<()> {
    let size = usize::try_from(size).map_err(|_| io::ErrorKind::OutOfMemory)?;
    Mapping::new(object.as_fd(), size).map(drop)
}

fn check(entry: &Entry, label: &str, settings: Settings) -> Result<(), Error> {
    if !entry.is_type(libc::S_IFREG) {
        let (memory, found) = (label.to_owned(), type_of(entry));
        return Err(match settings.is_file {
            true => Error::NotMemory { memory, found },
            false => Error::NotAFile { memory },
        });
    }
    let memory = format!("shared memory {label}");
    let (owner, mode) = (entry.owner, entry.permissions());
    if !entry.is_own() {
        return Err(Error::Foreign { memory, owner, mode, user: geteuid().as_raw() });
    }
    let allowed = settings.allowed();
    if mode & OTHERS_WRITE & !allowed != 0 {
        return Err(Error::Writable { memory, owner, mode, allowed });
    }
    let other = |&group: &u32| group != entry.group && mode & GROUP_WRITE != 0;
    if let Some(wanted) = settings.group.filter(other) {
        return Err(Error::OtherGroup { memory, group: entry.group, mode, wanted });
    }
    // Another user may have given a file of this user a name here. And two servers could serve it,
    // each by one name.
    if settings.is_file && entry.is_linked {
        return Err(Error::Linked { memory: label.to_owned() });
    }
    Ok(())
}

/// The file type, in words.
pub(super) fn type_of(entry: &Entry) -> &'static str {
    match entry.mode & libc::S_IFMT {
        libc::S_IFDIR => "a directory",
        libc::S_IFIFO => "a FIFO",
        libc::S_IFSOCK => "a socket",
        libc::S_IFLNK => "a symbolic link",
        libc::S_IFCHR => "a character device without memory of its own",
        libc::S_IFBLK => "a block device",
        _ => "no file",
    }
}

impl Kind for Named {
    fn object(&self) -> &File {
        &self.object
    }

    fn replace_object(&mut self, object: File) {
        self.object = object;
    }

    fn label(&self) -> String {
        self.label.clone()
    }

    fn served(&self) -> Option<u64> {
        self.served
    }

    fn usual_size(&self) -> Result<Option<u64>, Error> {
        if !self.settings.is_file || self.entry.length == 0 {
            return Ok(Some(DEFAULT_SIZE));
        }
        let size = match self.served {
            // A client has made it larger.
            Some(served) if served < self.entry.length => served,
            _ => self.entry.length,
        };
        if !size.is_power_of_two() && !self.settings.is_exact {
            return Err(Error::NotPowerOfTwo { memory: self.label.clone(), size });
        }
        Ok(Some(size))
    }

    fn reserved(&mut self, size: u64) -> Result<(), Error> {
        self.size = size;
        let failed = |action| Error::system::<io::Error>(&self.label, action);
        if self.settings.is_file {
            check_mapping(&self.object, size).map_err(failed("map"))?;
        }
        // Beyond this limit the kernel would not only refuse, but kill.
        let limit = getrlimit(Resource::RLIMIT_FSIZE).map_or(u64::MAX, |(soft, _)| soft);
        if limit < MAX_NOTE_LENGTH {
            return Ok(());
        }
        let logarithm = size.checked_next_power_of_two().map_or(63, u64::ilog2);
        let note = u64::from(logarithm) + 1;
        self.lock.note(note).map_err(failed("note the size of"))?;
        if self.settings.is_file {
            self.lock.mark(&self.entry).map_err(failed("note the size of"))?;
        }
        Ok(())
    }

    /// From now on the name is removed at the end, even if another program made the object. The
    /// reference does the same.
    fn finish(&mut self) {
        self.stage = Stage::Serving;
    }

    fn hand_over(&mut self) {
        self.stage = Stage::HandedOver;
    }

    fn is_named(&self) -> bool {
        true
    }

    fn take_used(&mut self) -> Option<Used> {
        self.used.take()
    }

    /// A file of the user's keeps its name: its content is meant to last.
    fn is_renewable(&self) -> bool {
        !self.settings.is_file
    }

    fn renew(&mut self) -> Result<(), Error> {
        let Self { place, label, settings, .. } = self;
        place
            .directory
            .remove(&place.name, &self.entry)
            .map_err(Error::system(label, "replace"))?;
        let (object, entry, is_new) = find_or_make(place, label, *settings)?;
        (self.object, self.entry, self.is_new) = (object, entry, is_new);
        Ok(())
    }
}

impl Named {
    /// What a client has added goes, so that the next server finds the size that was served.
    fn cut_back(&self) {
        let has = self.object.metadata().map_or(0, |meta| meta.len());
        if has <= self.size {
            return;
        }
        let Self { label, size, .. } = self;
        match self.object.set_len(*size) {
            Ok(()) => log::warn!(
                "shared memory {label} had grown to {has} bytes while it was served; it is cut \
                 back to {size}"
            ),
            Err(error) => log::warn!(
                "shared memory {label} had grown to {has} bytes while it was served, and cannot be \
                 cut back to {size}: {error}"
            ),
        }
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        let removes_name = match self.stage {
            Stage::Starting => self.is_new,
            Stage::Serving => !self.settings.keeps,
            Stage::HandedOver => false,
        };
        let Place { directory, name, .. } = &self.place;
        if removes_name {
            if let Err(error) = directory.remove(name, &self.entry) {
                log::warn!("cannot remove shared memory {}: {error}", self.label);
            }
        } else if self.stage == Stage::Serving {
            self.cut_back();
        }
        if removes_name || self.stage == Stage::Serving {
            self.lock.release(Some(directory));
        } else {
            give_up(directory, &mut self.lock);
        }
    }
}

/// Gives up the lock. A start that failed keeps the note of the server before it for the next one.
fn give_up(directory: &Directory, lock: &mut Lock) {
    if lock.noted() == 0 {
        lock.release(Some(directory));
    } else {
        lock.release_and_keep();
    }
}
