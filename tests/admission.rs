// SPDX-License-Identifier: GPL-2.0-or-later
//! Connections that have ended before they are admitted: they get no id, and no client is told of them.
//!
//! No test here starts a process: until its exec a child has a copy of each connection, which then does not end when the
//! test closes it.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use ivshmem::{Event, Refusal, Server};

mod common;

use common::peer::Connection;

#[test]
fn a_connection_that_ended_before_admission_costs_no_id_and_no_client_is_told_of_it() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let socket = directory.path().join("socket");
    let mut server = Server::builder().socket_path(&socket).size(4096).start().expect("it starts");
    let knock = || UnixStream::connect(&socket).expect("it listens");

    let mut resident = Connection::open(&socket);
    let events = server.dispatch().expect("epoll works");
    assert!(matches!(events[..], [Event::Joined { id: 0, .. }]), "{events:?}");

    drop(knock());
    let half = knock();
    half.shutdown(Shutdown::Write).expect("it is open");
    let mut loud = knock();
    loud.write_all(b"hello").expect("room in the socket");
    let quiet = knock();
    let events = server.dispatch().expect("epoll works");
    assert!(
        matches!(
            events[..],
            [
                Event::Refused { reason: Refusal::Ended, .. },
                Event::Refused { reason: Refusal::Ended, .. },
                Event::Refused { reason: Refusal::Ended, .. },
                Event::Joined { id: 1, .. },
            ]
        ),
        "{events:?}"
    );
    assert_eq!(server.next_id(), Some(2));

    // The resident was told of itself and of the quiet client, and of no other.
    drop(quiet);
    assert!(matches!(server.dispatch().expect("epoll works")[..], [Event::Left { id: 1, .. }]));
    drop(server);
    let mut heard = Vec::new();
    while let Some(message) = resident.receive(common::PATIENCE).expect("a message, or the end") {
        heard.push(message.value);
    }
    assert_eq!(
        heard,
        [0, 0, -1, 0, 1, 1],
        "version, id, memory, itself, the quiet client and its departure"
    );
}
