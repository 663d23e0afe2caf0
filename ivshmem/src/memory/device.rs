// SPDX-License-Identifier: GPL-2.0-or-later
//! Memory on a device: a block device, or a DAX device (persistent or reserved memory). The server
//! does not change its size, and has nothing to reserve.
//!
//! # Exactly one live server serves it
//! A block device is claimed (`O_EXCL`), as file systems do. So one that is mounted is refused
//! too, and it cannot be mounted while it is served. The claim has a description of its own:
//! clients get another one, so the claim ends with the server and not with its last client. A DAX
//! device cannot be claimed; it has a lock file (`lock.rs`).
//!
//! # Who can use it
//! A client finds out the size with fstat(2), as QEMU does, and that is 0 for each device. So
//! stock QEMU cannot attach, and ends with an error. Programs that know the size can.
//!
//! Other character devices are refused: to open one, or to map it, can have any effect.

#![forbid(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::unistd::geteuid;

use super::lock::Lock;
use super::named::{Place, check_mapping, type_of};
use super::{Error, Kind, Options, Used, find_used};
use crate::directory::{Entry, Pinned};

/// A group may write a device by the administrator's will.
const USUAL_MODE: u32 = 0o660;

/// What keeps other servers away.
#[derive(Debug)]
enum Claim {
    Block { _claim: File },
    Dax(Lock),
}

#[derive(Debug)]
pub(super) struct Device {
    object: File,
    label: String,
    size: u64,
    claim: Claim,
    used: Option<Used>,
}

impl Device {
    pub(super) fn open(place: &Place, options: &Options) -> Result<Self, Error> {
        let label = format!("{:?}", place.given);
        let failed = |action| Error::system::<io::Error>(&label, action);
        let pinned = place.directory.pin(&place.name).map_err(failed("open"))?;
        let Some(pinned) = pinned else {
            return Err(failed("open")(io::ErrorKind::NotFound.into()));
        };
        let dax = match pinned.entry.is_type(libc::S_IFBLK) {
            true => None,
            false => Some(dax_of(&pinned, &label)?),
        };
        check(&pinned.entry, &label, options)?;
        let (claim, size) = match dax {
            None => claim_block(&pinned, &label)?,
            Some(dax) => claim_dax(&dax, place)?,
        };
        let object = File::options().read(true).write(true).open(pinned.path());
        let object = object.map_err(failed("open"))?;
        let used = find_used(&object, &label);
        Ok(Self { object, label, size, claim, used })
    }
}

fn check(entry: &Entry, label: &str, options: &Options) -> Result<(), Error> {
    let memory = format!("shared memory {label}");
    let (owner, mode) = (entry.owner, entry.permissions());
    if !entry.is_trusted() {
        return Err(Error::Foreign { memory, owner, mode, user: geteuid().as_raw() });
    }
    let allowed = options.mode.unwrap_or(0) | USUAL_MODE;
    if mode & 0o002 & !allowed != 0 {
        return Err(Error::Writable { memory, owner, mode, allowed });
    }
    Ok(())
}

fn claim_block(pinned: &Pinned, label: &str) -> Result<(Claim, u64), Error> {
    let claim = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(pinned.path());
    let mut claim = claim.map_err(|error| match error.raw_os_error() {
        Some(libc::EBUSY) => Error::Busy { memory: label.to_owned() },
        _ => Error::system(label, "claim")(error),
    })?;
    let size = claim.seek(SeekFrom::End(0)).map_err(Error::system(label, "find the size of"))?;
    Ok((Claim::Block { _claim: claim }, size))
}

/// A DAX device.
struct Dax {
    /// Major and minor.
    numbers: (u32, u32),
    size: u64,
}

/// Finds out which DAX device it is. Other character devices are refused before they are opened.
fn dax_of(pinned: &Pinned, label: &str) -> Result<Dax, Error> {
    let not_memory =
        || Error::NotMemory { memory: label.to_owned(), found: type_of(&pinned.entry) };
    let meta = fs::metadata(pinned.path()).map_err(Error::system(label, "look at"))?;
    let numbers = (libc::major(meta.rdev()), libc::minor(meta.rdev()));
    let sysfs = Path::new("/sys/dev/char").join(format!("{}:{}", numbers.0, numbers.1));
    let subsystem = fs::read_link(sysfs.join("subsystem")).map_err(|_| not_memory())?;
    if subsystem.file_name().is_none_or(|name| name != "dax") {
        return Err(not_memory());
    }
    let text = fs::read_to_string(sysfs.join("size"));
    let text = text.map_err(Error::system(label, "find the size of"))?;
    let size = text.trim().parse().map_err(|_| not_memory())?;
    Ok(Dax { numbers, size })
}

fn claim_dax(dax: &Dax, place: &Place) -> Result<(Claim, u64), Error> {
    let (major, minor) = dax.numbers;
    let lock = Lock::by_number(&format!("dax-{major}-{minor}"), &place.given)?;
    Ok((Claim::Dax(lock), dax.size))
}

impl Kind for Device {
    fn object(&self) -> &File {
        &self.object
    }

    fn replace_object(&mut self, object: File) {
        self.object = object;
    }

    fn label(&self) -> String {
        self.label.clone()
    }

    fn fixed_size(&self) -> Option<u64> {
        Some(self.size)
    }

    fn reserved(&mut self, size: u64) -> Result<(), Error> {
        check_mapping(&self.object, size).map_err(Error::system(&self.label, "map"))?;
        log::warn!(
            "shared memory {} is a device: QEMU cannot attach, as it takes the size from \
             fstat(2), which gives 0 for a device",
            self.label
        );
        Ok(())
    }

    fn is_named(&self) -> bool {
        true
    }

    fn take_used(&mut self) -> Option<Used> {
        self.used.take()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if let Claim::Dax(lock) = &mut self.claim {
            lock.release(None);
        }
    }
}
