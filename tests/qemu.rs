// SPDX-License-Identifier: GPL-2.0-or-later
//! The server with stock QEMU as its client.
//!
//! The tests check what a guest can see: its id, the shared memory, and which interrupts arrive. Other test programs
//! cover clients that misbehave.

// Only common::peer has unsafe code: for descriptors and bytes that were received. Every other module forbids it.
#![deny(unsafe_code)]

mod common;

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use nix::sys::signal::Signal;

use common::daemon::Daemon;
use common::peer::Peer;
use common::skip::skip;
use common::vm::{Accel, Vm};
use common::{PATIENCE, wait_for, wait_up_to};

/// The numbers of all vectors of a device.
fn all(vectors: u16) -> BTreeSet<u16> {
    (0..vectors).collect()
}

/// Waits until `from` can ring the peer `to`. `arrived` tells whether a ring of the last vector has arrived. A QEMU
/// receives the vectors of a new peer some time after that peer is ready, and drops rings before that. So this function
/// rings repeatedly. It uses the last vector because the QEMU receives that one last.
#[track_caller]
fn ring_until(from: &mut Vm, to: u16, last: u16, mut arrived: impl FnMut() -> bool) {
    wait_for(&format!("a peer that can ring {to}"), || {
        from.ring(to, last);
        wait_up_to(PATIENCE / 500, || arrived().then_some(()))
    });
}

/// Waits until each of two VMs can ring the other.
#[track_caller]
fn wait_until_connected(vms: &mut [Vm], one: usize, two: usize) {
    for (from, to) in [(one, two), (two, one)] {
        let (first, second) = vms.split_at_mut(from.max(to));
        let (low, high) = (&mut first[from.min(to)], &mut second[0]);
        let (from, to) = if from < to { (low, high) } else { (high, low) };
        let (id, last) = (to.id(), to.vectors() - 1);
        ring_until(from, id, last, || to.pending().contains(&last));
        to.settled();
        to.clear(last);
    }
}

/// Waits until each of the VMs can ring each other one.
#[track_caller]
fn wait_until_all_connected(vms: &mut [Vm]) {
    for two in 1..vms.len() {
        for one in 0..two {
            wait_until_connected(vms, one, two);
        }
    }
}

/// Rings every vector of `to` from `from` once, one by one. Checks that the pending bit of that vector is set, and no
/// other bit in any VM.
#[track_caller]
fn ring_every_vector(vms: &mut [Vm], from: usize, to: usize) {
    let id = vms[to].id();
    for vector in 0..vms[to].vectors() {
        vms[from].ring(id, vector);
        vms[to].wait_pending(vector);
        for (index, vm) in vms.iter_mut().enumerate() {
            let expected = (index == to).then_some(vector).into_iter().collect();
            assert_eq!(
                vm.settled(),
                expected,
                "pending in VM {index} after {from} rang vector {vector} of {to}"
            );
        }
        vms[to].clear(vector);
        assert!(vms[to].settled().is_empty(), "the vector must not ring again by itself");
    }
}

/// Rings every vector of every VM from every other.
#[track_caller]
fn ring_every_vm(vms: &mut [Vm]) {
    for from in 0..vms.len() {
        for to in (0..vms.len()).filter(|to| *to != from) {
            ring_every_vector(vms, from, to);
        }
    }
}

/// Rings every vector in both directions between a VM and a raw peer that has received the VM's vectors.
#[track_caller]
fn ring_with_peer(vm: &mut Vm, peer: &Peer) {
    let (id, vectors) = (vm.id(), vm.vectors());
    ring_until(vm, peer.id(), vectors - 1, || !peer.take_rung().is_empty());
    for vector in 0..vectors {
        vm.ring(peer.id(), vector);
        assert_eq!(peer.take_rung(), [vector].into(), "rung by VM {id}");
        peer.ring(id, vector);
        vm.wait_pending(vector);
        assert_eq!(vm.settled(), [vector].into(), "rung by a raw peer");
        vm.clear(vector);
    }
}

#[test]
fn two_qemus_get_different_ids_and_the_first_is_0() {
    let daemon = Daemon::builder().vectors(2).start();
    let mut one = Vm::start(daemon.socket_path(), 2);
    let mut two = Vm::start(daemon.socket_path(), 2);
    assert_eq!(one.id(), 0);
    assert_ne!(two.id(), 0);
    one.quit();
    two.quit();
    daemon.stop();
}

