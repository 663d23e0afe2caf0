// SPDX-License-Identifier: GPL-2.0-or-later
//! Reports skipped tests.
//!
//! libtest cannot skip a test at run time: the test counts as passed. So each skip is printed, and appended to the file
//! that `IVSHMEM_SKIPPED` names. CI counts the lines of that file.

#![forbid(unsafe_code)]

use std::fs::OpenOptions;
use std::io::Write;

/// Records that the running test is skipped. The caller must then return.
pub(crate) fn skip(reason: &str) {
    let thread = std::thread::current();
    // libtest gives the thread the name of the test.
    let test = thread.name().unwrap_or("a test in a thread of its own");
    let line = format!("{test}: {}\n", reason.replace('\n', " "));
    eprint!("SKIPPED {line}");
    if let Some(path) = std::env::var_os("IVSHMEM_SKIPPED") {
        // The whole line is written by one call, because several processes append to this file.
        OpenOptions::new()
            .append(true)
            .create(true)
            .open(&path)
            .and_then(|mut file| file.write_all(line.as_bytes()))
            .unwrap_or_else(|error| panic!("IVSHMEM_SKIPPED={path:?}: {error}"));
    }
}
