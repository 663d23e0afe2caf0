// SPDX-License-Identifier: GPL-2.0-or-later
//! The number of instructions that the server itself executes for a message, counted by valgrind.
//!
//! A busy machine does not change this count, so a test can assert a bound on it; it could not do so with a time. The
//! kernel's instructions, most of the cost of a message, are not counted. `cargo bench --bench scale` measures those.

mod common;

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;

use common::crowd::Crowd;
use common::daemon::Builder;
use common::target::{Target, full_size, is_root, room_for};
use common::{find_in_path, text_of};

on_each_server! {
    a_message_costs_the_same_with_many_clients,
    a_burst_costs_less_than_the_same_clients_one_by_one,
    a_socket_of_the_smallest_size_costs_at_most_four_times_as_many_instructions,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Arrival {
    OneByOne,
    AtOnce,
}

/// The number of instructions of one server run in which `clients` clients join and none leaves. If the limit of open
/// files is too small, the test is skipped and this returns `None`.
fn instructions(target: Target, clients: usize, vectors: u16, arrival: Arrival) -> Option<u64> {
    find_in_path("valgrind").expect("valgrind: Debian package valgrind");
    let (_, descriptors) = room_for("instructions for a message", clients, clients, vectors)?;
    Some(instructions_of(
        target.builder().vectors(vectors).descriptors(descriptors),
        clients,
        vectors,
        arrival,
    ))
}

/// The same, for a server started by `builder`.
fn instructions_of(builder: Builder, clients: usize, vectors: u16, arrival: Arrival) -> u64 {
    let directory = tempfile::tempdir().expect("a temporary directory");
    // A server of another user must be able to write there.
    let all_users = Permissions::from_mode(0o777);
    std::fs::set_permissions(directory.path(), all_users).expect("we own the directory");
    let counts = directory.path().join("counts");
    let file = format!("--callgrind-out-file={}", counts.display());
    let server = builder.under(&["valgrind", "--quiet", "--tool=callgrind", &file]).start();
    let mut crowd = Crowd::new(server.socket_path(), vectors);
    for _ in 0..clients {
        crowd.connect(true);
        if arrival == Arrival::OneByOne {
            crowd.read_greetings();
        }
    }
    crowd.settle();
    assert_eq!(crowd.messages(), messages(clients, vectors), "messages in all");
    server.stop();
    let counts = text_of(&counts);
    let total = counts.lines().find_map(|line| line.strip_prefix("totals: "));
    total.expect("callgrind writes the sum").trim().parse().expect("a number")
}

fn messages(clients: usize, vectors: u16) -> u64 {
    let clients = clients as u64;
    clients * (clients * u64::from(vectors) + 3)
}

fn a_message_costs_the_same_with_many_clients(target: Target) {
    // An unprivileged server gives small sockets to most clients. Their number of calls depends on the readers.
    if !is_root("start a server whose sockets all have the usual size") {
        return;
    }
    let cases: &[(u16, usize)] =
        if full_size("instructions for a message") { &[(1, 3000), (64, 300)] } else { &[(1, 600)] };
    for &(vectors, many) in cases {
        let Some(idle) = instructions(target, 0, vectors, Arrival::OneByOne) else { return };
        let each = |clients, arrival| {
            let total = instructions(target, clients, vectors, arrival)?;
            Some((total - idle) as f64 / messages(clients, vectors) as f64)
        };
        for arrival in [Arrival::OneByOne, Arrival::AtOnce] {
            let Some(few) = each(100, arrival) else { return };
            let Some(most) = each(many, arrival) else { return };
            let figures = format!(
                "{vectors} vectors, {arrival:?}: {few:.0} instructions a message with 100 clients, \
                 {most:.0} with {many}"
            );
            eprintln!("{figures}");
            assert!(most <= 1.15 * few, "{figures}");
        }
    }
}

/// A socket of the smallest size holds six messages, so the server needs many calls for one client's greeting.
fn a_socket_of_the_smallest_size_costs_at_most_four_times_as_many_instructions(target: Target) {
    if !is_root("start a server of another user, and one whose sockets all have the usual size") {
        return;
    }
    const CLIENTS: usize = 256;
    // Half of this limit is less than the messages that one socket of the usual size holds.
    let builder = || target.builder().descriptors(3 * CLIENTS as u64);
    let instructions = |builder: Builder| instructions_of(builder, CLIENTS, 1, Arrival::AtOnce);
    let (usual, small) = (instructions(builder()), instructions(builder().unprivileged()));
    let ratio = small as f64 / usual as f64;
    eprintln!("the smallest sockets / the usual ones, in instructions: {ratio:.2}");
    // A ratio of 1 would mean that the sockets are not small.
    assert!((1.2..4.0).contains(&ratio), "{small} with the smallest, {usual} with the usual ones");
}

fn a_burst_costs_less_than_the_same_clients_one_by_one(target: Target) {
    // As in `a_message_costs_the_same_with_many_clients`.
    if !is_root("start a server whose sockets all have the usual size") {
        return;
    }
    let count = |clients, arrival| instructions(target, clients, 1, arrival);
    let Some(idle) = count(0, Arrival::OneByOne) else { return };
    let Some(burst) = count(256, Arrival::AtOnce) else { return };
    let Some(single) = count(256, Arrival::OneByOne) else { return };
    let ratio = (burst - idle) as f64 / (single - idle) as f64;
    eprintln!("256 at once / one by one, in instructions: {ratio:.2}");
    assert!(ratio <= 0.8, "{burst} at once, {single} one by one, {idle} with no client");
}
