// SPDX-License-Identifier: GPL-2.0-or-later
//! The server through the public Rust API, with this library's own client as its client.

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

/// The time limit for an action that takes a moment; long enough for a busy machine.
const PATIENCE: Duration = Duration::from_secs(10);

fn directory() -> TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

/// Connects a client while this thread runs the server.
#[track_caller]
fn join(server: &mut Server, socket: &Path) -> (Client, Vec<Event>) {
    let socket = UnixStream::connect(socket).expect("the server listens");
    adopt(server, socket)
}

#[track_caller]
fn adopt(server: &mut Server, socket: UnixStream) -> (Client, Vec<Event>) {
    let events = until(server, |events| !events.is_empty());
    let vectors = server.vectors();
    let client = Client::builder().vectors(vectors).connect_timeout(PATIENCE).adopt(socket);
    (client.expect("the server sent a greeting"), events)
}

/// Runs the server until `enough` is true for the events so far.
#[track_caller]
fn until(server: &mut Server, enough: impl Fn(&[Event]) -> bool) -> Vec<Event> {
    let end = Instant::now() + PATIENCE;
    let mut all = Vec::new();
    while !enough(&all) {
        let left = end.saturating_duration_since(Instant::now());
        assert!(!left.is_zero(), "not within {PATIENCE:?}; the events were {all:?}");
        all.extend(server.wait(Some(left)).expect("no client causes an error of the server"));
    }
    all
}

#[test]
fn a_given_listener_is_used_and_its_path_is_not_removed() {
    let dir = directory();
    let path = dir.path().join("mine");
    let listener = UnixListener::bind(&path).expect("a socket");
    let mut server = Server::builder().listener(listener).start().expect("a server");
    assert_eq!(server.socket_path(), None);
    let (client, events) = join(&mut server, &path);
    assert!(matches!(events[..], [Event::Joined { id: 0, .. }]), "{events:?}");
    assert_eq!(client.id(), 0);
    drop((server, client));
    assert!(path.exists(), "the server must not remove a given listener's path");
}

#[test]
fn a_given_path_is_removed_when_the_server_is_dropped() {
    let dir = directory();
    let path = dir.path().join("socket");
    let server = Server::builder().socket_path(&path).start().expect("a server");
    assert_eq!(server.socket_path(), Some(path.as_path()));
    assert!(path.exists());
    drop(server);
    assert!(!path.exists());
}

#[test]
fn a_given_descriptor_becomes_the_memory_and_keeps_its_content() {
    let dir = directory();
    let fd = memfd_create(c"given", MFdFlags::MFD_CLOEXEC).expect("a memfd");
    let file = File::from(fd);
    file.set_len(8192).expect("the memfd can grow");
    file.write_all_at(b"before", 100).expect("the range is in the memory");
    let path = dir.path().join("socket");
    let given = OwnedFd::from(file.try_clone().expect("dup"));
    let mut server = Server::builder()
        .socket_path(&path)
        .memory(MemorySource::Descriptor(given))
        .start()
        .expect("a server");
    assert_eq!(server.memory_size(), 8192, "the size of the descriptor is the default");
    let (client, _) = join(&mut server, &path);
    let mut bytes = [0; 6];
    client.memory().read(100, &mut bytes).expect("the range is in the memory");
    assert_eq!(&bytes, b"before");
    client.memory().write(100, b"after!").expect("the range is in the memory");
    file.read_exact_at(&mut bytes, 100).expect("the range is in the memory");
    assert_eq!(&bytes, b"after!");
    let same = |fd| fstat(fd).map(|stat| (stat.st_dev, stat.st_ino)).expect("an open file");
    assert_eq!(same(server.memory()), same(file.as_fd()));
}

