// SPDX-License-Identifier: GPL-2.0-or-later
//! A server that is killed without a keeper, and the next one on the same memory, while clients of the first one live:
//! no id is given twice.

// One function in common::peer takes over received descriptors; every other module forbids unsafe code.
#![deny(unsafe_code)]

mod common;

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use common::peer::Peer;
use common::program::{Ended, Place, Process, memory_of};
use common::target::Target;
use common::vm::Vm;
use common::{text_of, wait_for};

on_each_server! {
    ids_go_on_behind_those_of_clients_that_outlive_their_server,
    a_client_that_removes_the_locks_has_ids_from_before_the_start_given_again,
    no_lock_of_a_client_keeps_the_next_server_from_starting,
}

/// Byte N behind this one stands for the id N.
const BASE: i64 = 1 << 62;

/// The log line about clients that may live.
const WARNING: &str = "clients of a server that ended may still use shared memory";

/// Lets one test run at a time: a process that another test starts has copies of all descriptors until it executes its
/// program, so clients that this test has closed would live on for a moment.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn sigkill(server: Process) -> Ended {
    server.signal(Signal::SIGKILL);
    server.end()
}

/// Asserts that the daemon's log has, or has not, all of these texts. The C program has no log.
#[track_caller]
fn assert_logged(target: Target, ended: &Ended, texts: &[&str], expected: bool) {
    if target.logs() {
        for text in texts {
            assert_eq!(ended.stderr.contains(text), expected, "{text:?} in {ended:?}");
        }
    }
}

fn set_lock(memory: impl AsFd, kind: libc::c_int, start: i64, len: i64) {
    let lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: len,
        l_pid: 0,
    };
    fcntl(memory, FcntlArg::F_OFD_SETLK(&lock)).expect("a client may");
}

fn inode(place: &Place) -> u64 {
    fs::metadata(place.shm()).expect("it is served").ino()
}

fn ids_go_on_behind_those_of_clients_that_outlive_their_server(target: Target) {
    let _alone = alone();
    let place = Place::new();
    let server = place.serve_by(target);
    let old = [Peer::join(&place.socket(), 1), Peer::join(&place.socket(), 1)];
    let mut vm = Vm::start(&place.socket(), 1);
    assert_eq!((old[0].id(), old[1].id(), vm.id()), (0, 1, 2));
    let before = inode(&place);
    assert_logged(target, &sigkill(server), &[WARNING], false);

    let server = place.serve_by(target);
    let second = Peer::join(&place.socket(), 1);
    assert_eq!(second.id(), 64, "behind the block of the ids 0 to 2");
    assert_eq!(Peer::join(&place.socket(), 1).id(), 65);
    assert_eq!(inode(&place), before);
    vm.write_memory(4096, b"from the old one");
    let mut bytes = [0; 16];
    memory_of(&second).read_exact_at(&mut bytes, 4096).expect("it is there");
    assert_eq!(&bytes, b"from the old one", "the memory is the same");
    assert_eq!(vm.id(), 2);
    let expected = [WARNING, &place.name, "ids go on at 64\n"];
    assert_logged(target, &sigkill(server), &expected, true);

    // The VM alone keeps its ids from being given: descriptors are closed, or not, but it has the memory mapped.
    drop((old, second));
    let server = place.serve_by(target);
    let third = Peer::join(&place.socket(), 1);
    assert_eq!(third.id(), 64);
    assert_logged(target, &sigkill(server), &[WARNING], true);

    // Few ids are unused from 0 on.
    vm.quit();
    let server = place.serve_by(target);
    assert_eq!(Peer::join(&place.socket(), 1).id(), 128);
    assert_logged(target, &sigkill(server), &["ids go on at 128\n"], true);

    drop(third);
    let server = place.serve_by(target);
    assert_eq!(Peer::join(&place.socket(), 1).id(), 0, "no client is left");
    assert_eq!(inode(&place), before);
    assert_logged(target, &server.stop(), &[WARNING, "has locked"], false);
    place.assert_holds_only(&[]);
}

#[test]
fn a_first_id_that_no_client_has_is_used() {
    let _alone = alone();
    let place = Place::new();
    let server = place.serve(&[]);
    let _old = Peer::join(&place.socket(), 1);
    sigkill(server);
    for (option, id) in [("1000", 1000), ("10", 64), ("65535", 64), ("65500", 64)] {
        let server = place.serve(&["--first-id", option]);
        assert_eq!(Peer::join(&place.socket(), 1).id(), id, "--first-id {option}");
        let ended = sigkill(server);
        assert!(ended.stderr.contains(&format!("ids go on at {id}\n")), "{ended:?}");
    }
}

