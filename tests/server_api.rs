// SPDX-License-Identifier: GPL-2.0-or-later
//! The server as a Rust program uses it, through the public API, and with this library's own client on the other end.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use ivshmem::client::{Client, Event as Seen};
use ivshmem::{Error, Event, LeaveReason, ListenerError, MemorySource, Refusal, Server};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::fstat;
use nix::unistd::{getgid, getpid, getuid};
use tempfile::TempDir;

/// How long a thing that needs a moment may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(10);

fn directory() -> TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

/// A client that connects while the server is served by this thread.
#[track_caller]
fn join(server: &mut Server, socket: &Path) -> (Client, Vec<Event>) {
    let socket = UnixStream::connect(socket).expect("it listens");
    greet(server, socket)
}

#[track_caller]
fn greet(server: &mut Server, socket: UnixStream) -> (Client, Vec<Event>) {
    let events = until(server, |events| !events.is_empty());
    let vectors = server.vectors();
    let client = Client::builder().vectors(vectors).connect_timeout(PATIENCE).adopt(socket);
    (client.expect("what was sent is a greeting"), events)
}

/// Serves until enough has happened.
#[track_caller]
fn until(server: &mut Server, enough: impl Fn(&[Event]) -> bool) -> Vec<Event> {
    let end = Instant::now() + PATIENCE;
    let mut all = Vec::new();
    while !enough(&all) {
        let left = end.saturating_duration_since(Instant::now());
        assert!(!left.is_zero(), "not within {PATIENCE:?}; there was {all:?}");
        all.extend(server.wait(Some(left)).expect("what clients do is no error"));
    }
    all
}

#[test]
fn a_listener_that_is_given_is_used_and_its_path_stays() {
    let dir = directory();
    let path = dir.path().join("mine");
    let listener = UnixListener::bind(&path).expect("a socket");
    let mut server = Server::builder().listener(listener).start().expect("a server");
    assert_eq!(server.socket_path(), None);
    let (client, events) = join(&mut server, &path);
    assert!(matches!(events[..], [Event::Joined { id: 0, .. }]), "{events:?}");
    assert_eq!(client.id(), 0);
    drop((server, client));
    assert!(path.exists(), "it was not the server's to remove");
}

#[test]
fn a_path_that_is_given_is_removed_at_the_end() {
    let dir = directory();
    let path = dir.path().join("socket");
    let server = Server::builder().socket_path(&path).start().expect("a server");
    assert_eq!(server.socket_path(), Some(path.as_path()));
    assert!(path.exists());
    drop(server);
    assert!(!path.exists());
}

#[test]
fn a_descriptor_that_is_given_is_the_memory_with_its_content() {
    let dir = directory();
    let fd = memfd_create(c"given", MFdFlags::MFD_CLOEXEC).expect("a memfd");
    let file = File::from(fd);
    file.set_len(8192).expect("it grows");
    file.write_all_at(b"before", 100).expect("it is there");
    let path = dir.path().join("socket");
    let given = OwnedFd::from(file.try_clone().expect("dup"));
    let mut server = Server::builder()
        .socket_path(&path)
        .memory(MemorySource::Descriptor(given))
        .start()
        .expect("a server");
    assert_eq!(server.memory_size(), 8192, "its own size, as none was said");
    let (client, _) = join(&mut server, &path);
    let mut bytes = [0; 6];
    client.memory().read(100, &mut bytes).expect("it is there");
    assert_eq!(&bytes, b"before");
    client.memory().write(100, b"after!").expect("it is there");
    file.read_exact_at(&mut bytes, 100).expect("it is there");
    assert_eq!(&bytes, b"after!");
    let same = |fd| fstat(fd).map(|stat| (stat.st_dev, stat.st_ino)).expect("an open file");
    assert_eq!(same(server.memory()), same(file.as_fd()));
}

