// SPDX-License-Identifier: GPL-2.0-or-later
//! The largest supported numbers of clients, which join one by one or all at once: each client receives everything.
//!
//! A message takes about 3 µs on two processors, and there are clients² × vectors messages: 100 million for 10,000
//! clients. So the usual run has fewer clients, but enough to pass each limit on the way: the 278 messages of a socket,
//! the 256 connections accepted at a time, and descriptor 1024. `IVSHMEM_FULL=1` runs the full numbers, some minutes
//! each, or as many clients as the hard limit of open files allows.

mod common;

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::PATIENCE;
use common::crowd::Crowd;
use common::target::{Target, full_size, room_for};

on_each_server! {
    many_clients_of_1_vector_that_join_one_by_one_receive_everything,
    many_clients_of_1_vector_that_join_at_once_receive_everything,
    many_clients_of_64_vectors_that_join_one_by_one_receive_everything,
    many_clients_of_64_vectors_that_join_at_once_receive_everything,
    many_clients_with_the_most_vectors_that_join_one_by_one_receive_everything,
    many_clients_with_the_most_vectors_that_join_at_once_receive_everything,
    a_client_of_1_vector_takes_less_than_1_kib,
}

fn join(target: Target, short: usize, full: usize, vectors: u16, at_once: bool) {
    let vectors = vectors.min(target.max_vectors());
    let what =
        format!("clients of {vectors} vectors, {}", if at_once { "at once" } else { "one by one" });
    let wanted = if full_size(&what) { full } else { short };
    let Some((clients, limit)) = room_for(&what, short, wanted, vectors) else { return };
    let server = target.builder().vectors(vectors).descriptors(limit).start();
    let mut crowd = Crowd::new(server.socket_path(), vectors);
    let started = std::time::Instant::now();
    for _ in 0..clients {
        crowd.connect(true);
        if !at_once {
            crowd.read_greetings();
        }
    }
    crowd.settle();
    let messages = clients as u64 * (clients as u64 * u64::from(vectors) + 3);
    assert_eq!(crowd.messages(), messages, "messages in all");
    let each = server.run_time().as_secs_f64() * 1e6 / messages as f64;
    eprintln!(
        "{what}: {clients} clients, {messages} messages in {:?}, {each:.2} µs of processor each",
        started.elapsed()
    );

    // All clients are still connected: each one receives the departure of a client that leaves.
    crowd.leave(clients / 2);
    crowd.settle();
    // Closing 200,000 descriptors takes long on a machine where a system call takes 20 µs.
    server.stop_within(PATIENCE + Duration::from_micros(300) * (limit as u32));
}

fn many_clients_of_1_vector_that_join_one_by_one_receive_everything(target: Target) {
    join(target, 1100, 10_000, 1, false);
}

fn many_clients_of_1_vector_that_join_at_once_receive_everything(target: Target) {
    join(target, 600, 10_000, 1, true);
}

fn many_clients_of_64_vectors_that_join_one_by_one_receive_everything(target: Target) {
    join(target, 60, 1000, 64, false);
}

fn many_clients_of_64_vectors_that_join_at_once_receive_everything(target: Target) {
    join(target, 60, 1000, 64, true);
}

fn many_clients_with_the_most_vectors_that_join_one_by_one_receive_everything(target: Target) {
    join(target, 9, 100, 2048, false);
}

fn many_clients_with_the_most_vectors_that_join_at_once_receive_everything(target: Target) {
    join(target, 9, 100, 2048, true);
}

/// This counts the server's own memory, not the kernel's.
fn a_client_of_1_vector_takes_less_than_1_kib(target: Target) {
    let Some((clients, limit)) = room_for("the memory of each client", 500, 3000, 1) else {
        return;
    };
    let server = target.builder().descriptors(limit).start();
    let mut crowd = Crowd::new(server.socket_path(), 1);
    // The first client makes the server load and allocate things that later clients do not need again.
    crowd.connect(true);
    crowd.settle();
    let before = server.resident_kib();
    // These clients do not read. Reading would take much longer and change nothing in the server's memory.
    let streams: Vec<_> = (1..clients)
        .map(|_| {
            let mut stream = UnixStream::connect(server.socket_path()).expect("the server listens");
            stream.read_exact(&mut [0]).expect("the client is admitted");
            stream
        })
        .collect();
    let grown = (server.resident_kib() - before) * 1024;
    let each = grown / streams.len() as u64;
    eprintln!("{} clients: {each} bytes each", streams.len());
    assert!(each <= 1024, "{each} bytes for each of {} clients", streams.len());
    drop((streams, crowd));
    server.stop();
}
