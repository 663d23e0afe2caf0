// SPDX-License-Identifier: GPL-2.0-or-later
//! A private directory beside the pid file. It exists only while the pid file is created or removed.
//!
//! It has two purposes. It is a lock, so that only one of several starting daemons checks the pid file at a time; its mode
//! is 0700, so no other user can open it and hold the lock. And no other user can exchange files in it: no system call
//! removes a name only if it refers to a certain file, so the file is moved here, checked, and then removed, or moved back
//! if it is another file.
//!
//! This module does not know which pid files may be replaced.

#![forbid(unsafe_code)]

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::thread::sleep;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, FlockArg, OFlag, RenameFlags, openat, renameat, renameat2};
use nix::sys::stat::{FileStat, Mode, fchmod, fstat, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, geteuid, linkat, unlinkat};

use super::{Name, is_same, write_lock};
use crate::Failure;

/// The new pid file, before it gets its name.
const NEW: &str = "new";
/// The file that was moved here to be checked.
const OLD: &str = "old";

/// Another daemon holds the lock for less than a millisecond, unless it was stopped.
const TRIES: u32 = 200;
const BETWEEN_TRIES: Duration = Duration::from_millis(5);

/// The locked directory. It is removed when this value is dropped.
pub(super) struct PrivateDir<'a> {
    pid_file: &'a Name,
    name: OsString,
    directory: OwnedFd,
}

impl<'a> PrivateDir<'a> {
    pub(super) fn enter(pid_file: &'a Name) -> Result<Self, Failure> {
        let mut name = pid_file.file.clone();
        name.push(".lock");
        for _ in 0..TRIES {
            let made = match mkdirat(&pid_file.directory, name.as_os_str(), Mode::S_IRWXU) {
                Ok(()) => true,
                Err(Errno::EEXIST) => false,
                Err(errno) => {
                    return Err(pid_file.failed("create a directory beside", errno));
                }
            };
            match Self::lock(pid_file, &name) {
                Ok(Some(directory)) => {
                    let private = Self { pid_file, name, directory };
                    private.clear()?;
                    return Ok(private);
                }
                Ok(None) => {}
                Err(error) => {
                    if made {
                        remove_directory(pid_file, &name);
                    }
                    return Err(error);
                }
            }
        }
        Err(format!(
            "another process has been starting or ending for a second with {pid_file}; stop it, \
             or choose another file with -p"
        )
        .into())
    }

    /// Opens and locks the directory. Returns `None` if the caller has to try again.
    fn lock(pid_file: &Name, name: &OsStr) -> Result<Option<OwnedFd>, Failure> {
        let failed = |errno| pid_file.failed("open the directory beside", errno);
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let directory = match openat(&pid_file.directory, name, flags, Mode::empty()) {
            // Its owner has removed it.
            Err(Errno::ENOENT) => return Ok(None),
            Err(errno @ (Errno::ENOTDIR | Errno::ELOOP)) => {
                return Err(not_ours(pid_file, name, errno.desc()));
            }
            opened => opened.map_err(failed)?,
        };
        let stat = fstat(&directory).map_err(failed)?;
        if stat.st_uid != geteuid().as_raw() || stat.st_mode & 0o077 != 0 {
            let whose = format!("user {}, mode {:o}", stat.st_uid, stat.st_mode & 0o7777);
            return Err(not_ours(pid_file, name, &whose));
        }
        match flock(&directory) {
            Err(Errno::EAGAIN) => {
                sleep(BETWEEN_TRIES);
                return Ok(None);
            }
            locked => {
                locked.map_err(|errno| pid_file.failed("lock the directory beside", errno))?
            }
        }
        // Its owner may have removed it between `openat` and `flock`.
        match fstatat(&pid_file.directory, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(there) if is_same(&there, &stat) => Ok(Some(directory)),
            Ok(_) | Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(failed(errno)),
        }
    }

