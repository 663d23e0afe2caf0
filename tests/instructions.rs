// SPDX-License-Identifier: GPL-2.0-or-later
//! What a message costs in instructions of the server's own, counted by valgrind.
//!
//! A count is the same on a busy machine, so it can be held to a bound, as a time cannot. The kernel's share, which is
//! most of what a message costs, is not in it: `cargo bench --bench scale` measures that, beside the kernel's own floor.

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
    a_socket_of_the_smallest_size_costs_no_more_than_four_times_as_much,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Coming {
    OneByOne,
    AtOnce,
}

/// Instructions of a server's whole life, in which so many clients come and none leaves. Skips the test where the limit
/// of open files has no room for them.
fn instructions(target: Target, clients: usize, vectors: u16, coming: Coming) -> Option<u64> {
    find_in_path("valgrind").expect("valgrind: Debian package valgrind");
    let (_, descriptors) = room_for("instructions for a message", clients, clients, vectors)?;
    Some(instructions_of(
        target.builder().vectors(vectors).descriptors(descriptors),
        clients,
        vectors,
        coming,
    ))
}

/// The same of a server to be started so.
fn instructions_of(builder: Builder, clients: usize, vectors: u16, coming: Coming) -> u64 {
    let directory = tempfile::tempdir().expect("a temporary directory");
    // For a server of another user.
    let everybody = Permissions::from_mode(0o777);
    std::fs::set_permissions(directory.path(), everybody).expect("it is ours");
    let counts = directory.path().join("counts");
    let file = format!("--callgrind-out-file={}", counts.display());
    let server = builder.under(&["valgrind", "--quiet", "--tool=callgrind", &file]).start();
    let mut crowd = Crowd::new(server.socket_path(), vectors);
    for _ in 0..clients {
        crowd.connect(true);
        if coming == Coming::OneByOne {
            crowd.welcome();
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
    // An unprivileged server gives small sockets to most: how many calls these take, the readers say.
    if !is_root("start a server whose sockets all have the usual size") {
        return;
    }
    let cases: &[(u16, usize)] =
        if full_size("instructions for a message") { &[(1, 3000), (64, 300)] } else { &[(1, 600)] };
    for &(vectors, many) in cases {
        let Some(idle) = instructions(target, 0, vectors, Coming::OneByOne) else { return };
        let each = |clients, coming| {
            let total = instructions(target, clients, vectors, coming)?;
            Some((total - idle) as f64 / messages(clients, vectors) as f64)
        };
        for coming in [Coming::OneByOne, Coming::AtOnce] {
            let Some(few) = each(100, coming) else { return };
            let Some(most) = each(many, coming) else { return };
            let figures = format!(
                "{vectors} vectors, {coming:?}: {few:.0} instructions a message with 100 clients, \
                 {most:.0} with {many}"
            );
            eprintln!("{figures}");
            assert!(most <= 1.15 * few, "{figures}");
        }
    }
}

/// A socket of the smallest size holds six messages, so its client's greeting takes many calls.
fn a_socket_of_the_smallest_size_costs_no_more_than_four_times_as_much(target: Target) {
    if !is_root("start a server of another user, and one whose sockets all have the usual size") {
        return;
    }
    const CLIENTS: usize = 256;
    // Half of it is less than what one socket of the usual size holds.
    let builder = || target.builder().descriptors(3 * CLIENTS as u64);
    let instructions = |builder: Builder| instructions_of(builder, CLIENTS, 1, Coming::AtOnce);
    let (usual, small) = (instructions(builder()), instructions(builder().unprivileged()));
    let ratio = small as f64 / usual as f64;
    eprintln!("the smallest sockets / the usual ones, in instructions: {ratio:.2}");
    // Were it 1, these would not be small.
    assert!((1.2..4.0).contains(&ratio), "{small} with the smallest, {usual} with the usual ones");
}

fn a_burst_costs_less_than_the_same_clients_one_by_one(target: Target) {
    // As above.
    if !is_root("start a server whose sockets all have the usual size") {
        return;
    }
    let count = |clients, coming| instructions(target, clients, 1, coming);
    let Some(idle) = count(0, Coming::OneByOne) else { return };
    let Some(burst) = count(256, Coming::AtOnce) else { return };
    let Some(single) = count(256, Coming::OneByOne) else { return };
    let ratio = (burst - idle) as f64 / (single - idle) as f64;
    eprintln!("256 at once / one by one, in instructions: {ratio:.2}");
    assert!(ratio <= 0.8, "{burst} at once, {single} one by one, {idle} of them without clients");
}
