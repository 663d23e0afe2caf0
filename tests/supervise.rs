// SPDX-License-Identifier: GPL-2.0-or-later
//! `--supervise`: what the supervisor stores and gives back, when it starts which program, and how it ends.
//!
//! Most tests put `supervise/child.py` in the place of the server: it stores and removes what the test says.

// One function in common::peer takes over received descriptors; every other module forbids unsafe code.
#![deny(unsafe_code)]

mod common;
#[path = "supervise/supervisor.rs"]
mod supervisor;
#[path = "supervise/systemd.rs"]
mod systemd;

use std::fs;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
use nix::unistd::{Pid, geteuid};

use common::daemon::program;
use common::peer::Peer;
use common::program::{Background, Place, Process, run};
use common::skip::skip;
use common::{text_of, wait_for};
use supervisor::{CHILD, Supervisor, children, command, next_child, replace_program, servers};

/// How long a close waits that `child.py` arranges.
const LINGER: Duration = Duration::from_secs(60);

/// Stores `names` × `each` descriptors, kills the child, and checks what the next one gets.
fn store_and_return(names: usize, each: usize) {
    let count = names * each;
    if getrlimit(Resource::RLIMIT_NOFILE).is_ok_and(|(_, hard)| hard < count as u64 + 100) {
        return skip("the hard limit of open files is too low");
    }
    let (mut supervisor, mut child) = Supervisor::with_child();
    let seconds = child.ask(&format!("store {names} {each}"));
    let status = text_of(Path::new(&format!("/proc/{}/status", supervisor.pid())));
    let resident = status.lines().find(|line| line.starts_with("VmRSS")).expect("it runs");
    let killed = Instant::now();
    child.kill();
    let child = supervisor.next_child();
    println!(
        "{count} descriptors stored in {seconds} s, back {:?} after SIGKILL, supervisor: {resident}",
        killed.elapsed()
    );
    assert_eq!((child.stored, child.checked.as_str()), (count, count.to_string().as_str()));
    supervisor.signal(Signal::SIGTERM);
    let ended = supervisor.end();
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
}

#[test]
fn a_thousand_descriptors_come_back_with_their_names() {
    store_and_return(500, 2);
}

#[test]
fn nineteen_thousand_descriptors_come_back_with_their_names() {
    store_and_return(9_500, 2);
}

#[test]
fn a_message_takes_as_many_descriptors_as_the_kernel_sends() {
    store_and_return(4, 253);
}

#[test]
fn a_removed_name_does_not_come_back_and_the_others_do() {
    let (supervisor, mut child) = Supervisor::with_child();
    child.ask("store 10 3");
    child.ask("remove 5");
    child.kill();
    let child = supervisor.next_child();
    assert_eq!((child.stored, child.checked.as_str()), (27, "27"));
}

/// A client can pass a descriptor whose close waits. The process that closes the connection last would wait.
#[test]
fn a_connection_whose_close_would_wait_does_not_delay_the_supervisor() {
    let (mut supervisor, mut child) = Supervisor::with_child();
    let start = Instant::now();
    for _ in 0..10 {
        assert_eq!(child.ask("linger"), "done");
    }
    assert_eq!(child.ask("store 10 1").split('.').count(), 2, "it stores others");
    supervisor.signal(Signal::SIGTERM);
    assert_eq!(child.next_line().as_deref(), Some("signal 2"));
    assert_eq!(supervisor.end().status.code(), Some(0));
    assert!(start.elapsed() < LINGER, "{:?}", start.elapsed());
}

#[test]
fn what_does_not_fit_is_logged_and_the_others_stay() {
    let mut supervisor = Supervisor::start_with(Place::new(), |command| {
        let program = command.get_program().to_owned();
        let args: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
        let envs: Vec<_> = command
            .get_envs()
            .filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned())))
            .collect();
        *command = Command::new("prlimit");
        command.arg("--nofile=100:100").arg(program).args(args).envs(envs);
    });
    let mut child = supervisor.upgrade_to_child();
    // 52 are stored at most; 20 messages of 3 are 60.
    child.ask("store 20 3");
    child.kill();
    let child = supervisor.next_child();
    assert_eq!((child.stored, child.checked.as_str()), (51, "51"));
    supervisor.signal(Signal::SIGTERM);
    let ended = supervisor.end();
    assert!(ended.stderr.contains("cannot store 3 descriptors named \"xh\""), "{ended:?}");
}

