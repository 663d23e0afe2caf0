// SPDX-License-Identifier: GPL-2.0-or-later
//! Memory in a directory: a file without a name, on any file system, hugetlbfs included.
//!
//! No process can give it a name again: with `O_EXCL`, `O_TMPFILE` makes a file that `linkat`
//! refuses. Otherwise a client could keep the memory beyond the end of the server, on the
//! server's quota.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::{Error, Kind};

#[derive(Debug)]
pub(super) struct Unnamed {
    object: File,
    directory: PathBuf,
}

impl Unnamed {
    pub(super) fn open(directory: PathBuf) -> Result<Self, Error> {
        let object = File::from(temporary(&directory)?);
        Ok(Self { object, directory })
    }
}

impl Kind for Unnamed {
    fn object(&self) -> &File {
        &self.object
    }

    fn label(&self) -> String {
        label(&self.directory)
    }
}

fn label(directory: &Path) -> String {
    format!("in directory {directory:?}")
}

/// A file without a name in `directory`.
fn temporary(directory: &Path) -> Result<OwnedFd, Error> {
    let failed = |errno: Errno| Error::system(&label(directory), "create")(errno);
    let mode = Mode::S_IRUSR | Mode::S_IWUSR;
    let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC;
    match open(directory, flags | OFlag::O_TMPFILE | OFlag::O_EXCL, mode) {
        // A file system, or a kernel, that has no such files: the usual way.
        Err(Errno::EOPNOTSUPP | Errno::EISDIR | Errno::EINVAL) => {}
        result => return result.map_err(failed),
    }
    let directory_fd =
        open(directory, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
            .map_err(failed)?;
    let mut number = 0u32;
    loop {
        let name = &*format!("ivshmem.{}.{number}", std::process::id());
        let new = flags | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW;
        match openat(&directory_fd, name, new, mode) {
            Err(Errno::EEXIST) => number += 1,
            Ok(fd) => {
                unlinkat(&directory_fd, name, UnlinkatFlags::NoRemoveDir).map_err(failed)?;
                // A user who may write the directory could have given it a second name, or
                // have had something else removed.
                let file = File::from(fd);
                let names = file.metadata().map(|meta| meta.nlink());
                return match names.map_err(Error::system(&label(directory), "look at"))? {
                    0 => Ok(file.into()),
                    _ => Err(Error::system(&label(directory), "remove the name of")(
                        io::Error::new(io::ErrorKind::ResourceBusy, "it was given another name"),
                    )),
                };
            }
            Err(errno) => return Err(failed(errno)),
        }
    }
}
