// SPDX-License-Identifier: GPL-2.0-or-later
//! The pid file: claimed before anything else, so that two daemons do not share one.

#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::kill;
use nix::unistd::Pid;

use crate::Failure;

/// A pid file that is ours while this lives; removed then.
pub(crate) struct PidFile {
    path: PathBuf,
    file: Flock<File>,
}

impl PidFile {
    /// Takes `path`, unless a running daemon has it.
    pub(crate) fn claim(path: &Path) -> Result<Self, Failure> {
        let failed = |error: io::Error| {
            format!("cannot write pid file {path:?}: {error}; choose another file with -p")
        };
        loop {
            let file = File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(path)
                .map_err(failed)?;
            let failed = |error| {
                // An empty file that nobody has locked is what opening has just made.
                if fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file() && meta.len() == 0) {
                    let _ = fs::remove_file(path);
                }
                failed(error)
            };
            if !file.metadata().map_err(failed)?.is_file() {
                return Err(format!("pid file {path:?} is not a regular file").into());
            }
            let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(file) => file,
                Err((mut file, Errno::EAGAIN)) => {
                    let mut pid = String::new();
                    let _ = file.read_to_string(&mut pid);
                    // Until its owner writes it, it has what a killed daemon left, or nothing.
                    let pid = pid.trim().parse().ok().map(Pid::from_raw);
                    let who = match pid.filter(|&pid| kill(pid, None) != Err(Errno::ESRCH)) {
                        Some(pid) => format!("(pid {pid})"),
                        None => "that is starting".to_owned(),
                    };
                    return Err(format!(
                        "pid file {path:?} belongs to a running process {who}; stop it, or \
                         choose another file with -p"
                    )
                    .into());
                }
                Err((_, errno)) => return Err(failed(errno.into()).into()),
            };
            let path = std::path::absolute(path).map_err(failed)?;
            let claim = Self { path, file };
            // The one who had it may have removed it between our opening and our locking.
            if claim.is_still_there() {
                // What a killed daemon left is not to be taken for ours.
                claim.file.set_len(0).map_err(failed)?;
                return Ok(claim);
            }
        }
    }

    /// Writes this process's id.
    pub(crate) fn write(&self) -> Result<(), Failure> {
        (&*self.file)
            .write_all(format!("{}\n", std::process::id()).as_bytes())
            .map_err(|error| format!("cannot write pid file {:?}: {error}", self.path).into())
    }

    fn is_still_there(&self) -> bool {
        match (fs::metadata(&self.path), self.file.metadata()) {
            (Ok(there), Ok(ours)) => (there.dev(), there.ino()) == (ours.dev(), ours.ino()),
            _ => false,
        }
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if self.is_still_there() {
            if let Err(error) = fs::remove_file(&self.path) {
                log::warn!("cannot remove pid file {:?}: {error}", self.path);
            }
        }
    }
}
