// SPDX-License-Identifier: GPL-2.0-or-later
//! Memory without a name: a memfd whose size no client can change.
//!
//! The seals are added when the size is right: no shrinking, no growing, and then, with
//! `F_SEAL_SEAL`, no further seal. That last one matters as much as the others: with
//! `F_SEAL_FUTURE_WRITE` a client could keep all later clients from mapping the memory writable.
//!
//! One thing the kernel cannot refuse: to punch holes (`fallocate` with `FALLOC_FL_PUNCH_HOLE`).
//! Only `F_SEAL_WRITE` would, which refuses all writing too. A hole reads as zeroes, as if the
//! client had written them, which it may do anyway; its pages are then no longer reserved. Of huge
//! pages the next access takes a free one, and kills by SIGBUS if there is none.

#![forbid(unsafe_code)]

use std::fs::File;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::{Error, Kind};

const LABEL: &str = "(memfd)";

/// Makes the memory not executable, for good. Linux 6.3 or newer.
const MFD_NOEXEC_SEAL: MFdFlags = MFdFlags::from_bits_retain(libc::MFD_NOEXEC_SEAL);

#[derive(Debug)]
pub(super) struct Sealed {
    object: File,
}

impl Sealed {
    /// Makes it of huge pages of this size, or of usual ones.
    pub(super) fn open(huge_page: Option<u64>) -> Result<Self, Error> {
        let mut flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        if let Some(page) = huge_page {
            let size = page.ilog2() << libc::MFD_HUGE_SHIFT;
            flags |= MFdFlags::MFD_HUGETLB | MFdFlags::from_bits_retain(size);
        }
        let object = match memfd_create(c"ivshmem", flags | MFD_NOEXEC_SEAL) {
            // An older kernel does not know the flag.
            Err(Errno::EINVAL) => memfd_create(c"ivshmem", flags),
            result => result,
        };
        let object = File::from(object.map_err(Error::system(LABEL, "create"))?);
        Ok(Self { object })
    }
}

impl Kind for Sealed {
    fn object(&self) -> &File {
        &self.object
    }

    fn label(&self) -> String {
        LABEL.into()
    }

    fn reserved(&mut self, _size: u64) -> Result<(), Error> {
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&self.object, FcntlArg::F_ADD_SEALS(seals))
            .map(drop)
            .map_err(Error::system(LABEL, "seal"))
    }
}
