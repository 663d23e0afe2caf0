// SPDX-License-Identifier: GPL-2.0-or-later
//! The memory and the doorbells of two clients, in several threads, and without a server.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::thread;

use ivshmem::client::{Client, Error, Event};
use nix::sys::signal::Signal;

use super::{next, until};
use crate::common::daemon::Daemon;

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
    let bytes =
        [one.memory().load_u8(2), one.memory().load_u8(3)].map(|byte| byte.expect("a byte"));
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
    assert!(
        one.dispatch().expect("it works").is_empty(),
        "`ring_all` does not ring the client itself"
    );
    two.ring_peer(1).expect("itself");
    assert_eq!(next(&mut two).len(), 3);
    drop((one, two));
    daemon.stop();
}

#[test]
fn a_memory_handle_works_in_other_threads_while_the_client_waits_and_outlives_it() {
    const ROUNDS: usize = 2000;
    // Long enough for each way of copying, and not a multiple of a word.
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
fn an_unknown_peer_or_vector_and_a_wrong_offset_are_errors_with_the_right_values() {
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
    memory.write(size, b"").expect("no bytes fit everywhere");
}

#[test]
fn clients_work_without_a_server() {
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
fn a_client_knows_whether_its_memory_is_sealed() {
    let daemon = Daemon::builder().start();
    let client = Client::connect(daemon.socket_path()).expect("a server");
    assert!(!client.memory().is_sealed(), "a POSIX object can shrink");
    let daemon = Daemon::builder().arg("--memfd").start();
    let client = Client::connect(daemon.socket_path()).expect("a server");
    assert!(client.memory().is_sealed());
    assert!(nix::unistd::ftruncate(client.memory(), 0).is_err(), "it cannot shrink");
    client.memory().check().expect("it is all there");
}