#[test]
fn memory_written_by_one_guest_is_read_by_the_other_and_by_the_host() {
    const SIZE: u64 = 1 << 20;
    let daemon = Daemon::builder().size("1M").start();
    let mut one = Vm::start(daemon.socket_path(), 1);
    let mut two = Vm::start(daemon.socket_path(), 1);
    let host = OpenOptions::new()
        .read(true)
        .write(true)
        .open(daemon.shm_path())
        .expect("the host can open the memory by its name");
    assert_eq!(host.metadata().expect("fstat works").len(), SIZE);

    // The first bytes, some that cross a page, and the last.
    for offset in [0, 4096 - 7, SIZE - 15] {
        let read_on_host = || {
            let mut bytes = [0; 15];
            host.read_exact_at(&mut bytes, offset).expect("the host reads");
            bytes
        };
        assert_eq!(read_on_host(), [0; 15], "the memory is new");
        one.write_memory(offset, b"from one to all");
        assert_eq!(two.read_memory(offset, 15), b"from one to all");
        assert_eq!(&read_on_host(), b"from one to all");
        two.write_memory(offset, b"from two to all");
        assert_eq!(one.read_memory(offset, 15), b"from two to all");
        assert_eq!(&read_on_host(), b"from two to all");
        host.write_all_at(b"from host to vm", offset).expect("the host writes");
        assert_eq!(one.read_memory(offset, 15), b"from host to vm");
        assert_eq!(two.read_memory(offset, 15), b"from host to vm");
    }
    drop((one, two));
    daemon.stop();
}

#[test]
fn memory_of_a_file_in_a_directory_is_shared_and_leaves_no_name() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let daemon = Daemon::builder().memory_dir(dir.path()).start();
    let mut one = Vm::start(daemon.socket_path(), 1);
    let mut two = Vm::start(daemon.socket_path(), 1);
    let peer = Peer::join(daemon.socket_path(), 1);
    let names = dir.path().read_dir().expect("the directory exists").count();
    assert_eq!(names, 0, "the file must have no name any more");

    one.write_memory(100, b"from one to all");
    assert_eq!(two.read_memory(100, 15), b"from one to all");
    let memory = peer.memory().try_clone_to_owned().expect("dup works");
    let mut bytes = [0; 15];
    std::fs::File::from(memory).read_exact_at(&mut bytes, 100).expect("the peer reads");
    assert_eq!(&bytes, b"from one to all");
    drop((one, two, peer));
    daemon.stop();
}

#[test]
fn every_vector_rung_both_ways_sets_its_own_pending_bit_and_no_other() {
    let daemon = Daemon::builder().vectors(64).start();
    let mut vms = [(); 2].map(|()| Vm::start(daemon.socket_path(), 64));
    assert_eq!(vms[0].vectors(), 64);
    wait_until_all_connected(&mut vms);
    ring_every_vm(&mut vms);
    drop(vms);
    daemon.stop();
}

#[test]
fn a_qemu_that_joins_later_and_the_earlier_ones_can_ring_each_other() {
    let daemon = Daemon::builder().vectors(4).start();
    let mut vms = Vec::new();
    for _ in 0..3 {
        // The VMs that are connected already have received each other's vectors before the next one starts.
        vms.push(Vm::start(daemon.socket_path(), 4));
        wait_until_all_connected(&mut vms);
        ring_every_vm(&mut vms);
    }
    let ids: BTreeSet<u16> = vms.iter_mut().map(Vm::id).collect();
    assert_eq!(ids.len(), 3, "different ids");
    drop(vms);
    daemon.stop();
}

/// One of three VMs leaves. Checks that the others and a new VM can still ring each other.
#[track_caller]
fn check_that_the_others_still_ring_after(leave: impl Fn(Vm)) {
    let daemon = Daemon::builder().vectors(4).start();
    let mut vms: Vec<Vm> = (0..3).map(|_| Vm::start(daemon.socket_path(), 4)).collect();
    let mut observer = Peer::join(daemon.socket_path(), 4);
    wait_until_all_connected(&mut vms);

    let mut leaver = vms.remove(1);
    let gone = leaver.id();
    leave(leaver);
    observer.wait_for_departure(gone);
    vms[0].ring(gone, 0);
    ring_every_vm(&mut vms);

    vms.push(Vm::start(daemon.socket_path(), 4));
    assert_ne!(vms[2].id(), gone, "the others have received the departure of this id");
    wait_until_all_connected(&mut vms);
    ring_every_vm(&mut vms);
    // A damaged heap may show only when QEMU frees it at its end.
    vms.into_iter().for_each(Vm::quit);
    daemon.stop();
}

#[test]
fn the_other_vms_still_ring_after_one_quits() {
    check_that_the_others_still_ring_after(Vm::quit);
}

#[test]
fn the_other_vms_still_ring_after_one_is_killed() {
    check_that_the_others_still_ring_after(Vm::kill);
}

