// SPDX-License-Identifier: GPL-2.0-or-later
//! A block device on a file.

#![forbid(unsafe_code)]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::skip::skip;
use super::target::is_root;

/// A loop device, which is removed when dropped.
pub(crate) struct LoopDevice(PathBuf);

impl LoopDevice {
    /// Makes one on a new file of this size. None, and a skipped test, if that is not possible.
    pub(crate) fn new(file: &Path, size: u64) -> Option<Self> {
        if !is_root("make a loop device") {
            return None;
        }
        File::create(file).and_then(|file| file.set_len(size)).expect("a file for the device");
        let output = Command::new("losetup").args(["--find", "--show"]).arg(file).output();
        let output = output.expect("losetup (Debian package mount)");
        if !output.status.success() {
            let why = String::from_utf8_lossy(&output.stderr);
            skip(&format!("there are no loop devices: {why}"));
            return None;
        }
        let path = String::from_utf8(output.stdout).expect("a path");
        Some(Self(path.trim().into()))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}
