// SPDX-License-Identifier: GPL-2.0-or-later
//! Stock QEMU as a client that the server refuses, or ends before it has sent the memory.
//!
//! QEMU reads the version, the id and the memory in a loop that takes the end of the connection for "no data yet". A
//! connection that is only closed would make it spin for ever, and with `device_add` the guest would stop with it. So
//! the server must send a message that QEMU rejects. Each case is checked at the start of a QEMU, which must end with
//! an error, and by `device_add`, which must fail while the guest goes on.

// Only common::peer and common::user have unsafe code: for descriptors that were received, and for the user of a thread.
#![deny(unsafe_code)]

#[path = "../common/mod.rs"]
mod common;
mod limits;
mod qemu;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use ivshmem::{Event, Server};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use common::crowd::use_all_ids;
use common::daemon::{Daemon, is_listening};
use common::peer::{Connection, unread};
use common::target::{Target, is_root};
use common::{stop_process, wait_for};
use qemu::{Qemu, Running};

on_each_server! {
    without_free_ids_a_qemu_ends_with_an_error_and_device_add_fails,
    without_free_descriptors_a_qemu_ends_with_an_error_and_device_add_fails,
    a_qemu_in_the_backlog_of_a_server_that_stops_ends_with_an_error,
    device_add_in_the_backlog_of_a_server_that_stops_fails,
    a_qemu_that_waits_for_the_memory_of_a_server_that_stops_ends_with_an_error,
    device_add_that_waits_for_the_memory_of_a_server_that_stops_fails,
}

/// QEMU's error after the message that refuses a client.
const REFUSED: &str = "server sent version 1, expecting 0";

/// QEMU's error after the message that ends a client which was sent the version and its id.
const ENDED: &str = "server sent invalid message";

/// Checks a server that refuses every new client.
#[track_caller]
fn check_refused(socket: &Path, vm: &mut Running) {
    Qemu::with_device(socket).assert_fails_with(REFUSED);
    // The second time shows that the first one left nothing behind.
    for _ in 0..2 {
        vm.plug(socket);
        vm.assert_plug_fails_with(REFUSED);
    }
}

fn without_free_ids_a_qemu_ends_with_an_error_and_device_add_fails(target: Target) {
    if !is_root("connect as other users") {
        return;
    }
    let server = target.builder().for_all_users().start();
    let (mut witness, number, _) = use_all_ids(&server);
    let mut vm = Running::start();
    check_refused(server.socket_path(), &mut vm);

    // The witness leaves, so no connected client remembers the ids.
    witness.leave(number);
    wait_for("ids are assigned again", || {
        let mut client = Connection::open(server.socket_path());
        (client.expect("the version or a refusal").value == 0).then_some(())
    });
    vm.plug(server.socket_path());
    vm.assert_plugged();
    server.stop();
}

fn without_free_descriptors_a_qemu_ends_with_an_error_and_device_add_fails(target: Target) {
    let server = target.builder().descriptors(40).start();
    let mut clients = Vec::new();
    loop {
        let mut client = Connection::open(server.socket_path());
        if client.expect("the version or a refusal").value != 0 {
            break;
        }
        clients.push(client);
    }
    let mut vm = Running::start();
    check_refused(server.socket_path(), &mut vm);

    let full = server.open_fds();
    clients.pop();
    wait_for("the server removes the client", || (server.open_fds() < full).then_some(()));
    vm.plug(server.socket_path());
    vm.assert_plugged();
    server.stop();
}

/// A stopped server, and more connections in its backlog than it accepts before it obeys SIGTERM.
fn stopped_server(target: Target) -> (Daemon, Vec<UnixStream>) {
    let server = target.builder().start();
    server.pause();
    let connect = || UnixStream::connect(server.socket_path()).expect("the backlog has room");
    let clients = (0..600).map(|_| connect()).collect();
    (server, clients)
}

/// Sends SIGTERM to a stopped server and lets it go on.
fn terminate(server: &mut Daemon) {
    server.signal(Signal::SIGTERM);
    server.signal(Signal::SIGCONT);
    assert!(server.wait().success(), "the server ends by SIGTERM");
}

fn a_qemu_in_the_backlog_of_a_server_that_stops_ends_with_an_error(target: Target) {
    let (mut server, _clients) = stopped_server(target);
    let qemu = Qemu::with_device(server.socket_path());
    qemu.wait_until_receiving();
    terminate(&mut server);
    qemu.assert_fails_with(REFUSED);
}

fn device_add_in_the_backlog_of_a_server_that_stops_fails(target: Target) {
    let (mut server, _clients) = stopped_server(target);
    let mut vm = Running::start();
    vm.begin_plug(server.socket_path());
    terminate(&mut server);
    vm.assert_plug_fails_with(REFUSED);
}

/// The limit of open files of a server, and the number of clients that do not read. They leave so many descriptors in
/// flight that the server cannot send another one.
const LIMIT: u64 = 256;
const STALLED: usize = 100;