#[test]
fn peers_tell_who_they_are_and_are_reached_by_their_vectors() {
    let dir = directory();
    let path = dir.path().join("socket");
    let mut server =
        Server::builder().socket_path(&path).vectors(3).first_id(40).start().expect("a server");
    assert_eq!((server.vectors(), server.next_id(), server.peers().count()), (3, Some(40), 0));
    let (mut one, events) = join(&mut server, &path);
    let (_two, _) = join(&mut server, &path);
    assert_eq!(server.peers().map(|peer| peer.id()).collect::<Vec<_>>(), [40, 41]);
    let peer = server.peer(40).expect("it is here");
    assert!(
        matches!(events[..], [Event::Joined { id: 40, socket, .. }] if socket == peer.socket().as_raw_fd())
    );
    let credentials = peer.credentials().expect("a socket has some");
    assert_eq!(credentials.pid, getpid().as_raw());
    assert_eq!((credentials.uid, credentials.gid), (getuid().as_raw(), getgid().as_raw()));
    assert_eq!(peer.vectors().len(), 3);
    let third = peer.vectors().nth(2).expect("it has three");
    nix::unistd::write(third, &1u64.to_ne_bytes()).expect("an eventfd");
    let seen = one.wait(Some(PATIENCE)).expect("it can wait");
    assert!(seen.iter().any(|event| matches!(event, Seen::Rung { vector: 2, count: 1 })));
    assert!(server.peer(42).is_none());
}

#[test]
fn a_client_that_does_not_read_is_behind_and_catches_up() {
    let dir = directory();
    let path = dir.path().join("socket");
    let mut server = Server::builder().socket_path(&path).vectors(8).start().expect("a server");
    let slow = UnixStream::connect(&path).expect("it listens");
    until(&mut server, |events| !events.is_empty());
    assert_eq!(server.peer(0).expect("it is here").behind(), 0, "its socket holds the greeting");
    let others: Vec<_> = (0..45).map(|_| UnixStream::connect(&path).expect("it listens")).collect();
    until(&mut server, |events| events.len() == 45);
    let behind = server.peer(0).expect("it is here").behind();
    // 360 messages more than its greeting, of which a socket holds 278.
    assert!((50..360).contains(&behind), "{behind}");
    let mut slow = Client::builder().vectors(8).adopt(slow).expect("all of it");
    let end = Instant::now() + PATIENCE;
    while slow.peers().len() < 45 || slow.peers().any(|peer| peer.vectors() < 8) {
        assert!(Instant::now() < end, "{} of 45", slow.peers().len());
        slow.wait(Some(Duration::from_millis(1))).expect("it works");
        server.dispatch().expect("it works");
    }
    assert_eq!(server.peer(0).expect("it is here").behind(), 0);
    drop(others);
}

#[test]
fn a_client_that_is_disconnected_leaves_with_the_next_dispatch() {
    let dir = directory();
    let path = dir.path().join("socket");
    let mut server = Server::builder().socket_path(&path).start().expect("a server");
    let (mut one, _) = join(&mut server, &path);
    let (mut two, _) = join(&mut server, &path);
    assert!(!server.disconnect(7), "nobody has that id");
    assert!(server.disconnect(1));
    assert!(server.peer(1).is_some(), "not before the dispatch");
    assert!(server.is_ready(), "which is due");
    let events = server.dispatch().expect("it works");
    assert!(
        matches!(events[..], [Event::Left { id: 1, reason: LeaveReason::Disconnected, .. }]),
        "{events:?}"
    );
    assert!(server.peer(1).is_none());
    let seen = two.wait(Some(PATIENCE)).expect("it can wait");
    assert!(matches!(&seen[..], [Seen::Disconnected { reason }] if reason.is_closed()), "{seen:?}");
    let mut seen = Vec::new();
    while !seen.iter().any(|event| matches!(event, Seen::Left { peer: 1 })) {
        let events = one.wait(Some(PATIENCE)).expect("it can wait");
        assert!(!events.is_empty(), "{seen:?}");
        seen.extend(events);
    }
}

#[test]
fn a_client_that_says_anything_leaves() {
    let dir = directory();
    let path = dir.path().join("socket");
    let mut server = Server::builder().socket_path(&path).start().expect("a server");
    let mut socket = UnixStream::connect(&path).expect("it listens");
    until(&mut server, |events| !events.is_empty());
    socket.write_all(b"x").expect("it is open");
    let events = until(&mut server, |events| !events.is_empty());
    assert!(
        matches!(events[..], [Event::Left { id: 0, reason: LeaveReason::SentData, .. }]),
        "{events:?}"
    );
}