#[test]
fn a_server_that_ends_in_order_leaves_nothing_to_the_next() {
    let _alone = alone();
    let place = Place::new();
    let server = place.serve(&[]);
    let old = Peer::join(&place.socket(), 1);
    server.stop();
    let server = place.serve(&[]);
    let new = Peer::join(&place.socket(), 1);
    assert_eq!(new.id(), 0);
    let inodes = [&old, &new].map(|peer| memory_of(peer).metadata().expect("fstat works").ino());
    assert_ne!(inodes[0], inodes[1], "new memory");
    let ended = server.stop();
    assert!(!ended.stderr.contains(WARNING), "{ended:?}");
}

fn a_client_that_removes_the_locks_has_ids_from_before_the_start_given_again(target: Target) {
    let _alone = alone();
    let place = Place::new();
    let server = place.serve_by(target);
    let old = Peer::join(&place.socket(), 1);
    let before = inode(&place);
    set_lock(old.memory(), libc::F_UNLCK, 0, 0);
    // The server that lives does not notice.
    assert_eq!(Peer::join(&place.socket(), 1).id(), 1);
    sigkill(server);
    let server = place.serve_by(target);
    assert_eq!(Peer::join(&place.socket(), 1).id(), 0, "as it was before there were such locks");
    assert_eq!(inode(&place), before);
    assert_logged(target, &server.stop(), &[WARNING, "has locked"], false);
    place.assert_holds_only(&[]);
}

fn no_lock_of_a_client_keeps_the_next_server_from_starting(target: Target) {
    let _alone = alone();
    let place = Place::new();
    let server = place.serve_by(target);
    let old = Peer::join(&place.socket(), 1);
    let before = inode(&place);
    let opened = || {
        let path = format!("/proc/self/fd/{}", old.memory().as_raw_fd());
        File::options().read(true).write(true).open(path).expect("the owner may")
    };
    sigkill(server);

    // The whole object, as programs do that lock its content.
    let whole = opened();
    set_lock(&whole, libc::F_RDLCK, 0, 0);
    let server = place.serve_by(target);
    assert_eq!(Peer::join(&place.socket(), 1).id(), 64, "the locks of the server are found");
    assert_eq!(inode(&place), before);
    assert_logged(target, &sigkill(server), &[WARNING, "another program has locked"], true);
    drop(whole);

    // All ids: a new object, as no id is left for this one.
    let all = opened();
    set_lock(&all, libc::F_RDLCK, BASE, 65_536);
    let server = place.serve_by(target);
    let new = Peer::join(&place.socket(), 1);
    assert_eq!(new.id(), 0);
    assert_ne!(inode(&place), before);
    assert_eq!(memory_of(&new).metadata().expect("fstat works").ino(), inode(&place));
    assert_eq!(memory_of(&new).metadata().expect("fstat works").len(), 64 << 10);
    let texts = [WARNING, &place.name, "a new object takes its name"];
    assert_logged(target, &server.stop(), &texts, true);
    place.assert_holds_only(&[]);
}

#[test]
fn a_server_that_was_resumed_keeps_ids_from_the_next_without_a_keeper() {
    let _alone = alone();
    let place = Place::new();
    let supervisor = place.serve(&["--supervise"]);
    let child = || {
        let pid = supervisor.pid();
        let path = format!("/proc/{pid}/task/{pid}/children");
        let children = fs::read_to_string(path).expect("the supervisor runs");
        children.trim().parse().ok().map(Pid::from_raw)
    };
    let resident = Peer::join(&place.socket(), 1);
    let first = child().expect("a server runs");
    kill(first, Signal::SIGKILL).expect("it runs");
    // It waits in the listening socket, which was kept, for the next server.
    let mut peers: Vec<Peer> = (0..64).map(|_| Peer::join(&place.socket(), 1)).collect();
    let newest = peers.pop().expect("64 peers");
    assert_eq!((resident.id(), newest.id()), (0, 64));
    let second = wait_for("the next server", || child().filter(|&pid| pid != first));
    // Its output stays open, as the server has it too.
    drop(supervisor);
    kill(second, Signal::SIGKILL).expect("it goes on alone");
    wait_for("its end", || {
        let stat = text_of(Path::new(&format!("/proc/{second}/stat")));
        (stat.is_empty() || stat.contains(") Z ")).then_some(())
    });

    drop(peers);
    let server = place.serve(&[]);
    assert_eq!(Peer::join(&place.socket(), 1).id(), 128);
    sigkill(server);
    drop(newest);
    let server = place.serve(&[]);
    let id = Peer::join(&place.socket(), 1).id();
    assert_eq!(id, 128, "all clients of one supervisor share one open file");
    sigkill(server);
    drop(resident);
    let server = place.serve(&[]);
    assert_eq!(Peer::join(&place.socket(), 1).id(), 0);
    server.stop();
}
