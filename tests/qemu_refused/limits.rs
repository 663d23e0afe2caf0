// SPDX-License-Identifier: GPL-2.0-or-later
//! Stock QEMU that a limit of the server's operator refuses: the number of clients, the clients of one user, the list of
//! users, or a rule of a Rust program.
//!
//! The C API has no such limits, so these tests run on the daemon and on the Rust API only.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use ivshmem::{Event, Refusal, Server};

use crate::check_refused;
use crate::common::daemon::Daemon;
use crate::common::peer::Peer;
use crate::common::target::is_root;
use crate::common::user::as_user;
use crate::common::wait_for;
use crate::qemu::Running;

const ONE: u32 = 1_100_041;
const OTHER: u32 = 1_100_042;

/// Connects a client that uses up the limit, checks that a QEMU of the same user is refused, and that it is admitted
/// after the client has left.
#[track_caller]
fn check_refused_beside_one_client(server: &Daemon) -> Running {
    let client = Peer::join(server.socket_path(), 1);
    let mut vm = Running::start();
    check_refused(server.socket_path(), &mut vm);
    drop(client);
    wait_for("the server has no client", || (server.open_fds() == server.idle_fds()).then_some(()));
    vm.plug(server.socket_path());
    vm.assert_plugged();
    vm
}

#[test]
fn with_max_clients_a_qemu_ends_with_an_error_and_device_add_fails() {
    let server = Daemon::builder().arg("--max-clients=1").start();
    check_refused_beside_one_client(&server);
    assert!(server.stop().contains("as the limit allows: 1"));
}

#[test]
fn with_max_clients_per_uid_a_qemu_ends_with_an_error_and_device_add_fails() {
    let server = Daemon::builder().for_all_users().arg("--max-clients-per-uid=1").start();
    let _first = check_refused_beside_one_client(&server);
    if is_root("start a QEMU as another user") {
        let mut vm = as_user(OTHER, Running::start);
        vm.plug(server.socket_path());
        vm.assert_plugged();
    }
    assert!(server.stop().contains("the limit for each user is 1"));
}

/// The options that admit only [`OTHER`].
fn options_for_the_other_user() -> [String; 2] {
    // `as_user` changes user and group.
    [format!("--allow-uid={OTHER}"), format!("--allow-gid={OTHER}")]
}

#[test]
fn when_only_another_user_is_allowed_a_qemu_ends_with_an_error_and_device_add_fails() {
    for option in options_for_the_other_user() {
        let server = Daemon::builder().arg(&option).start();
        check_refused(server.socket_path(), &mut Running::start());
        assert!(server.stop().contains("--allow-uid"));
    }
}

#[test]
fn a_qemu_of_the_allowed_user_is_admitted_where_one_of_another_user_is_refused() {
    if !is_root("start a QEMU as another user") {
        return;
    }
    for option in options_for_the_other_user() {
        let server = Daemon::builder().for_all_users().arg(&option).start();
        as_user(ONE, || check_refused(server.socket_path(), &mut Running::start()));
        let mut vm = as_user(OTHER, Running::start);
        vm.plug(server.socket_path());
        vm.assert_plugged();
        assert!(server.stop().contains(&format!("uid {ONE}")));
    }
}

#[test]
fn a_qemu_that_the_callers_rule_refuses_ends_with_an_error_and_device_add_fails() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let socket = directory.path().join("socket");
    let admits = Arc::new(AtomicBool::new(false));
    let rule = {
        let admits = Arc::clone(&admits);
        move |_: &ivshmem::Applicant<'_>| {
            admits.load(Ordering::Relaxed).then_some(()).ok_or_else(|| "not yet".to_owned())
        }
    };
    let mut server = Server::builder().socket_path(&socket).admit(rule).start().expect("a server");
    let serving = thread::spawn(move || {
        let mut events = Vec::new();
        while !matches!(events.last(), Some(Event::Left { .. })) {
            events.extend(server.wait(None).expect("the system reports events"));
        }
        events
    });
    let mut vm = Running::start();
    check_refused(&socket, &mut vm);
    admits.store(true, Ordering::Relaxed);
    vm.plug(&socket);
    vm.assert_plugged();
    drop(vm);
    wait_for("the server removes QEMU", || serving.is_finished().then_some(()));

    let events = serving.join().expect("the server's thread ends without a panic");
    let (refused, admitted) = events.split_at(3);
    for event in refused {
        let Event::Refused { reason: Refusal::NotPermitted(text), .. } = event else {
            panic!("{events:?}")
        };
        assert_eq!(text, "not yet");
    }
    assert!(
        matches!(admitted, [Event::Joined { id: 0, .. }, Event::Left { id: 0, .. }]),
        "{events:?}"
    );
}