#[test]
fn a_client_that_no_id_is_left_for_is_refused_and_the_event_says_why() {
    let dir = directory();
    let path = dir.path().join("socket");
    let mut server = Server::builder().socket_path(&path).id_space(2).start().expect("a server");
    let (one, _) = join(&mut server, &path);
    let (two, _) = join(&mut server, &path);
    assert_eq!(server.next_id(), None);
    let third = UnixStream::connect(&path).expect("it listens");
    let events = until(&mut server, |events| !events.is_empty());
    assert!(matches!(events[..], [Event::Refused(Refusal::NoIds)]), "{events:?}");
    let Event::Refused(refusal) = &events[0] else { unreachable!("it was just seen") };
    assert!(refusal.to_string().contains("no id is left"), "{refusal}");
    let refused = Client::builder().connect_timeout(PATIENCE).adopt(third);
    let refused = refused.expect_err("it was refused");
    assert!(refused.to_string().contains("version 1"), "what makes a QEMU end: {refused}");
    drop((one, two));
}

#[test]
fn a_stopper_ends_run_from_another_thread() {
    let dir = directory();
    let path = dir.path().join("socket");
    let mut server = Server::builder().socket_path(&path).start().expect("a server");
    let stopper = server.stopper().expect("a descriptor is left");
    let serving = thread::spawn(move || {
        server.run().expect("it can wait");
        server
    });
    let client = Client::builder().vectors(1).connect(&path).expect("it is served");
    assert_eq!(client.id(), 0);
    stopper.clone().stop();
    let mut server = serving.join().expect("it ends");
    assert_eq!(server.peers().count(), 1, "to stop is not to close");
    // It can go on; and a stop that came before `run` counts too.
    stopper.stop();
    server.run().expect("it can wait");
}

#[test]
fn the_server_is_one_descriptor_that_is_readable_when_there_is_something_to_do() {
    let dir = directory();
    let path = dir.path().join("socket");
    let mut server = Server::builder().socket_path(&path).start().expect("a server");
    let readable = |server: &Server, time: PollTimeout| {
        poll(&mut [PollFd::new(server.as_fd(), PollFlags::POLLIN)], time).expect("poll") == 1
    };
    let patience = PollTimeout::try_from(PATIENCE).expect("it fits");
    assert!(!readable(&server, PollTimeout::ZERO) && !server.is_ready());
    let socket = UnixStream::connect(&path).expect("it listens");
    assert!(readable(&server, patience) && server.is_ready());
    assert_eq!(server.dispatch().expect("it works").len(), 1);
    assert!(!readable(&server, PollTimeout::ZERO) && !server.is_ready());
    drop(socket);
    assert!(readable(&server, patience));
    assert_eq!(server.dispatch().expect("it works").len(), 1);
    let start = Instant::now();
    let time = Duration::from_millis(30);
    assert!(server.wait(Some(time)).expect("it can wait").is_empty());
    assert!(start.elapsed() >= time);
}

#[test]
fn a_server_that_drops_disconnects_its_clients() {
    let dir = directory();
    let path = dir.path().join("socket");
    let mut server = Server::builder().socket_path(&path).start().expect("a server");
    let (mut client, _) = join(&mut server, &path);
    drop(server);
    let seen = client.wait(Some(PATIENCE)).expect("it can wait");
    assert!(matches!(&seen[..], [Seen::Disconnected { reason }] if reason.is_closed()), "{seen:?}");
}

#[test]
fn what_cannot_be_started_is_an_error_that_says_what_would_be_right() {
    let dir = directory();
    let path = dir.path().join("socket");
    let builder = || Server::builder().socket_path(&path);
    for (error, parts) in [
        (Server::builder().start(), &["no socket", "give a socket path"][..]),
        (builder().vectors(0).start(), &["0 vectors", "1 to 2048"]),
        (builder().vectors(2049).start(), &["2049 vectors", "1 to 2048"]),
        (builder().id_space(0).start(), &["id space of 0", "1 to 65536"]),
        (builder().id_space(65_537).start(), &["id space of 65537", "1 to 65536"]),
        (builder().size(0).start(), &["size 0", "power of two"]),
    ] {
        let error: Error = error.map(drop).expect_err(parts[0]);
        let text = error.to_string();
        for part in parts {
            assert!(text.contains(part), "no {part:?} in {text:?}");
        }
    }
    assert!(!path.exists(), "nothing is left behind");
    let _server = builder().start().expect("the same, with nothing wrong");
    let error = builder().start().map(drop).unwrap_err();
    assert!(matches!(error, Error::Listener(ListenerError::InUse { .. })), "{error:?}");
}
