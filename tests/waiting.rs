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
fn a_descriptor_of_the_caller_ends_the_wait_and_clients_are_served_too() {
    let (directory, mut server) = start();
    let (mut here, there) = UnixStream::pair().expect("a pair of sockets");
    server.wake_on(&there, 7).expect("a socket can be waited for");

    let _client = UnixStream::connect(directory.path().join("socket")).expect("it listens");
    let events = server.wait(PATIENCE).expect("waiting works");
    assert!(matches!(events[..], [Event::Joined { id: 0, .. }]), "{events:?}");

    here.write_all(b"!").expect("room in the socket");
    let events = server.wait(PATIENCE).expect("waiting works");
    assert!(matches!(events[..], [Event::Woken { token: 7, .. }]), "{events:?}");
    server.run().expect("it ends at once, as the byte is still there");

    let _client = UnixStream::connect(directory.path().join("socket")).expect("it listens");
    let events = server.wait(PATIENCE).expect("waiting works");
    let woken = events.iter().any(|event| matches!(event, Event::Woken { token: 7, .. }));
    let joined = events.iter().any(|event| matches!(event, Event::Joined { id: 1, .. }));
    assert!(woken && joined && events.len() == 2, "{events:?}");

    drop(there);
    assert!(server.dispatch().expect("dispatching works").is_empty(), "a closed one wakes nobody");
}

#[test]
fn each_descriptor_of_the_caller_has_its_own_token() {
    let (_directory, mut server) = start();
    let pairs = [1u64, u64::MAX].map(|token| {
        let (here, there) = UnixStream::pair().expect("a pair of sockets");
        server.wake_on(&there, token).expect("a socket can be waited for");
        (token, here, there)
    });
    for (token, here, there) in &pairs {
        let mut here = here;
        here.write_all(b"!").expect("room in the socket");
        let events = server.wait(PATIENCE).expect("waiting works");
        assert!(matches!(events[..], [Event::Woken { token: t, .. }] if t == *token), "{events:?}");
        std::io::Read::read(&mut &*there, &mut [0]).expect("one byte");
    }
}

#[test]
fn a_stop_ends_one_run_only() {
    let (_directory, mut server) = start();
    let stopper = server.stopper().expect("an eventfd");
    stopper.stop();
    let events = server.dispatch().expect("dispatching works");
    assert!(matches!(events[..], [Event::Stopped]), "{events:?}");
    server.run().expect("it was stopped before it began");
    assert!(server.dispatch().expect("dispatching works").is_empty(), "the stop is used up");

    let other = std::thread::spawn(move || stopper.stop());
    server.run().expect("it is stopped");
    other.join().expect("no panic");
}

#[test]
fn what_cannot_be_waited_for_is_refused() {
    let (_directory, mut server) = start();
    let file = tempfile::tempfile().expect("a temporary file");
    let error = server.wake_on(&file, 0).expect_err("a regular file is always readable");
    assert!(error.to_string().contains("wait for the given descriptor"), "{error}");
}
