// SPDX-License-Identifier: GPL-2.0-or-later
//! What the server does with new connections, through the public interface of the library.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use ivshmem::{Event, Server};
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use tempfile::TempDir;

/// A server with its socket in a directory of its own.
fn server(vectors: u32) -> (Server, PathBuf, TempDir) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let socket = directory.path().join("socket");
    let server = Server::builder().socket_path(&socket).vectors(vectors).size(4096).start();
    (server.expect("a server"), socket, directory)
}

fn joined(events: &[Event]) -> usize {
    events.iter().filter(|event| matches!(event, Event::Joined { .. })).count()
}

#[test]
fn the_eventfds_of_a_client_are_non_blocking_and_close_on_exec() {
    let (mut server, socket, _directory) = server(3);
    let _client = UnixStream::connect(&socket).expect("the server listens");
    server.dispatch().expect("the call succeeds");
    let peer = server.peer(0).expect("the client was admitted");
    let vectors: Vec<_> = peer.vectors().collect();
    assert_eq!(vectors.len(), 3);
    for vector in vectors {
        let flags = fcntl(vector, FcntlArg::F_GETFL).expect("an open descriptor");
        assert!(OFlag::from_bits_retain(flags).contains(OFlag::O_NONBLOCK));
        let flags = fcntl(vector, FcntlArg::F_GETFD).expect("an open descriptor");
        assert!(FdFlag::from_bits_retain(flags).contains(FdFlag::FD_CLOEXEC));
    }
}

#[test]
fn one_dispatch_spends_half_of_its_budget_on_new_clients_at_most() {
    let (mut server, socket, _directory) = server(64);
    assert!(server.is_listening());
    let clients: Vec<_> =
        (0..50).map(|_| UnixStream::connect(&socket).expect("the server listens")).collect();
    let first = joined(&server.dispatch().expect("the call succeeds"));
    // A client with 64 vectors costs more than 64 messages of the budget of 4,096.
    assert!((10..=32).contains(&first), "{first} clients in one dispatch");
    assert!(server.is_ready(), "the other clients wait");
    let mut all = first;
    while all < clients.len() {
        let events = server.dispatch().expect("the call succeeds");
        all += joined(&events);
        assert!(server.is_ready() || all == clients.len());
    }
    assert_eq!(server.stats().joined, 50);
    assert!(server.is_listening());
}

#[test]
fn a_connection_that_waits_when_the_server_ends_is_refused() {
    let (server, socket, _directory) = server(1);
    let mut client = UnixStream::connect(&socket).expect("the server listens");
    drop(server);
    let mut bytes = Vec::new();
    client.read_to_end(&mut bytes).expect("the server closed the connection");
    assert_eq!(bytes, 1i64.to_le_bytes(), "version 1, which ends a QEMU with an error");
}
