// SPDX-License-Identifier: GPL-2.0-or-later
//! Who is admitted: not a connection that has ended before, and only what the daemon's options allow.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use ivshmem::{Event, Refusal, Server};

mod common;

use common::daemon::Daemon;
use common::peer::Connection;
use common::target::is_root;
use common::user::as_user;

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

#[test]
fn the_options_of_the_daemon_admit_users_and_groups_up_to_their_limits() {
    if !is_root("connect as other users") {
        return;
    }
    let outcome = |server: &Daemon, uid: u32| {
        let mut client = as_user(uid, || Connection::open(server.socket_path()));
        let version = client.expect("a version or a refusal").value;
        (version, client)
    };
    let start = |args: &[&str]| {
        args.iter().fold(Daemon::builder().for_all_users(), |builder, arg| builder.arg(arg)).start()
    };

    // `as_user` changes user and group.
    let server = start(&["--allow-uid", "1100031", "--allow-uid=root", "--allow-gid=1100032"]);
    for (uid, version) in [(1_100_031, 0), (1_100_032, 0), (1_100_033, 1), (0, 0)] {
        assert_eq!(outcome(&server, uid).0, version, "uid {uid}");
    }
    let output = server.stop();
    assert!(output.contains("--allow-uid") && output.contains("uid 1100033"), "{output}");

    let server = start(&["--max-clients=2"]);
    let clients: Vec<_> = (0..3).map(|_| outcome(&server, 0)).collect();
    assert_eq!(clients.iter().map(|client| client.0).collect::<Vec<_>>(), [0, 0, 1]);
    assert!(server.stop().contains("as the limit allows: 2"));

    let server = start(&["--max-clients-per-uid=2"]);
    let clients: Vec<_> = [0, 0, 0, 1_100_031].map(|uid| outcome(&server, uid)).into();
    assert_eq!(clients.iter().map(|client| client.0).collect::<Vec<_>>(), [0, 0, 1, 0]);
    assert!(server.stop().contains("the limit for each user is 2"));
}
