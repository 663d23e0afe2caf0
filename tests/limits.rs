// SPDX-License-Identifier: GPL-2.0-or-later
//! The caller's limits through the Rust API: a rule for each connection, the number of clients, and what one user may
//! hold. Connections, ended connections with unread messages, and remembered ids count, and come free.

mod common;

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ivshmem::{Event, Refusal, Server};
use tempfile::TempDir;

use common::PATIENCE;
use common::target::is_root;
use common::user::as_user;

const ONE: u32 = 1_100_021;
const OTHER: u32 = 1_100_022;

/// A directory for a socket to which all users can connect.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mode = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(dir.path(), mode).expect("the directory is ours");
        Self(dir)
    }

    fn socket(&self) -> PathBuf {
        self.0.path().join("socket")
    }

    fn builder(&self) -> ivshmem::Builder {
        Server::builder().socket_path(self.socket()).socket_mode(0o777).size(4096)
    }

    fn connect(&self, uid: u32) -> UnixStream {
        as_user(uid, || UnixStream::connect(self.socket()).expect("the server listens"))
    }
}

/// Serves until this number of clients joined, left or was refused.
#[track_caller]
fn serve(server: &mut Server, count: usize) -> Vec<Event> {
    let end = Instant::now() + PATIENCE;
    let mut events = Vec::new();
    while events.len() < count {
        let left = end.saturating_duration_since(Instant::now());
        assert!(!left.is_zero(), "{count} events; there were {events:?}");
        events.extend(server.wait(Some(left)).expect("no client causes an error"));
    }
    // What is still to be sent.
    while server.is_ready() {
        events.extend(server.dispatch().expect("no client causes an error"));
    }
    assert_eq!(events.len(), count, "{events:?}");
    events
}

/// Connects a client, which must be admitted.
#[track_caller]
fn admit(server: &mut Server, place: &Place, uid: u32) -> UnixStream {
    let mut stream = place.connect(uid);
    let events = serve(server, 1);
    assert!(matches!(events[..], [Event::Joined { .. }]), "{events:?}");
    assert_eq!(value(&mut stream), 0, "the version");
    stream
}

/// Connects a client, which must be refused.
#[track_caller]
fn refuse(server: &mut Server, place: &Place, uid: u32) -> Refusal {
    let next = server.next_id();
    let mut stream = place.connect(uid);
    let mut events = serve(server, 1);
    let Some(Event::Refused { reason, credentials: Some(credentials), .. }) = events.pop() else {
        panic!("{events:?}")
    };
    assert_eq!(credentials.uid, uid);
    assert_eq!(value(&mut stream), 1, "what makes a QEMU end");
    assert_eq!(stream.read(&mut [0]).expect("the end"), 0);
    assert_eq!(server.next_id(), next, "a refused client was given an id");
    reason
}

/// The value of the next message. Drops its descriptor.
#[track_caller]
fn value(stream: &mut UnixStream) -> i64 {
    stream.set_read_timeout(Some(PATIENCE)).expect("it is a socket");
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes).expect("a message");
    i64::from_le_bytes(bytes)
}

#[test]
fn the_callers_rule_is_asked_about_each_connection_before_it_is_sent_a_byte() {
    if !is_root("connect as other users") {
        return;
    }
    let place = Place::new();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&asked);
    let rule = move |applicant: &ivshmem::Applicant<'_>| {
        let credentials = applicant.credentials();
        log.lock().expect("no panic").push(credentials.uid);
        assert_eq!(credentials.pid, i32::try_from(std::process::id()).expect("a pid"));
        applicant.groups().expect("Linux 4.13 or newer");
        let own = std::env::current_exe().expect("the path of the test program");
        assert_eq!(applicant.executable().expect("it is this program"), own);
        match credentials.uid {
            OTHER => Ok(()),
            uid => Err(format!("uid {uid} is not on the list")),
        }
    };
    let mut server = place.builder().admit(rule).start().expect("it starts");
    let reason = refuse(&mut server, &place, ONE);
    assert!(
        matches!(&reason, Refusal::NotPermitted(text) if *text == format!("uid {ONE} is not on the list")),
        "{reason:?}"
    );
    let _other = admit(&mut server, &place, OTHER);
    refuse(&mut server, &place, ONE);
    assert_eq!(*asked.lock().expect("no panic"), [ONE, OTHER, ONE]);
    let stats = server.stats();
    assert_eq!((stats.peers, stats.refused_not_permitted, stats.refused_limit), (1, 2, 0));
}

