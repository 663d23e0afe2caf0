// SPDX-License-Identifier: GPL-2.0-or-later
//! One user that takes all it can get: descriptors at many vectors, and places in the queue of connections that wait
//! to be admitted. Clients of other users are admitted all the same, and the log names the user.

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sys::signal::Signal;

use common::crowd::Crowd;
use common::daemon::Daemon;
use common::target::{Target, is_root, room_for};
use common::user::as_user;
use common::{PATIENCE, is_asleep, wait_for};

on_each_server! {
    one_user_does_not_use_up_all_descriptors_with_64_vectors,
    ended_clients_that_keep_their_sockets_do_not_use_up_all_descriptors,
    a_burst_of_one_user_that_came_and_went_fills_only_its_own_queue,
}

const ONE: u32 = 1_100_031;
const OTHER: u32 = 1_100_032;

/// Connects a client of the user [`ONE`]. The calling thread must have this user.
fn connect(socket: &Path) -> UnixStream {
    UnixStream::connect(socket).expect("the server listens")
}

/// Whether the server has admitted this client. Waits for the first message, which says so, and reads nothing more.
#[track_caller]
fn is_admitted(mut stream: &UnixStream) -> bool {
    stream.set_read_timeout(Some(PATIENCE)).expect("it is a socket");
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes).expect("the version or a refusal");
    match i64::from_le_bytes(bytes) {
        0 => true,
        1 => false,
        value => panic!("{value} in place of the version"),
    }
}

/// Connects a client of another user, and waits for its complete greeting.
#[track_caller]
fn join_as(uid: u32, server: &Daemon, vectors: u16) -> Crowd {
    let mut crowd = Crowd::new(server.socket_path(), vectors).of_user(uid);
    let number = crowd.connect(true);
    crowd.read_greetings();
    assert!(!crowd.is_ended(number) && !crowd.view(number).is_refused());
    crowd
}

fn one_user_does_not_use_up_all_descriptors_with_64_vectors(target: Target) {
    if !is_root("connect as other users") {
        return;
    }
    // With less there is no reserve: it would take too large a part of all descriptors.
    const LEAST: usize = 300;
    let Some((_, limit)) = room_for("hoarding with 64 vectors", LEAST, LEAST, 64) else {
        return;
    };
    let most = (limit / 65) as usize;
    let server = target.builder().for_all_users().vectors(64).descriptors(limit).start();
    let hoard: Vec<UnixStream> = as_user(ONE, || {
        let clients = (0..=most).map(|_| connect(server.socket_path()));
        clients.take_while(is_admitted).collect()
    });
    println!("{target:?}: the user got {} clients, of {most} that fit", hoard.len());
    assert!(hoard.len() > most - 10 && hoard.len() < most, "{} of {most}", hoard.len());
    // There is room for a client of each of several other users, and still none for this one.
    let others: Vec<Crowd> = (0..3).map(|user| join_as(OTHER + user, &server, 64)).collect();
    assert!(!is_admitted(&as_user(ONE, || connect(server.socket_path()))));
    drop(others);
    let held = hoard.len();
    drop(hoard);
    let output = server.stop();
    let refusal = format!("uid {ONE} holds {held} already, and the last descriptors are reserved");
    assert!(output.contains(&refusal), "{output}");
    if target.logs() {
        let holder = format!("uid {ONE} holds most: {held} clients");
        assert!(output.contains(&holder), "{output}");
    }
}

fn ended_clients_that_keep_their_sockets_do_not_use_up_all_descriptors(target: Target) {
    if !is_root("connect as other users") {
        return;
    }
    let server = target.builder().for_all_users().descriptors(2048).start();
    let ended: Vec<UnixStream> = as_user(ONE, || {
        let clients = (0..2048).map(|_| {
            let mut client = connect(server.socket_path());
            is_admitted(&client).then(|| {
                client.write_all(b"!").expect("there is room");
                client
            })
        });
        clients.map_while(|client| client).collect()
    });
    println!("{target:?}: {} ended clients", ended.len());
    assert!((1900..2048).contains(&ended.len()), "{}", ended.len());
    let others: Vec<Crowd> = (0..4).map(|user| join_as(OTHER + user, &server, 1)).collect();
    assert!(!is_admitted(&as_user(ONE, || connect(server.socket_path()))));
    drop(others);
    // All that it held comes free.
    drop(ended);
    assert!(is_admitted(&as_user(ONE, || connect(server.socket_path()))));
    let output = server.stop();
    assert!(output.contains("the last descriptors are reserved"), "{output}");
    if target.logs() {
        let holder = format!("uid {ONE} holds most: ");
        assert!(output.contains(&holder), "{output}");
    }
}

fn a_burst_of_one_user_that_came_and_went_fills_only_its_own_queue(target: Target) {
    if !is_root("connect as other users") {
        return;
    }
    // A limit of 1,024 lets 128 connections of one user wait.
    let server = target.builder().for_all_users().descriptors(1024).start();
    let mut witness = Crowd::new(server.socket_path(), 1);
    let number = witness.connect(true);
    witness.settle();
    let brief: Vec<UnixStream> =
        as_user(ONE, || (0..16).map(|_| connect(server.socket_path())).collect());
    witness
        .read_until("the witness knows them", |witness| witness.view(number).known().len() == 17);
    wait_for("the server waits for events", || is_asleep(server.pid()).then_some(()));

    // The server sees at once that 16 clients have left, and 300 new connections.
    server.pause();
    drop(brief);
    let burst: Vec<UnixStream> =
        as_user(ONE, || (0..300).map(|_| connect(server.socket_path())).collect());
    server.signal(Signal::SIGCONT);
    let _other = join_as(OTHER, &server, 1);
    let admitted = burst.iter().filter(|stream| is_admitted(stream)).count();
    println!("{target:?}: {admitted} of {} admitted", burst.len());
    assert!((128..300).contains(&admitted), "{admitted}");
    drop(burst);
    let output = server.stop();
    let refusal = format!("too many connections of uid {ONE} wait");
    assert!(output.contains(&refusal), "{output}");
}
