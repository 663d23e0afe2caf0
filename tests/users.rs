// SPDX-License-Identifier: GPL-2.0-or-later
//! One user does not keep the clients of other users out, whatever it does.

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::crowd::Crowd;
use common::daemon::Daemon;
use common::peer::{Connection, Peer};
use common::target::{Target, full_size, is_root, room_for};
use common::user::as_user;

on_each_server! {
    one_user_does_not_use_up_all_descriptors,
    a_user_that_connects_and_closes_without_end_delays_others_only_a_little,
    connections_that_were_ended_but_have_not_read_count_until_they_have,
}

const ONE: u32 = 1_100_001;
const OTHER: u32 = 1_100_002;

fn one_user_does_not_use_up_all_descriptors(target: Target) {
    if !is_root("connect as other users") {
        return;
    }
    let server = target.builder().for_all_users().descriptors(2048).start();
    let mut crowd = Crowd::new(server.socket_path(), 1).of_user(ONE);
    loop {
        assert!(crowd.numbers().len() < 1024, "the user got all descriptors");
        let number = crowd.connect(true);
        crowd.read_until("a greeting or a refusal", |crowd| {
            crowd.view(number).is_greeting_complete() || crowd.is_ended(number)
        });
        if crowd.is_ended(number) {
            assert!(crowd.view(number).is_refused());
            crowd.leave(number);
            break;
        }
    }
    let admitted = crowd.numbers().len();
    assert!(admitted > 950, "{admitted} clients with 2,048 descriptors");
    let other = as_user(OTHER, || Peer::join(server.socket_path(), 1));
    drop(crowd);
    drop(other);
    let output = server.stop();
    let refusal = format!("uid {ONE} holds");
    assert!(output.contains(&refusal) && output.contains("descriptors are reserved"), "{output}");
    if target.logs() {
        assert!(output.contains(&format!("uid {ONE} holds most")), "{output}");
        assert!(output.contains(&format!("pid {}, uid {ONE}", std::process::id())), "{output}");
    }
}

/// Connects and closes as fast as it can until `stop` is set.
fn knock(socket: &Path, stop: &AtomicBool) {
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        // The server may refuse connections for a moment.
        if let Ok(mut stream) = UnixStream::connect(socket) {
            number += 1;
            // Some stay until they are admitted.
            if number % 4 != 0 {
                let _ = stream.read(&mut [0; 8]);
            }
        }
    }
}

fn a_user_that_connects_and_closes_without_end_delays_others_only_a_little(target: Target) {
    if !is_root("connect as other users") {
        return;
    }
    for reads in [false, true] {
        let wanted = match (full_size("a user that connects and closes"), reads) {
            (true, false) => 5000,
            (true, true) => 2000,
            (false, _) => 600,
        };
        let Some((count, limit)) = room_for("a user that connects and closes", 600, wanted, 1)
        else {
            return;
        };
        let server = target.builder().for_all_users().descriptors(limit + 1100).start();
        let mut residents = Crowd::new(server.socket_path(), 1);
        residents.connect_many(count);
        residents.settle();
        residents.set_all_reading(reads);
        let stop = AtomicBool::new(false);
        let times = thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| as_user(ONE, || knock(server.socket_path(), &stop)));
            }
            let others = scope.spawn(|| {
                thread::sleep(Duration::from_millis(500));
                let times = (0..5).map(|_| {
                    let started = Instant::now();
                    let peer = as_user(OTHER, || Peer::join(server.socket_path(), 1));
                    assert!(peer.others().len() >= count, "a complete greeting");
                    started.elapsed()
                });
                let times: Vec<_> = times.collect();
                stop.store(true, Ordering::Relaxed);
                times
            });
            while !others.is_finished() {
                residents.read(Duration::from_millis(10));
            }
            others.join().expect("no panic")
        });
        let longest = times.into_iter().max().expect("five times");
        eprintln!("{count} residents, reading: {reads}: complete after {longest:?} at most");
        // 300 ms on an idle machine; other tests may run beside this one.
        assert!(longest < Duration::from_secs(6), "{longest:?}");
        server.stop();
    }
}

fn connections_that_were_ended_but_have_not_read_count_until_they_have(target: Target) {
    let server = target.builder().start();
    let mut witness = Crowd::new(server.socket_path(), 1);
    witness.connect_many(4);
    witness.settle();
    let before = server.open_fds();
    let open = AtomicU32::new(0);
    let ended: Vec<UnixStream> = (0..20)
        .map(|_| {
            let mut stream = UnixStream::connect(server.socket_path()).expect("it listens");
            stream.read_exact(&mut [0; 8]).expect("the version");
            stream.write_all(b"!").expect("a byte");
            open.fetch_add(1, Ordering::Relaxed);
            stream
        })
        .collect();
    // Each keeps its socket, and nothing else.
    common::wait_for("the server ends them", || {
        witness.settle();
        (server.open_fds() == before + ended.len()).then_some(())
    });
    for mut stream in ended {
        // What was sent before the end can still be read, to its end.
        let mut rest = Vec::new();
        if let Err(error) = stream.read_to_end(&mut rest) {
            // The server closed it with this client's byte unread, once all was read here.
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        }
        assert!(rest.len() >= 16 && rest.len() % 8 == 0, "{} bytes", rest.len());
        std::mem::forget(stream);
    }
    common::wait_for("the server closes them", || (server.open_fds() == before).then_some(()));
    server.stop();
}

#[test]
fn the_options_of_the_daemon_admit_users_and_groups_up_to_their_limits() {
    if !is_root("connect as other users") {
        return;
    }
    let outcome = |server: &Daemon, uid: u32| {
        let mut client = as_user(uid, || Connection::open(server.socket_path()));
        let version = client.expect("a version or a refusal").value;
        (version, client)
    };
    let start = |args: &[&str]| {
        args.iter().fold(Daemon::builder().for_all_users(), |builder, arg| builder.arg(arg)).start()
    };

    // `as_user` changes user and group.
    let server = start(&["--allow-uid", "1100031", "--allow-uid=root", "--allow-gid=1100032"]);
    for (uid, version) in [(1_100_031, 0), (1_100_032, 0), (1_100_033, 1), (0, 0)] {
        assert_eq!(outcome(&server, uid).0, version, "uid {uid}");
    }
    let output = server.stop();
    assert!(output.contains("--allow-uid") && output.contains("uid 1100033"), "{output}");

    let server = start(&["--max-clients=2"]);
    let clients: Vec<_> = (0..3).map(|_| outcome(&server, 0)).collect();
    assert_eq!(clients.iter().map(|client| client.0).collect::<Vec<_>>(), [0, 0, 1]);
    assert!(server.stop().contains("as the limit allows: 2"));

    let server = start(&["--max-clients-per-uid=2"]);
    let clients: Vec<_> = [0, 0, 0, 1_100_031].map(|uid| outcome(&server, uid)).into();
    assert_eq!(clients.iter().map(|client| client.0).collect::<Vec<_>>(), [0, 0, 1, 0]);
    assert!(server.stop().contains("the limit for each user is 2"));
}
