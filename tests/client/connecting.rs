// SPDX-License-Identifier: GPL-2.0-or-later
//! How a client connects and leaves, and how long that may take.

#![forbid(unsafe_code)]

use std::os::unix::net::UnixStream;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use ivshmem::client::{Client, Error, ErrorKind, Event};
use nix::poll::{PollTimeout, poll};

use super::{next, until};
use crate::common::PATIENCE;
use crate::common::daemon::Daemon;
use crate::common::program::run;

#[test]
fn a_client_that_says_how_many_vectors_it_has_need_not_wait_for_quiet() {
    let daemon = Daemon::builder().vectors(4).start();
    let long = Duration::from_secs(3600);
    // The quiet time is longer than the time limit: a client that waits for it fails.
    let builder = Client::builder().quiet_time(long).connect_timeout(PATIENCE);
    let first = builder.clone().vectors(4).connect(daemon.socket_path()).expect("4 vectors come");
    assert_eq!(first.vectors(), 4);
    let second = builder
        .clone()
        .connect(daemon.socket_path())
        .expect("it gets as many vectors as the first");
    assert_eq!(second.vectors(), 4);
    let mut none = builder.vectors(0).connect(daemon.socket_path()).expect("it needs no vector");
    until(&mut none, "the second is complete", |event| {
        matches!(event, Event::Joined { peer: 1, vectors: 4 })
    });
    none.ring(1, 3).expect("the last of its vectors");
    let error = Client::builder().vectors(5).connect_timeout(Duration::from_millis(300));
    let error = error.connect(daemon.socket_path()).map(drop);
    assert!(matches!(error, Err(Error::Timeout { .. })), "there are only 4: {error:?}");
}

#[test]
fn a_client_that_is_dropped_leaves_at_once() {
    let daemon = Daemon::builder().start();
    let mut one = Client::connect(daemon.socket_path()).expect("the first");
    let two = Client::connect(daemon.socket_path()).expect("the second");
    assert!(matches!(next(&mut one)[..], [Event::Joined { peer: 1, .. }]));
    // A forked child could have a copy of the socket. The client leaves all the same.
    let copy = two.socket().expect("connected").try_clone_to_owned().expect("dup");
    drop(two);
    assert!(matches!(next(&mut one)[..], [Event::Left { peer: 1 }]));
    drop(copy);
    assert!(one.peer(1).is_none());
    assert!(matches!(one.ring(1, 0), Err(Error::UnknownPeer { peer: 1 })));
}

#[test]
fn a_client_that_the_server_refuses_says_so_and_where_the_reason_is() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("socket");
    let server = ivshmem::Server::builder().socket_path(&path).id_space(1).start();
    let mut server = server.expect("it starts");
    let stopper = server.stopper().expect("an eventfd");
    let serving = thread::spawn(move || server.run());
    let _first = Client::connect(&path).expect("the only id");
    let error = Client::connect(&path).map(drop).expect_err("no id is left");
    stopper.stop();
    serving.join().expect("no panic").expect("it serves");
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(error.to_string().contains("the server refused this client"), "{error}");
    assert!(error.to_string().contains("its log has the reason"), "{error}");
}

#[test]
fn a_client_can_use_a_connected_socket_instead_of_a_path() {
    let daemon = Daemon::builder().vectors(2).start();
    let socket = UnixStream::connect(daemon.socket_path()).expect("a server");
    let client = Client::adopt(socket).expect("it greets");
    assert_eq!((client.id(), client.vectors()), (0, 2));
}

/// Runs one ignored test of this program as a process of its own. strace makes each of these calls
/// (or those that `when` names) fail after 10 ms, as if a signal had interrupted it.
#[track_caller]
fn passes_while_interrupted(call: &str, when: &str, test: &str) {
    let when = if when.is_empty() { String::new() } else { format!(":{when}") };
    let ended = run(Command::new("strace")
        .args(["-f", "-qq", "-o", "/dev/null", "-e", &format!("trace={call}"), "-e"])
        .arg(format!("inject={call}:error=EINTR:delay_enter=10000{when}"))
        .arg(std::env::current_exe().expect("this program"))
        .args(["--exact", test, "--ignored", "--nocapture"]));
    assert!(ended.status.success(), "{ended:?}");
    assert!(ended.stdout.contains("test result: ok. 1 passed"), "{ended:?}");
}

#[test]
fn signals_do_not_make_the_time_to_connect_longer() {
    passes_while_interrupted("connect", "", "connecting::connects_while_signals_come");
}

#[test]
#[ignore = "another test starts it, as a process whose connects are interrupted"]
fn connects_while_signals_come() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&path).expect("a socket");
    let limit = Duration::from_millis(300);
    let start = Instant::now();
    let error = Client::builder().connect_timeout(limit).connect(&path).unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
    assert!(start.elapsed() >= limit && start.elapsed() < PATIENCE, "{:?}", start.elapsed());
}

/// Signals interrupt each poll(2) of a thread, except the first.
#[test]
fn signals_do_not_make_the_quiet_time_longer() {
    passes_while_interrupted("poll", "when=2+", "connecting::waits_for_quiet_while_signals_come");
}

#[test]
#[ignore = "another test starts it, as a process whose polls are interrupted"]
fn waits_for_quiet_while_signals_come() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("socket");
    let mut server = ivshmem::Server::builder().socket_path(&path).start().expect("it starts");
    let stopper = server.stopper().expect("an eventfd");
    let serving = thread::spawn(move || server.run());
    // The first poll(2) is not interrupted, because the start of a program needs one.
    poll(&mut [], PollTimeout::ZERO).expect("it works");
    let limit = Duration::from_secs(5);
    let client = Client::builder().connect_timeout(limit).connect(&path);
    stopper.stop();
    serving.join().expect("no panic").expect("it serves");
    assert_eq!(client.expect("the quiet time ends").vectors(), 1);
}
