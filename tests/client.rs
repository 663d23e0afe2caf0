// SPDX-License-Identifier: GPL-2.0-or-later
//! The library's client with the server program, with a server in C, with many peers, and with a guest of stock QEMU.

// One function in common::peer takes over received descriptors; every other module forbids unsafe code.
#![deny(unsafe_code)]

mod common;

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use ivshmem::client::{Client, Error, Event, Vector};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

use common::PATIENCE;
use common::daemon::Daemon;
use common::peer::Peer;
use common::program::run;
use common::target::Target;
use common::vm::Vm;
use common::wait_for;

/// Waits for what happens next.
#[track_caller]
fn next(client: &mut Client) -> Vec<Event> {
    let events = client.wait(Some(PATIENCE)).expect("it can wait");
    assert!(!events.is_empty(), "nothing happened within {PATIENCE:?}");
    events
}

/// Waits until an event comes that is looked for; the others are skipped.
#[track_caller]
fn until(client: &mut Client, what: &str, looked_for: impl Fn(&Event) -> bool) {
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        if next(client).iter().any(&looked_for) {
            return;
        }
    }
    panic!("not within {PATIENCE:?}: {what}");
}

#[test]
fn two_clients_share_the_memory_and_ring_each_other() {
    let daemon = Daemon::builder().vectors(3).size("64K").start();
    let mut one = Client::connect(daemon.socket_path()).expect("the first");
    let mut two = Client::connect(daemon.socket_path()).expect("the second");
    assert_eq!((one.id(), one.vectors()), (0, 3));
    assert_eq!((two.id(), two.vectors()), (1, 3));
    let peer = two.peer(0).expect("it was here before");
    assert_eq!((peer.id(), peer.vectors(), two.peers().len()), (0, 3, 1));
    assert!(matches!(next(&mut one)[..], [Event::Joined { peer: 1, vectors: 3 }]));

    assert_eq!((one.memory().len(), two.memory().len()), (65_536, 65_536));
    one.memory().write(65_531, b"there").expect("up to the last byte");
    let mut bytes = [0; 5];
    two.memory().read(65_531, &mut bytes).expect("up to the last byte");
    assert_eq!(&bytes, b"there");
    assert_eq!(one.memory().atomic_u64(8).expect("aligned").fetch_add(7, Ordering::AcqRel), 0);
    assert_eq!(two.memory().load_u64(8).expect("aligned"), 7);
    two.memory().store_u16(2, 0xabcd).expect("aligned");
    let bytes = [one.memory().load_u8(2), one.memory().load_u8(3)].map(|byte| byte.expect("it"));
    assert_eq!(u16::from_ne_bytes(bytes), 0xabcd);

    for vector in 0..3 {
        one.ring(1, vector).expect("it is here");
        assert!(matches!(next(&mut two)[..], [Event::Rung { vector: v, count: 1 }] if v == vector));
        two.ring(0, vector).expect("it is here");
        two.ring(0, vector).expect("it is here");
        assert!(matches!(next(&mut one)[..], [Event::Rung { vector: v, count: 2 }] if v == vector));
    }
    one.ring_all().expect("all are here");
    let rung: BTreeSet<_> = next(&mut two)
        .iter()
        .map(|event| match event {
            Event::Rung { vector, count: 1 } => *vector,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(rung, (0..3).collect());
    assert!(one.dispatch().expect("it works").is_empty(), "`all` is all others");
    two.ring_peer(1).expect("itself");
    assert_eq!(next(&mut two).len(), 3);
    drop((one, two));
    daemon.stop();
}

#[test]
fn a_memory_handle_works_in_other_threads_while_the_client_waits_and_outlives_it() {
    const ROUNDS: usize = 2000;
    // Long enough for every way of copying, and not aligned.
    const BLOCK: usize = 3001;
    let daemon = Daemon::builder().start();
    let mut client = Client::connect(daemon.socket_path()).expect("a server");
    let doorbell = client.doorbell(0, 0).expect("its own");
    let write = |byte: u8| {
        let memory = client.memory().clone();
        thread::spawn(move || {
            for _ in 0..ROUNDS {
                memory.write(5, &[byte; BLOCK]).expect("it lies in the memory");
                memory.atomic_u64(4096).expect("aligned").fetch_add(1, Ordering::Relaxed);
            }
        })
    };
    let memory = client.memory().clone();
    let read = thread::spawn(move || {
        let mut bytes = [0; BLOCK];
        for _ in 0..ROUNDS {
            memory.read(5, &mut bytes).expect("it lies in the memory");
            assert!(bytes.iter().all(|byte| [0, 1, 2].contains(byte)), "no thread wrote that");
        }
        doorbell.ring().expect("it rings");
    });
    let threads = [write(1), write(2), read];
    assert!(matches!(next(&mut client)[..], [Event::Rung { vector: 0, count: 1 }]));
    let memory = client.memory().clone();
    drop(client);
    for thread in threads {
        thread.join().expect("no panic");
    }
    assert_eq!(memory.load_u64(4096).expect("aligned"), 2 * ROUNDS as u64);
    let mut bytes = [0; BLOCK];
    memory.read(5, &mut bytes).expect("it is still mapped");
    assert!(bytes.iter().all(|byte| [1, 2].contains(byte)));
}

#[test]
fn handles_can_be_sent_to_and_shared_with_other_threads() {
    const fn check<T: Send + Sync>() {}
    const {
        check::<Client>();
        check::<ivshmem::client::Memory>();
        check::<ivshmem::client::Doorbell>();
        check::<Vector>();
        check::<Error>();
        check::<Event>();
    }
}

#[test]
fn what_cannot_be_rung_or_reached_is_an_error_that_says_what_can() {
    let daemon = Daemon::builder().vectors(2).start();
    let client = Client::connect(daemon.socket_path()).expect("a server");
    assert!(matches!(client.ring(7, 0), Err(Error::UnknownPeer { peer: 7 })));
    assert!(matches!(client.ring_peer(7), Err(Error::UnknownPeer { peer: 7 })));
    let has = |error| matches!(error, Some(Error::UnknownVector { peer: 0, vector: 2, has: 2 }));
    assert!(has(client.ring(0, 2).err()));
    assert!(has(client.doorbell(0, 2).err()));
    assert!(has(client.vector(2).err()));

    let memory = client.memory();
    let size = memory.len();
    for (offset, len) in [(size, 1), (size - 1, 2), (usize::MAX, 1), (0, size + 1)] {
        let mut buffer = vec![0; len];
        let error = memory.read(offset, &mut buffer);
        assert!(matches!(error, Err(Error::MemoryBounds { .. })), "{offset} {len}: {error:?}");
        assert!(matches!(memory.write(offset, &buffer), Err(Error::MemoryBounds { .. })));
    }
    assert!(matches!(memory.load_u64(size - 4), Err(Error::MemoryBounds { len: 8, .. })));
    assert!(matches!(memory.load_u32(usize::MAX), Err(Error::MemoryBounds { .. })));
    assert!(matches!(memory.store_u32(2, 0), Err(Error::MemoryAlignment { offset: 2, size: 4 })));
    assert!(memory.load_u32(size - 4).is_ok());
    memory.write(size, b"").expect("nothing lies everywhere");
}

#[test]
fn a_client_that_says_how_many_vectors_it_has_need_not_wait_for_quiet() {
    let daemon = Daemon::builder().vectors(4).start();
    let long = Duration::from_secs(3600);
    // The quiet time would outlast the limit: whoever relies on it fails.
    let builder = Client::builder().quiet_time(long).connect_timeout(PATIENCE);
    let first = builder.clone().vectors(4).connect(daemon.socket_path()).expect("it knows");
    assert_eq!(first.vectors(), 4);
    let second =
        builder.clone().connect(daemon.socket_path()).expect("it sees how many the first has");
    assert_eq!(second.vectors(), 4);
    let mut none = builder.vectors(0).connect(daemon.socket_path()).expect("it needs none");
    until(&mut none, "the second is whole", |event| {
        matches!(event, Event::Joined { peer: 1, vectors: 4 })
    });
    none.ring(1, 3).expect("the last of its vectors");
    let error = Client::builder().vectors(5).connect_timeout(Duration::from_millis(300));
    let error = error.connect(daemon.socket_path()).map(drop);
    assert!(matches!(error, Err(Error::Timeout { .. })), "there are only 4: {error:?}");
}

#[test]
fn a_client_that_drops_leaves_at_once() {
    let daemon = Daemon::builder().start();
    let mut one = Client::connect(daemon.socket_path()).expect("the first");
    let two = Client::connect(daemon.socket_path()).expect("the second");
    assert!(matches!(next(&mut one)[..], [Event::Joined { peer: 1, .. }]));
    // A copy of the socket, as a forked child would have it, keeps nobody here.
    let copy = two.socket().expect("connected").try_clone_to_owned().expect("dup");
    drop(two);
    assert!(matches!(next(&mut one)[..], [Event::Left { peer: 1 }]));
    drop(copy);
    assert!(one.peer(1).is_none());
    assert!(matches!(one.ring(1, 0), Err(Error::UnknownPeer { peer: 1 })));
}

#[test]
fn a_connected_socket_will_do_instead_of_a_path() {
    let daemon = Daemon::builder().vectors(2).start();
    let socket = UnixStream::connect(daemon.socket_path()).expect("a server");
    let client = Client::adopt(socket).expect("it greets");
    assert_eq!((client.id(), client.vectors()), (0, 2));
}

#[test]
fn a_client_is_one_descriptor_that_is_readable_when_something_happened() {
    let daemon = Daemon::builder().start();
    let mut one = Client::connect(daemon.socket_path()).expect("the first");
    let readable = |client: &Client, time: PollTimeout| {
        poll(&mut [PollFd::new(client.as_fd(), PollFlags::POLLIN)], time).expect("poll") == 1
    };
    let patience = PollTimeout::try_from(PATIENCE).expect("it fits");
    assert!(!readable(&one, PollTimeout::ZERO));
    let two = Client::connect(daemon.socket_path()).expect("the second");
    assert!(readable(&one, patience), "somebody joined");
    assert_eq!(one.dispatch().expect("it works").len(), 1);
    assert!(!readable(&one, PollTimeout::ZERO));
    two.ring(0, 0).expect("it is here");
    assert!(readable(&one, patience), "somebody rang");
    assert_eq!(one.dispatch().expect("it works").len(), 1);
    assert!(!readable(&one, PollTimeout::ZERO));
    drop(two);
    assert!(readable(&one, patience), "somebody left");
}

#[test]
fn a_wait_ends_with_its_time() {
    let daemon = Daemon::builder().start();
    let mut client = Client::connect(daemon.socket_path()).expect("a server");
    let time = Duration::from_millis(50);
    let start = Instant::now();
    assert!(client.wait(Some(time)).expect("it can wait").is_empty());
    assert!(start.elapsed() >= time);
    let mut vector = client.vector(0).expect("it has one");
    let start = Instant::now();
    assert!(!vector.wait(Some(time)).expect("it can wait"));
    assert!(start.elapsed() >= time);
    assert_eq!(vector.take().expect("it can look"), 0);
}

#[test]
fn a_vector_and_a_doorbell_work_in_threads_of_their_own() {
    let daemon = Daemon::builder().vectors(2).start();
    let mut one = Client::connect(daemon.socket_path()).expect("the first");
    let two = Client::connect(daemon.socket_path()).expect("the second");
    assert!(matches!(next(&mut one)[..], [Event::Joined { peer: 1, .. }]));
    // Both with looking first and with sleeping at once, and often enough for both to be used.
    for spin in [Duration::ZERO, Duration::from_micros(20)] {
        const ROUNDS: usize = 2000;
        let mut ping = one.vector(1).expect("it has two").spin(spin);
        let mut pong = two.vector(1).expect("it has two").spin(spin);
        let back = one.doorbell(1, 1).expect("it has joined");
        let there = two.doorbell(0, 1).expect("it was here before");
        let echo = thread::spawn(move || {
            for _ in 0..ROUNDS {
                assert!(ping.wait(Some(PATIENCE)).expect("it can wait"));
                back.ring().expect("it rings");
            }
        });
        for _ in 0..ROUNDS {
            there.ring().expect("it rings");
            assert!(pong.wait(Some(PATIENCE)).expect("it can wait"));
        }
        echo.join().expect("it got them all");
    }
}

#[test]
fn a_ring_is_seen_once_by_the_client_or_by_the_vector_that_was_taken() {
    let daemon = Daemon::builder().start();
    let mut client = Client::connect(daemon.socket_path()).expect("a server");
    let ring = |client: &Client| client.ring(0, 0).expect("itself");
    let rung = |client: &mut Client| match &client.dispatch().expect("it works")[..] {
        [] => 0,
        [Event::Rung { vector: 0, count }] => *count,
        other => panic!("{other:?}"),
    };
    ring(&client);
    assert_eq!(rung(&mut client), 1);
    ring(&client);
    let mut vector = client.vector(0).expect("it has one").spin(Duration::ZERO);
    assert!(matches!(client.vector(0), Err(Error::VectorTaken { vector: 0 })));
    assert_eq!(rung(&mut client), 0, "it is the vector's now, and so is what was not seen");
    let waits = |vector: &mut Vector| vector.wait(Some(Duration::ZERO)).expect("it can look");
    assert!(waits(&mut vector));
    assert!(!waits(&mut vector), "once");
    for _ in 0..3 {
        ring(&client);
    }
    assert!(waits(&mut vector), "several at once are one");
    assert!(!waits(&mut vector));
    assert_eq!(vector.take().expect("it can look"), 4, "how often, it says when asked");
    assert_eq!(vector.take().expect("it can look"), 0);
    ring(&client);
    assert_eq!(vector.take().expect("it can look"), 1);
    assert!(!waits(&mut vector), "what was taken is not waited for");
    ring(&client);
    assert!(waits(&mut vector));
    drop(vector);
    assert_eq!(rung(&mut client), 0, "what was waited for was seen");
    let mut vector = client.vector(0).expect("it is free again");
    assert!(!waits(&mut vector));
    ring(&client);
    drop(vector);
    assert_eq!(rung(&mut client), 1, "what nobody saw is the client's again");
    let vector = client.vector(0).expect("it is free again");
    ring(&client);
    drop(vector);
    assert_eq!(rung(&mut client), 1, "also of a vector that never waited");
    // One that outlives its client has nowhere to go back to, and does not mind.
    let vector = client.vector(0).expect("it is free again");
    drop(client);
    drop(vector);
}

/// Runs one ignored test of this program as a process of its own. strace makes each of these calls
/// (or those that `when` names) end like one that a signal interrupts after 10 ms.
#[track_caller]
fn passes_while_interrupted(call: &str, when: &str, test: &str) {
    let when = if when.is_empty() { String::new() } else { format!(":{when}") };
    let ended = run(Command::new("strace")
        .args(["-f", "-qq", "-o", "/dev/null", "-e", &format!("trace={call}"), "-e"])
        .arg(format!("inject={call}:error=EINTR:delay_enter=10000{when}"))
        .arg(std::env::current_exe().expect("this program"))
        .args(["--exact", test, "--ignored", "--nocapture"]));
    assert!(ended.status.success(), "{ended:?}");
    assert!(ended.stdout.contains("test result: ok. 1 passed"), "{ended:?}");
}

#[test]
fn signals_do_not_make_the_time_to_connect_longer() {
    passes_while_interrupted("connect", "", "connects_while_signals_come");
}

#[test]
#[ignore = "another test starts it, as a process whose connects are interrupted"]
fn connects_while_signals_come() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&path).expect("a socket");
    let limit = Duration::from_millis(300);
    let start = Instant::now();
    let error = Client::builder().connect_timeout(limit).connect(&path).unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
    assert!(start.elapsed() >= limit && start.elapsed() < PATIENCE, "{:?}", start.elapsed());
}

