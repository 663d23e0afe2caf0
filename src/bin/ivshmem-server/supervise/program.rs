// SPDX-License-Identifier: GPL-2.0-or-later
//! Which program file the supervisor starts: the one that is now at its own path, unless that one has refused; then the
//! last one that was ready, which is held open because its file may have been replaced.

#![forbid(unsafe_code)]

use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::sys;

/// A program file, held open.
#[derive(Debug)]
pub(super) struct Image {
    file: File,
    identity: Identity,
}

/// Device, inode, and the time when the content changed.
type Identity = (u64, u64, i64, i64);

fn identity(metadata: &Metadata) -> Identity {
    (metadata.dev(), metadata.ino(), metadata.mtime(), metadata.mtime_nsec())
}

impl Image {
    fn open(path: &Path) -> io::Result<Self> {
        let file = File::options().read(true).custom_flags(libc::O_PATH).open(path)?;
        let identity = identity(&file.metadata()?);
        Ok(Self { file, identity })
    }
}

#[derive(Debug)]
pub(super) struct Programs {
    path: PathBuf,
    /// The last one that was ready; at first the supervisor's own.
    good: Image,
    refused: Option<Identity>,
}

/// A program to start. `image` is `None` if it is the last good one.
#[derive(Debug)]
pub(super) struct Choice {
    pub(super) path: PathBuf,
    image: Option<Image>,
    /// The descriptor that `path` names, if it does.
    _named: Option<OwnedFd>,
}

impl Choice {
    /// Whether a program that was ready once can be started in its place.
    pub(super) fn is_new(&self) -> bool {
        self.image.is_some()
    }
}

impl Programs {
    pub(super) fn new() -> io::Result<Self> {
        let own = Path::new("/proc/self/exe");
        let good = Image::open(own)?;
        Ok(Self { path: path_of(&good)?, good, refused: None })
    }

    /// As the supervisor was started, for the first argument of the child.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether there is a program at the path; an upgrade asks before it ends the old one.
    pub(super) fn check(&mut self) -> io::Result<()> {
        Image::open(&self.path)?;
        self.refused = None;
        Ok(())
    }

    /// `count` descriptors are given to the program, from number 3 on.
    pub(super) fn choose(&self, count: usize) -> io::Result<Choice> {
        let path = self.path.clone();
        match Image::open(&self.path) {
            Ok(image) if image.identity == self.good.identity => {
                return Ok(Choice { path, image: None, _named: None });
            }
            Ok(image) if self.refused != Some(image.identity) => {
                return Ok(Choice { path, image: Some(image), _named: None });
            }
            Ok(_) => {}
            Err(error) => log::error!(
                "cannot open the program {:?}: {error}; the one that ran before is started",
                self.path
            ),
        }
        // Its file may have no name any more. In the new process the numbers from 3 on belong to the descriptors that
        // are given to it.
        let lowest = RawFd::try_from(count).unwrap_or(RawFd::MAX).saturating_add(sys::FIRST);
        let named = sys::copy_above(self.good.file.as_fd(), lowest)?;
        let path = format!("/proc/self/fd/{}", named.as_raw_fd()).into();
        Ok(Choice { path, image: None, _named: Some(named) })
    }

    /// The child is ready.
    pub(super) fn is_good(&mut self, choice: &mut Choice) {
        if let Some(image) = choice.image.take() {
            self.good = image;
        }
    }

    /// The child ended before it was ready.
    pub(super) fn has_refused(&mut self, choice: &Choice) {
        self.refused = choice.image.as_ref().map(|image| image.identity);
    }
}

/// The path by which this program was started: a later file may be there. /proc/self/exe would follow the symbolic
/// links of today, and ends in " (deleted)" after an upgrade.
fn path_of(own: &Image) -> io::Result<PathBuf> {
    let word = PathBuf::from(std::env::args_os().next().unwrap_or_default());
    let mut candidates = Vec::new();
    if word.components().count() > 1 || word.is_absolute() {
        candidates.push(std::path::absolute(&word)?);
    } else if let Some(search) = std::env::var_os("PATH").filter(|_| !word.as_os_str().is_empty()) {
        candidates.extend(std::env::split_paths(&search).map(|place| place.join(&word)));
    }
    let is_own = |path: &&PathBuf| {
        fs::metadata(path).is_ok_and(|metadata| identity(&metadata) == own.identity)
    };
    match candidates.iter().find(is_own) {
        Some(path) => Ok(path.clone()),
        None => {
            let path = std::env::current_exe()?;
            let name = path.as_os_str().as_encoded_bytes();
            match name.strip_suffix(b" (deleted)").filter(|_| !path.exists()) {
                Some(name) => Ok(OsStr::from_bytes(name).into()),
                None => Ok(path),
            }
        }
    }
}
