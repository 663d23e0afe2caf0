// SPDX-License-Identifier: GPL-2.0-or-later
//! Memory that the caller has opened: an object of any kind. Its origin, owner and content are the
//! caller's responsibility.

#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::OwnedFd;

use super::{Error, Kind};

#[derive(Debug)]
pub(super) struct Given {
    object: File,
}

impl Given {
    pub(super) fn new(descriptor: OwnedFd) -> Self {
        Self { object: File::from(descriptor) }
    }
}

impl Kind for Given {
    fn object(&self) -> &File {
        &self.object
    }

    fn label(&self) -> String {
        "(given descriptor)".into()
    }

    /// The object is taken as it is.
    fn usual_size(&self) -> Result<Option<u64>, Error> {
        Ok(None)
    }
}
