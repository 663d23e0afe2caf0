// SPDX-License-Identifier: GPL-2.0-or-later
//! Unread messages take up kernel memory, which the kernel charges to the memory cgroup of the server. Clients that do
//! not read cannot make the kernel kill the server: neither connected ones, nor ones that were removed and keep
//! their socket.

mod common;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use common::cgroup::Cgroup;
use common::crowd::Crowd;
use common::daemon::Daemon;
use common::peer::unread;
use common::target::{Target, is_root, room_for};
use common::user::as_user;

on_each_server! {
    clients_that_do_not_read_take_up_a_bounded_amount_of_kernel_memory,
    clients_with_64_vectors_that_do_not_read_take_up_no_more,
    clients_that_read_at_first_and_then_stop_take_up_no_more,
}

/// The limit of the server's cgroup. Before there was a bound, 252 clients that did not read filled it.
const LIMIT: u64 = 300 << 20;

/// The bound: 64 MiB for all clients together, and 32 KiB for each.
const TOGETHER: u64 = 64 << 20;
const EACH: u64 = 32 << 10;

/// Memory that is not for clients, such as the server's log in the page cache, and charges that the kernel makes in
/// advance.
const MARGIN: u64 = 8 << 20;

/// The clients that are ended at once.
const BATCH: usize = 125;

const ONE: u32 = 1_100_011;
const OTHER: u32 = 1_100_012;

/// Connects `count` clients of the user [`ONE`], which read nothing.
fn connect(socket: &Path, count: usize) -> Vec<UnixStream> {
    let connect = |_| UnixStream::connect(socket).expect("the server listens");
    as_user(ONE, || (0..count).map(connect).collect())
}

/// Connects a client of the user [`OTHER`] and returns the time until its greeting is complete. By then all older clients
/// were sent as much as the server is willing to send.
fn newcomer(server: &Daemon, vectors: u16) -> Duration {
    let mut crowd = Crowd::new(server.socket_path(), vectors).of_user(OTHER);
    let started = Instant::now();
    let number = crowd.connect(true);
    crowd.read_greetings();
    assert!(!crowd.is_ended(number));
    started.elapsed()
}

/// Starts a server in a cgroup, lets `ended` clients be removed with unread messages, and connects `stalled` more.
fn attack(target: Target, vectors: u16, ended: usize, stalled: usize, descriptors: u64) {
    let Some(cgroup) = Cgroup::with_limit(LIMIT) else { return };
    let server = start(target, vectors, descriptors, &cgroup);
    let idle = cgroup.usage();

    // Clients of one batch are sent messages about each other.
    let mut clients = Vec::new();
    for _ in 0..ended.div_ceil(BATCH) {
        let mut batch = connect(server.socket_path(), BATCH);
        // They may have to wait until all clients are told of the batch before.
        common::wait_for("each client of the batch is admitted", || {
            batch.iter().all(|client| unread(client) >= 3).then_some(())
        });
        newcomer(&server, vectors);
        for client in &mut batch {
            client.write_all(b"!").expect("there is room");
        }
        clients.append(&mut batch);
    }
    newcomer(&server, vectors);
    let after_ended = cgroup.usage();
    let ended_unread: u64 = clients.iter().map(unread).sum();
    clients.extend(connect(server.socket_path(), stalled));
    common::wait_for("each client is admitted or refused", || {
        clients.iter().all(|client| unread(client) >= 1).then_some(())
    });
    let longest = (0..3).map(|_| newcomer(&server, vectors)).max().expect("three times");
    let (usage, peak) = (cgroup.usage(), cgroup.peak());
    let all_unread: u64 = clients.iter().map(unread).sum();
    let kib = |bytes: u64| bytes / 1024;
    println!(
        "{target:?}, {vectors} vectors: {ended} ended clients with {ended_unread} unread messages: {} KiB; and \
         {stalled} stalled ones, {all_unread} unread messages: {} KiB, at most {} KiB, {} KiB without clients; a newcomer is \
         complete after {longest:?}",
        kib(after_ended),
        kib(usage),
        kib(peak),
        kib(idle),
    );
    check(server, &cgroup, idle, clients.len(), longest);
    drop(clients);
}

fn start(target: Target, vectors: u16, descriptors: u64, cgroup: &Cgroup) -> Daemon {
    let command = cgroup.command();
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    let builder = target.builder().for_all_users().vectors(vectors).descriptors(descriptors);
    builder.under(&command).start()
}

/// Checks the memory that was charged for this number of clients, and the time of the slowest newcomer. Stops the server.
#[track_caller]
fn check(mut server: Daemon, cgroup: &Cgroup, idle: u64, clients: usize, longest: Duration) {
    server.assert_running();
    let peak = cgroup.peak();
    let bound = idle + TOGETHER + EACH * clients as u64 + MARGIN;
    assert!(peak < bound, "{} KiB; the bound is {} KiB", peak / 1024, bound / 1024);
    // One second on an idle machine.
    assert!(longest < Duration::from_secs(6), "{longest:?}");
    server.stop();
}

fn clients_that_do_not_read_take_up_a_bounded_amount_of_kernel_memory(target: Target) {
    if !is_root("make a memory cgroup") {
        return;
    }
    if let Some((_, limit)) = room_for("clients that do not read", 2100, 2100, 1) {
        attack(target, 1, 1000, 1000, limit);
    }
}

fn clients_with_64_vectors_that_do_not_read_take_up_no_more(target: Target) {
    if !is_root("make a memory cgroup") {
        return;
    }
    // Each ended client needs one descriptor.
    let ended = 1000;
    let more = ended / 65 + 10;
    if let Some((room, limit)) =
        room_for("clients with 64 vectors that do not read", more + BATCH, more + 1000, 64)
    {
        attack(target, 64, ended, room - more, limit);
    }
}

fn clients_that_read_at_first_and_then_stop_take_up_no_more(target: Target) {
    if !is_root("make a memory cgroup") {
        return;
    }
    const EACH_KIND: usize = 500;
    let count = 2 * EACH_KIND + 2;
    let Some((_, limit)) = room_for("clients that stop reading", count, count, 1) else { return };
    let Some(cgroup) = Cgroup::with_limit(LIMIT) else { return };
    let server = start(target, 1, limit, &cgroup);
    let idle = cgroup.usage();
    let mut first = Crowd::new(server.socket_path(), 1).of_user(ONE);
    first.connect_many(EACH_KIND);
    first.settle();
    first.set_all_reading(false);
    // The first ones were readers. They are sent messages about the others.
    let others = connect(server.socket_path(), EACH_KIND);
    common::wait_for("each client is admitted", || {
        others.iter().all(|client| unread(client) >= 3).then_some(())
    });
    let longest = (0..3).map(|_| newcomer(&server, 1)).max().expect("three times");
    let of_first: u64 = first.numbers().iter().map(|&number| unread(first.stream(number))).sum();
    println!(
        "{target:?}: {EACH_KIND} clients that have stopped reading have {of_first} unread messages; {} KiB at most; a newcomer \
         is complete after {longest:?}",
        cgroup.peak() / 1024,
    );
    check(server, &cgroup, idle, 2 * EACH_KIND, longest);
}
