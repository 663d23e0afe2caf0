// SPDX-License-Identifier: GPL-2.0-or-later
//! No client hurts another, whatever it does to the server.

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
    connections_that_close_at_once_hurt_nobody,
    connections_that_close_before_they_are_let_in_are_not_told_of,
    one_who_sends_is_hung_up_on_and_the_others_are_told,
    one_who_shuts_its_sending_side_is_let_go_and_the_others_are_told,
    one_who_shuts_its_receiving_side_hurts_nobody,
    connections_that_never_read_hurt_nobody,
    a_client_killed_at_any_point_of_its_greeting_hurts_nobody,
    a_client_killed_with_a_full_socket_hurts_nobody,
}

const VECTORS: u16 = 4;

/// A server, and some well-behaved clients that know each other.
fn serve(target: Target, witnesses: usize) -> (Daemon, Crowd) {
    let server = target.builder().vectors(VECTORS).start();
    let mut crowd = Crowd::new(server.socket_path(), VECTORS);
    crowd.connect_many(witnesses);
    crowd.settle();
    (server, crowd)
}

/// All are whole, the next one is served, and nothing of those who left is kept.
fn all_is_well(server: Daemon, mut crowd: Crowd) {
    crowd.connect(true);
    crowd.settle();
    let each = usize::from(VECTORS) + 1;
    let here = crowd.numbers().len();
    wait_for("the server has only what its clients need", || {
        (server.open_fds() == server.idle_fds() + here * each).then_some(())
    });
    server.stop();
}

fn connections_that_close_before_they_are_let_in_are_not_told_of(target: Target) {
    let (server, mut crowd) = serve(target, 3);
    // It is stopped meanwhile, so that they are gone when it looks.
    server.signal(Signal::SIGSTOP);
    for _ in 0..500 {
        drop(UnixStream::connect(server.socket_path()).expect("it listens"));
    }
    server.signal(Signal::SIGCONT);
    let number = crowd.connect(true);
    crowd.settle();
    assert_eq!(crowd.view(number).id(), Some(3), "they took ids");
    for number in crowd.numbers() {
        assert_eq!(crowd.view(number).gone().len(), 0, "client {number} was told of them");
    }
    all_is_well(server, crowd);
}

fn connections_that_close_at_once_hurt_nobody(target: Target) {
    let (server, mut crowd) = serve(target, 10);
    for _ in 0..5000 {
        drop(UnixStream::connect(server.socket_path()).expect("it listens"));
        crowd.read(std::time::Duration::ZERO);
    }
    all_is_well(server, crowd);
}

/// Waits for the end of the stream on a client's side, whatever comes before it.
fn is_hung_up_on(mut stream: &UnixStream) {
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket has time limits");
    let mut buffer = [0; 4096];
    // Closing with something unread is a reset.
    while !matches!(
        stream.read(&mut buffer).map_err(|error| error.kind()),
        Ok(0) | Err(std::io::ErrorKind::ConnectionReset)
    ) {}
}

