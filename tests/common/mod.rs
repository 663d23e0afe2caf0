// SPDX-License-Identifier: GPL-2.0-or-later
//! What the test programs share: the daemon under test, a raw protocol client, stock QEMU, and waiting.
//!
//! Nothing here uses the library of this project. The tests speak the wire protocol by themselves, so that the same
//! suite can judge another server: `IVSHMEM_SERVER_BIN=/path/to/it cargo test`.

// Each test program compiles this module for itself and uses its own part of it.
#![allow(dead_code)]

pub(crate) mod crowd;
pub(crate) mod daemon;
pub(crate) mod member;
pub(crate) mod peer;
pub(crate) mod program;
pub(crate) mod qtest;
pub(crate) mod skip;
pub(crate) mod target;
pub(crate) mod view;
pub(crate) mod vm;

use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use nix::unistd::Pid;

/// How long a thing that needs no more than a moment may take on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// Waits until `look` finds something, and returns it; panics after [`PATIENCE`].
#[track_caller]
pub(crate) fn wait_for<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    match wait_up_to(PATIENCE, look) {
        Some(found) => found,
        None => panic!("not within {PATIENCE:?}: {what}"),
    }
}

/// Waits until `look` finds something, at most for `limit`.
pub(crate) fn wait_up_to<T>(limit: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let start = Instant::now();
    loop {
        // Read before the look: if this process was held up in between, the last look is still a fresh one.
        let late = start.elapsed() >= limit;
        if let Some(found) = look() {
            return Some(found);
        }
        if late {
            return None;
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// Waits for the end of a process that was asked to end.
#[track_caller]
pub(crate) fn wait_for_exit(child: &mut Child, who: &str) -> ExitStatus {
    wait_for(&format!("the end of {who}"), || child.try_wait().expect("waitpid works"))
}

/// Finds a program in the search path.
pub(crate) fn find_in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|file| file.is_file())
}

/// Whether a process waits for something.
pub(crate) fn is_asleep(pid: Pid) -> bool {
    text_of(Path::new(&format!("/proc/{pid}/stat"))).contains(") S ")
}

/// The text of a file for a message; what is not there is an empty text.
pub(crate) fn text_of(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
}
