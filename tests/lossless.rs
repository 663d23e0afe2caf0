// SPDX-License-Identifier: GPL-2.0-or-later
//! The server loses no message, however slowly or irregularly a client reads.

mod common;

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use common::crowd::Crowd;
use common::daemon::Daemon;
use common::peer::{Connection, Peer};
use common::target::{Target, full_size, room_for};
use common::wait_for;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

on_each_server! {
    clients_that_read_only_after_400_have_joined_lose_nothing_1_vector,
    clients_that_read_only_after_400_have_joined_lose_nothing_4_vectors,
    clients_that_read_only_after_many_have_joined_lose_nothing_16_vectors,
    clients_that_read_only_after_many_have_joined_lose_nothing_64_vectors,
    a_client_that_stops_reading_while_100_others_join_loses_nothing,
    a_client_that_reads_byte_by_byte_gets_each_descriptor_with_the_first_byte,
    clients_that_read_irregularly_while_others_join_and_leave_lose_nothing,
    the_doorbells_of_a_client_that_read_late_ring_the_right_vectors,
    the_rest_of_a_partial_write_is_sent_without_a_second_descriptor,
    a_stalled_client_takes_no_memory_and_no_ids_during_100000_joins_and_leaves,
}

/// Connects many clients one after another. None of them reads before all have connected.
fn read_late(target: Target, short: usize, vectors: u16) {
    let what = format!("late readers, {vectors} vectors");
    let wanted = if short == 400 || full_size(&what) { 400 } else { short };
    let Some((clients, limit)) = room_for(&what, short, wanted, vectors) else { return };
    let server = target.builder().vectors(vectors).descriptors(limit).start();
    let mut crowd = Crowd::new(server.socket_path(), vectors);
    for _ in 0..clients {
        crowd.connect(false);
    }
    crowd.settle();
    let each = clients as u64 * u64::from(vectors) + 3;
    assert_eq!(crowd.messages(), clients as u64 * each, "messages in all");
    server.stop();
}

fn clients_that_read_only_after_400_have_joined_lose_nothing_1_vector(target: Target) {
    read_late(target, 400, 1);
}

fn clients_that_read_only_after_400_have_joined_lose_nothing_4_vectors(target: Target) {
    read_late(target, 400, 4);
}

fn clients_that_read_only_after_many_have_joined_lose_nothing_16_vectors(target: Target) {
    read_late(target, 150, 16);
}

fn clients_that_read_only_after_many_have_joined_lose_nothing_64_vectors(target: Target) {
    read_late(target, 50, 64);
}

fn a_client_that_stops_reading_while_100_others_join_loses_nothing(target: Target) {
    const VECTORS: u16 = 8;
    let server = target.builder().vectors(VECTORS).start();
    let mut crowd = Crowd::new(server.socket_path(), VECTORS);
    let stopped = crowd.connect(true);
    crowd.read_greetings();
    crowd.set_reading(stopped, false);
    for _ in 0..100 {
        crowd.connect(true);
        crowd.read_greetings();
    }
    assert_eq!(crowd.view(stopped).known().len(), 1, "the client has not read since it joined");
    crowd.settle();
    assert_eq!(crowd.view(stopped).messages(), 3 + 101 * u64::from(VECTORS));
    server.stop();
}

/// Receives one byte and counts the descriptors that came with it.
fn receive_byte(connection: &Connection) -> (u8, usize) {
    let mut byte = [0];
    let mut space = nix::cmsg_space!([i32; 4]);
    let mut parts = [io::IoSliceMut::new(&mut byte)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let received =
        recvmsg::<()>(connection.stream().as_raw_fd(), &mut parts, Some(&mut space), flags)
            .expect("a byte within the time limit of the socket");
    assert_eq!(received.bytes, 1, "the server closed the connection");
    let mut fds = 0;
    for control in received.cmsgs().expect("whole control messages") {
        if let ControlMessageOwned::ScmRights(numbers) = control {
            for number in numbers {
                fds += 1;
                nix::unistd::close(number).expect("it was just received");
            }
        }
    }
    (byte[0], fds)
}

fn a_client_that_reads_byte_by_byte_gets_each_descriptor_with_the_first_byte(target: Target) {
    let server = target.builder().vectors(2).start();
    let mut others = Crowd::new(server.socket_path(), 2);
    others.connect_many(300);
    others.settle();
    let connection = Connection::open(server.socket_path());
    connection.stream().set_read_timeout(Some(common::PATIENCE)).expect("a socket has time limits");
    let mut messages = Vec::new();
    for _ in 0..3 + 301 * 2 {
        let bytes: [(u8, usize); 8] = std::array::from_fn(|_| receive_byte(&connection));
        assert!(bytes[1..].iter().all(|&(_, fds)| fds == 0), "a descriptor after the first byte");
        messages.push((i64::from_le_bytes(bytes.map(|(byte, _)| byte)), bytes[0].1));
    }
    let mut expected = vec![(0, 0), (300, 0), (-1, 1)];
    expected.extend((0..=300).flat_map(|id| [(id, 1), (id, 1)]));
    assert_eq!(messages, expected);
    others.add_outside_client(300);
    others.settle();
    server.stop();
}

fn clients_that_read_irregularly_while_others_join_and_leave_lose_nothing(target: Target) {
    const VECTORS: u16 = 3;
    let server = target.builder().vectors(VECTORS).start();
    let mut crowd = Crowd::new(server.socket_path(), VECTORS);
    // The choices are pseudo-random with a fixed start, so a failure can be reproduced.
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut choose = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 33) as usize % below
    };
    for step in 0..4000 {
        let here = crowd.numbers();
        match choose(10) {
            0..4 if here.len() < 200 => {
                crowd.connect(choose(3) == 0);
            }
            4..6 if here.len() > 3 => crowd.leave(here[choose(here.len())]),
            6 if !here.is_empty() => crowd.set_reading(here[choose(here.len())], true),
            7..9 if !here.is_empty() => crowd.set_reading(here[choose(here.len())], false),
            _ => {
                crowd.read(Duration::ZERO);
            }
        }
        if step % 1000 == 999 {
            crowd.settle();
        }
    }
    server.stop();
}

