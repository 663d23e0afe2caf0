// SPDX-License-Identifier: GPL-2.0-or-later
//! Owner and group of the socket, group of the memory, and `--user`.

// Only common::peer and common::user have unsafe code. Every other module forbids it.
#![deny(unsafe_code)]

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use common::daemon::program;
use common::peer::Peer;
use common::program::{Background, Place, Process, run};
use common::target::is_root;
use common::user::as_user;
use common::{text_of, wait_for};

const USER: u32 = 1_200_001;
const GROUP: u32 = 1_200_002;

/// Lets all users reach the socket of a place.
fn open_to_all(place: &Place) {
    let mode = fs::Permissions::from_mode(0o755);
    fs::set_permissions(place.dir(), mode).expect("the place is ours");
}

/// Starts a server in a directory that others may write. /proc/net/unix does not have its path.
fn serve(place: &Place, options: &[&str]) -> Process {
    let server = Process::spawn(place.command(options).arg("-F"));
    wait_for("the server listens", || UnixStream::connect(place.socket()).ok());
    server
}

#[test]
fn the_socket_has_the_owner_group_and_mode_of_the_options() {
    if !is_root("give files to other users") {
        return;
    }
    // Other users may write the second directory.
    for mode in [0o755, 0o777, 0o1777] {
        let place = Place::new();
        fs::set_permissions(place.dir(), fs::Permissions::from_mode(mode)).expect("it is ours");
        let (user, group) = (USER.to_string(), GROUP.to_string());
        let options =
            ["--socket-owner", &user, "--socket-group", &group, "--socket-mode", "660", "--memfd"];
        let server = serve(&place, &options);
        let socket = place.socket().metadata().expect("it is there");
        assert_eq!((socket.uid(), socket.gid(), socket.mode() & 0o777), (USER, GROUP, 0o660));
        as_user(USER, || drop(Peer::join(&place.socket(), 1)));
        // as_user changes the group too.
        as_user(GROUP, || drop(Peer::join(&place.socket(), 1)));
        as_user(USER + 10, || {
            let error = UnixStream::connect(place.socket()).expect_err("it may not write");
            assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
        });
        // What a killed server left is replaced, whoever owns it.
        server.signal(Signal::SIGKILL);
        server.end();
        serve(&place, &options).stop();
        place.assert_holds_only(&[]);
    }
}

#[test]
fn an_owner_that_cannot_be_set_is_refused_and_leaves_nothing() {
    if !is_root("run the server as another user") {
        return;
    }
    let place = Place::new();
    chown(place.dir(), Some(USER), Some(USER)).expect("we are root");
    let mut command = Command::new("setpriv");
    let words = [format!("--reuid={USER}"), format!("--regid={USER}")];
    command.args(words).arg("--clear-groups").arg(program());
    command.args(place.args()).arg("-F");
    for (option, parts) in [
        ("--socket-owner=0", ["to user id 0", "only root"]),
        ("--socket-group=0", ["to group id 0", "only root"]),
        ("--shm-group=0", ["to group id 0", "only root"]),
        ("--user=4242", ["--user 4242 needs root", "user id 1200001"]),
    ] {
        let mut refused = Command::new(command.get_program());
        let ended = run(refused.args(command.get_args()).args([option, "--shm-mode=660"]));
        ended.assert_refused(&parts);
        place.assert_holds_only(&[]);
    }
}

#[test]
fn names_that_do_not_exist_are_refused() {
    let place = Place::new();
    for option in ["--socket-owner", "--socket-group", "--shm-group", "--user"] {
        let ended = run(&mut place.command(&[&format!("{option}=no-such-name")]));
        ended.assert_refused(&[option, "no-such-name", "of this name", "a name or a number"]);
    }
}

#[test]
fn the_memory_has_the_group_of_the_option_and_no_other_group_may_write_it() {
    if !is_root("give files to other users") {
        return;
    }
    let place = Place::new();
    let group = GROUP.to_string();
    let options = ["--shm-group", &group, "--shm-mode", "660"];
    let server = place.serve(&options);
    let memory = place.shm().metadata().expect("it is there");
    assert_eq!((memory.uid(), memory.gid(), memory.mode() & 0o777), (0, GROUP, 0o660));
    server.signal(Signal::SIGKILL);
    server.end();
    // It is served again, and not with another group.
    let ended = run(place.command(&["--shm-group=0", "--shm-mode=660"]).arg("-F"));
    ended.assert_refused(&["group id 1200002", "mode 0660", "the group for shared memory is 0"]);
    place.serve(&options).stop();
    place.assert_holds_only(&[]);
}