/// Each poll(2) but a thread's first is interrupted.
#[test]
fn signals_do_not_make_the_quiet_time_longer() {
    passes_while_interrupted("poll", "when=2+", "waits_for_quiet_while_signals_come");
}

#[test]
#[ignore = "another test starts it, as a process whose polls are interrupted"]
fn waits_for_quiet_while_signals_come() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("socket");
    let mut server = ivshmem::Server::builder().socket_path(&path).start().expect("it starts");
    let stopper = server.stopper().expect("an eventfd");
    let serving = thread::spawn(move || server.run());
    // The first is not interrupted, since the start of a program needs one.
    poll(&mut [], PollTimeout::ZERO).expect("it works");
    let limit = Duration::from_secs(5);
    let client = Client::builder().connect_timeout(limit).connect(&path);
    stopper.stop();
    serving.join().expect("no panic").expect("it serves");
    assert_eq!(client.expect("the quiet time ends").vectors(), 1);
}

/// strace makes each read of a vector take half a second, so that it comes when the dropped vector has looked already.
#[test]
fn a_ring_while_a_vector_is_dropped_is_not_lost() {
    let slowly = "-f -qq -o /dev/null -e trace=preadv2 -e inject=preadv2:delay_enter=500000";
    let ended = run(Command::new("strace")
        .args(slowly.split(' '))
        .arg(std::env::current_exe().expect("this program"))
        .args(["--exact", "drops_a_vector_while_it_is_rung", "--ignored", "--nocapture"]));
    assert!(ended.status.success(), "{ended:?}");
    assert!(ended.stdout.contains("test result: ok. 1 passed"), "{ended:?}");
}

