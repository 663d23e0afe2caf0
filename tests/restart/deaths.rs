// SPDX-License-Identifier: GPL-2.0-or-later
//! A server that the kernel kills for want of memory, and a supervisor that is process 1 of a container.

#![forbid(unsafe_code)]

use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};

use crate::common::cgroup::Cgroup;
use crate::common::daemon::program;
use crate::common::program::{Place, Process};
use crate::common::skip::skip;
use crate::common::vm::Vm;
use crate::common::{text_of, wait_for};
use crate::crowd::Crowd;
use crate::supervisor::{children, servers};
use crate::vms::{check_after, check_before};
use crate::{start, wait_until_idle};

/// A group in which a server that runs can join some clients, but not many.
const LITTLE: u64 = 256 << 10;

#[test]
fn clients_go_on_after_the_kernel_killed_the_server_for_want_of_memory() {
    let supervisor = start(2);
    let server = supervisor.server_other_than(None);
    let mut crowd = Crowd::new(supervisor.place.socket(), 2);
    (0..10).for_each(|_| crowd.connect());
    crowd.settle();
    wait_until_idle(server);
    let Some(cgroup) = Cgroup::with_limit(LITTLE) else { return };
    cgroup.take(server);
    while servers(supervisor.pid()).contains(&server) {
        let count = crowd.clients.len();
        assert!(count < 5000, "the server needs no memory for {count} clients");
        crowd.connect();
        crowd.settle();
    }
    assert_eq!(cgroup.killed(), 1);
    supervisor.wait_until_serving(Some(server));
    crowd.connect();
    crowd.settle();
    let log = text_of(&supervisor.log());
    assert!(log.contains("was killed by SIGKILL"), "{log}");
    // The kernel may have killed it in the middle of a send.
    assert!(crowd.ended.len() <= 1, "{:?} were ended\n{log}", crowd.ended);
    for id in crowd.ended.iter().flatten() {
        assert!(log.contains(&format!("peer {id} is ended at the restart")), "{id}: {log}");
    }
}

#[test]
fn vms_do_not_notice_that_the_server_of_a_container_was_killed() {
    if !geteuid().is_root() {
        return skip("a new pid namespace needs root");
    }
    let place = Place::new();
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--mount-proc", "--kill-child"]).arg(program());
    command.args(["-F", "--supervise", "--memfd", "-n", "2", "-S"]).arg(place.socket());
    command.env("RUNTIME_DIRECTORY", place.dir()).env_remove("NOTIFY_SOCKET");
    let mut container = Process::spawn(&mut command);
    container.wait_until_listening(&place.socket());
    let init = children(container.pid())[0];
    let server = |old: Option<Pid>| {
        wait_for("a server", || servers(init).into_iter().find(|&pid| Some(pid) != old))
    };
    let socket = place.socket();
    let mut vms = [Vm::start(&socket, 2), Vm::start(&socket, 2)];
    let ids = check_before(&mut vms);
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        let before = server(None);
        wait_until_idle(before);
        kill(before, signal).expect("it runs");
        server(Some(before));
        check_after(&socket, &mut vms, &ids);
    }
    kill(init, Signal::SIGTERM).expect("it runs");
    let ended = container.end();
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    assert!(!socket.exists(), "the end for good removes the socket");
}