#[test]
fn with_max_clients_a_client_is_admitted_again_after_one_has_left() {
    if !is_root("connect as other users") {
        return;
    }
    let place = Place::new();
    let mut server = place.builder().max_clients(2).start().expect("it starts");
    let first = admit(&mut server, &place, ONE);
    let _second = admit(&mut server, &place, OTHER);
    for uid in [ONE, OTHER] {
        let reason = refuse(&mut server, &place, uid);
        assert!(matches!(reason, Refusal::TooManyClients { limit: 2, .. }), "{reason:?}");
    }
    drop(first);
    serve(&mut server, 1);
    let _third = admit(&mut server, &place, OTHER);
    assert_eq!(server.stats().refused_limit, 2);
}

/// The number that a refusal by the limit for each user names.
#[track_caller]
fn held(reason: &Refusal) -> u32 {
    match reason {
        Refusal::TooManyOfUser { uid: ONE, held, .. } => *held,
        _ => panic!("{reason:?}"),
    }
}

#[test]
fn the_limit_for_each_user_counts_connections_of_that_user_only() {
    if !is_root("connect as other users") {
        return;
    }
    let place = Place::new();
    let mut server = place.builder().max_clients_per_uid(2).start().expect("it starts");
    let mut clients: Vec<_> = (0..2).map(|_| admit(&mut server, &place, ONE)).collect();
    assert_eq!(held(&refuse(&mut server, &place, ONE)), 2);
    let _others: Vec<_> = (0..2).map(|_| admit(&mut server, &place, OTHER)).collect();
    assert_eq!(held(&refuse(&mut server, &place, ONE)), 2);
    assert_eq!(server.stats().refused_limit, 2);
    clients.clear();
    serve(&mut server, 2);
}

#[test]
fn the_limit_for_each_user_counts_remembered_ids_until_nobody_remembers_them() {
    if !is_root("connect as other users") {
        return;
    }
    let place = Place::new();
    let mut server = place.builder().max_clients_per_uid(2).start().expect("it starts");
    let witness = admit(&mut server, &place, OTHER);
    let brief: Vec<_> = (0..2).map(|_| admit(&mut server, &place, ONE)).collect();
    drop(brief);
    serve(&mut server, 2);
    assert_eq!(server.stats().peers, 1);
    // The witness was told of both, so their ids cannot be given again.
    assert_eq!(held(&refuse(&mut server, &place, ONE)), 2);
    let _other = admit(&mut server, &place, OTHER);
    drop(witness);
    serve(&mut server, 1);
    // The other client joined later and was told of neither.
    let _one = admit(&mut server, &place, ONE);
}

#[test]
fn the_limit_for_each_user_counts_ended_clients_until_they_have_read() {
    if !is_root("connect as other users") {
        return;
    }
    let place = Place::new();
    let mut server = place.builder().max_clients_per_uid(2).start().expect("it starts");
    let mut ended: Vec<_> = (0..2).map(|_| admit(&mut server, &place, ONE)).collect();
    for stream in &mut ended {
        stream.write_all(b"!").expect("there is room");
    }
    serve(&mut server, 2);
    let stats = server.stats();
    assert_eq!((stats.peers, stats.lingering), (0, 2));
    assert_eq!(held(&refuse(&mut server, &place, ONE)), 2);
    let _other = admit(&mut server, &place, OTHER);

    // One reads everything, to its end.
    let mut rest = Vec::new();
    if let Err(error) = ended[0].read_to_end(&mut rest) {
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
    assert!(!rest.is_empty());
    let _one = admit(&mut server, &place, ONE);
    assert_eq!(held(&refuse(&mut server, &place, ONE)), 2);
    // The other one closes its connection with unread messages.
    ended.clear();
    let end = Instant::now() + PATIENCE;
    while server.stats().lingering > 0 {
        assert!(Instant::now() < end, "a connection that was closed still counts");
        server.wait(Some(Duration::from_millis(10))).expect("no client causes an error");
    }
    let _two = admit(&mut server, &place, ONE);
}
