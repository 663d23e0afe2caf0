// SPDX-License-Identifier: GPL-2.0-or-later
//! Names in a directory that other users may write too.
//!
//! # The danger
//! Each call looks up a path anew. If another user may write one of its directories, the next call
//! may change or remove another object than the one that was checked. Such a user could make a
//! server that runs as root change the mode of any file, or remove it.
//!
//! # What is done
//! - The directory is opened once ([`Directory::of`]); all else is relative to that descriptor,
//!   names a last component, and follows no symbolic link there.
//! - An object that must be checked before it is used is opened without access
//!   ([`Directory::pin`]), and used through that descriptor.
//! - The system call that removes takes a name, not a descriptor. If another user could exchange
//!   the object, [`Directory::remove`] first moves it into a directory that only this user may
//!   write, and checks it there. A different object is moved back.
//! - A new object can be made in such a directory too ([`Directory::private`]), and moved to its
//!   name when it is complete.
//!
//! Other users that may write the directory can still take names, and so make a call fail.
//!
//! This file knows names and inodes. It does not know what they are for. The program's pid file
//! uses it too; it is not meant for other users of the library.

#![forbid(unsafe_code)]

use std::borrow::Cow;
use std::collections::hash_map::RandomState;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Permissions};
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, RenameFlags, open, openat, readlinkat, renameat2};
use nix::sys::stat::{FileStat, Mode, fstat, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, geteuid, unlinkat};

/// The sticky bit of a directory: only its owner may rename or remove an entry.
const STICKY: u32 = 0o1000;

/// Symbolic links on one path, as the kernel allows.
const MAX_LINKS: u32 = 40;

/// The object that a name had when it was looked up.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    device: u64,
    inode: u64,
    /// File type and permissions, as `st_mode` has them.
    pub mode: u32,
    /// The user who owns it.
    pub owner: u32,
    /// Its group.
    pub group: u32,
    /// Whether it has a second name.
    pub is_linked: bool,
    /// Its length in bytes.
    pub length: u64,
}

impl Entry {
    fn new(stat: &FileStat) -> Self {
        Self {
            device: stat.st_dev,
            inode: stat.st_ino,
            mode: stat.st_mode,
            owner: stat.st_uid,
            group: stat.st_gid,
            is_linked: stat.st_nlink > 1,
            length: stat.st_size as u64,
        }
    }

    /// What an open file is.
    ///
    /// # Errors
    /// As `fstat(2)`.
    pub fn of(file: impl AsFd) -> io::Result<Self> {
        Ok(Self::new(&fstat(file)?))
    }

    /// Whether both are the same object. It is sure only while one of the two is open, as the
    /// number of an inode can be used again.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
    }

    /// Its device and inode number.
    #[must_use]
    pub fn identity(&self) -> (u64, u64) {
        (self.device, self.inode)
    }

    /// Its permissions, with set-id and sticky bits.
    #[must_use]
    pub fn permissions(&self) -> u32 {
        self.mode & 0o7777
    }

    /// Whether its file type is this one (`S_IFREG` and so on).
    #[must_use]
    pub fn is_type(&self, file_type: u32) -> bool {
        self.mode & libc::S_IFMT == file_type
    }

    /// Whether it is this process's user who owns it.
    #[must_use]
    pub fn is_own(&self) -> bool {
        self.owner == geteuid().as_raw()
    }

    /// Whether it belongs to root or to the user of this process, who can do here what they like
    /// anyway.
    #[must_use]
    pub fn is_trusted(&self) -> bool {
        self.owner == 0 || self.is_own()
    }

    /// Whether, in this directory, other users cannot exchange an entry of a trusted user.
    fn keeps_entries(&self) -> bool {
        self.is_trusted() && (self.mode & 0o022 == 0 || self.mode & STICKY != 0)
    }
}

/// An object that was opened without access to it: it cannot be exchanged any more.
#[derive(Debug)]
pub struct Pinned {
    fd: OwnedFd,
    /// What it is.
    pub entry: Entry,
}

