// SPDX-License-Identifier: GPL-2.0-or-later
//! A server that serves a listening socket of its service manager (socket activation).

#![forbid(unsafe_code)]

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::process::Command;

use nix::sys::signal::{Signal, kill};

use crate::common::daemon::program;
use crate::common::peer::Peer;
use crate::common::program::{Place, Process};
use crate::common::wait_for;
use crate::supervisor::servers;
use crate::wait_until_idle;

/// A server that gets a listening socket as descriptor 3, and no path. The shell sets LISTEN_PID to its own pid, which
/// the program keeps.
fn activated(place: &Place, listener: &UnixListener, options: &[&str]) -> Process {
    let script = "LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=ivshmem.socket exec \"$@\" 3<&0";
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh"]).arg(program()).args(["-F", "--memfd"]).args(options);
    command.env_remove("NOTIFY_SOCKET").env("RUNTIME_DIRECTORY", place.dir());
    Process::spawn_with_input(&mut command, listener.as_fd())
}

#[test]
fn the_socket_of_a_socket_unit_is_served_and_not_removed() {
    let place = Place::new();
    let listener = UnixListener::bind(place.socket()).expect("the place is empty");
    let server = activated(&place, &listener, &[]);
    let first = Peer::join(&place.socket(), 1);
    let mut second = Peer::join(&place.socket(), 1);
    second.wait_for_peer(first.id());
    let ended = server.stop();
    assert!(place.socket().exists(), "it belongs to the service manager: {ended:?}");
}

#[test]
fn clients_of_a_socket_unit_go_on_after_the_server_was_killed_or_handed_over() {
    let place = Place::new();
    let listener = UnixListener::bind(place.socket()).expect("the place is empty");
    let supervisor = activated(&place, &listener, &["--supervise"]);
    let mut first = Peer::join(&place.socket(), 1);
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        let server = servers(supervisor.pid())[0];
        wait_until_idle(server);
        kill(server, signal).expect("it runs");
        wait_for("another server", || {
            servers(supervisor.pid()).into_iter().find(|&pid| pid != server)
        });
        let mut second = Peer::join(&place.socket(), 1);
        second.wait_for_peer(first.id());
        first.wait_for_peer(second.id());
    }
    let ended = supervisor.stop();
    assert!(place.socket().exists(), "it belongs to the service manager: {ended:?}");
}