fn one_who_sends_is_hung_up_on_and_the_others_are_told(target: Target) {
    let (server, mut crowd) = serve(target, 10);
    let one_byte = |mut stream: &UnixStream| stream.write_all(b"x").expect("it is connected");
    let a_message = |mut stream: &UnixStream| stream.write_all(&[0; 8]).expect("it is connected");
    let much = |mut stream: &UnixStream| {
        // It may be hung up on while it is still at it.
        let _ = stream.write_all(&vec![0xff; 150_000]);
    };
    let descriptors = |stream: &UnixStream| {
        let fds = [0; 100].map(|_| stream.as_raw_fd());
        let rights = [ControlMessage::ScmRights(&fds)];
        sendmsg::<()>(
            stream.as_raw_fd(),
            &[IoSlice::new(b"x")],
            &rights,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .expect("it is connected");
    };
    let ways: [&dyn Fn(&UnixStream); 4] = [&one_byte, &a_message, &much, &descriptors];
    for (number, way) in ways.iter().enumerate() {
        // Before it has read anything, and after it has read all.
        let early = Connection::open(server.socket_path());
        way(early.stream());
        is_hung_up_on(early.stream());
        let late = Peer::join(server.socket_path(), VECTORS).into_connection();
        way(late.stream());
        is_hung_up_on(late.stream());
        crowd.settle();
        let gone = |crowd: &mut Crowd| crowd.view(0).gone().len() > number;
        crowd.read_until("its goodbye", gone);
    }
    all_is_well(server, crowd);
}

fn one_who_shuts_its_sending_side_is_let_go_and_the_others_are_told(target: Target) {
    let (server, mut crowd) = serve(target, 10);
    let one = Peer::join(server.socket_path(), VECTORS);
    let id = one.id();
    let connection = one.into_connection();
    connection.stream().shutdown(Shutdown::Write).expect("it is connected");
    is_hung_up_on(connection.stream());
    crowd.read_until("the goodbyes", |crowd| {
        crowd.numbers().iter().all(|&number| crowd.view(number).gone().contains(id))
    });
    all_is_well(server, crowd);
}

fn one_who_shuts_its_receiving_side_hurts_nobody(target: Target) {
    let (server, mut crowd) = serve(target, 10);
    let one = Peer::join(server.socket_path(), VECTORS);
    let id = one.id();
    let connection = one.into_connection();
    connection.stream().shutdown(Shutdown::Read).expect("it is connected");
    // It cannot be told of this one, and so is let go.
    crowd.connect(true);
    crowd.read_until("the goodbyes", |crowd| {
        crowd.numbers()[..10].iter().all(|&number| crowd.view(number).gone().contains(id))
    });
    all_is_well(server, crowd);
}

fn connections_that_never_read_hurt_nobody(target: Target) {
    let what = "connections that never read";
    let wanted = if full_size(what) { 5020 } else { 1020 };
    let Some((clients, limit)) = room_for(what, 620, wanted, VECTORS) else { return };
    let many = clients - 20;
    let server = target.builder().vectors(VECTORS).descriptors(limit).start();
    let mut crowd = Crowd::new(server.socket_path(), VECTORS);
    crowd.connect_many(20);
    crowd.settle();
    let silent: Vec<_> =
        (0..many).map(|_| UnixStream::connect(server.socket_path()).expect("it listens")).collect();
    // Who comes and goes is served, and all who read know all the same.
    for _ in 0..5 {
        let number = crowd.connect(true);
        crowd.welcome();
        crowd.leave(number);
    }
    crowd.read_until("everybody knows the silent ones", |crowd| {
        crowd.numbers().iter().all(|&number| crowd.view(number).known().len() == 20 + many)
    });
    drop(silent);
    all_is_well(server, crowd);
}

/// A process of its own that reads so many messages, says so, and waits to be killed.
const CHILD: &str = "IVSHMEM_TEST_CHILD";

#[test]
#[ignore = "other tests start it, as a process to be killed"]
fn child_of_another_test() {
    let what = std::env::var(CHILD).expect("what to be");
    let (messages, socket) = what.split_once(' ').expect("it is ours");
    let mut connection = Connection::open(socket.as_ref());
    for _ in 0..messages.parse::<usize>().expect("it is ours") {
        connection.expect("a message of the greeting");
    }
    println!("\nready");
    // Until the end of what is a pipe from the parent, if it does not kill us.
    let _ = std::io::stdin().read(&mut [0]);
}

/// Starts a client that reads `messages`, and kills it when it has.
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

fn a_client_killed_at_any_point_of_its_greeting_hurts_nobody(target: Target) {
    let (server, mut crowd) = serve(target, 3);
    // Version, id, memory, and four peers' vectors, its own among them.
    for messages in 0..=3 + 4 * usize::from(VECTORS) {
        kill_one_after(&server, messages);
        crowd.settle();
    }
    all_is_well(server, crowd);
}

fn a_client_killed_with_a_full_socket_hurts_nobody(target: Target) {
    // 100 × 4 messages: more than a socket holds.
    let (server, mut crowd) = serve(target, 100);
    for messages in [0, 1, 3, 50, 120] {
        kill_one_after(&server, messages);
        crowd.settle();
    }
    all_is_well(server, crowd);
}