    /// Removes files that a killed process left here.
    fn clear(&self) -> Result<(), Failure> {
        let failed = |errno| self.pid_file.failed("clear the directory beside", errno);
        match unlinkat(&self.directory, NEW, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(errno) => return Err(failed(errno)),
        }
        match self.move_back() {
            Ok(()) | Err(Errno::ENOENT) => return Ok(()),
            // Another file has the name now. A stale pid file can be removed.
            Err(Errno::EEXIST) => {}
            Err(errno) => return Err(failed(errno)),
        }
        match self.pid_file.stale_file(self.directory.as_fd(), &OLD.into()) {
            Ok(_) => unlinkat(&self.directory, OLD, UnlinkatFlags::NoRemoveDir).map_err(failed),
            Err(_) => Err(self.lost()),
        }
    }

    fn move_back(&self) -> nix::Result<()> {
        let (file, flags) = (self.pid_file.file.as_os_str(), RenameFlags::RENAME_NOREPLACE);
        renameat2(&self.directory, OLD, &self.pid_file.directory, file, flags)
    }

    fn lost(&self) -> Failure {
        let kept = self.pid_file.path.with_file_name(&self.name).join(OLD);
        format!("{kept:?} was the {} and is not a pid file; move it away", self.pid_file).into()
    }

    /// Removes the pid file if it is `expected`. Another file keeps its name.
    pub(super) fn remove(&self, expected: &FileStat) -> Result<(), Failure> {
        let failed = |errno| self.pid_file.failed("remove", errno);
        let from = &self.pid_file.directory;
        match renameat(from, self.pid_file.file.as_os_str(), &self.directory, OLD) {
            Err(Errno::ENOENT) => return Ok(()),
            moved => moved.map_err(failed)?,
        }
        let moved = fstatat(&self.directory, OLD, AtFlags::AT_SYMLINK_NOFOLLOW).map_err(failed)?;
        if is_same(&moved, expected) {
            return unlinkat(&self.directory, OLD, UnlinkatFlags::NoRemoveDir).map_err(failed);
        }
        self.move_back().map_err(|_| self.lost())?;
        Err(self.pid_file.refuse("is being changed by another process"))
    }

    /// Creates the pid file: empty, locked, and of mode 0644 for every umask. No file may have its name.
    pub(super) fn create(&self) -> Result<File, Failure> {
        let failed = |errno| self.pid_file.failed("create", errno);
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        let file = openat(&self.directory, NEW, flags, mode).map_err(failed)?;
        let named = write_lock(&file)
            .and_then(|()| fchmod(&file, mode | Mode::S_IRGRP | Mode::S_IROTH))
            // Unlike a rename, a link does not replace a file.
            .and_then(|()| {
                let to = &self.pid_file.directory;
                let name = self.pid_file.file.as_os_str();
                linkat(&self.directory, NEW, to, name, AtFlags::empty())
            });
        // If this fails, the next process that uses the directory removes the file.
        let _ = unlinkat(&self.directory, NEW, UnlinkatFlags::NoRemoveDir);
        match named {
            Ok(()) => Ok(file.into()),
            Err(Errno::EEXIST) => {
                Err(self.pid_file.refuse("was created by another process just now"))
            }
            Err(errno) => Err(failed(errno)),
        }
    }
}

impl Drop for PrivateDir<'_> {
    fn drop(&mut self) {
        // This fails if the directory is not empty: see `lost`.
        remove_directory(self.pid_file, &self.name);
    }
}

fn remove_directory(pid_file: &Name, name: &OsStr) {
    let _ = unlinkat(&pid_file.directory, name, UnlinkatFlags::RemoveDir);
}

/// Takes a lock that lasts until the directory is closed.
#[expect(
    deprecated,
    reason = "its successor panics when unlocking fails; closing the descriptor cannot fail that way"
)]
fn flock(directory: &OwnedFd) -> nix::Result<()> {
    nix::fcntl::flock(directory.as_raw_fd(), FlockArg::LockExclusiveNonblock)
}

fn not_ours(pid_file: &Name, name: &OsStr, what: &str) -> Failure {
    let path = pid_file.path.with_file_name(name);
    format!(
        "{path:?}, which is needed to create {pid_file}, is not a private directory ({what}); remove \
         it, or choose another file with -p"
    )
    .into()
}
