// SPDX-License-Identifier: GPL-2.0-or-later
//! No client can disturb another client, whatever it does to the server.

mod common;

use std::io::{BufRead, BufReader, IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use common::crowd::Crowd;
use common::daemon::Daemon;
use common::peer::{Connection, Peer};
use common::target::{Target, full_size, room_for};
use common::{PATIENCE, wait_for};
use nix::sys::signal::Signal;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

on_each_server! {
    connections_that_close_at_once_do_not_disturb_other_clients,
    connections_closed_before_admission_are_not_broadcast,
    a_client_that_sends_data_is_removed_and_the_others_receive_its_departure,
    a_client_that_shuts_down_sending_is_removed_and_the_others_receive_its_departure,
    a_client_that_shuts_down_receiving_does_not_disturb_other_clients,
    connections_that_never_read_do_not_disturb_other_clients,
    a_client_killed_at_any_point_of_its_greeting_does_not_disturb_other_clients,
    a_client_killed_with_a_full_socket_does_not_disturb_other_clients,
}

const VECTORS: u16 = 4;

/// Starts a server and some well-behaved clients that know each other.
fn serve(target: Target, witnesses: usize) -> (Daemon, Crowd) {
    let server = target.builder().vectors(VECTORS).start();
    let mut crowd = Crowd::new(server.socket_path(), VECTORS);
    crowd.connect_many(witnesses);
    crowd.settle();
    (server, crowd)
}

/// Checks that all clients know each other, that a new client is served, and that the server has closed the descriptors
/// of the clients that left.
fn check_and_stop(server: Daemon, mut crowd: Crowd) {
    crowd.connect(true);
    crowd.settle();
    let each = usize::from(VECTORS) + 1;
    let here = crowd.numbers().len();
    wait_for("the server has only the descriptors that its clients need", || {
        (server.open_fds() == server.idle_fds() + here * each).then_some(())
    });
    server.stop();
}

fn connections_closed_before_admission_are_not_broadcast(target: Target) {
    let (server, mut crowd) = serve(target, 3);
    // The server is stopped, so the connections are closed before it accepts them.
    server.pause();
    for _ in 0..500 {
        drop(UnixStream::connect(server.socket_path()).expect("the server listens"));
    }
    server.signal(Signal::SIGCONT);
    let number = crowd.connect(true);
    crowd.settle();
    assert_eq!(crowd.view(number).id(), Some(3), "the closed connections used up ids");
    for number in crowd.numbers() {
        assert_eq!(crowd.view(number).gone().len(), 0, "client {number} received their departure");
    }
    check_and_stop(server, crowd);
}

fn connections_that_close_at_once_do_not_disturb_other_clients(target: Target) {
    let (server, mut crowd) = serve(target, 10);
    for _ in 0..5000 {
        drop(UnixStream::connect(server.socket_path()).expect("the server listens"));
        crowd.read(std::time::Duration::ZERO);
    }
    check_and_stop(server, crowd);
}

/// Waits until the server closes the connection. Ignores the data that comes before.
fn wait_until_closed(mut stream: &UnixStream) {
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket has time limits");
    let mut buffer = [0; 4096];
    // If the server closes a socket that has unread data, the client gets a reset.
    while !matches!(
        stream.read(&mut buffer).map_err(|error| error.kind()),
        Ok(0) | Err(std::io::ErrorKind::ConnectionReset)
    ) {}
}

fn a_client_that_sends_data_is_removed_and_the_others_receive_its_departure(target: Target) {
    let (server, mut crowd) = serve(target, 10);
    let one_byte =
        |mut stream: &UnixStream| stream.write_all(b"x").expect("the client is connected");
    let a_message =
        |mut stream: &UnixStream| stream.write_all(&[0; 8]).expect("the client is connected");
    let much = |mut stream: &UnixStream| {
        // The server may close the connection before everything is written.
        let _ = stream.write_all(&vec![0xff; 150_000]);
    };
    let descriptors = |stream: &UnixStream| {
        let fds = [0; 100].map(|_| stream.as_raw_fd());
        let rights = [ControlMessage::ScmRights(&fds)];
        let sent = sendmsg::<()>(
            stream.as_raw_fd(),
            &[IoSlice::new(b"x")],
            &rights,
            MsgFlags::MSG_NOSIGNAL,
            None,
        );
        match sent {
            // Since Linux 6.16 the server has the kernel refuse descriptors.
            Err(nix::errno::Errno::EPERM) => one_byte(stream),
            sent => assert_eq!(sent, Ok(1)),
        }
    };
    let ways: [&dyn Fn(&UnixStream); 4] = [&one_byte, &a_message, &much, &descriptors];
    for (number, way) in ways.iter().enumerate() {
        // Once with a client that has read nothing, and once with a client that has read everything.
        let early = Connection::open(server.socket_path());
        way(early.stream());
        wait_until_closed(early.stream());
        let late = Peer::join(server.socket_path(), VECTORS).into_connection();
        way(late.stream());
        wait_until_closed(late.stream());
        crowd.settle();
        let gone = |crowd: &mut Crowd| crowd.view(0).gone().len() > number;
        crowd.read_until("its departure", gone);
    }
    check_and_stop(server, crowd);
}

fn a_client_that_shuts_down_sending_is_removed_and_the_others_receive_its_departure(
    target: Target,
) {
    let (server, mut crowd) = serve(target, 10);
    let one = Peer::join(server.socket_path(), VECTORS);
    let id = one.id();
    let connection = one.into_connection();
    connection.stream().shutdown(Shutdown::Write).expect("the client is connected");
    wait_until_closed(connection.stream());
    crowd.read_until("the departures", |crowd| {
        crowd.numbers().iter().all(|&number| crowd.view(number).gone().contains(id))
    });
    check_and_stop(server, crowd);
}

fn a_client_that_shuts_down_receiving_does_not_disturb_other_clients(target: Target) {
    let (server, mut crowd) = serve(target, 10);
    let one = Peer::join(server.socket_path(), VECTORS);
    let id = one.id();
    let connection = one.into_connection();
    connection.stream().shutdown(Shutdown::Read).expect("the client is connected");
    // The server cannot send it the join of this new client, and so removes it.
    crowd.connect(true);
    crowd.read_until("the departures", |crowd| {
        crowd.numbers()[..10].iter().all(|&number| crowd.view(number).gone().contains(id))
    });
    check_and_stop(server, crowd);
}

fn connections_that_never_read_do_not_disturb_other_clients(target: Target) {
    let what = "connections that never read";
    let wanted = if full_size(what) { 5020 } else { 1020 };
    let Some((clients, limit)) = room_for(what, 620, wanted, VECTORS) else { return };
    let many = clients - 20;
    let server = target.builder().vectors(VECTORS).descriptors(limit).start();
    let mut crowd = Crowd::new(server.socket_path(), VECTORS);
    crowd.connect_many(20);
    crowd.settle();
    let silent: Vec<_> = (0..many)
        .map(|_| UnixStream::connect(server.socket_path()).expect("the server listens"))
        .collect();
    // Clients that join and leave are served, and all clients that read know the same peers.
    for _ in 0..5 {
        let number = crowd.connect(true);
        crowd.read_greetings();
        crowd.leave(number);
    }
    crowd.read_until("each reader knows the silent clients", |crowd| {
        crowd.numbers().iter().all(|&number| crowd.view(number).known().len() == 20 + many)
    });
    drop(silent);
    check_and_stop(server, crowd);
}

/// Tells the child process how many messages to read, and the socket. It then prints `ready` and waits to be killed.
const CHILD: &str = "IVSHMEM_TEST_CHILD";

#[test]
#[ignore = "other tests start this as a child process and kill it"]
fn child_of_another_test() {
    let what = std::env::var(CHILD).expect("the parent sets the variable");
    let (messages, socket) = what.split_once(' ').expect("the parent wrote it");
    let mut connection = Connection::open(socket.as_ref());
    for _ in 0..messages.parse::<usize>().expect("the parent wrote it") {
        connection.expect("a message of the greeting");
    }
    println!("\nready");
    // Ends when the parent closes the pipe, if the parent does not kill this process.
    let _ = std::io::stdin().read(&mut [0]);
}

/// Starts a client that reads `messages` messages, and then kills it.
fn kill_one_after(server: &Daemon, messages: usize) {
    let mut child = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "child_of_another_test", "--ignored", "--nocapture"])
        .env(CHILD, format!("{messages} {}", server.socket_path().display()))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("this program runs");
    let mut lines = BufReader::new(child.stdout.take().expect("it is a pipe")).lines();
    let ready = lines.any(|line| line.is_ok_and(|line| line == "ready"));
    child.kill().expect("it is our child");
    let status = child.wait().expect("it is our child");
    assert!(ready && status.code().is_none(), "killed after {messages} messages: {status}");
}

fn a_client_killed_at_any_point_of_its_greeting_does_not_disturb_other_clients(target: Target) {
    let (server, mut crowd) = serve(target, 3);
    // Version, id, memory, and the vectors of four peers, its own included.
    for messages in 0..=3 + 4 * usize::from(VECTORS) {
        kill_one_after(&server, messages);
        crowd.settle();
    }
    check_and_stop(server, crowd);
}

fn a_client_killed_with_a_full_socket_does_not_disturb_other_clients(target: Target) {
    // 100 × 4 messages are more than a socket holds.
    let (server, mut crowd) = serve(target, 100);
    for messages in [0, 1, 3, 50, 120] {
        kill_one_after(&server, messages);
        crowd.settle();
    }
    check_and_stop(server, crowd);
}
