// SPDX-License-Identifier: GPL-2.0-or-later
//! Skipping a test aloud.
//!
//! libtest knows no "skipped at run time": such a test would count as passed and nobody would see it. So each skip is
//! printed, and appended to the file named by `IVSHMEM_SKIPPED`, where CI counts them.

#![forbid(unsafe_code)]

use std::fs::OpenOptions;
use std::io::Write;

/// Records that the running test is skipped; the caller then returns.
pub(crate) fn skip(reason: &str) {
    let thread = std::thread::current();
    // libtest names the thread after the test.
    let test = thread.name().unwrap_or("a test in a thread of its own");
    let line = format!("{test}: {}\n", reason.replace('\n', " "));
    eprint!("SKIPPED {line}");
    if let Some(path) = std::env::var_os("IVSHMEM_SKIPPED") {
        // One write of the whole line: tests of several processes append to this file.
        OpenOptions::new()
            .append(true)
            .create(true)
            .open(&path)
            .and_then(|mut file| file.write_all(line.as_bytes()))
            .unwrap_or_else(|error| panic!("IVSHMEM_SKIPPED={path:?}: {error}"));
    }
}