#[test]
fn a_qemu_that_was_stopped_for_a_while_misses_nothing() {
    const VECTORS: u16 = 16;
    let daemon = Daemon::builder().vectors(VECTORS).start();
    let join = || Peer::join(daemon.socket_path(), VECTORS);
    let mut vms: Vec<Vm> = (0..2).map(|_| Vm::start(daemon.socket_path(), VECTORS)).collect();
    wait_until_all_connected(&mut vms);
    let stopped = vms[1].id();
    vms[1].signal(Signal::SIGSTOP);

    // Far more messages than the socket of the stopped QEMU holds (278): 17 for each peer that joins and leaves.
    for _ in 0..60 {
        drop(join());
    }
    let mut peers = [join(), join(), join()];
    vms.push(Vm::start(daemon.socket_path(), VECTORS));
    wait_until_connected(&mut vms, 0, 2);
    vms[0].ring(stopped, 3);

    vms[1].signal(Signal::SIGCONT);
    vms[1].wait_pending(3);
    assert_eq!(vms[1].settled(), [3].into(), "rung while it was stopped");
    vms[1].clear(3);
    wait_until_all_connected(&mut vms);
    ring_every_vm(&mut vms);
    let newest = vms[2].id();
    for peer in &mut peers {
        peer.wait_for_peer(newest);
        for vm in &mut vms {
            ring_with_peer(vm, peer);
        }
    }
    drop(peers);
    vms.into_iter().for_each(Vm::quit);
    daemon.stop();
}

#[test]
fn eight_qemus_of_64_vectors_that_start_together_all_get_ready() {
    let daemon = Daemon::builder().vectors(64).start();
    let starting = [(); 8].map(|()| Vm::spawn(daemon.socket_path(), 64, Accel::Tcg));
    let mut vms = starting.map(|vm| vm.up());
    let ids: Vec<u16> = vms.iter_mut().map(Vm::id).collect();
    let distinct: BTreeSet<u16> = ids.iter().copied().collect();
    assert_eq!(distinct.len(), 8, "different ids: {ids:?}");
    wait_until_all_connected(&mut vms);
    for from in 0..8 {
        for to in (0..8).filter(|to| *to != from) {
            for vector in 0..64 {
                vms[from].ring(ids[to], vector);
            }
            for (index, vm) in vms.iter_mut().enumerate() {
                let expected = if index == to { all(64) } else { BTreeSet::new() };
                assert_eq!(
                    vm.settled(),
                    expected,
                    "VM {index}, after VM {to} was rung by VM {from}"
                );
            }
            (0..64).for_each(|vector| vms[to].clear(vector));
        }
    }
    drop(vms);
    daemon.stop();
}

#[test]
fn a_qemu_stays_alive_while_200_peers_join_and_leave() {
    const VECTORS: u16 = 4;
    let daemon = Daemon::builder().vectors(VECTORS).start();
    let mut resident = Vm::start(daemon.socket_path(), VECTORS);
    // If an id is used again while a QEMU runs that received its departure, that QEMU's heap is corrupted.
    let mut ids = BTreeSet::from([resident.id()]);
    for round in 0..200 {
        let peer = Peer::join(daemon.socket_path(), VECTORS);
        assert!(ids.insert(peer.id()), "round {round}: id {} was used again", peer.id());
        // Half of the peers leave at once, so the resident QEMU may receive join and departure together.
        if round % 2 == 0 {
            ring_with_peer(&mut resident, &peer);
        }
        drop(peer);
        if round % 5 == 0 {
            let mut vms = [resident, Vm::start(daemon.socket_path(), VECTORS)];
            wait_until_all_connected(&mut vms);
            ring_every_vm(&mut vms);
            let [stays, mut leaves] = vms;
            resident = stays;
            assert!(ids.insert(leaves.id()), "round {round}: an id was used again");
            if round % 10 == 0 { leaves.quit() } else { leaves.kill() }
        }
    }
    let mut vms = [resident, Vm::start(daemon.socket_path(), VECTORS)];
    wait_until_all_connected(&mut vms);
    ring_every_vm(&mut vms);
    vms.into_iter().for_each(Vm::quit);
    daemon.stop();
}

#[test]
fn doorbells_still_work_after_the_server_is_killed() {
    let mut daemon = Daemon::builder().vectors(4).start();
    let mut vms = [(); 2].map(|()| Vm::start(daemon.socket_path(), 4));
    wait_until_all_connected(&mut vms);
    daemon.signal(Signal::SIGKILL);
    daemon.wait();
    ring_every_vm(&mut vms);
    vms.into_iter().for_each(Vm::quit);
}

#[test]
fn with_kvm_every_vector_rung_both_ways_sets_its_own_pending_bit_and_no_other() {
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        return skip(&format!("/dev/kvm cannot be opened: {error}"));
    }
    let daemon = Daemon::builder().vectors(8).start();
    let mut vms = [Accel::Kvm, Accel::Kvm, Accel::Tcg]
        .map(|accel| Vm::spawn(daemon.socket_path(), 8, accel).up());
    wait_until_all_connected(&mut vms);
    ring_every_vm(&mut vms);
    drop(vms);
    daemon.stop();
}
