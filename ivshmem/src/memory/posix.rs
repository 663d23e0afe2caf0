// SPDX-License-Identifier: GPL-2.0-or-later
//! A POSIX shared memory object: a name in /dev/shm, which every user may write.
//!
//! This file knows where `shm_open(3)` has its names and which names are valid; the rest is in
//! `named.rs`. /dev/shm is sticky, so no other user can exchange an object of the server's user.

#![forbid(unsafe_code)]

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::named::{Named, Place};
use super::{Error, Options};
use crate::directory::Directory;
use crate::lock_file;

/// Where shm_open(3) of Linux's C libraries has its names.
pub(super) const SHM_DIRECTORY: &str = "/dev/shm";

/// The mode of a new object, which the reference uses too.
const DEFAULT_MODE: u32 = 0o700;

/// Finds or makes the object of this name.
pub(super) fn open(given: OsString, options: &Options) -> Result<Named, Error> {
    let Some(name) = valid_name(&given) else {
        return Err(Error::Name { name: given });
    };
    options.check_mode()?;
    let path = Path::new(SHM_DIRECTORY);
    let directory = Directory::open(path).map_err(Error::system(&format!("{given:?}"), "find"))?;
    let place = Place { directory, path: path.into(), name, given };
    Named::open_object(place, options, DEFAULT_MODE)
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
