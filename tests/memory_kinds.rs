// SPDX-License-Identifier: GPL-2.0-or-later
//! Memory from anywhere: files, devices, huge pages, NUMA nodes, exact sizes, and objects that are kept.

// One function in common::peer takes over received descriptors; every other module forbids unsafe code.
#![deny(unsafe_code)]

mod common;
#[path = "memory_kinds/devices.rs"]
mod devices;
#[path = "memory_kinds/files.rs"]
mod files;
#[path = "memory_kinds/huge.rs"]
mod huge;
#[path = "memory_kinds/numa.rs"]
mod numa;
#[path = "memory_kinds/restarts.rs"]
mod restarts;
#[path = "memory_kinds/sizes.rs"]
mod sizes;
#[path = "supervise/supervisor.rs"]
#[allow(dead_code, reason = "the tests of the supervisor use the rest")]
mod supervisor;

use std::ffi::OsStr;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sys::signal::Signal;

use common::daemon::program;
use common::peer::Peer;
use common::program::{Ended, Place, Process, memory_of, run};

/// Lets one test run at a time: a process that another test starts has copies of all descriptors until it executes its
/// program, so clients that this test has closed, and their huge pages, would live on for a moment.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A command without options for the memory.
fn command(place: &Place, args: &[impl AsRef<OsStr>]) -> Command {
    let mut command = Command::new(program());
    command.arg("-F").arg("-S").arg(place.socket()).args(args);
    command
}

/// Starts a server in the foreground and waits until it listens.
#[track_caller]
fn serve(place: &Place, args: &[impl AsRef<OsStr>]) -> Process {
    let mut process = Process::spawn(&mut command(place, args));
    process.wait_until_listening(&place.socket());
    process
}

/// Runs a server that does not start.
#[track_caller]
fn refused(place: &Place, args: &[impl AsRef<OsStr>], parts: &[&str]) {
    run(&mut command(place, args)).assert_refused(parts);
    assert!(!place.socket().exists(), "the socket is left behind");
}

fn sigkill(server: Process) -> Ended {
    server.signal(Signal::SIGKILL);
    server.end()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("ours")
}

#[track_caller]
fn assert_content(peer: &Peer, offset: u64, content: &[u8]) {
    let mut bytes = vec![0; content.len()];
    memory_of(peer).read_exact_at(&mut bytes, offset).expect("it is there");
    assert_eq!(bytes, content);
}
