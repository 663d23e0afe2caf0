// SPDX-License-Identifier: GPL-2.0-or-later
//! What stock QEMUs see over a restart of the server: each other's interrupts, one memory, their own ids.

#![forbid(unsafe_code)]

use std::path::Path;

use crate::common::vm::Vm;
use crate::common::wait_for;

/// Lets one machine interrupt the other until it arrives: the sender may learn of the other a moment later.
#[track_caller]
pub(crate) fn ring(from: &mut Vm, to: &mut Vm, vector: u16) {
    let id = to.id();
    wait_for("an interrupt arrives", || {
        from.ring(id, vector);
        to.pending().contains(&vector).then_some(())
    });
    to.clear(vector);
}

const OFFSET: u64 = 4096;

fn text_of(index: usize) -> Vec<u8> {
    format!("machine {index}").into_bytes()
}

/// Two machines before the restart. Returns their ids.
pub(crate) fn check_before(vms: &mut [Vm; 2]) -> [u16; 2] {
    let ids = [vms[0].id(), vms[1].id()];
    let [one, other] = vms;
    ring(one, other, 1);
    ring(other, one, 1);
    for (index, vm) in vms.iter_mut().enumerate() {
        vm.write_memory(OFFSET * (1 + index as u64), &text_of(index));
    }
    ids
}

/// The same two machines after it, and a third that joins.
#[track_caller]
pub(crate) fn check_after(socket: &Path, vms: &mut [Vm; 2], ids: &[u16; 2]) {
    assert_eq!([vms[0].id(), vms[1].id()], *ids, "IVPosition");
    let mut third = Vm::start(socket, 2);
    let id = third.id();
    assert!(!ids.contains(&id), "{id} of {ids:?}");
    third.write_memory(OFFSET * 3, &text_of(3));
    for (index, vm) in vms.iter_mut().enumerate() {
        ring(vm, &mut third, 0);
        ring(&mut third, vm, 1);
        let wrote = text_of(index);
        assert_eq!(third.read_memory(OFFSET * (1 + index as u64), wrote.len()), wrote);
        assert_eq!(vm.read_memory(OFFSET * 3, text_of(3).len()), text_of(3));
    }
    let [one, other] = vms;
    ring(one, other, 0);
    ring(other, one, 1);
}
