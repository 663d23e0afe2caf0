// SPDX-License-Identifier: GPL-2.0-or-later
//! What ends a server's waiting, besides its clients.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use ivshmem::{Event, Server};

const PATIENCE: Option<Duration> = Some(Duration::from_secs(10));

fn start() -> (tempfile::TempDir, Server) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let socket = directory.path().join("socket");
    let server = Server::builder().socket_path(&socket).size(4096).start().expect("it starts");
    (directory, server)
}

#[test]
fn a_descriptor_of_the_callers_ends_the_waiting_and_the_clients_are_served_as_well() {
    let (directory, mut server) = start();
    let (mut here, there) = UnixStream::pair().expect("a pair of sockets");
    server.wake_on(&there).expect("a socket can be waited for");

    let _client = UnixStream::connect(directory.path().join("socket")).expect("it listens");
    let events = server.wait(PATIENCE).expect("waiting works");
    assert!(matches!(events[..], [Event::Joined { id: 0, .. }]), "{events:?}");
    assert!(!server.woken(), "only a client came");

    here.write_all(b"!").expect("room in the socket");
    assert!(server.wait(PATIENCE).expect("waiting works").is_empty(), "no client did anything");
    assert!(server.woken());
    server.run().expect("it ends at once, as the byte is still there");

    let _client = UnixStream::connect(directory.path().join("socket")).expect("it listens");
    let events = server.wait(PATIENCE).expect("waiting works");
    assert!(matches!(events[..], [Event::Joined { id: 1, .. }]), "{events:?}");
    assert!(server.woken(), "both at once");

    drop(there);
    assert!(server.dispatch().expect("dispatching works").is_empty());
    assert!(!server.woken(), "what is closed wakes nobody");
}

#[test]
fn a_stop_ends_one_run_only() {
    let (_directory, mut server) = start();
    let stopper = server.stopper().expect("an eventfd");
    stopper.stop();
    server.run().expect("it was stopped before it began");
    server.dispatch().expect("dispatching works");
    assert!(!server.woken(), "the stop is used up");

    let other = std::thread::spawn(move || stopper.stop());
    server.run().expect("it is stopped");
    other.join().expect("no panic");
}

#[test]
fn what_cannot_be_waited_for_is_refused() {
    let (_directory, mut server) = start();
    let file = tempfile::tempfile().expect("a temporary file");
    let error = server.wake_on(&file).expect_err("a regular file is always readable");
    assert!(error.to_string().contains("wait for a descriptor too"), "{error}");
}