fn the_doorbells_of_a_client_that_read_late_ring_the_right_vectors(target: Target) {
    const VECTORS: u16 = 64;
    let server = target.builder().vectors(VECTORS).start();
    // 9 × 64 messages are more than twice what a socket holds. Few clients are used because each one has a copy of each
    // eventfd.
    let mut late = Peer::join(server.socket_path(), VECTORS);
    let others: Vec<Peer> = (0..9).map(|_| Peer::join(server.socket_path(), VECTORS)).collect();
    for other in &others {
        late.wait_for_peer(other.id());
        for vector in 0..VECTORS {
            late.ring(other.id(), vector);
            assert_eq!(Vec::from_iter(other.take_rung()), [vector], "at {}", other.id());
            other.ring(late.id(), vector);
            assert_eq!(Vec::from_iter(late.take_rung()), [vector], "by {}", other.id());
        }
    }
    server.stop();
}

/// Linux never sends a part of eight bytes, so strace pretends a partial write: one `sendmsg` returns 3 (-D: the
/// server, not strace, is our child). The bytes that the server sends next show how it goes on.
fn the_rest_of_a_partial_write_is_sent_without_a_second_descriptor(target: Target) {
    let trace = ["strace", "-D", "-qq", "-o", "/dev/null", "-e", "trace=sendmsg"];
    let inject = ["-e", "inject=sendmsg:retval=3:when=2"];
    let server = target.builder().under(&trace).under(&inject).start();
    // A greeting is one batch. The first `sendmsg` sends the first client its own vector, and the
    // second `sendmsg` sends it the vector of the second client.
    let first = Peer::join(server.socket_path(), 1);
    let second = Peer::join(server.socket_path(), 1);
    let connection = first.into_connection();
    connection.stream().set_read_timeout(Some(common::PATIENCE)).expect("a socket has time limits");
    let tail: [(u8, usize); 5] = std::array::from_fn(|_| receive_byte(&connection));
    assert_eq!(tail, [(0, 0); 5], "the rest of the message of peer 1");
    let third = Peer::join(server.socket_path(), 1);
    let whole: [(u8, usize); 8] = std::array::from_fn(|_| receive_byte(&connection));
    let mut expected = [(0, 0); 8];
    expected[0] = (2, 1);
    assert_eq!(whole, expected, "the message of peer 2");
    assert_eq!((second.id(), third.id()), (1, 2));
    server.stop();
}

fn a_stalled_client_takes_no_memory_and_no_ids_during_100000_joins_and_leaves(target: Target) {
    let server = target.builder().start();
    let mut stalled = Crowd::new(server.socket_path(), 1);
    let number = stalled.connect(true);
    stalled.read_greetings();
    stalled.set_reading(number, false);
    let alone = server.open_fds();
    let churn = |rounds: usize| {
        for _ in 0..rounds {
            let mut crowd = Crowd::new(server.socket_path(), 1);
            crowd.connect_many(20);
            crowd.read_greetings();
        }
    };
    // The stalled client's socket is full after 278 messages. After these rounds the server has allocated what
    // it needs.
    churn(50);
    all_have_left(&server, alone);
    let before = server.resident_kib();
    churn(5000);
    all_have_left(&server, alone);
    let after = server.resident_kib();
    eprintln!("resident before {before} KiB, after 100,000 joins and leaves {after} KiB");
    // A retired id takes 24 bytes, independent of the number of clients: 1.5 MiB, and once more as much if the
    // allocator cannot reuse the room of the smaller log when the log grows.
    assert!(after < before + 3072, "{before} KiB have become {after} KiB");

    stalled.connect_many(3);
    stalled.settle();
    assert!(
        stalled.view(number).gone().len() < 1100,
        "the stalled client received departures of clients that left before it read"
    );
    server.stop();
}

/// Waits until the server has removed all clients but the stalled one. It then has as many descriptors open as
/// when only that client was connected.
fn all_have_left(server: &Daemon, alone: usize) {
    wait_for("the server removes the clients that left", || {
        (server.open_fds() <= alone).then_some(())
    });
}