#[test]
fn messages_of_other_processes_are_ignored_and_their_descriptors_closed() {
    let (mut supervisor, mut child) = Supervisor::with_child();
    let socket = UnixDatagram::unbound().expect("a socket");
    socket.connect(&child.notify).expect("root, or the same user, can reach it");
    let (read, write) = std::io::pipe().expect("a pipe");
    let text = [IoSlice::new(b"FDSTORE=1\nFDNAME=evil")];
    let fds = [write.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&fds)];
    sendmsg::<UnixAddr>(socket.as_raw_fd(), &text, &rights, MsgFlags::empty(), None)
        .expect("the supervisor receives");
    drop(write);
    // The supervisor handles messages in order, so that one is handled when this one is.
    child.ask("ready");
    let mut polled = [PollFd::new(read.as_fd(), PollFlags::empty())];
    assert_eq!(poll(&mut polled, PollTimeout::ZERO), Ok(1), "the descriptor was closed");
    // A child of the server has the socket, but it is not the server.
    child.ask("foreign");
    child.kill();
    assert_eq!(supervisor.next_child().stored, 0);
    supervisor.signal(Signal::SIGTERM);
    let ended = supervisor.end();
    assert_eq!(ended.stderr.matches("ignored a notification of process").count(), 2, "{ended:?}");
}

#[test]
fn the_server_starts_again_after_every_kind_of_death() {
    let mut supervisor = Supervisor::start();
    let mut server = supervisor.wait_until_serving(None);
    for signal in [Signal::SIGKILL, Signal::SIGABRT, Signal::SIGKILL] {
        kill(server, signal).expect("it runs");
        server = supervisor.wait_until_serving(Some(server));
    }
    let mut child = supervisor.upgrade_to_child();
    for code in [0, 1, 127] {
        child.tell(&format!("exit {code}"));
        child = supervisor.next_child();
        child.ask("ready");
    }
    supervisor.signal(Signal::SIGTERM);
    let ended = supervisor.end();
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    for words in ["killed by SIGKILL", "killed by SIGABRT", "exited with status 127"] {
        assert!(ended.stderr.contains(words), "no {words:?} in {ended:?}");
    }
}

#[test]
fn a_server_that_dies_five_times_before_it_is_ready_is_given_up() {
    let (mut supervisor, child) = Supervisor::with_child();
    fs::write(supervisor.place.path("die"), "").expect("the place is ours");
    child.kill();
    let ended = supervisor.end();
    ended.assert_refused(&["exited with status 3", "5 times within 10 s", "giving up"]);
}

#[test]
fn a_start_that_fails_ends_with_the_servers_error_and_code_and_leaves_nothing() {
    let place = Place::new();
    let ended = run(command(&place).args(["-F", "-S", "/nonexistent/socket"]));
    ended.assert_refused(&["/nonexistent/socket"]);
    assert!(!ended.stderr.contains("giving up"), "{ended:?}");
    place.assert_holds_only(&["ivshmem-server"]);
    let ended = run(command(&place).args(["-F", "-n", "0"]));
    ended.assert_refused(&["--vectors"]);
}

#[test]
fn sighup_starts_the_program_file_that_is_there_now_and_gives_it_everything() {
    let (supervisor, mut child) = Supervisor::with_child();
    child.ask("store 7 1");
    // The same program once more.
    supervisor.signal(Signal::SIGHUP);
    assert_eq!(child.next_line().as_deref(), Some("signal 15"), "SIGTERM tells it to hand over");
    let child = supervisor.next_child();
    assert_eq!((child.stored, child.checked.as_str()), (7, "7"));
    assert_eq!(child.blocked, "[2, 15]", "blocked until the server takes them");
}

