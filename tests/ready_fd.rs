// SPDX-License-Identifier: GPL-2.0-or-later
//! `--ready-fd`: one line when the server listens, and then the end of the file.

// Only common::peer has unsafe code: for descriptors and bytes that were received. Every other module forbids it.
#![deny(unsafe_code)]

mod common;

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::Command;

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, pipe2};

use common::daemon::{is_listening, program};
use common::peer::Peer;
use common::program::{Background, Place, Process, adopt_orphans, run};
use common::{PATIENCE, text_of, wait_for};

/// A shell that executes the program with its stdin as descriptor 5.
const SHELL: &str = "exec \"$@\" 5>&0 </dev/null";

fn command(place: &Place, shell: &str, args: &[&str]) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", shell, "sh"]).arg(program()).args(place.args()).args(args);
    command.env("RUNTIME_DIRECTORY", place.dir()).env_remove("NOTIFY_SOCKET");
    command
}

fn start(place: &Place, args: &[&str]) -> (Process, OwnedFd) {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC).expect("a pipe");
    let process = Process::spawn_with_input(&mut command(place, SHELL, args), writer.as_fd());
    (process, reader)
}

/// Everything up to the end of the file.
#[track_caller]
fn read_all(pipe: OwnedFd) -> String {
    let mut file = File::from(pipe);
    let mut text = Vec::new();
    loop {
        let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLIN)];
        let limit = PollTimeout::try_from(PATIENCE).expect("it fits");
        assert_ne!(poll(&mut fds, limit), Ok(0), "the descriptor stays open after {text:?}");
        let mut bytes = [0; 100];
        match file.read(&mut bytes).expect("a pipe can be read") {
            0 => return String::from_utf8(text).expect("text"),
            count => text.extend(&bytes[..count]),
        }
    }
}

#[test]
fn a_server_that_listens_writes_one_line_and_closes_the_descriptor() {
    let place = Place::new();
    let (server, pipe) = start(&place, &["-F", "--ready-fd", "5"]);
    assert_eq!(read_all(pipe), "READY=1\n");
    assert!(is_listening(&place.socket()));
    server.stop();
}

#[test]
fn a_server_in_the_background_writes_the_line() {
    let place = Place::new();
    adopt_orphans();
    let (launcher, pipe) = start(&place, &["--ready-fd=5"]);
    assert_eq!(read_all(pipe), "READY=1\n");
    assert!(is_listening(&place.socket()));
    let ended = launcher.end();
    assert!(ended.status.success(), "{ended:?}");
    let mut daemon = Background::adopted(&text_of(&place.pid_file()));
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait(), 0);
}

#[test]
fn a_supervisor_writes_the_line_once_for_its_first_server() {
    let place = Place::new();
    let (supervisor, pipe) = start(&place, &["-F", "--supervise", "--memfd", "--ready-fd=5"]);
    assert_eq!(read_all(pipe), "READY=1\n");
    let mut first = Peer::join(&place.socket(), 1);
    let pid = supervisor.pid();
    let servers = || {
        let text = text_of(Path::new(&format!("/proc/{pid}/task/{pid}/children")));
        text.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    let old = servers().pop().expect("one server");
    wait_for("the server waits", || {
        text_of(Path::new(&format!("/proc/{old}/stat"))).contains(") S ").then_some(())
    });
    kill(Pid::from_raw(old.parse().expect("a pid")), Signal::SIGKILL).expect("it runs");
    // The next one does not have the descriptor, and does not miss it.
    wait_for("another server", || servers().into_iter().find(|server| *server != old));
    let second = Peer::join(&place.socket(), 1);
    first.wait_for_peer(second.id());
    let ended = supervisor.stop();
    assert!(!ended.stderr.contains("ready-fd"), "{ended:?}");
}

#[test]
fn a_start_that_fails_closes_the_descriptor_without_a_line() {
    let place = Place::new();
    for args in [&["-F", "--ready-fd=5", "-m", "/nowhere"][..], &["--ready-fd=5", "-m", "/nowhere"]]
    {
        let (server, pipe) = start(&place, args);
        assert_eq!(read_all(pipe), "", "{args:?}");
        server.end().assert_refused(&["/nowhere"]);
    }
}

#[test]
fn a_descriptor_that_cannot_be_used_is_refused() {
    let place = Place::new();
    let listening = "LISTEN_PID=$$ LISTEN_FDS=3 exec \"$@\" 5>/dev/null";
    for (shell, number, parts) in [
        ("exec \"$@\"", "2", ["'2'", "3 or above"]),
        ("exec \"$@\"", "-1", ["'-1'", "3 or above"]),
        ("exec \"$@\"", "five", ["'five'", "3 or above"]),
        ("exec \"$@\"", "99999999999", ["'99999999999'", "3 or above"]),
        ("exec \"$@\"", "77", ["--ready-fd 77", "not open"]),
        ("exec \"$@\" 5</dev/null", "5", ["--ready-fd 5", "not open for writing"]),
        (listening, "5", ["--ready-fd 5", "LISTEN_FDS"]),
    ] {
        for mode in ["-F", "--memfd"] {
            if mode == "--memfd" && shell == listening {
                // LISTEN_PID is not the pid of a process in the background.
                continue;
            }
            let option = format!("--ready-fd={number}");
            let ended = run(&mut command(&place, shell, &[mode, &option]));
            ended.assert_refused(&parts);
            place.assert_holds_only(&[]);
        }
    }
}

#[test]
fn a_reader_that_has_gone_does_not_stop_the_server() {
    let place = Place::new();
    let shell = "exec \"$@\" 5>&0 </dev/null";
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC).expect("a pipe");
    drop(reader);
    let mut command = command(&place, shell, &["-F", "--ready-fd=5"]);
    let mut server = Process::spawn_with_input(&mut command, writer.as_fd());
    server.wait_until_listening(&place.socket());
    drop(Peer::join(&place.socket(), 1));
    let ended = server.stop();
    assert!(ended.stderr.contains("cannot write to the descriptor 5"), "{ended:?}");
}