/// A server that cannot send the memory to a new client, and its other clients.
fn server_without_memory(target: Target) -> Option<(Daemon, Vec<UnixStream>)> {
    if !is_root("start a server as another user") {
        return None;
    }
    let server = target.builder().descriptors(LIMIT).unprivileged().start();
    let clients = stall(server.socket_path());
    Some((server, clients))
}

/// Connects the clients that do not read, and waits until the server cannot send a descriptor any more. A client that
/// connects earlier may still get the memory.
fn stall(socket: &Path) -> Vec<UnixStream> {
    let connect = || UnixStream::connect(socket).expect("the server listens");
    let clients: Vec<_> = (0..STALLED).map(|_| connect()).collect();
    // The kernel refuses a descriptor when more than the limit are in flight.
    wait_for("the server has no more descriptors to send", || {
        let unread = clients.iter().map(unread_descriptors).sum::<u64>();
        (unread > LIMIT).then_some(())
    });
    clients
}

/// How many descriptors are in the unread messages of a client. All messages but the version and the id carry one.
fn unread_descriptors(client: &UnixStream) -> u64 {
    unread(client).saturating_sub(2)
}

/// Waits until the server has admitted a QEMU whose connection is in its backlog or was accepted. It admits connections
/// in their order, so a later client that was sent the version shows it.
#[track_caller]
fn wait_for_admission_of_earlier_clients(server: &Daemon) -> Connection {
    let mut later = Connection::open(server.socket_path());
    assert_eq!(later.expect("the version").value, 0);
    later
}

fn a_qemu_that_waits_for_the_memory_of_a_server_that_stops_ends_with_an_error(target: Target) {
    let Some((mut server, _clients)) = server_without_memory(target) else { return };
    let qemu = Qemu::with_device(server.socket_path());
    qemu.wait_until_receiving();
    let _later = wait_for_admission_of_earlier_clients(&server);
    server.signal(Signal::SIGTERM);
    assert!(server.wait().success(), "the server ends by SIGTERM");
    qemu.assert_fails_with(ENDED);
}

fn device_add_that_waits_for_the_memory_of_a_server_that_stops_fails(target: Target) {
    let Some((mut server, _clients)) = server_without_memory(target) else { return };
    let mut vm = Running::start();
    vm.begin_plug(server.socket_path());
    let _later = wait_for_admission_of_earlier_clients(&server);
    server.signal(Signal::SIGTERM);
    assert!(server.wait().success(), "the server ends by SIGTERM");
    vm.assert_plug_fails_with(ENDED);
}

/// The variable that names the socket of the server below.
const SOCKET: &str = "IVSHMEM_TEST_OF_DISCONNECT";

/// Not a test by itself: the other process of the next test. It disconnects each client after the stalled ones as soon
/// as that client was sent its id.
#[test]
fn server_that_disconnects() {
    let Some(path) = std::env::var_os(SOCKET) else { return };
    let mut server = Server::builder().socket_path(path).start().expect("a server");
    loop {
        poll(&mut [PollFd::new(server.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE)
            .expect("poll works");
        for event in server.dispatch().expect("the system reports events") {
            match event {
                Event::Joined { id, .. } if usize::from(id) >= STALLED => {
                    assert!(server.disconnect(id), "it has just joined");
                }
                _ => {}
            }
        }
    }
}

/// The process of that server. It is killed when this value is dropped.
struct Disconnecting(Child);

impl Disconnecting {
    /// Starts it as a user that nothing else uses, because the kernel counts descriptors in flight per user.
    fn start(directory: &Path) -> Self {
        let user = 2_000_000 + std::process::id();
        std::os::unix::fs::chown(directory, Some(user), Some(user)).expect("we are root");
        let child = Command::new("setpriv")
            .args([format!("--reuid={user}"), format!("--regid={user}"), "--clear-groups".into()])
            .args(["prlimit", &format!("--nofile={LIMIT}:{LIMIT}")])
            .arg(std::env::current_exe().expect("a test knows its own file"))
            .args(["--exact", "server_that_disconnects"])
            .env(SOCKET, directory.join("socket"))
            .stdin(Stdio::null())
            .spawn();
        Self(child.expect("setpriv is installed"))
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.0.id()).expect("a pid is an int"))
    }
}

impl Drop for Disconnecting {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_qemu_that_is_disconnected_before_the_memory_ends_with_an_error_and_device_add_fails() {
    if !is_root("start a server as another user") {
        return;
    }
    let directory = tempfile::tempdir().expect("a temporary directory");
    let socket = directory.path().join("socket");
    let server = Disconnecting::start(directory.path());
    wait_for("the server listens", || is_listening(&socket).then_some(()));
    let _clients = stall(&socket);
    Qemu::with_device(&socket).assert_fails_with(ENDED);

    let mut vm = Running::start();
    stop_process(server.pid());
    vm.begin_plug(&socket);
    kill(server.pid(), Signal::SIGCONT).expect("it is our child");
    vm.assert_plug_fails_with(ENDED);
}