/// Asserts that a process has the user and the group, no other group, and no capability.
#[track_caller]
fn assert_runs_as(pid: Pid, user: u32, group: u32) {
    for thread in fs::read_dir(format!("/proc/{pid}/task")).expect("it runs") {
        let status = text_of(&thread.expect("an entry").path().join("status"));
        let words = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).expect(name);
            line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(words("Uid:"), [user; 4].map(|id| id.to_string()));
        assert_eq!(words("Gid:"), [group; 4].map(|id| id.to_string()));
        assert!(words("Groups:").iter().all(|id| *id == group.to_string()), "{status}");
        for set in ["CapPrm:", "CapEff:", "CapAmb:"] {
            assert_eq!(words(set), ["0000000000000000"], "{set}");
        }
    }
}

#[test]
fn a_server_gives_up_root_once_it_listens() {
    if !is_root("give up root") {
        return;
    }
    let nobody = nix::unistd::User::from_name("nobody").expect("a lookup").expect("an account");
    for (name, user, group) in [
        (USER.to_string(), USER, USER),
        ("nobody".to_owned(), nobody.uid.as_raw(), nobody.gid.as_raw()),
    ] {
        let place = Place::new();
        open_to_all(&place);
        let mut server = place.serve(&["--user", &name, "--memfd", "-n", "2"]);
        let first = Peer::join(&place.socket(), 2);
        assert_runs_as(server.pid(), user, group);
        let mut second = Peer::join(&place.socket(), 2);
        second.wait_for_peer(first.id());
        assert!(server.is_running());
        let ended = server.stop();
        // The directory is root's.
        assert!(ended.stderr.contains("cannot remove socket"), "{ended:?}");
        place.assert_holds_only(&["socket", "socket.control"]);
        let socket = place.socket().metadata().expect("it is left");
        assert_eq!(socket.uid(), user, "the socket is the server's");
        // The next start replaces it. In a directory of the user, and in one such as /tmp, it is removed.
        for (owner, mode) in [(user, 0o755), (0, 0o1777)] {
            chown(place.dir(), Some(owner), None).expect("we are root");
            fs::set_permissions(place.dir(), fs::Permissions::from_mode(mode)).expect("as root");
            let ended = serve(&place, &["--user", &name, "--memfd"]).stop();
            assert_eq!(ended.stderr, "");
            place.assert_holds_only(&[]);
        }
    }
}

#[test]
fn a_server_in_the_background_gives_up_root() {
    if !is_root("give up root") {
        return;
    }
    let place = Place::new();
    chown(place.dir(), Some(USER), None).expect("we are root");
    let user = USER.to_string();
    let mut command = place.command(&["--user", &user, "--memfd"]);
    let mut daemon = Background::start(&mut command, &place.pid_file()).0;
    assert_runs_as(daemon.pid(), USER, USER);
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait(), 0);
}

#[test]
fn a_supervisor_stays_root_and_each_of_its_servers_gives_it_up() {
    if !is_root("give up root") {
        return;
    }
    let place = Place::new();
    let mut command = place.command(&["-F", "--supervise", "--memfd", "--user"]);
    command.arg(USER.to_string());
    command.env("RUNTIME_DIRECTORY", place.dir()).env_remove("NOTIFY_SOCKET");
    let mut supervisor = Process::spawn(&mut command);
    supervisor.wait_until_listening(&place.socket());
    let pid = supervisor.pid();
    let mut first = Peer::join(&place.socket(), 1);
    let server = || -> Option<Pid> {
        let children = text_of(Path::new(&format!("/proc/{pid}/task/{pid}/children")));
        children.trim().parse().ok().map(Pid::from_raw)
    };
    let old = server().expect("one server");
    assert_runs_as(old, USER, USER);
    wait_for("the server waits", || common::is_asleep(old).then_some(()));
    kill(old, Signal::SIGKILL).expect("it runs");
    let new = wait_for("another server", || server().filter(|&server| server != old));
    let second = Peer::join(&place.socket(), 1);
    first.wait_for_peer(second.id());
    assert_runs_as(new, USER, USER);
    assert!(text_of(Path::new(&format!("/proc/{pid}/status"))).contains("Uid:\t0\t0\t0\t0\n"));
    let ended = supervisor.stop();
    assert!(!ended.stderr.contains("ignored a notification"), "{ended:?}");
}