impl Pinned {
    /// A path that leads to this very object, as long as it is pinned.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        proc_path(&self.fd)
    }

    /// Changes its permissions. It must not be a symbolic link.
    ///
    /// # Errors
    /// As `chmod(2)`.
    pub fn set_mode(&self, mode: u32) -> io::Result<()> {
        fs::set_permissions(self.path(), Permissions::from_mode(mode))
    }
}

impl Pinned {
    /// Gives it to an owner and a group, and returns what it is then. It must not be a symbolic
    /// link.
    ///
    /// # Errors
    /// As `chown(2)`.
    pub fn set_owner(&self, owner: Option<u32>, group: Option<u32>) -> io::Result<Entry> {
        std::os::unix::fs::chown(self.path(), owner, group)?;
        Entry::of(&self.fd)
    }
}

fn proc_path(fd: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", fd.as_raw_fd()).into()
}

/// A directory that stays the same however its path is changed.
#[derive(Debug)]
pub struct Directory {
    /// None once it is [parked](Self::park): then the path leads to it.
    fd: Option<OwnedFd>,
    path: PathBuf,
    /// No other user can exchange an entry of a trusted user in it.
    keeps_entries: bool,
    /// Nor can another user make its path lead elsewhere.
    has_fixed_path: bool,
}

impl Directory {
    /// Opens the directory of a path; the path's last component comes with it.
    ///
    /// # Errors
    /// As `open(2)`; `InvalidInput` where the path does not end in a name.
    pub fn of(path: &Path) -> io::Result<(Self, OsString)> {
        let bytes = path.as_os_str().as_bytes();
        let (directory, name) = match bytes.iter().rposition(|&byte| byte == b'/') {
            Some(0) => (&b"/"[..], &bytes[1..]),
            Some(at) => (&bytes[..at], &bytes[at + 1..]),
            None => (&b"."[..], bytes),
        };
        if matches!(name, b"" | b"." | b"..") {
            let text = "the path must end in a name, not in '/', '.' or '..'";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let name = OsStr::from_bytes(name).to_owned();
        Ok((Self::open(Path::new(OsStr::from_bytes(directory)))?, name))
    }

    /// Opens a directory by its path.
    ///
    /// # Errors
    /// As `open(2)`.
    pub fn open(path: &Path) -> io::Result<Self> {
        let fd = open(path, Self::FLAGS, Mode::empty())?;
        let entry = Entry::of(&fd)?;
        // Where the path cannot be judged, it is taken for one that others can change.
        let end = fixed_end_of(path).unwrap_or(None);
        let has_fixed_path = end.is_some_and(|end| end.is(&entry));
        // Absolute, as the process may change its directory.
        let path = std::path::absolute(path).unwrap_or_else(|_| path.into());
        Ok(Self { fd: Some(fd), path, keeps_entries: entry.keeps_entries(), has_fixed_path })
    }

    const FLAGS: OFlag = OFlag::O_PATH.union(OFlag::O_DIRECTORY).union(OFlag::O_CLOEXEC);

    /// Whether no other user can exchange what a trusted user has made here, by name or by a
    /// change of the directory's path.
    #[must_use]
    pub fn is_safe(&self) -> bool {
        self.keeps_entries && self.has_fixed_path
    }

    /// Closes the descriptor if nobody else can change where the path leads; from now on this is
    /// only for [`look`](Self::look) and [`remove`](Self::remove). A server keeps it so: each
    /// descriptor that it holds is one less for clients.
    #[must_use]
    pub fn park(mut self) -> Self {
        if self.is_safe() && self.path.is_absolute() {
            self.fd = None;
        }
        self
    }

    /// The descriptor and the name with which a call is made.
    fn at<'a>(&'a self, name: &'a OsStr) -> (BorrowedFd<'a>, Cow<'a, OsStr>) {
        match &self.fd {
            Some(fd) => (fd.as_fd(), name.into()),
            None => (AT_FDCWD, self.path.join(name).into_os_string().into()),
        }
    }