#[test]
fn peers_have_credentials_and_vectors_that_ring_them() {
    let dir = directory();
    let path = dir.path().join("socket");
    let mut server =
        Server::builder().socket_path(&path).vectors(3).first_id(40).start().expect("a server");
    assert_eq!((server.vectors(), server.next_id(), server.peers().count()), (3, Some(40), 0));
    let (mut one, events) = join(&mut server, &path);
    let (_two, _) = join(&mut server, &path);
    assert_eq!(server.peers().map(|peer| peer.id()).collect::<Vec<_>>(), [40, 41]);
    let peer = server.peer(40).expect("the peer is connected");
    assert!(
        matches!(events[..], [Event::Joined { id: 40, socket, .. }] if socket == peer.socket().as_raw_fd())
    );
    let credentials = peer.credentials().expect("a UNIX socket has credentials");
    assert_eq!(credentials.pid, getpid().as_raw());
    assert_eq!((credentials.uid, credentials.gid), (getuid().as_raw(), getgid().as_raw()));
    assert_eq!(peer.vectors().len(), 3);
    let third = peer.vectors().nth(2).expect("the peer has three vectors");
    nix::unistd::write(third, &1u64.to_ne_bytes()).expect("an eventfd");
    let seen = one.wait(Some(PATIENCE)).expect("the wait succeeds");
    assert!(seen.iter().any(|event| matches!(event, Seen::Rung { vector: 2, count: 1 })));
    assert!(server.peer(42).is_none());
}

#[test]
fn behind_counts_unsent_messages_until_the_client_catches_up() {
    let dir = directory();
    let path = dir.path().join("socket");
    let mut server = Server::builder().socket_path(&path).vectors(8).start().expect("a server");
    let slow = UnixStream::connect(&path).expect("the server listens");
    until(&mut server, |events| !events.is_empty());
    assert_eq!(
        server.peer(0).expect("the peer is connected").behind(),
        0,
        "the greeting fits into the socket"
    );
    let others: Vec<_> =
        (0..45).map(|_| UnixStream::connect(&path).expect("the server listens")).collect();
    until(&mut server, |events| events.len() == 45);
    let behind = server.peer(0).expect("the peer is connected").behind();
    // The server has 360 messages for it after the greeting, and a socket holds 278.
    assert!((50..360).contains(&behind), "{behind}");
    let mut slow = Client::builder().vectors(8).adopt(slow).expect("the greeting is complete");
    let end = Instant::now() + PATIENCE;
    while slow.peers().len() < 45 || slow.peers().any(|peer| peer.vectors() < 8) {
        assert!(Instant::now() < end, "{} of 45", slow.peers().len());
        slow.wait(Some(Duration::from_millis(1))).expect("the call succeeds");
        server.dispatch().expect("the call succeeds");
    }
    assert_eq!(server.peer(0).expect("the peer is connected").behind(), 0);
    drop(others);
}

#[test]
fn a_disconnected_client_is_removed_by_the_next_dispatch() {
    let dir = directory();
    let path = dir.path().join("socket");
    let mut server = Server::builder().socket_path(&path).start().expect("a server");
    let (mut one, _) = join(&mut server, &path);
    let (mut two, _) = join(&mut server, &path);
    assert!(!server.disconnect(7), "no client has that id");
    assert!(server.disconnect(1));
    assert!(server.peer(1).is_some(), "the peer is removed only by the next dispatch");
    assert!(server.is_ready(), "a dispatch is due");
    let events = server.dispatch().expect("the call succeeds");
    assert!(
        matches!(events[..], [Event::Left { id: 1, reason: LeaveReason::Disconnected, .. }]),
        "{events:?}"
    );
    assert!(server.peer(1).is_none());
    let seen = two.wait(Some(PATIENCE)).expect("the wait succeeds");
    assert!(matches!(&seen[..], [Seen::Disconnected { reason }] if reason.is_closed()), "{seen:?}");
    let mut seen = Vec::new();
    while !seen.iter().any(|event| matches!(event, Seen::Left { peer: 1 })) {
        let events = one.wait(Some(PATIENCE)).expect("the wait succeeds");
        assert!(!events.is_empty(), "{seen:?}");
        seen.extend(events);
    }
}

#[test]
fn a_client_that_sends_data_is_removed() {
    let dir = directory();
    let path = dir.path().join("socket");
    let mut server = Server::builder().socket_path(&path).start().expect("a server");
    let mut socket = UnixStream::connect(&path).expect("the server listens");
    until(&mut server, |events| !events.is_empty());
    socket.write_all(b"x").expect("the socket is open");
    let events = until(&mut server, |events| !events.is_empty());
    assert!(
        matches!(events[..], [Event::Left { id: 0, reason: LeaveReason::SentData, .. }]),
        "{events:?}"
    );
}

