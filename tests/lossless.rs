// SPDX-License-Identifier: GPL-2.0-or-later
//! No message is lost, ever, however a client reads.

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
    clients_that_read_by_fits_and_starts_while_others_come_and_go_lose_nothing,
    the_doorbells_of_a_client_that_was_behind_ring_the_right_vectors,
    a_message_that_went_out_in_part_is_finished_without_its_descriptor,
    a_client_stalled_through_100000_joins_and_leaves_costs_no_memory_and_no_ids,
}

/// Joins that many one after another, of whom nobody reads before all have joined.
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
    crowd.welcome();
    crowd.set_reading(stopped, false);
    for _ in 0..100 {
        crowd.connect(true);
        crowd.welcome();
    }
    assert_eq!(crowd.view(stopped).known().len(), 1, "it has not read since it joined");
    crowd.settle();
    assert_eq!(crowd.view(stopped).messages(), 3 + 101 * u64::from(VECTORS));
    server.stop();
}

/// One byte, and the descriptors that came with it.
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
    others.also(300);
    others.settle();
    server.stop();
}

fn clients_that_read_by_fits_and_starts_while_others_come_and_go_lose_nothing(target: Target) {
    const VECTORS: u16 = 3;
    let server = target.builder().vectors(VECTORS).start();
    let mut crowd = Crowd::new(server.socket_path(), VECTORS);
    // A fixed row of choices: a failure comes again with the next run.
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

fn the_doorbells_of_a_client_that_was_behind_ring_the_right_vectors(target: Target) {
    const VECTORS: u16 = 64;
    let server = target.builder().vectors(VECTORS).start();
    // 9 × 64 messages: more than twice what a socket holds. With few clients, as each has a copy of every eventfd.
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

/// Linux takes eight bytes whole or not at all, so strace makes it look otherwise: the first `sendmsg` seems to have
/// sent three of them (-D: the server, not strace, is our child). What it does then shows in what it sends next.
fn a_message_that_went_out_in_part_is_finished_without_its_descriptor(target: Target) {
    let trace = ["strace", "-D", "-qq", "-o", "/dev/null", "-e", "trace=sendmsg"];
    let inject = ["-e", "inject=sendmsg:retval=3:when=2"];
    let server = target.builder().under(&trace).under(&inject).start();
    // A greeting is one batch. The first `sendmsg` is the first client's own vector, and the
    // second one is the vector of the second client.
    let first = Peer::join(server.socket_path(), 1);
    let second = Peer::join(server.socket_path(), 1);
    let connection = first.into_connection();
    connection.stream().set_read_timeout(Some(common::PATIENCE)).expect("a socket has time limits");
    let tail: [(u8, usize); 5] = std::array::from_fn(|_| receive_byte(&connection));
    assert_eq!(tail, [(0, 0); 5], "what is left of the message of peer 1");
    let third = Peer::join(server.socket_path(), 1);
    let whole: [(u8, usize); 8] = std::array::from_fn(|_| receive_byte(&connection));
    let mut expected = [(0, 0); 8];
    expected[0] = (2, 1);
    assert_eq!(whole, expected, "the message of peer 2");
    assert_eq!((second.id(), third.id()), (1, 2));
    server.stop();
}

fn a_client_stalled_through_100000_joins_and_leaves_costs_no_memory_and_no_ids(target: Target) {
    let server = target.builder().start();
    let mut stalled = Crowd::new(server.socket_path(), 1);
    let number = stalled.connect(true);
    stalled.welcome();
    stalled.set_reading(number, false);
    let alone = server.open_fds();
    let churn = |rounds: usize| {
        for _ in 0..rounds {
            let mut crowd = Crowd::new(server.socket_path(), 1);
            crowd.connect_many(20);
            crowd.welcome();
        }
    };
    // Its socket is full after 278 messages, and the server has grown to what this takes.
    churn(50);
    all_have_left(&server, alone);
    let before = server.resident_kib();
    churn(5000);
    all_have_left(&server, alone);
    let after = server.resident_kib();
    eprintln!("resident before {before} KiB, after 100,000 joins and leaves {after} KiB");
    // What is retired takes 24 bytes an id, whoever is connected: 1.5 MiB, and the allocator's slack.
    assert!(after < before + 2560, "{before} KiB have become {after} KiB");

    stalled.connect_many(3);
    stalled.settle();
    assert!(
        stalled.view(number).gone().len() < 1100,
        "it was told of those who left before it read"
    );
    server.stop();
}

/// Waits until the server has noticed that all but the stalled one have left: it then has as many descriptors open as
/// when that one was alone.
fn all_have_left(server: &Daemon, alone: usize) {
    wait_for("the server lets everybody go", || (server.open_fds() <= alone).then_some(()));
}
