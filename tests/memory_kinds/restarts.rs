// SPDX-License-Identifier: GPL-2.0-or-later
//! Each kind of memory over a restart, with a keeper and without one.

#![forbid(unsafe_code)]

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::Command;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::signal::{Signal, kill};

use super::supervisor::{Supervisor, servers};
use super::{alone, assert_content, serve, sigkill, text};
use crate::common::huge_pages::{HugeMount, HugePages};
use crate::common::loop_device::LoopDevice;
use crate::common::peer::Peer;
use crate::common::program::{Place, memory_of};
use crate::common::skip::skip;
use crate::common::{is_asleep, wait_for};

/// Device and inode of a client's memory.
fn identity(peer: &Peer) -> (u64, u64) {
    let meta = memory_of(peer).metadata().expect("fstat works");
    (meta.dev(), meta.ino())
}

/// Kills the server of a supervisor, then hands over to the next: old and new clients share the memory.
#[track_caller]
fn check_with_keeper(args: &[&str]) {
    let mut supervisor = Supervisor::start_with(Place::new(), |command| {
        command.args(args);
    });
    let socket = supervisor.place.socket();
    let mut server = supervisor.server_other_than(None);
    let old = Peer::join(&socket, 1);
    memory_of(&old).write_all_at(b"from the first", 100).expect("it is there");
    for (id, signal) in [(1, Signal::SIGKILL), (2, Signal::SIGTERM)] {
        wait_for("the server waits for events", || is_asleep(server).then_some(()));
        kill(server, signal).expect("it runs");
        server = supervisor.wait_until_serving(Some(server));
        let new = Peer::join(&socket, 1);
        assert_eq!((new.id(), identity(&new)), (id, identity(&old)), "{args:?}");
        assert_content(&new, 100, b"from the first");
        memory_of(&new).write_all_at(b"from the next", 200).expect("it is there");
        assert_content(&old, 200, b"from the next");
    }
    supervisor.signal(Signal::SIGINT);
    let ended = supervisor.end();
    assert_eq!(ended.status.code(), Some(0), "{args:?}: {ended:?}");
    assert!(!ended.stderr.contains("left alone"), "{args:?}: {ended:?}");
}

/// Kills a server without a keeper: the next one serves the same memory, and gives no id of its clients.
#[track_caller]
fn check_without_keeper(args: &[&str]) {
    let place = Place::new();
    let server = serve(&place, args);
    let old = Peer::join(&place.socket(), 1);
    memory_of(&old).write_all_at(b"from the first", 100).expect("it is there");
    sigkill(server);
    let server = serve(&place, args);
    let new = Peer::join(&place.socket(), 1);
    assert_eq!((new.id(), identity(&new)), (64, identity(&old)), "{args:?}");
    assert_content(&new, 100, b"from the first");
    let ended = server.stop();
    assert!(ended.stderr.contains("ids go on at 64"), "{args:?}: {ended:?}");
    // A client outlives a server that ends in order, too, and its memory stays.
    drop(new);
    let server = serve(&place, args);
    assert_eq!(Peer::join(&place.socket(), 1).id(), 64, "{args:?}");
    server.stop();
    drop(old);
    let server = serve(&place, args);
    let last = Peer::join(&place.socket(), 1);
    assert_eq!(last.id(), 0, "{args:?}: no client is left");
    assert_content(&last, 100, b"from the first");
    server.stop();
}

#[test]
fn usual_memory_survives_its_server() {
    let _alone = alone();
    let place = Place::new();
    let (file, name) = (place.path("memory"), &*place.name);
    for kind in [
        &["--memfd"][..],
        &["--memfd", "--size-exact", "-l", "12K"],
        &["--memfd", "--numa-node", "0"],
        &["-m", text(place.dir())],
        &["-M", name],
        &["--shm-file", text(&file)],
    ] {
        check_with_keeper(kind);
    }
    assert!(file.exists());
    place.assert_holds_only(&["memory"]);
    check_with_keeper(&["-M", name, "--keep"]);
    assert!(place.shm().exists());
    check_without_keeper(&["-M", name, "--keep"]);
    check_without_keeper(&["--shm-file", text(&file)]);
    check_without_keeper(&["--shm-file", text(&file), "--numa-node", "0"]);
}

