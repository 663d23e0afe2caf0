// SPDX-License-Identifier: GPL-2.0-or-later
//! The end of the protocol's ids, with a connected client behind each of them.
//!
//! If all read, that would be 4,295 million messages. So nobody reads, and what there is to see is what a full house must
//! not do: give an id twice, end, or let one more in. It takes 131,200 open files and, unless the kernel's sockets are
//! small (`net.core.wmem_default`), 14 GiB of messages under way; so it is not in the usual run. `make check-full` has it.
//! That ids are given again when those who knew them have left, `exhaustion.rs` says.

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

/// In an emulated machine, a connection takes a while.
const LONG: Duration = Duration::from_secs(1200);

/// Joins, and reads no more than the id; nothing if it is turned away.
fn join(server: &Daemon) -> Option<(UnixStream, i64)> {
    let mut stream = UnixStream::connect(server.socket_path()).expect("it listens");
    stream.set_read_timeout(Some(LONG)).expect("a socket has time limits");
    let mut greeting = [0; 16];
    let mut got = 0;
    while got < greeting.len() {
        match stream.read(&mut greeting[got..]) {
            Ok(0) => {
                assert_eq!(got, 0, "turned away, it was told something");
                return None;
            }
            count => got += count.expect("a greeting, or the end"),
        }
    }
    let word = |at: usize| i64::from_le_bytes(greeting[at..at + 8].try_into().expect("8 bytes"));
    assert_eq!(word(0), 0, "the version");
    Some((stream, word(8)))
}

fn with_a_client_on_each_id_no_other_is_let_in_and_nobody_is_hurt(target: Target) {
    let Some((_, limit)) = room_for("all ids", ALL, ALL, 1) else { return };
    let mut server = target.builder().descriptors(limit).start();
    let before = server.open_fds();
    let mut clients = Vec::with_capacity(ALL);
    let mut ids = BTreeSet::new();
    while clients.len() < ALL {
        let (stream, id) =
            join(&server).unwrap_or_else(|| panic!("client {} was turned away", clients.len()));
        assert!((0..ALL as i64).contains(&id), "{id} is no id");
        assert!(ids.insert(id), "id {id} was given twice");
        clients.push(stream);
    }
    assert_eq!(server.open_fds() - before, 2 * ALL, "a socket and an eventfd for each");
    eprintln!(
        "{ALL} clients: {} KiB resident, {:?} of processor time",
        server.resident_kib(),
        server.run_time()
    );

    for _ in 0..20 {
        assert!(join(&server).is_none(), "no id is left");
    }
    server.assert_running();
    let lines = server.output().matches("client refused: no id is left").count();
    assert!(!target.logs() || lines > 0, "not a word about it");
    assert_eq!(server.open_fds() - before, 2 * ALL, "those turned away left something behind");
    // Each of the others still has its connection, and on it its memory, sent as -1.
    for (number, mut stream) in clients.iter().enumerate() {
        let mut memory = [0; 8];
        stream.read_exact(&mut memory).unwrap_or_else(|error| panic!("client {number}: {error}"));
        assert_eq!(i64::from_le_bytes(memory), -1, "client {number}");
    }

    // The kernel closes 131,072 descriptors, and the test's patience is for a handful.
    server.signal(Signal::SIGTERM);
    let stat = format!("/proc/{}/stat", server.pid());
    let ended = || std::fs::read_to_string(&stat).ok()?.contains(") Z ").then_some(());
    wait_up_to(LONG, ended).expect("it ends when it is told to");
    assert!(server.wait().success(), "it ended badly");
}

#[test]
#[ignore = "65,536 clients: make check-full"]
fn daemon_with_a_client_on_each_id_no_other_is_let_in_and_nobody_is_hurt() {
    with_a_client_on_each_id_no_other_is_let_in_and_nobody_is_hurt(Target::Daemon);
}

#[test]
#[ignore = "65,536 clients: make check-full"]
fn select_loop_with_a_client_on_each_id_no_other_is_let_in_and_nobody_is_hurt() {
    with_a_client_on_each_id_no_other_is_let_in_and_nobody_is_hurt(Target::SelectLoop);
}