    /// What has this name now; none if nothing has it. It may be something else a moment later.
    ///
    /// # Errors
    /// As `fstatat(2)`.
    pub fn look(&self, name: &OsStr) -> io::Result<Option<Entry>> {
        let (fd, name) = self.at(name);
        match fstatat(fd, &*name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(Entry::new(&stat))),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Opens what has this name, without access to it; none if nothing has the name.
    ///
    /// # Errors
    /// As `openat(2)`.
    pub fn pin(&self, name: &OsStr) -> io::Result<Option<Pinned>> {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let (fd, name) = self.at(name);
        match openat(fd, &*name, flags, Mode::empty()) {
            Ok(fd) => Ok(Some(Pinned { entry: Entry::of(&fd)?, fd })),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Makes a new file, for reading and writing.
    ///
    /// # Errors
    /// As `openat(2)`, `AlreadyExists` above all.
    pub fn create(&self, name: &OsStr, mode: u32) -> io::Result<File> {
        let flags = OFlag::O_CREAT | OFlag::O_EXCL;
        self.open_file(name, flags, mode)
    }

    /// Opens a file that exists, for reading and writing. [`Entry::of`] tells which one it is.
    ///
    /// # Errors
    /// As `openat(2)`.
    pub fn open_existing(&self, name: &OsStr) -> io::Result<File> {
        self.open_file(name, OFlag::empty(), 0)
    }

    fn open_file(&self, name: &OsStr, flags: OFlag, mode: u32) -> io::Result<File> {
        let flags = flags | OFlag::O_RDWR | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mode = Mode::from_bits_truncate(mode);
        let (fd, name) = self.at(name);
        Ok(File::from(openat(fd, &*name, flags, mode)?))
    }

    /// Removes this name if the object has it still; whether it had. It must be open, so that it
    /// can be told from a later one, and must not be a directory.
    ///
    /// # Errors
    /// As `unlinkat(2)`, and, where other users may exchange entries, `mkdirat(2)`, `openat(2)` and
    /// `renameat2(2)`.
    pub fn remove(&self, name: &OsStr, object: &Entry) -> io::Result<bool> {
        if !self.look(name)?.is_some_and(|now| now.is(object)) {
            return Ok(false);
        }
        if self.keeps_entries && object.is_trusted() {
            let (fd, name) = self.at(name);
            unlinkat(fd, &*name, UnlinkatFlags::NoRemoveDir)?;
            return Ok(true);
        }
        let private = self.private()?;
        match rename(self, name, &private.inside, PrivateDirectory::ENTRY) {
            Err(Errno::ENOENT) => return Ok(false),
            result => result?,
        }
        if private.inside.look(PrivateDirectory::ENTRY.as_ref())?.is_some_and(|now| now.is(object))
        {
            private.discard()?;
            return Ok(true);
        }
        // Another user exchanged it in the moment between.
        private.publish(self, name)?;
        Ok(false)
    }

    /// Makes a directory in this one that nobody else may write.
    ///
    /// # Errors
    /// As `mkdirat(2)` and `openat(2)`; `PermissionDenied` if another user exchanged it.
    pub fn private(&self) -> io::Result<PrivateDirectory<'_>> {
        let name = loop {
            // Random, so that nobody can take the names before.
            let number = RandomState::new().build_hasher().finish();
            let name = OsString::from(format!(".ivshmem-{number:016x}"));
            let (fd, at) = self.at(&name);
            match mkdirat(fd, &*at, Mode::S_IRWXU) {
                Err(Errno::EEXIST) => {}
                result => break result.map(|()| name)?,
            }
        };
        let (at, full_name) = self.at(&name);
        let opened = openat(at, &*full_name, Self::FLAGS | OFlag::O_NOFOLLOW, Mode::empty())
            .map_err(io::Error::from)
            .and_then(|fd| Ok((Entry::of(&fd)?, fd)));
        let (entry, fd) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                let _ = unlinkat(at, &*full_name, UnlinkatFlags::RemoveDir);
                return Err(error);
            }
        };
        if !entry.is_own() || entry.mode & 0o077 != 0 {
            let text = "another user exchanged a directory that was made a moment ago";
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        let path = proc_path(&fd);
        let inside = Self { fd: Some(fd), path, keeps_entries: true, has_fixed_path: false };
        Ok(PrivateDirectory { outside: self, name, inside })
    }
}

/// A directory of one entry that nobody else may write, within one that others may. It is removed
/// when dropped.
#[derive(Debug)]
pub struct PrivateDirectory<'a> {
    outside: &'a Directory,
    name: OsString,
    inside: Directory,
}