#[test]
fn the_old_program_runs_again_if_the_new_one_refuses() {
    let place = Place::new();
    // A copy by another process: a file that a test writes could not be executed while another test forks.
    let copy = place.path("ivshmem-server");
    let copied = Command::new("cp").arg(program()).arg(&copy).status();
    assert!(copied.expect("cp runs").success());
    let mut supervisor = Supervisor::start_with(place, |_| ());
    let old = supervisor.wait_until_serving(None);
    fs::write(supervisor.place.path("die"), "").expect("the place is ours");
    supervisor.replace_program(Path::new(CHILD));
    supervisor.signal(Signal::SIGHUP);
    // Its file has no name any more.
    let is_old = |pid: &Pid| {
        fs::read_link(format!("/proc/{pid}/exe"))
            .is_ok_and(|exe| exe.to_string_lossy().ends_with("ivshmem-server (deleted)"))
    };
    let again = wait_for("the old program", || {
        servers(supervisor.pid()).into_iter().find(|pid| *pid != old && is_old(pid))
    });
    supervisor.wait_until_serving(Some(old));
    // A death does not try the new one again, SIGHUP does.
    fs::remove_file(supervisor.place.path("die")).expect("it is there");
    kill(again, Signal::SIGKILL).expect("it runs");
    supervisor.wait_until_serving(Some(again));
    supervisor.signal(Signal::SIGHUP);
    let mut child = supervisor.next_child();
    child.ask("ready");
    supervisor.signal(Signal::SIGTERM);
    let ended = supervisor.end();
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    assert_eq!(ended.stderr.matches("starting the one that ran before").count(), 1, "{ended:?}");
}

#[test]
fn an_upgrade_without_a_program_file_leaves_the_server_alone() {
    let mut supervisor = Supervisor::start();
    let server = supervisor.wait_until_serving(None);
    fs::remove_file(supervisor.place.path("ivshmem-server")).expect("it is there");
    supervisor.signal(Signal::SIGHUP);
    supervisor.signal(Signal::SIGTERM);
    assert!(children(supervisor.pid()).iter().all(|&pid| pid == server));
    let ended = supervisor.end();
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    assert!(ended.stderr.contains("cannot upgrade, and the server goes on"), "{ended:?}");
}

#[test]
fn both_end_signals_end_the_server_for_good_and_leave_nothing() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut supervisor = Supervisor::start();
        supervisor.wait_until_serving(None);
        supervisor.signal(signal);
        let ended = supervisor.end();
        assert_eq!(ended.status.code(), Some(0), "{ended:?}");
        assert!(ended.stdout.contains("server disconnected"), "{ended:?}");
        supervisor.place.assert_holds_only(&["control", "ivshmem-server"]);
    }
    let (mut supervisor, mut child) = Supervisor::with_child();
    supervisor.signal(Signal::SIGTERM);
    assert_eq!(child.next_line().as_deref(), Some("signal 2"), "SIGINT tells it to end for good");
    assert_eq!(supervisor.end().status.code(), Some(0));
}

#[test]
fn a_terminals_interrupt_ends_both_processes() {
    // The server may end before the supervisor looks at its own signal.
    for _ in 0..20 {
        let mut supervisor = Supervisor::start_with(Place::new(), |command| {
            command.process_group(0);
        });
        killpg(supervisor.pid(), Signal::SIGINT).expect("it leads a group");
        let ended = supervisor.end();
        assert_eq!(ended.status.code(), Some(0), "{ended:?}");
        assert!(!ended.stderr.contains("starting it again"), "{ended:?}");
        supervisor.place.assert_holds_only(&["control", "ivshmem-server"]);
    }
}

#[test]
fn a_supervisor_that_was_killed_leaves_its_server_alone_and_the_next_one_clears_up() {
    let place = {
        let mut supervisor = Supervisor::start();
        let server = supervisor.wait_until_serving(None);
        // It listens before its descriptors are stored, and a start that cannot store them fails.
        let first = Peer::join(&supervisor.place.socket(), 1);
        supervisor.signal(Signal::SIGKILL);
        wait_for("the server has another parent", || {
            let status = text_of(Path::new(&format!("/proc/{server}/status")));
            (!status.contains(&format!("PPid:\t{}\n", supervisor.pid()))).then_some(())
        });
        let second = Peer::join(&supervisor.place.socket(), 1);
        assert_ne!(first.id(), second.id(), "it serves both");
        kill(server, Signal::SIGINT).expect("it runs");
        supervisor.end();
        std::mem::replace(&mut supervisor.place, Place::new())
    };
    let left = |names: &[String]| names.iter().any(|name| name.starts_with("ivshmem-server."));
    assert!(left(&place.names()), "its directory is left: {:?}", place.names());
    fs::remove_file(place.path("control")).expect("it is there");
    let mut next = Supervisor::start_with(place, |_| ());
    next.signal(Signal::SIGTERM);
    next.end();
    next.place.assert_holds_only(&["control", "ivshmem-server"]);
}