#[test]
#[ignore = "another test starts it, as a process whose reads take long"]
fn drops_a_vector_while_it_is_rung() {
    let daemon = Daemon::builder().start();
    let mut client = Client::connect(daemon.socket_path()).expect("a server");
    let doorbell = client.doorbell(0, 0).expect("it has one");
    let mut vector = client.vector(0).expect("it has one");
    doorbell.ring().expect("it can be rung");
    assert!(vector.wait(Some(PATIENCE)).expect("it can wait"));
    let again = thread::spawn(move || {
        thread::sleep(Duration::from_millis(100));
        doorbell.ring().expect("it can be rung");
    });
    drop(vector);
    again.join().expect("no panic");
    assert!(matches!(next(&mut client)[..], [Event::Rung { vector: 0, count: 1 }]));
}

#[test]
fn a_vector_that_is_taken_for_long_can_still_be_waited_for() {
    let daemon = Daemon::builder().start();
    let client = Client::connect(daemon.socket_path()).expect("a server");
    let mut vector = client.vector(0).expect("it has one");
    for _ in 0..3 {
        assert!(!vector.wait(Some(Duration::ZERO)).expect("it can look"));
        client.ring(0, 0).expect("itself");
        assert!(vector.wait(Some(PATIENCE)).expect("it can wait"));
        assert_eq!(vector.take().expect("it can look"), 1);
        for _ in 0..100 {
            assert_eq!(vector.take().expect("it can look"), 0);
            client.ring(0, 0).expect("itself");
            assert_eq!(vector.take().expect("it can look"), 1);
        }
        client.ring(0, 0).expect("itself");
        assert!(vector.wait(Some(PATIENCE)).expect("it can wait"), "what was not taken");
        assert!(!vector.wait(Some(Duration::ZERO)).expect("it can look"), "once");
        assert_eq!(vector.take().expect("it can look"), 1);
    }
}