impl PrivateDirectory<'_> {
    /// The name of its entry.
    const ENTRY: &'static str = "entry";

    /// A path at which the entry can be made, short enough for a socket address.
    #[must_use]
    pub fn entry_path(&self) -> PathBuf {
        self.inside.path.join(Self::ENTRY)
    }

    /// Pins the entry.
    ///
    /// # Errors
    /// As `openat(2)`.
    pub fn pin(&self) -> io::Result<Option<Pinned>> {
        self.inside.pin(Self::ENTRY.as_ref())
    }

    /// Moves the entry to a name that nothing has.
    ///
    /// # Errors
    /// As `renameat2(2)`: `AlreadyExists` if something has the name.
    pub fn publish(&self, directory: &Directory, name: &OsStr) -> io::Result<()> {
        Ok(rename(&self.inside, Self::ENTRY, directory, name)?)
    }

    /// Removes the entry.
    ///
    /// # Errors
    /// As `unlinkat(2)`.
    pub fn discard(&self) -> io::Result<()> {
        let (fd, name) = self.inside.at(Self::ENTRY.as_ref());
        Ok(unlinkat(fd, &*name, UnlinkatFlags::NoRemoveDir)?)
    }
}

impl Drop for PrivateDirectory<'_> {
    fn drop(&mut self) {
        // By name, as there is no other way. Only an empty directory can be removed so, and only
        // in a directory whose other users can do the same.
        let (fd, name) = self.outside.at(&self.name);
        match unlinkat(fd, &*name, UnlinkatFlags::RemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(errno) => {
                log::warn!("cannot remove the directory {:?}: {}", self.name, errno.desc());
            }
        }
    }
}

fn rename(
    from: &Directory,
    old: impl AsRef<OsStr>,
    to: &Directory,
    new: impl AsRef<OsStr>,
) -> nix::Result<()> {
    let ((from, old), (to, new)) = (from.at(old.as_ref()), to.at(new.as_ref()));
    renameat2(from, &*old, to, &*new, RenameFlags::RENAME_NOREPLACE)
}

/// Where a path leads, if no other user can make it lead elsewhere: if each directory on it
/// keeps its entries, and each entry on it belongs to a trusted user, symbolic links included.
fn fixed_end_of(path: &Path) -> io::Result<Option<Entry>> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let start = |path: &Path| {
        let from = if path.is_absolute() { "/" } else { "." };
        open(from, flags, Mode::empty())
    };
    // The components that are still to go, the next one last.
    let push = |rest: &mut Vec<OsString>, path: &Path| {
        let names = path.components().rev().filter_map(|component| match component {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some("..".into()),
            _ => None,
        });
        rest.extend(names);
    };
    let mut at = start(path)?;
    let mut rest = Vec::new();
    push(&mut rest, path);
    // Somebody may move the current directory, and so exchange its parent.
    let mut knows_parent = path.is_absolute();
    let mut links = 0;
    while let Some(name) = rest.pop() {
        let next = openat(&at, &*name, flags, Mode::empty())?;
        let entry = Entry::of(&next)?;
        let is_fixed = Entry::of(&at)?.keeps_entries() && entry.is_trusted();
        if !is_fixed || (name == ".." && !knows_parent) {
            return Ok(None);
        }
        if entry.is_type(libc::S_IFLNK) {
            links += 1;
            if links > MAX_LINKS {
                return Ok(None);
            }
            let target = PathBuf::from(readlinkat(&at, &*name)?);
            if target.is_absolute() {
                at = start(&target)?;
                knows_parent = true;
            }
            push(&mut rest, &target);
        } else {
            at = next;
        }
    }
    Entry::of(&at).map(Some)
}

#[cfg(test)]
mod tests;