#[test]
fn names_that_are_too_long_together_are_left_out_and_the_descriptors_come_back() {
    let (mut supervisor, mut child) = Supervisor::with_child();
    child.ask("long 600");
    child.kill();
    let child = supervisor.next_child();
    assert_eq!((child.stored, child.checked.as_str()), (600, "no_names"));
    supervisor.signal(Signal::SIGTERM);
    let ended = supervisor.end();
    assert!(ended.stderr.contains("the names of 600 descriptors need 150599 bytes"), "{ended:?}");
}

#[test]
fn in_the_background_the_pid_file_names_the_supervisor() {
    let place = Place::new();
    let mut command = command(&place);
    let (mut supervisor, ended) =
        Background::start(command.arg("-p").arg(place.pid_file()).arg("--hint"), &place.pid_file());
    assert!(ended.stdout.contains("qemu-system"), "the server's words reach the caller: {ended:?}");
    let server = children(supervisor.pid())[0];
    assert_eq!(Peer::join(&place.socket(), 1).id(), 0);
    kill(server, Signal::SIGKILL).expect("it runs");
    wait_for("another server", || servers(supervisor.pid()).into_iter().find(|&pid| pid != server));
    supervisor.signal(Signal::SIGTERM);
    assert_eq!(supervisor.wait(), 0);
    wait_for("no names", || (place.names() == ["ivshmem-server"]).then_some(()));
}

#[test]
fn a_failed_start_in_the_background_reaches_the_caller() {
    let place = Place::new();
    let ended =
        run(command(&place).arg("-p").arg(place.pid_file()).args(["-S", "/nonexistent/socket"]));
    ended.assert_refused(&["/nonexistent/socket"]);
    place.assert_holds_only(&["ivshmem-server"]);
}

#[test]
fn a_caller_that_cannot_be_told_that_all_is_ready_leaves_no_server_behind() {
    let place = Place::new();
    let full = fs::File::options().write(true).open("/dev/full").expect("Linux has it");
    let mut command = command(&place);
    command.arg("--detached").arg("-p").arg(place.pid_file());
    let status = command.stdout(full).stderr(Stdio::null()).status().expect("it starts");
    assert_eq!(status.code(), Some(1));
    place.assert_holds_only(&["ivshmem-server"]);
}

#[test]
fn as_process_1_it_reaps_every_child_and_obeys_signals() {
    if !geteuid().is_root() {
        return skip("a new pid namespace needs root");
    }
    let place = Place::new();
    let control = UnixListener::bind(place.path("control")).expect("the place is empty");
    control.set_nonblocking(true).expect("fcntl works");
    let inner = command(&place);
    let mut outer = Command::new("unshare");
    outer.args(["--pid", "--fork", "--mount-proc", "--kill-child"]);
    outer.arg(inner.get_program()).args(inner.get_args()).arg("-F");
    outer.env("RUNTIME_DIRECTORY", place.dir());
    let mut process = Process::spawn(&mut outer);
    process.wait_until_listening(&place.socket());
    let init = children(process.pid())[0];
    replace_program(&place, Path::new(CHILD));
    kill(init, Signal::SIGHUP).expect("it runs");
    let mut child = next_child(&control);
    child.ask("ready");
    assert_eq!(child.ask("orphan"), "done", "the process without a parent was reaped");
    kill(init, Signal::SIGTERM).expect("it runs");
    assert_eq!(child.next_line().as_deref(), Some("signal 2"));
    let ended = process.end();
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
}
