// SPDX-License-Identifier: GPL-2.0-or-later
//! Faults on the way to the first client: either a clear error, exit code 1 and no trace, or
//! a server that is as good as any.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getegid};
use tempfile::TempDir;

use crate::common::daemon::program;
use crate::common::{text_of, wait_for, wait_for_exit};
use crate::crowd::Crowd;
use crate::matrix::{self, MATRIX, Phase, Row, Then};
use crate::strace::{self, Call};

/// Ways to start, which make different calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// POSIX shared memory.
    Named,
    /// A file in a directory.
    Directory,
    /// A sealed memfd, and the socket's mode and group set.
    Sealed,
    /// Where a killed server has left its socket, and the memory's mode and group set.
    Leftover,
    /// As the background process, told so by the option that the program tells itself.
    Background,
    /// The process that starts the one in the background, and that one untouched.
    Launch,
    /// With a control socket that was asked for.
    Control,
    /// With the control socket that is there by default. The other ways have none.
    Beside,
}

/// A place for one start, and for everything that could be left behind.
struct Place {
    /// Nothing but what the server makes.
    dir: TempDir,
    /// What the test makes.
    notes: TempDir,
    shm: PathBuf,
}

impl Place {
    fn new(way: Way) -> Self {
        let dir = tempfile::Builder::new().prefix("ivshmem-fault-").tempdir().expect("a directory");
        let notes = tempfile::tempdir().expect("a directory");
        let shm = Path::new("/dev/shm").join(dir.path().file_name().expect("it has a name"));
        let place = Self { dir, notes, shm };
        if way == Way::Leftover {
            drop(UnixListener::bind(place.socket()).expect("a socket to be left over"));
        }
        place
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    fn shm_lock(&self) -> PathBuf {
        let name = self.dir.path().file_name().expect("it has a name").to_string_lossy();
        Path::new("/dev/shm").join(format!(".ivshmem-lock.{name}"))
    }

    fn pid_file(&self) -> PathBuf {
        self.dir.path().join("pid")
    }

    fn note(&self, name: &str) -> PathBuf {
        self.notes.path().join(name)
    }

    /// What is there that a server has made.
    fn left(&self, way: Way) -> BTreeSet<PathBuf> {
        let entries = fs::read_dir(self.dir.path()).expect("our own directory");
        let mut left: BTreeSet<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
        if way == Way::Leftover {
            left.remove(&self.socket());
        }
        left.extend([self.shm.clone(), self.shm_lock()].into_iter().filter(|path| path.exists()));
        left
    }

    /// Of the memory.
    fn name(&self) -> &OsStr {
        self.shm.file_name().expect("it has a name")
    }

    fn start(&self, way: Way, faults: &str) -> Child {
        let mut command = strace::command(&self.note("log"), faults, program());
        // The log of a start is no part of it, and its errors are ignored.
        command.env("RUST_LOG", "warn");
        command.arg("-S").arg(self.socket()).args(["-n", "2", "-l", "64K"]);
        match way {
            Way::Directory => command.arg("-m").arg(self.dir.path()),
            Way::Sealed => {
                let group = format!("--socket-group={}", getegid());
                command.args(["--memfd", "--socket-mode=660", &group])
            }
            Way::Leftover => {
                let group = format!("--shm-group={}", getegid());
                command.args(["--shm-mode=660", &group, "-M"]).arg(self.name())
            }
            _ => command.arg("-M").arg(self.name()),
        };
        match way {
            Way::Control => command.arg("--control").arg(self.dir.path().join("look")),
            Way::Beside => &mut command,
            _ => command.arg("--no-control"),
        };
        match way {
            Way::Background | Way::Launch => command.arg("-p").arg(self.pid_file()),
            _ => command.args(["-F", "-v"]),
        };
        if way == Way::Background {
            command.arg("--detached");
        }
        self.spawn(&mut command)
    }

    fn spawn(&self, command: &mut Command) -> Child {
        let output = |name| File::create(self.note(name)).expect("a file for output");
        command.stdin(Stdio::null()).stdout(output("stdout")).stderr(output("stderr"));
        command.spawn().expect("strace is installed")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // A background process that a failed test leaves; its own end removes the file.
        if let Ok(pid) = text_of(&self.pid_file()).trim().parse() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let _ = fs::remove_file(&self.shm);
        let _ = fs::remove_file(self.shm_lock());
    }
}

/// Ends with the test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts, and finds out what came of it: the log of strace's, and whether it served. Panics
/// if it is neither of the two that are allowed. Nothing must be left behind, but for the socket where it `leaves` one.
#[track_caller]
fn start_with(way: Way, faults: &str, leaves: bool) -> (String, bool) {
    println!("starting {way:?} with {faults}");
    let place = Place::new(way);
    let mut child = Killed(place.start(way, faults));
    let served = wait_for("the server serves, or ends", || {
        match child.0.try_wait().expect("waitpid works") {
            Some(status) if way == Way::Launch && status.success() => Some(true),
            Some(status) => {
                let said = text_of(&place.note("stderr"));
                assert_eq!(status.code(), Some(1), "{way:?}, {faults}: {status}\n{said}");
                assert!(said.starts_with("ivshmem-server: "), "{way:?}, {faults}: {said:?}");
                // What the launcher waits for.
                let ready = !text_of(&place.note("stdout")).is_empty();
                assert!(way != Way::Background || !ready, "{faults}: failed when it was ready");
                assert!(said.len() > 40, "{way:?}, {faults}: an error that says little: {said:?}");
                Some(false)
            }
            None => (way != Way::Launch && is_served(&place)).then_some(true),
        }
    });
    if served {
        let mut crowd = Crowd::new(&place.socket(), 2);
        crowd.join();
        crowd.join();
        crowd.settle();
        assert_eq!(crowd.len(), 2, "{way:?}, {faults}: clients are served");
        if way == Way::Launch {
            let pid = text_of(&place.pid_file()).trim().parse().expect("a pid in the pid file");
            kill(Pid::from_raw(pid), Signal::SIGTERM).expect("it runs");
            wait_for("the end of the background process", || {
                (!place.pid_file().exists()).then_some(())
            });
        } else {
            let pid = i32::try_from(child.0.id()).expect("a pid is an int");
            kill(Pid::from_raw(pid), Signal::SIGTERM).expect("it is our child");
            let status = wait_for_exit(&mut child.0, "the server");
            assert_eq!(status.code(), Some(0), "{way:?}, {faults}: {status}");
        }
    }
    // The launcher does not wait for a background process that fails after it.
    wait_for(&format!("{way:?}, {faults}: nothing is left behind"), || {
        let mut left = place.left(way);
        if leaves {
            left.remove(&place.socket());
            for name in [".ivshmem-lock.socket", "look", "socket.control"] {
                left.remove(&place.dir.path().join(name));
            }
        }
        (left.is_empty() || (way != Way::Launch && panic_with(&left, faults))).then_some(())
    });
    (strace::finished_log(&place.note("log")), served)
}

fn panic_with(left: &BTreeSet<PathBuf>, faults: &str) -> ! {
    panic!("{faults}: left behind: {left:?}")
}

/// Whether all is done that it does before it waits for clients, found without connecting.
fn is_served(place: &Place) -> bool {
    text_of(&place.note("log")).contains("\nepoll_wait(")
}

/// What the program does by itself, from after the loader and the runtime to its first wait.
fn own_calls(way: Way) -> Vec<Call> {
    let (log, served) = start_with(way, "", false);
    assert!(served, "{way:?} starts when nothing fails");
    let (first, last) = match way {
        Way::Launch => ("readlink(\"/proc/self/exe\"", "exit_group"),
        _ => ("rt_sigprocmask(SIG_BLOCK, [HUP INT TERM]", "accept4("),
    };
    let calls = strace::calls(&log);
    let find = |start: &str| {
        let place = calls.iter().position(|call| call.line.starts_with(start));
        place.unwrap_or_else(|| panic!("{way:?} makes no {start}…: {log}"))
    };
    let own = |call: &&Call| call.name != "epoll_wait";
    calls[find(first)..find(last)].iter().filter(own).cloned().collect()
}

/// Whether two runs of the program make the same calls in the same places up to here.
fn is_at_its_place(log: &str, call: &Call, errno: &str) -> bool {
    let name = call.line.split('(').next().unwrap_or_default();
    let hits = || strace::calls(log).into_iter().filter(|call| call.line.contains("(INJECTED)"));
    hits().count() == 1 && hits().all(|hit| hit.line.starts_with(name) && hit.line.contains(errno))
}

fn judge(way: Way, call: &Call, row: &Row, errno: &str) {
    let name = call.line.split('(').next().unwrap_or_default();
    let faults = format!("{name}:error={errno}:when={}", call.ordinal);
    let (log, served) = start_with(way, &faults, row.then == Then::MayLeaveBehind);
    assert!(is_at_its_place(&log, call, errno), "{way:?}, {faults}: was not injected\n{log}");
    match row.then {
        Then::Fails => assert!(!served, "{way:?}: starts in spite of {faults}: {}", call.line),
        Then::Harmless => assert!(served, "{way:?}: ended by {faults}: {}", call.line),
        _ => {}
    }
}

/// Tries the faults of one way to start.
fn try_all(way: Way) {
    let mut sum = 0;
    for call in own_calls(way) {
        let rows = matrix::rows(Phase::Start, &call.name);
        // The C library blocks all signals while it starts a process.
        let exempt = matrix::EXEMPT.iter().any(|(name, _)| *name == call.name)
            || (way == Way::Launch && call.name == "rt_sigprocmask");
        assert!(exempt || !rows.is_empty(), "in no row of the matrix: {}", call.line);
        for row in rows.into_iter().filter(|_| !exempt) {
            // In the short form the other ways are only looked at where they differ.
            let errnos = match matrix::is_full() || way == Way::Named {
                true => row.errnos(),
                false => &row.errnos()[..1],
            };
            for errno in errnos {
                judge(way, &call, row, errno);
                sum += 1;
            }
        }
    }
    println!("{sum} faults at the start, {way:?}");
    assert!(sum > 5, "{sum} faults");
}

macro_rules! tests {
    ($($name:ident: $way:expr;)*) => {
        $(#[test]
        fn $name() {
            try_all($way);
        })*

        #[test]
        fn each_call_of_the_matrix_is_made_in_some_way_to_start() {
            let calls = [$($way),*].into_iter().flat_map(own_calls);
            let made: BTreeSet<String> = calls.map(|call| call.name).collect();
            for row in MATRIX.iter().filter(|row| row.phase == Phase::Start) {
                assert!(made.contains(row.call), "no {} in {made:?}", row.call);
            }
        }
    };
}

tests! {
    a_fault_at_the_start_with_named_memory_is_an_error_or_harmless: Way::Named;
    a_fault_at_the_start_with_a_directory_is_an_error_or_harmless: Way::Directory;
    a_fault_at_the_start_with_sealed_memory_is_an_error_or_harmless: Way::Sealed;
    a_fault_at_the_start_over_a_left_socket_is_an_error_or_harmless: Way::Leftover;
    a_fault_at_the_start_in_the_background_is_an_error_or_harmless: Way::Background;
    a_fault_in_starting_the_background_process_is_an_error_or_harmless: Way::Launch;
}

#[test]
fn a_fault_at_the_control_socket_is_an_error_if_it_was_asked_for_or_else_harmless() {
    for way in [Way::Control, Way::Beside] {
        let calls = own_calls(way);
        let begins = |call: &Call| call.name == "epoll_create1" && call.ordinal == 2;
        let first = calls.iter().position(begins).expect("it has an epoll instance of its own");
        let last =
            calls.iter().rposition(|call| call.name == "listen").expect("the server listens");
        let mut failed = 0;
        for call in &calls[first..last] {
            if matrix::EXEMPT.iter().any(|(name, _)| *name == call.name) {
                continue;
            }
            let rows = matrix::rows(Phase::Start, &call.name);
            assert!(!rows.is_empty(), "in no row of the matrix: {}", call.line);
            for row in rows {
                let (name, errno) = (call.line.split('(').next().unwrap_or(""), row.errnos()[0]);
                let faults = format!("{name}:error={errno}:when={}", call.ordinal);
                let (log, served) = start_with(way, &faults, row.then == Then::MayLeaveBehind);
                assert!(is_at_its_place(&log, call, errno), "{faults}: was not injected\n{log}");
                assert!(served || way == Way::Control, "ended by {faults}: {}", call.line);
                failed += usize::from(!served);
            }
        }
        // Made, named, watched: at least that fails.
        assert!(way == Way::Beside || failed >= 5, "{failed} faults were errors");
    }
}

#[test]
fn an_error_that_nobody_can_read_is_still_exit_code_1() {
    let full = File::options().write(true).open("/dev/full").expect("/dev/full");
    let mut command = Command::new(program());
    command.args(["-F", "-S", "/nonexistent/socket", "--memfd"]).stdin(Stdio::null());
    let status = command.stdout(Stdio::null()).stderr(full).status().expect("it starts");
    assert_eq!(status.code(), Some(1), "{status}");
}

/// A test may count the descriptors of a server as soon as it listens.
#[test]
fn a_server_that_listens_has_all_its_descriptors() {
    for way in [Way::Named, Way::Directory, Way::Sealed, Way::Leftover, Way::Control, Way::Beside] {
        let calls = own_calls(way);
        // The control socket listens before.
        let listens = calls.iter().rposition(|call| call.name == "listen").expect("it listens");
        let (before, after) = calls.split_at(listens);
        let makes = |call: &&Call| {
            [
                "open",
                "socket",
                "eventfd",
                "epoll_create",
                "timerfd_create",
                "signalfd",
                "memfd",
                "dup",
                "pipe",
            ]
            .iter()
            .any(|name| call.name.starts_with(name))
        };
        assert!(before.iter().filter(makes).count() >= 4, "{way:?}: {before:?}");
        let late: Vec<_> = after.iter().filter(makes).collect();
        assert!(late.is_empty(), "{way:?}: after it listens: {late:?}");
    }
}
