// SPDX-License-Identifier: GPL-2.0-or-later
//! The pid file. It is claimed before the other steps of the start, so that two daemons do not share one.
//!
//! Only a pid file is ever replaced or removed: a regular file that belongs to this user, has one name, and is empty or
//! contains one decimal number and a newline. All calls use one descriptor of the directory and follow no symbolic link.
//! A file is removed in two steps: it is moved to a private directory and checked there (see `private_dir`). So another
//! user who can change the directory cannot redirect this process to another file.
//!
//! A running daemon holds a write lock (of the open file description) on its pid file. Every user may read the file, and
//! so take a read lock on it. Therefore the daemon takes its lock before other users can open the file, and a starting
//! daemon checks for write locks only, which need write permission.

#![forbid(unsafe_code)]

mod private_dir;

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, FcntlArg, OFlag, fcntl, open, openat};
use nix::sys::signal::kill;
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat};
use nix::unistd::{Pid, geteuid};

use crate::Failure;
use private_dir::PrivateDir;

/// A pid file that belongs to this process. It is removed when this value is dropped.
pub(crate) struct PidFile {
    name: Name,
    file: File,
}

impl PidFile {
    /// Creates the pid file at `path`, unless a running daemon has one there.
    pub(crate) fn claim(path: &Path) -> Result<Self, Failure> {
        let name = Name::new(path)?;
        let private = PrivateDir::enter(&name)?;
        if let Some(stale) = name.stale_file(name.directory.as_fd(), &name.file)? {
            private.remove(&stale)?;
        }
        let file = private.create()?;
        drop(private);
        Ok(Self { name, file })
    }

    /// Writes this process's id.
    pub(crate) fn write(&self) -> Result<(), Failure> {
        (&self.file)
            .write_all(format!("{}\n", std::process::id()).as_bytes())
            .map_err(|error| format!("cannot write {}: {error}", self.name).into())
    }

    fn remove(&self) -> Result<(), Failure> {
        let ours = fstat(&self.file).map_err(|errno| self.name.failed("look at", errno))?;
        if !self.name.stat().is_ok_and(|there| is_same(&there, &ours)) {
            return Ok(());
        }
        PrivateDir::enter(&self.name)?.remove(&ours)
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            log::warn!("{error}");
        }
    }
}

/// Whether both are the same file.
fn is_same(one: &FileStat, other: &FileStat) -> bool {
    (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)
}

/// A file name in a directory, and a descriptor of that directory.
struct Name {
    directory: OwnedFd,
    file: OsString,
    /// The path as given, for messages.
    path: PathBuf,
}

impl std::fmt::Display for Name {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "pid file {:?}", self.path)
    }
}

impl Name {
    fn new(path: &Path) -> Result<Self, Failure> {
        let Some(file) = path.file_name() else {
            return Err(
                format!("pid file {path:?} has no file name; choose another with -p").into()
            );
        };
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let directory = open(parent, flags, Mode::empty()).map_err(|errno| {
            format!("cannot open the directory of pid file {path:?}: {}", errno.desc())
        })?;
        Ok(Self { directory, file: file.to_owned(), path: path.to_owned() })
    }

    /// The file that has the name now. A symbolic link is not followed.
    fn stat(&self) -> nix::Result<FileStat> {
        fstatat(&self.directory, self.file.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW)
    }

    /// An error of a system call, with advice.
    fn failed(&self, what: &str, errno: Errno) -> Failure {
        format!("cannot {what} {self}: {}; choose another file with -p", errno.desc()).into()
    }

    fn refuse(&self, why: &str) -> Failure {
        format!("{self} {why}; remove it, or choose another file with -p").into()
    }

    /// Checks that `file` in `directory` may be replaced, and returns which file it is. Returns `None` if there is no
    /// file. It is an error if the file is not a pid file, or belongs to a running daemon.
    fn stale_file(
        &self,
        directory: impl AsFd + Copy,
        file: &OsString,
    ) -> Result<Option<FileStat>, Failure> {
        let failed = |errno| self.failed("look at", errno);
        let file = file.as_os_str();
        // This check comes before the file is opened, because opening a device can have an effect.
        let there = match fstatat(directory, file, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Err(Errno::ENOENT) => return Ok(None),
            there => there.map_err(failed)?,
        };
        let kind = SFlag::from_bits_truncate(there.st_mode) & SFlag::S_IFMT;
        if kind != SFlag::S_IFREG {
            return Err(self.refuse(&format!("is {}, not a regular file", name_of(kind))));
        }
        if there.st_uid != geteuid().as_raw() {
            return Err(self.refuse(&format!("belongs to user {}", there.st_uid)));
        }
        if there.st_nlink > 1 {
            return Err(self.refuse(&format!("has {} names (hard links)", there.st_nlink)));
        }
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let opened = openat(directory, file, flags, Mode::empty()).map_err(failed)?;
        let stat = fstat(&opened).map_err(failed)?;
        if !is_same(&stat, &there) {
            return Err(self.refuse("is being changed by another process"));
        }
        let mut content = Vec::new();
        let locked = is_write_locked(&opened).map_err(failed)?;
        // No process id is as long as this.
        File::from(opened)
            .take(64)
            .read_to_end(&mut content)
            .map_err(|error| format!("cannot read {self}: {error}"))?;
        if locked {
            return Err(self.in_use(&content));
        }
        match content.split_last() {
            None => {}
            Some((b'\n', [_, ..]))
                if content[..content.len() - 1].iter().all(u8::is_ascii_digit) => {}
            Some(_) => {
                let start = String::from_utf8_lossy(&content[..content.len().min(20)]).into_owned();
                return Err(self.refuse(&format!(
                    "contains other text than a process id (it begins with {start:?})"
                )));
            }
        }
        Ok(Some(stat))
    }

    /// The error for a file that a daemon has locked.
    fn in_use(&self, content: &[u8]) -> Failure {
        let pid = std::str::from_utf8(content).ok().and_then(|text| text.trim().parse().ok());
        // The file is empty until its owner writes it.
        let owner = match pid.map(Pid::from_raw).filter(|&pid| kill(pid, None) != Err(Errno::ESRCH))
        {
            Some(pid) => format!("(pid {pid})"),
            None => "that is starting".to_owned(),
        };
        format!(
            "{self} belongs to a running process {owner}; stop it, or choose another file with -p"
        )
        .into()
    }
}

fn name_of(kind: SFlag) -> &'static str {
    match kind {
        SFlag::S_IFLNK => "a symbolic link",
        SFlag::S_IFDIR => "a directory",
        SFlag::S_IFIFO => "a FIFO",
        SFlag::S_IFSOCK => "a socket",
        SFlag::S_IFCHR | SFlag::S_IFBLK => "a device",
        _ => "of an unknown kind",
    }
}

/// A lock on the whole file.
fn whole_file(kind: i32) -> libc::flock {
    libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

/// Takes the write lock.
fn write_lock(file: impl AsFd) -> nix::Result<()> {
    fcntl(file, FcntlArg::F_OFD_SETLK(&whole_file(libc::F_WRLCK))).map(drop)
}

/// Whether another open file description has the write lock. Read locks do not count.
fn is_write_locked(file: impl AsFd) -> nix::Result<bool> {
    // Only a write lock conflicts with a read lock.
    let mut lock = whole_file(libc::F_RDLCK);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}
