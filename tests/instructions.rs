// SPDX-License-Identifier: GPL-2.0-or-later
//! What a message costs in instructions of the server's own, counted by valgrind.
//!
//! A count is the same on a busy machine, so it can be held to a bound, as a time cannot. The kernel's share, which is
//! most of what a message costs, is not in it: `cargo bench --bench scale` measures that, beside the kernel's own floor.

mod common;

use common::crowd::Crowd;
use common::target::{Target, full_size, room_for};
use common::{find_in_path, text_of};

on_each_server! {
    a_message_costs_the_same_with_many_clients,
    a_burst_costs_less_than_the_same_clients_one_by_one,
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
    let counts = tempfile::NamedTempFile::new().expect("a temporary file");
    let file = format!("--callgrind-out-file={}", counts.path().display());
    let server = target
        .builder()
        .vectors(vectors)
        .descriptors(descriptors)
        .under(&["valgrind", "--quiet", "--tool=callgrind", &file])
        .start();
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
    let counts = text_of(counts.path());
    let total = counts.lines().find_map(|line| line.strip_prefix("totals: "));
    Some(total.expect("callgrind writes the sum").trim().parse().expect("a number"))
}

fn messages(clients: usize, vectors: u16) -> u64 {
    let clients = clients as u64;
    clients * (clients * u64::from(vectors) + 3)
}

fn a_message_costs_the_same_with_many_clients(target: Target) {
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

fn a_burst_costs_less_than_the_same_clients_one_by_one(target: Target) {
    let count = |clients, coming| instructions(target, clients, 1, coming);
    let Some(idle) = count(0, Coming::OneByOne) else { return };
    let Some(burst) = count(256, Coming::AtOnce) else { return };
    let Some(single) = count(256, Coming::OneByOne) else { return };
    let ratio = (burst - idle) as f64 / (single - idle) as f64;
    eprintln!("256 at once / one by one, in instructions: {ratio:.2}");
    assert!(ratio <= 0.8, "{burst} at once, {single} one by one, {idle} of them without clients");
}