/// It was removed, replaced, or has become another user's thing.
#[test]
fn clients_go_on_with_a_file_that_the_next_server_does_not_find() {
    let _alone = alone();
    let place = Place::new();
    let (directory, file) = (place.path("directory"), place.path("directory/memory"));
    fs::create_dir(&directory).expect("the place is ours");
    for (change, text_of_log) in [
        ("chmod 666 memory", "has mode 0666"),
        ("rm memory", "is not the memory that clients have"),
        ("mv memory before; echo precious > memory; chmod 600 memory", "the name is left alone"),
        ("rm memory; mkfifo memory", "is a FIFO"),
        ("rm -r ../directory", "No such file"),
    ] {
        let mut supervisor = Supervisor::start_with(Place::new(), |command| {
            command.args(["--shm-file", text(&file), "-l", "64K"]);
        });
        let socket = supervisor.place.socket();
        let server = supervisor.server_other_than(None);
        let old = Peer::join(&socket, 1);
        let mut shell = Command::new("sh");
        let changed = shell.args(["-ec", change]).current_dir(&directory).status();
        assert!(changed.expect("a shell").success());
        wait_for("the server waits for events", || is_asleep(server).then_some(()));
        kill(server, Signal::SIGKILL).expect("it runs");
        let new = Peer::join(&socket, 1);
        assert_eq!((new.id(), identity(&new)), (1, identity(&old)), "{change}");
        supervisor.signal(Signal::SIGINT);
        let ended = supervisor.end();
        assert!(ended.stderr.contains(text_of_log), "{change}: {ended:?}");
        if change.contains("precious") {
            assert_eq!(fs::read(&file).expect("it is kept"), b"precious\n");
        }
        let _ = fs::remove_file(&file);
        let _ = fs::remove_file(directory.join("before"));
    }
}

#[test]
fn memory_on_a_device_survives_its_server() {
    let _alone = alone();
    let place = Place::new();
    let Some(device) = LoopDevice::new(&place.path("disk"), 1 << 20) else { return };
    let args = ["--shm-file", text(device.path())];
    check_with_keeper(&args);
    check_without_keeper(&args);
}

#[test]
fn memory_of_huge_pages_survives_its_server() {
    let _alone = alone();
    let Some(_pages) = HugePages::reserve(1) else {
        return skip("the kernel has no huge page for us (/proc/sys/vm/nr_hugepages)");
    };
    // A hugetlbfs cannot be written by write(2), so the clients map it.
    let option = format!("{}M", HugePages::size() >> 20);
    let size = HugePages::size().to_string();
    huge::check(&["--memfd", "--hugetlb", &option, "-l", &size], true);
    let place = Place::new();
    let Some(mount) = HugeMount::new(place.path("huge")) else {
        return skip("a hugetlbfs cannot be mounted");
    };
    huge::check(&["-m", text(mount.path()), "-l", &size], true);
    let file = mount.path().join("memory");
    huge::check(&["--shm-file", text(&file), "-l", &size], true);
    huge::check(&["--shm-file", text(&file), "-l", &size], false);
    huge::check_growth(&["--shm-file", text(&file), "-l", &size]);
    assert_eq!(fs::read_dir(mount.path()).expect("it is mounted").count(), 1);
}