#[test]
fn a_vector_that_somebody_filled_up_is_rung_again() {
    let daemon = Daemon::builder().start();
    let client = Client::connect(daemon.socket_path()).expect("a server");
    let doorbell = client.doorbell(0, 0).expect("its own");
    let mut vector = client.vector(0).expect("it has one").spin(Duration::ZERO);
    assert!(!vector.wait(Some(Duration::ZERO)).expect("it can look"));
    for _ in 0..3 {
        nix::unistd::write(&doorbell, &(u64::MAX - 1).to_ne_bytes()).expect("there is room");
        assert!(vector.wait(Some(PATIENCE)).expect("it can wait"));
        doorbell.ring().expect("it rings");
        assert!(vector.wait(Some(PATIENCE)).expect("it can wait"), "there is room again");
        vector.take().expect("it can look");
    }
}

#[test]
fn clients_go_on_without_a_server() {
    let mut daemon = Daemon::builder().start();
    let mut one = Client::connect(daemon.socket_path()).expect("the first");
    let mut two = Client::connect(daemon.socket_path()).expect("the second");
    assert!(matches!(next(&mut one)[..], [Event::Joined { peer: 1, .. }]));
    daemon.signal(Signal::SIGKILL);
    daemon.wait();
    for client in [&mut one, &mut two] {
        let ended =
            |event: &Event| matches!(event, Event::Disconnected { reason } if reason.is_closed());
        until(client, "the server's end", ended);
        assert!(!client.is_connected());
    }
    one.ring(1, 0).expect("it is still known");
    assert!(matches!(next(&mut two)[..], [Event::Rung { vector: 0, .. }]));
    one.memory().write(0, b"on").expect("it is still there");
    let mut bytes = [0; 2];
    two.memory().read(0, &mut bytes).expect("it is still there");
    assert_eq!(&bytes, b"on");
}

