// SPDX-License-Identifier: GPL-2.0-or-later
//! Code that the test programs share: the daemon under test, a raw protocol client, stock QEMU, and wait functions.
//!
//! This code does not use the library of this project. It implements the wire protocol itself, so the same tests can
//! check another server: `IVSHMEM_SERVER_BIN=/path/to/it cargo test`.

// Each test program compiles this module and uses a part of it.
#![allow(dead_code)]

pub(crate) mod cgroup;
pub(crate) mod checked_client;
pub(crate) mod crowd;
pub(crate) mod daemon;
pub(crate) mod huge_pages;
pub(crate) mod lingering;
pub(crate) mod loop_device;
pub(crate) mod peer;
pub(crate) mod program;
pub(crate) mod qtest;
pub(crate) mod skip;
pub(crate) mod systemd;
pub(crate) mod target;
pub(crate) mod user;
pub(crate) mod view;
pub(crate) mod vm;

use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The time limit for an action that takes a moment; long enough for a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// Waits until `look` returns a value, and returns that value. Panics after [`PATIENCE`].
#[track_caller]
pub(crate) fn wait_for<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    match wait_up_to(PATIENCE, look) {
        Some(found) => found,
        None => panic!("not within {PATIENCE:?}: {what}"),
    }
}

/// Waits until `look` returns a value. Returns `None` after `limit`.
pub(crate) fn wait_up_to<T>(limit: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let start = Instant::now();
    loop {
        // The time is read before the call of `look`. So the last call happens after the limit, even if
        // this process was delayed in between.
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
pub(crate) fn wait_for_exit(child: &mut Child, name: &str) -> ExitStatus {
    wait_for(&format!("the end of {name}"), || child.try_wait().expect("waitpid works"))
}

/// Finds a program in the search path.
pub(crate) fn find_in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|file| file.is_file())
}

/// Whether a process sleeps.
pub(crate) fn is_asleep(pid: Pid) -> bool {
    text_of(Path::new(&format!("/proc/{pid}/stat"))).contains(") S ")
}

/// Stops a process with SIGSTOP, and returns when each of its threads has stopped: the signal reaches one of them, which may
/// have to wait for a processor while the others go on. SIGCONT continues it.
#[track_caller]
pub(crate) fn stop_process(pid: Pid) {
    kill(pid, Signal::SIGSTOP).expect("the process runs");
    let threads = PathBuf::from(format!("/proc/{pid}/task"));
    wait_for("each thread has stopped", || {
        let entries = std::fs::read_dir(&threads).expect("the process runs");
        let mut stats = entries
            .map(|entry| text_of(&entry.expect("a directory of the kernel").path().join("stat")));
        // "t" if strace traces it.
        stats.all(|stat| stat.contains(") T ") || stat.contains(") t ")).then_some(())
    });
}

/// The text of a file, for a message. A missing file gives an empty text.
pub(crate) fn text_of(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
}