#[test]
fn a_client_that_gives_huge_pages_back_does_not_keep_the_server_from_going_on() {
    let _alone = alone();
    let Some(pages) = HugePages::reserve(2) else {
        return skip("the kernel has no 2 huge pages for us (/proc/sys/vm/nr_hugepages)");
    };
    let option = format!("{}M", HugePages::size() >> 20);
    let size = (2 * HugePages::size()).to_string();
    let mut supervisor = Supervisor::start_with(Place::new(), |command| {
        command.args(["--hugetlb", &option, "-l", &size]);
    });
    let socket = supervisor.place.socket();
    let server = supervisor.server_other_than(None);
    let old = Peer::join(&socket, 1);
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let length = HugePages::size() as i64;
    fallocate(old.memory(), flags, 0, length).expect("no seal prevents it");
    pages.take_free();
    wait_for("the server waits for events", || is_asleep(server).then_some(()));
    kill(server, Signal::SIGKILL).expect("it runs");
    let new = Peer::join(&socket, 1);
    assert_eq!((new.id(), identity(&new)), (1, identity(&old)));
    supervisor.signal(Signal::SIGINT);
    let ended = supervisor.end();
    let text = "needs 1 huge pages";
    assert!(ended.stderr.contains(text) && ended.stderr.contains("goes on"), "{ended:?}");
}

/// Locks on all ids are no reason to replace a user's file, or to refuse to start.
#[test]
fn a_file_is_never_replaced() {
    let _alone = alone();
    use nix::fcntl::{FcntlArg, fcntl};
    use nix::libc;
    let place = Place::new();
    let file = place.path("memory");
    let args = ["--shm-file", text(&file), "-l", "4K"];
    let server = serve(&place, &args);
    let old = Peer::join(&place.socket(), 1);
    let lock = libc::flock {
        l_type: libc::F_RDLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 1 << 62,
        l_len: 65_536,
        l_pid: 0,
    };
    fcntl(old.memory(), FcntlArg::F_OFD_SETLK(&lock)).expect("a client may");
    sigkill(server);
    let server = serve(&place, &args);
    let new = Peer::join(&place.socket(), 1);
    assert_eq!((new.id(), identity(&new)), (0, identity(&old)));
    let ended = server.stop();
    assert!(ended.stderr.contains("new clients may get their ids"), "{ended:?}");
    place.assert_holds_only(&["memory"]);
}

mod huge {
    use ivshmem::Client;

    use super::*;

    /// Like the checks of other memory, with clients that map it.
    #[track_caller]
    pub(super) fn check(args: &[&str], has_keeper: bool) {
        let place = Place::new();
        let mut supervised = args.to_vec();
        if has_keeper {
            supervised.push("--supervise");
        }
        let first = serve(&place, &supervised);
        let old = Client::connect(place.socket()).expect("it is served");
        old.memory().write(100, b"from the first").expect("it is there");
        let server = if has_keeper {
            let pid = first.pid();
            let server = servers(pid)[0];
            wait_for("the server waits for events", || is_asleep(server).then_some(()));
            kill(server, Signal::SIGKILL).expect("it runs");
            first
        } else {
            sigkill(first);
            serve(&place, args)
        };
        let new = Client::connect(place.socket()).expect("it is served");
        assert_eq!(new.id(), if has_keeper { 1 } else { 64 }, "{args:?}");
        let mut bytes = [0; 14];
        new.memory().read(100, &mut bytes).expect("it is there");
        assert_eq!(&bytes, b"from the first", "{args:?}");
        new.memory().write(200, b"from the next").expect("it is there");
        let mut bytes = [0; 13];
        old.memory().read(200, &mut bytes).expect("it is there");
        assert_eq!(&bytes, b"from the next", "{args:?}");
        server.stop();
    }

    /// A client makes the file larger after its server was killed.
    #[track_caller]
    pub(super) fn check_growth(args: &[&str]) {
        let place = Place::new();
        let server = serve(&place, args);
        let peer = Peer::join(&place.socket(), 1);
        let size = memory_of(&peer).metadata().expect("fstat works").len();
        sigkill(server);
        memory_of(&peer).set_len(4 * size).expect("a client can");
        let ended = serve(&place, args).stop();
        assert!(ended.stderr.contains(&format!("cut back to {size}")), "{ended:?}");
        assert_eq!(memory_of(&peer).metadata().expect("fstat works").len(), size);
    }
}
