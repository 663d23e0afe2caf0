// SPDX-License-Identifier: GPL-2.0-or-later
//! Memory at a path: a file or a device, which the server never removes.
//!
//! # Symbolic links
//! A link as the last component is followed only if no other user could have made it or can
//! change it: it belongs to root or to the server's user, and no other user can exchange an entry
//! on the way to it (`directory.rs`). /dev/disk/by-id is an example. All other links are refused.
//!
//! This file finds what a path leads to. The two kinds of object are in `named.rs` and
//! `device.rs`.

#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::device::Device;
use super::named::{Named, Place};
use super::{Error, Kind, Options};
use crate::directory::Directory;

/// The mode of a new file.
const DEFAULT_MODE: u32 = 0o600;

/// Symbolic links behind each other, as the kernel allows.
const MAX_LINKS: u32 = 40;

/// Opens what the path leads to, or makes a file there.
pub(super) fn open(given: PathBuf, options: &Options) -> Result<Box<dyn Kind>, Error> {
    options.check_mode()?;
    let place = find(given)?;
    let label = format!("{:?}", place.given);
    let found = place.directory.look(&place.name).map_err(Error::system(&label, "look at"))?;
    match found {
        Some(entry) if entry.is_type(libc::S_IFBLK) || entry.is_type(libc::S_IFCHR) => {
            Ok(Box::new(Device::open(&place, options)?))
        }
        None if is_in_dev(&place.path) => {
            let text = "there is no such device, and no file is made in /dev";
            Err(Error::system(&label, "find")(io::Error::new(io::ErrorKind::NotFound, text)))
        }
        _ => Ok(Box::new(Named::open_file(place, options, DEFAULT_MODE)?)),
    }
}

/// Whether a directory is in /dev, but not in another file system there such as /dev/shm. A file
/// that is made there instead of a device would not last, and would take the machine's memory.
fn is_in_dev(directory: &Path) -> bool {
    let device = |path: &Path| fs::metadata(path).ok().map(|meta| meta.dev());
    let directory = if directory == Path::new("") { Path::new(".") } else { directory };
    let dev = device(Path::new("/dev"));
    dev.is_some() && device(directory) == dev && device(Path::new("/")) != dev
}

/// Follows symbolic links that can be trusted.
fn find(given: PathBuf) -> Result<Place, Error> {
    let label = format!("{given:?}");
    let failed = |error: io::Error| Error::system(&label, "find")(error);
    let mut path = given.clone();
    for _ in 0..=MAX_LINKS {
        let (directory, name) = Directory::of(&path).map_err(failed)?;
        let parent = path.parent().unwrap_or(Path::new("")).to_owned();
        let link = directory.look(&name).map_err(failed)?;
        let Some(link) = link.filter(|entry| entry.is_type(libc::S_IFLNK)) else {
            return Ok(Place { directory, path: parent, name, given: given.into() });
        };
        if !directory.is_safe() || !link.is_trusted() {
            return Err(Error::Link { memory: label, owner: link.owner });
        }
        // By its path, which no other user can make lead elsewhere.
        path = parent.join(fs::read_link(&path).map_err(failed)?);
    }
    Err(failed(io::Error::from_raw_os_error(libc::ELOOP)))
}