#[test]
fn sealed_memory_is_known_to_be_sealed() {
    let daemon = Daemon::builder().start();
    let client = Client::connect(daemon.socket_path()).expect("a server");
    assert!(!client.memory().is_sealed(), "a POSIX object can shrink");
    let daemon = Daemon::builder().arg("--memfd").start();
    let client = Client::connect(daemon.socket_path()).expect("a server");
    assert!(client.memory().is_sealed());
    assert!(nix::unistd::ftruncate(client.memory(), 0).is_err(), "and is");
    client.memory().check().expect("it is all there");
}

on_each_server!(
    a_client_survives_a_thousand_peers_that_join_and_leave,
    a_client_and_a_guest_of_stock_qemu_ring_each_other_and_share_the_memory,
);

fn a_client_survives_a_thousand_peers_that_join_and_leave(server: Target) {
    const CROWD: usize = 20;
    let daemon = server.builder().vectors(4).start();
    let mut client = Client::connect(daemon.socket_path()).expect("the first");
    let descriptors = || std::fs::read_dir("/proc/self/fd").expect("/proc").count();
    let joined_before = client.peers().len();
    let mut seen = BTreeSet::new();
    let (mut joined, mut left) = (0, 0);
    for round in 0..1000 / CROWD {
        let crowd: Vec<_> = (0..CROWD).map(|_| Peer::join(daemon.socket_path(), 4)).collect();
        let last = crowd.last().expect("a crowd");
        let mut rung_by = 0;
        while joined < (round + 1) * CROWD {
            for event in next(&mut client) {
                match event {
                    Event::Joined { peer, vectors: 4 } => {
                        joined += 1;
                        assert!(seen.insert(peer), "an id came back: {peer}");
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
        client.ring(last.id(), 3).expect("it is here");
        assert_eq!(last.take_rung(), [3].into());
        last.ring(0, 2);
        while rung_by == 0 {
            for event in next(&mut client) {
                assert!(matches!(event, Event::Rung { vector: 2, count: 1 }), "{event:?}");
                rung_by += 1;
            }
        }
        drop(crowd);
        while left < (round + 1) * CROWD {
            for event in next(&mut client) {
                assert!(matches!(event, Event::Left { .. }), "{event:?}");
                left += 1;
            }
        }
        assert_eq!(client.peers().len(), joined_before);
    }
    assert_eq!((joined, left), (1000, 1000));
    // Other tests of this process have descriptors open too, but 4,000 would be seen.
    assert!(descriptors() < 2000, "{} descriptors are open", descriptors());
    drop(client);
    daemon.stop();
}

fn a_client_and_a_guest_of_stock_qemu_ring_each_other_and_share_the_memory(server: Target) {
    let daemon = server.builder().vectors(2).start();
    let mut vm = Vm::start(daemon.socket_path(), 2);
    let guest = vm.id();
    let mut client = Client::connect(daemon.socket_path()).expect("a server");
    assert_eq!(client.peer(guest).expect("it was here before").vectors(), 2);

    for vector in 0..2u16 {
        client.ring(guest, u32::from(vector)).expect("it is here");
        vm.wait_pending(vector);
        assert_eq!(vm.settled(), [vector].into(), "it and no other");
        vm.clear(vector);
    }
    // The guest drops what it rings before QEMU has heard of the client.
    wait_for("the guest knows how to ring the client", || {
        vm.ring(client.id(), 1);
        let events = client.wait(Some(PATIENCE / 500)).expect("it can wait");
        events.iter().any(|event| matches!(event, Event::Rung { vector: 1, .. })).then_some(())
    });
    client.dispatch().expect("what was rung more than once");
    for vector in 0..2 {
        vm.ring(client.id(), vector);
        assert!(matches!(
            next(&mut client)[..],
            [Event::Rung { vector: v, count: 1 }] if v == u32::from(vector)
        ));
    }

    client.memory().write(4096, b"from the host").expect("it is there");
    assert_eq!(vm.read_memory(4096, 13), b"from the host");
    vm.write_memory(8192, b"from the guest");
    let mut bytes = [0; 14];
    client.memory().read(8192, &mut bytes).expect("it is there");
    assert_eq!(&bytes, b"from the guest");

    // A guest that starts later is told of, and can be rung; one that ends is told of.
    let mut late = Vm::start(daemon.socket_path(), 2);
    let id = late.id();
    until(
        &mut client,
        "the late guest",
        |event| matches!(event, Event::Joined { peer, vectors: 2 } if *peer == id),
    );
    client.ring(id, 1).expect("it is here");
    late.wait_pending(1);
    late.kill();
    until(&mut client, "its end", |event| matches!(event, Event::Left { peer } if *peer == id));
    vm.quit();
    until(
        &mut client,
        "the other's end",
        |event| matches!(event, Event::Left { peer } if *peer == guest),
    );
    drop(client);
    daemon.stop();
}
