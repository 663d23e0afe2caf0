// SPDX-License-Identifier: GPL-2.0-or-later
//! As many clients as the promises name: each complete, none lost, one by one and all at once.
//!
//! A message is some 3 µs of two processors, and there are clients² × vectors of them: 10,000 clients are 100 million.
//! So the usual run takes smaller numbers, beyond every limit that is met on the way (a socket's 278 messages, 256
//! connections let in at a time, descriptor 1024), and `IVSHMEM_FULL=1` takes the full ones, in some minutes each, or as
//! many as the hard limit of open files has room for.

mod common;

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::PATIENCE;
use common::crowd::Crowd;
use common::target::{Target, full_size, room_for};

on_each_server! {
    many_clients_of_1_vector_come_one_by_one_and_all_are_complete,
    many_clients_of_1_vector_come_at_once_and_all_are_complete,
    many_clients_of_64_vectors_come_one_by_one_and_all_are_complete,
    many_clients_of_64_vectors_come_at_once_and_all_are_complete,
    many_clients_with_the_most_vectors_come_one_by_one_and_all_are_complete,
    many_clients_with_the_most_vectors_come_at_once_and_all_are_complete,
    a_client_of_1_vector_takes_less_than_1_kib,
}

fn come(target: Target, short: usize, full: usize, vectors: u16, at_once: bool) {
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
            crowd.welcome();
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

    // They are all alive: one who leaves is missed by all.
    crowd.leave(clients / 2);
    crowd.settle();
    // To close 200,000 descriptors takes long where a system call takes 20 µs.
    server.stop_within(PATIENCE + Duration::from_micros(300) * (limit as u32));
}

fn many_clients_of_1_vector_come_one_by_one_and_all_are_complete(target: Target) {
    come(target, 1100, 10_000, 1, false);
}

fn many_clients_of_1_vector_come_at_once_and_all_are_complete(target: Target) {
    come(target, 600, 10_000, 1, true);
}

fn many_clients_of_64_vectors_come_one_by_one_and_all_are_complete(target: Target) {
    come(target, 60, 1000, 64, false);
}

fn many_clients_of_64_vectors_come_at_once_and_all_are_complete(target: Target) {
    come(target, 60, 1000, 64, true);
}

fn many_clients_with_the_most_vectors_come_one_by_one_and_all_are_complete(target: Target) {
    come(target, 9, 100, 2048, false);
}

fn many_clients_with_the_most_vectors_come_at_once_and_all_are_complete(target: Target) {
    come(target, 9, 100, 2048, true);
}

/// Of its own memory, that is: what the kernel keeps is not in it.
fn a_client_of_1_vector_takes_less_than_1_kib(target: Target) {
    let Some((clients, limit)) = room_for("the memory of each client", 500, 3000, 1) else {
        return;
    };
    let server = target.builder().descriptors(limit).start();
    let mut crowd = Crowd::new(server.socket_path(), 1);
    // What the first one makes it load and allocate is there once.
    crowd.connect(true);
    crowd.settle();
    let before = server.resident_kib();
    // They do not read: that would change nothing for the server, and take much longer.
    let streams: Vec<_> = (1..clients)
        .map(|_| {
            let mut stream = UnixStream::connect(server.socket_path()).expect("it listens");
            stream.read_exact(&mut [0]).expect("it is let in");
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