#[test]
fn without_a_free_id_a_client_is_refused_and_the_event_names_the_reason() {
    let dir = directory();
    let path = dir.path().join("socket");
    let mut server = Server::builder().socket_path(&path).id_space(2).start().expect("a server");
    let (one, _) = join(&mut server, &path);
    let (two, _) = join(&mut server, &path);
    assert_eq!(server.next_id(), None);
    let third = UnixStream::connect(&path).expect("the server listens");
    let events = until(&mut server, |events| !events.is_empty());
    assert!(matches!(events[..], [Event::Refused { reason: Refusal::NoIds, .. }]), "{events:?}");
    let Event::Refused { reason: refusal, credentials, .. } = &events[0] else {
        unreachable!("the assertion above checked it")
    };
    assert!(refusal.to_string().contains("no id is left"), "{refusal}");
    assert_eq!(credentials.map(|who| who.pid), Some(std::process::id() as i32));
    let refused = Client::builder().connect_timeout(PATIENCE).adopt(third);
    let refused = refused.expect_err("the server refused the client");
    assert!(
        refused.to_string().contains("1 in place of the protocol version"),
        "an unknown version makes a QEMU end: {refused}"
    );
    drop((one, two));
}

#[test]
fn a_stopper_ends_run_from_another_thread() {
    let dir = directory();
    let path = dir.path().join("socket");
    let mut server = Server::builder().socket_path(&path).start().expect("a server");
    let stopper = server.stopper().expect("a descriptor is left");
    let serving = thread::spawn(move || {
        server.run().expect("the wait succeeds");
        server
    });
    let client =
        Client::builder().vectors(1).connect(&path).expect("the server accepts the client");
    assert_eq!(client.id(), 0);
    stopper.clone().stop();
    let mut server = serving.join().expect("the thread ends");
    assert_eq!(server.peers().count(), 1, "stopping `run` must not remove the clients");
    // The server can run again. A stop before `run` makes `run` return at once.
    stopper.stop();
    server.run().expect("the wait succeeds");
}

#[test]
fn the_server_descriptor_is_readable_only_when_there_is_work() {
    let dir = directory();
    let path = dir.path().join("socket");
    let mut server = Server::builder().socket_path(&path).start().expect("a server");
    let readable = |server: &Server, time: PollTimeout| {
        poll(&mut [PollFd::new(server.as_fd(), PollFlags::POLLIN)], time).expect("poll") == 1
    };
    let patience = PollTimeout::try_from(PATIENCE).expect("the time limit fits into a PollTimeout");
    assert!(!readable(&server, PollTimeout::ZERO) && !server.is_ready());
    let socket = UnixStream::connect(&path).expect("the server listens");
    assert!(readable(&server, patience) && server.is_ready());
    assert_eq!(server.dispatch().expect("the call succeeds").len(), 1);
    assert!(!readable(&server, PollTimeout::ZERO) && !server.is_ready());
    drop(socket);
    assert!(readable(&server, patience));
    assert_eq!(server.dispatch().expect("the call succeeds").len(), 1);
    let start = Instant::now();
    let time = Duration::from_millis(30);
    assert!(server.wait(Some(time)).expect("the wait succeeds").is_empty());
    assert!(start.elapsed() >= time);
}

#[test]
fn dropping_a_server_disconnects_its_clients() {
    let dir = directory();
    let path = dir.path().join("socket");
    let mut server = Server::builder().socket_path(&path).start().expect("a server");
    let (mut client, _) = join(&mut server, &path);
    drop(server);
    let seen = client.wait(Some(PATIENCE)).expect("the wait succeeds");
    assert!(matches!(&seen[..], [Seen::Disconnected { reason }] if reason.is_closed()), "{seen:?}");
}

#[test]
fn an_invalid_configuration_gives_an_error_with_the_allowed_values() {
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
    assert!(!path.exists(), "a failed start must not leave a socket");
    let _server = builder().start().expect("the same builder with valid values starts");
    let error = builder().start().map(drop).unwrap_err();
    assert!(matches!(error, Error::Listener(ListenerError::InUse { .. })), "{error:?}");
}

#[test]
fn a_given_listener_that_was_shut_down_is_not_watched_any_more() {
    let dir = directory();
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).expect("the path is free");
    let shared = listener.try_clone().expect("dup works");
    let mut server = Server::builder().listener(listener).start().expect("a server");
    let (client, _) = join(&mut server, &path);
    nix::sys::socket::shutdown(shared.as_raw_fd(), nix::sys::socket::Shutdown::Both)
        .expect("it is a socket");
    server.dispatch().expect("it works");
    server.dispatch().expect("it works");
    assert!(!server.is_ready() && !server.is_listening(), "it would be reported for ever");
    assert_eq!(server.peers().count(), 1, "the client stays");
    drop(client);
}
