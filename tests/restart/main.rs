// SPDX-License-Identifier: GPL-2.0-or-later
//! A server that is killed, restarted and upgraded below its supervisor and below a real systemd. Its clients are stock
//! QEMUs and raw clients that check each message.

// One function in common::peer takes over received descriptors; every other module forbids unsafe code.
#![deny(unsafe_code)]

mod activation;
#[path = "../common/mod.rs"]
mod common;
mod crowd;
mod deaths;
#[path = "../supervise/supervisor.rs"]
#[allow(dead_code, reason = "the tests of the supervisor use the rest")]
mod supervisor;
mod systemd;
mod upgrade;
mod vms;

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use common::daemon::program;
use common::peer::Peer;
use common::vm::Vm;
use common::{is_asleep, text_of, wait_for};
use crowd::{Crowd, below};
use supervisor::Supervisor;
use vms::{check_after, check_before};

/// A supervisor whose log is in its place.
fn start(vectors: u32) -> Supervisor {
    Supervisor::start_program(&program(), |command| {
        command.args(["-n", &vectors.to_string()]);
    })
}

/// Waits until a server has sent everything. One that is killed in the middle of a send ends that client, so a test that
/// has just received a message must not kill it.
fn wait_until_idle(server: Pid) {
    wait_for("the server waits for events", || is_asleep(server).then_some(()));
}

/// Ends the server by a signal, and waits for the next one.
fn replace_server(supervisor: &Supervisor, server: Pid, signal: Signal) -> Pid {
    wait_until_idle(server);
    kill(server, signal).expect("it runs");
    supervisor.wait_until_serving(Some(server))
}

#[test]
fn two_vms_do_not_notice_that_the_server_was_killed_and_a_third_joins_them() {
    let mut supervisor = start(2);
    let server = supervisor.server_other_than(None);
    let socket = supervisor.place.socket();
    let mut vms = [Vm::start(&socket, 2), Vm::start(&socket, 2)];
    let ids = check_before(&mut vms);
    let server = replace_server(&supervisor, server, Signal::SIGKILL);
    check_after(&socket, &mut vms, &ids);
    // SIGABRT is what a panic that nothing catches ends with, and SIGTERM a hand-over.
    let server = replace_server(&supervisor, server, Signal::SIGABRT);
    check_after(&socket, &mut vms, &ids);
    replace_server(&supervisor, server, Signal::SIGTERM);
    check_after(&socket, &mut vms, &ids);
    supervisor.signal(Signal::SIGTERM);
    let ended = supervisor.end();
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    assert!(!socket.exists(), "the end for good removes the socket");
}

#[test]
fn a_stopped_vm_is_complete_after_three_restarts() {
    let supervisor = start(1);
    let mut server = supervisor.server_other_than(None);
    let socket = supervisor.place.socket();
    let mut first = Vm::start(&socket, 1);
    let mut stopped = Vm::start(&socket, 1);
    let ids = [first.id(), stopped.id()];
    stopped.signal(Signal::SIGSTOP);
    let mut joined = Vec::new();
    for _ in 0..3 {
        let leaves = Peer::join(&socket, 1);
        joined.push(Vm::start(&socket, 1));
        server = replace_server(&supervisor, server, Signal::SIGKILL);
        drop(leaves);
        joined.push(Vm::start(&socket, 1));
    }
    stopped.signal(Signal::SIGCONT);
    assert_eq!([first.id(), stopped.id()], ids);
    joined.push(first);
    for vm in &mut joined {
        vms::ring(&mut stopped, vm, 0);
        vms::ring(vm, &mut stopped, 0);
    }
    drop(supervisor);
}

#[test]
fn sigint_to_the_supervisor_ends_the_clients() {
    let mut supervisor = start(1);
    let mut client = Peer::join(&supervisor.place.socket(), 1).into_connection();
    supervisor.signal(Signal::SIGINT);
    let ended = supervisor.end();
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    let end = client.receive(common::PATIENCE).expect("the stream ends with a whole message");
    assert!(end.is_none(), "{end:?}");
}

/// How long the server is killed again and again.
fn seconds() -> u64 {
    std::env::var("SOAK_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(60)
}

#[test]
fn clients_of_a_server_that_is_killed_every_50_to_500_ms_see_no_gap_and_no_message_twice() {
    const VECTORS: u32 = 3;
    let supervisor = start(VECTORS);
    let socket = supervisor.place.socket();
    let mut crowd = Crowd::new(socket.clone(), VECTORS);
    let seed = std::env::var("SOAK_SEED").ok().and_then(|text| text.parse().ok());
    let mut random = seed.unwrap_or_else(|| u64::from(std::process::id()));
    println!("SOAK_SEED={random}");
    let until = Instant::now() + Duration::from_secs(seconds());
    let mut server = supervisor.server_other_than(None);
    let mut kills = 0;
    while Instant::now() < until {
        let life = Duration::from_millis(50 + below(&mut random, 450));
        let end = Instant::now() + life;
        while Instant::now() < end {
            crowd.step(&mut random);
        }
        kill(server, Signal::SIGKILL).expect("it runs");
        kills += 1;
        server = supervisor.server_other_than(Some(server));
    }
    let messages = crowd.settle();
    drop(crowd.clients);
    let log = text_of(&supervisor.log());
    for id in crowd.ended.iter().flatten() {
        assert!(log.contains(&format!("peer {id} is ended at the restart")), "{id}: {log}");
    }
    println!("{kills} kills, {} clients ended, {messages} messages at the end", crowd.ended.len());
    assert!(kills > 0);
    wait_for("all clients are gone", || {
        let peer = Peer::join(&socket, VECTORS as u16);
        peer.others().is_empty().then_some(())
    });
}
