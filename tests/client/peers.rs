// SPDX-License-Identifier: GPL-2.0-or-later
//! A client among many peers, and with a guest of stock QEMU.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;

use ivshmem::client::{Client, Event};

use super::{next, until};
use crate::common::peer::Peer;
use crate::common::target::Target;
use crate::common::vm::Vm;
use crate::common::{PATIENCE, wait_for};

crate::on_each_server!(
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
    // Other tests of this process have descriptors open too, but far fewer than 4,000.
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
    // QEMU drops a doorbell for a peer that it does not know yet.
    wait_for("the guest knows how to ring the client", || {
        vm.ring(client.id(), 1);
        let events = client.wait(Some(PATIENCE / 500)).expect("it can wait");
        events.iter().any(|event| matches!(event, Event::Rung { vector: 1, .. })).then_some(())
    });
    client.dispatch().expect("it works");
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

    // The client is told of a guest that starts later, can interrupt it, and is told of its end.
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
