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

use std::io;
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
        _ => Ok(Box::new(Named::open_file(place, options, DEFAULT_MODE)?)),
    }
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
        path = parent.join(std::fs::read_link(&path).map_err(failed)?);
    }
    Err(failed(io::Error::from_raw_os_error(libc::ELOOP)))
}
