// SPDX-License-Identifier: GPL-2.0-or-later
//! The path of the control socket: where it is, who may use it, and what happens if it cannot be made.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use nix::sys::signal::Signal;
use serde_json::json;

use crate::caller::{Caller, control_of, status};
use crate::common::daemon::Daemon;
use crate::common::program::{Place, Process, run};
use crate::common::target::is_root;
use crate::common::user::as_user;

fn mode(path: &Path) -> u32 {
    fs::metadata(path).expect("it is there").permissions().mode() & 0o777
}

/// A server in a place. Its log goes to a pipe.
fn serve(place: &Place, args: &[&str]) -> Process {
    let socket = place.socket();
    let args = [&["-F", "--memfd", "-S", socket.to_str().expect("ours")], args].concat();
    let mut server = Process::spawn(&mut place.command(&args));
    server.wait_until_listening(&socket);
    server
}

#[test]
fn it_is_beside_the_servers_socket_for_its_user_alone_and_goes_with_it() {
    let place = Place::new();
    let server = serve(&place, &["--socket-mode=777"]);
    assert_eq!(mode(&control_of(&place.socket())), 0o600);
    status(&place.socket());
    let ended = server.stop();
    assert_eq!(ended.stderr, "");
    place.assert_holds_only(&[]);
}

#[test]
fn it_can_be_elsewhere_or_nowhere() {
    let place = Place::new();
    let path = place.path("look");
    let option = format!("--control={}", path.display());
    let server = serve(&place, &[&option]);
    assert_eq!(mode(&path), 0o600);
    assert_eq!(Caller::at(&path).status()["socket"], json!(place.socket()));
    assert_eq!(place.names(), ["look", "socket"]);
    server.stop();
    place.assert_holds_only(&[]);
    for args in [&["--no-control"][..], &[&option, "--no-control"]] {
        let server = serve(&place, args);
        assert_eq!(place.names(), ["socket"]);
        server.stop();
    }
    // The last one wins.
    let server = serve(&place, &["--no-control", &option]);
    assert_eq!(place.names(), ["look", "socket"]);
    server.stop();
}

#[test]
fn one_that_a_killed_server_left_is_replaced() {
    let place = Place::new();
    let server = serve(&place, &[]);
    server.signal(Signal::SIGKILL);
    server.end();
    assert_eq!(place.names(), ["socket", "socket.control"]);
    assert!(UnixStream::connect(control_of(&place.socket())).is_err());
    let server = serve(&place, &[]);
    status(&place.socket());
    server.stop();
    place.assert_holds_only(&[]);
}

#[test]
fn a_path_that_cannot_be_used_is_an_error_if_it_was_asked_for_and_else_a_warning() {
    for what in ["live", "file", "link", "directory"] {
        let place = Place::new();
        let path = control_of(&place.socket());
        let _live = match what {
            "live" => Some(UnixListener::bind(&path).expect("the place is empty")),
            "file" => fs::write(&path, "kept").map(|()| None).expect("a file"),
            "link" => symlink("elsewhere", &path).map(|()| None).expect("a link"),
            _ => fs::create_dir(&path).map(|()| None).expect("a directory"),
        };
        let server = serve(&place, &[]);
        let stopped = server.stop();
        assert!(stopped.stderr.contains("no control socket"), "{what}: {stopped:?}");
        assert!(stopped.stderr.contains("socket.control"), "{what}: {stopped:?}");
        place.assert_holds_only(&["socket.control"]);

        let option = format!("--control={}", path.display());
        let socket = place.socket();
        let args = ["-F", "--memfd", "-S", socket.to_str().expect("ours"), &option];
        let part = if what == "live" { "in use" } else { "not a socket left over" };
        run(&mut place.command(&args)).assert_refused(&["socket.control", part]);
        place.assert_holds_only(&["socket.control"]);
    }
    let place = Place::new();
    let (socket, option) = (place.socket(), format!("--control={}/x", "/nowhere"));
    let args = ["-F", "--memfd", "-S", socket.to_str().expect("ours"), &option];
    run(&mut place.command(&args)).assert_refused(&["/nowhere/x", "No such file"]);
    place.assert_holds_only(&[]);
}

#[test]
fn a_second_server_at_the_same_path_leaves_the_control_socket_of_the_first() {
    let place = Place::new();
    let server = serve(&place, &[]);
    let socket = place.socket();
    let args = ["-F", "--memfd", "-S", socket.to_str().expect("ours")];
    let refused = run(&mut place.command(&args));
    refused.assert_refused(&["in use"]);
    assert!(!refused.stderr.contains("control"), "{refused:?}");
    status(&socket);
    server.stop();
    place.assert_holds_only(&[]);
}

#[test]
fn another_user_may_not_use_it() {
    const OTHER: u32 = 1_100_003;
    if !is_root("connect as another user") {
        return;
    }
    let daemon = Daemon::builder().for_all_users().start();
    let control = control_of(daemon.socket_path());
    let error = as_user(OTHER, || UnixStream::connect(&control).expect_err("its mode is 0600"));
    assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
    // Also if root makes it accessible.
    fs::set_permissions(&control, fs::Permissions::from_mode(0o666)).expect("we are root");
    let reply = as_user(OTHER, || {
        let mut caller = Caller::at(&control);
        caller.receive().map(|reply| (reply, caller.receive()))
    });
    let (reply, after) = reply.expect("a reply");
    assert_eq!(reply["error"], "org.varlink.service.PermissionDenied");
    assert_eq!(after, None, "the connection ends");
    status(daemon.socket_path());
    let output = daemon.stop();
    assert!(
        output.contains(&format!(
            "control connection refused: pid {}, uid {OTHER}",
            std::process::id()
        )),
        "{output}"
    );
}

#[test]
fn root_may_look_at_the_server_of_another_user() {
    if !is_root("run a server as another user") {
        return;
    }
    let daemon = Daemon::builder().unprivileged().start();
    let status = status(daemon.socket_path());
    assert!(status["uid"].as_u64() >= Some(1_000_000), "{status}");
    daemon.stop();
}
