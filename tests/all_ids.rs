// SPDX-License-Identifier: GPL-2.0-or-later
//! All 65,536 ids of the protocol in use, each by a connected client.
//!
//! If all clients read, the server would send 4,295 million messages. So the clients do not read, and the test checks
//! what the server must not do: assign an id twice, end, or admit one more client. The test needs 131,200 open files
//! and, unless the kernel's sockets are small (`net.core.wmem_default`), 14 GiB of unread messages. So it is not part
//! of the usual run; `make check-full` runs it. `exhaustion.rs` tests that ids are assigned again after the clients
//! that remember them have left.

mod common;

use std::collections::BTreeSet;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::daemon::Daemon;
use common::target::{Target, room_for};
use common::wait_up_to;
use nix::sys::signal::Signal;

/// All ids of 16 bits.
const ALL: usize = 65_536;

/// An emulated machine needs a long time for each connection.
const LONG: Duration = Duration::from_secs(1200);

/// Connects and reads only the version and the id. Returns `None` if the server refuses the client.
fn join(server: &Daemon) -> Option<(UnixStream, i64)> {
    let mut stream = UnixStream::connect(server.socket_path()).expect("the server listens");
    stream.set_read_timeout(Some(LONG)).expect("a socket has time limits");
    let mut greeting = [0; 16];
    let mut got = 0;
    while got < greeting.len() {
        match stream.read(&mut greeting[got..]) {
            Ok(0) => {
                assert_eq!(got, 0, "the server sent data before it closed the connection");
                return None;
            }
            count => got += count.expect("a greeting or the end of the stream"),
        }
    }
    let word = |at: usize| i64::from_le_bytes(greeting[at..at + 8].try_into().expect("8 bytes"));
    assert_eq!(word(0), 0, "the version");
    Some((stream, word(8)))
}

fn with_all_ids_in_use_new_clients_are_refused_and_connected_ones_stay(target: Target) {
    let Some((_, limit)) = room_for("all ids", ALL, ALL, 1) else { return };
    let mut server = target.builder().descriptors(limit).start();
    let before = server.open_fds();
    let mut clients = Vec::with_capacity(ALL);
    let mut ids = BTreeSet::new();
    while clients.len() < ALL {
        let (stream, id) =
            join(&server).unwrap_or_else(|| panic!("client {} was refused", clients.len()));
        assert!((0..ALL as i64).contains(&id), "{id} is not a valid id");
        assert!(ids.insert(id), "id {id} was assigned twice");
        clients.push(stream);
    }
    assert_eq!(server.open_fds() - before, 2 * ALL, "each client needs a socket and an eventfd");
    eprintln!(
        "{ALL} clients: {} KiB resident, {:?} of processor time",
        server.resident_kib(),
        server.run_time()
    );

    for _ in 0..20 {
        assert!(join(&server).is_none(), "no id is free, so the client must be refused");
    }
    server.assert_running();
    let lines = server.output().matches("client refused: no id is left").count();
    assert!(!target.logs() || lines > 0, "the server logged no refusal");
    assert_eq!(server.open_fds() - before, 2 * ALL, "refused clients left descriptors open");
    // Each connected client still has its connection and can read the memory message, -1.
    for (number, mut stream) in clients.iter().enumerate() {
        let mut memory = [0; 8];
        stream.read_exact(&mut memory).unwrap_or_else(|error| panic!("client {number}: {error}"));
        assert_eq!(i64::from_le_bytes(memory), -1, "client {number}");
    }

    // The kernel must close 131,072 descriptors; the usual time limit is too short for that.
    server.signal(Signal::SIGTERM);
    let stat = format!("/proc/{}/stat", server.pid());
    let ended = || std::fs::read_to_string(&stat).ok()?.contains(") Z ").then_some(());
    wait_up_to(LONG, ended).expect("the server ends after SIGTERM");
    assert!(server.wait().success(), "the server failed");
}

#[test]
#[ignore = "65,536 clients: make check-full"]
fn daemon_with_a_client_on_each_id_no_other_is_let_in_and_nobody_is_hurt() {
    with_all_ids_in_use_new_clients_are_refused_and_connected_ones_stay(Target::Daemon);
}

#[test]
#[ignore = "65,536 clients: make check-full"]
fn select_loop_with_a_client_on_each_id_no_other_is_let_in_and_nobody_is_hurt() {
    with_all_ids_in_use_new_clients_are_refused_and_connected_ones_stay(Target::SelectLoop);
}
