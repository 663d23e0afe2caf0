// SPDX-License-Identifier: GPL-2.0-or-later
//! The control socket of the daemon: its methods, its events, who may use it, its path, and that no control client blocks
//! the server or makes it grow.

// One function in common::peer takes over received descriptors; every other module forbids unsafe code.
#![deny(unsafe_code)]

#[path = "control/caller.rs"]
mod caller;
mod common;
#[path = "control/hostile.rs"]
mod hostile;
#[path = "control/others.rs"]
mod others;
#[path = "control/paths.rs"]
mod paths;
#[path = "control/program.rs"]
mod program;
#[path = "supervise/supervisor.rs"]
#[allow(dead_code, reason = "the tests of the supervisor use the rest")]
mod supervisor;
#[path = "control/systemd.rs"]
mod systemd;

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::sys::signal::{Signal, kill};
use nix::unistd::geteuid;
use serde_json::{Value, json};

use caller::{Caller, control_of, status, wait_for_status};
use common::daemon::{Daemon, program as server_program};
use common::peer::{Connection, Peer};
use common::wait_for;
use supervisor::Supervisor;

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs()
}

#[test]
fn the_status_has_the_server_and_each_peer() {
    let start = now();
    let daemon = Daemon::builder().vectors(2).size("2M").start();
    let socket = daemon.socket_path();
    let before = status(socket);
    assert_eq!(before["peers"], json!([]));
    let peers = [Peer::join(socket, 2), Peer::join(socket, 2)];
    drop(Peer::join(socket, 2));
    let status = wait_for_status(socket, "the third one left", |status| status["left"] == 1);

    let expected = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "pid": daemon.pid().as_raw(),
        "uid": geteuid().as_raw(),
        "socket": socket,
        "restarts": 0,
        "vectors": 2,
        "memory": {"kind": "posix", "name": daemon.shm_path(), "size": 2 << 20},
        "ids": {"free": 65_533, "used": 2, "remembered": 1},
        "joined": 3,
        "left": 1,
        "lingering": 0,
    });
    for (name, value) in expected.as_object().expect("an object") {
        assert_eq!(&status[name], value, "{name}");
    }
    assert!(status["started"].as_u64().is_some_and(|time| (start..=now()).contains(&time)));
    let descriptors = &status["descriptors"];
    // The connection of this call has one.
    assert!(descriptors["open"].as_u64().is_some_and(|open| open >= daemon.open_fds() as u64));
    assert!(descriptors["limit"].as_u64() > descriptors["open"].as_u64());
    assert!(status["messages"].as_u64().is_some_and(|count| count >= 3 * (3 + 2)));
    let refused = status["refused"].as_object().expect("an object");
    assert!(refused.len() >= 9 && refused.values().all(|count| *count == 0), "{refused:?}");

    let listed = status["peers"].as_array().expect("an array");
    let ids: Vec<_> = listed.iter().map(|peer| peer["id"].as_u64()).collect();
    assert_eq!(ids, peers.each_ref().map(|peer| Some(u64::from(peer.id()))));
    for peer in listed {
        assert_eq!(peer["pid"], std::process::id());
        assert_eq!(peer["uid"], geteuid().as_raw());
        let own = std::fs::read_to_string("/proc/self/comm").expect("/proc");
        assert_eq!(peer["program"], own.trim_end());
        assert_eq!(peer.get("name"), None, "this is no QEMU");
        assert_eq!(peer["resumed"], false);
        assert!(peer["since"].as_u64().is_some_and(|time| (start..=now()).contains(&time)));
    }
    daemon.stop();
}

/// A QEMU that is attached, and started with this `-name`.
fn qemu(socket: &Path, name: &str) -> Child {
    Command::new("qemu-system-x86_64")
        .args(["-S", "-accel", "tcg", "-machine", "pc", "-m", "16", "-no-user-config"])
        .args(["-nodefaults", "-display", "none", "-name", name, "-chardev"])
        .arg(format!("socket,id=c,path={}", socket.display()))
        .args(["-device", "ivshmem-doorbell,chardev=c,vectors=1"])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("qemu-system-x86_64 (Debian package qemu-system-x86)")
}

#[test]
fn a_virtual_machine_is_shown_with_its_name() {
    let daemon = Daemon::builder().start();
    let socket = daemon.socket_path();
    let names = ["red", "guest=green,,1,debug-threads=on"];
    let mut machines = Vec::new();
    for name in names {
        machines.push(qemu(socket, name));
        let count = machines.len();
        wait_for_status(socket, "it joined", |status| status["joined"] == count);
    }
    let status = status(socket);
    for machine in &mut machines {
        machine.kill().expect("it runs");
        machine.wait().expect("it runs");
    }
    for (number, name) in ["red", "green,1"].iter().enumerate() {
        let peer = &status["peers"][number];
        assert_eq!((&peer["name"], &peer["pid"]), (&json!(name), &json!(machines[number].id())));
        assert!(peer["program"].as_str().is_some_and(|program| program.contains("qemu")), "{peer}");
    }
    daemon.stop();
}

#[test]
fn a_client_that_does_not_read_is_shown_as_behind() {
    let vectors = 16_u16;
    let daemon = Daemon::builder().vectors(vectors).start();
    let socket = daemon.socket_path();
    let lazy = Connection::open(socket);
    wait_for_status(socket, "it joined", |status| status["joined"] == 1);
    let others: Vec<Peer> = (0..30).map(|_| Peer::join(socket, vectors)).collect();
    let each = u64::from(vectors);
    let all = 3 + each * (1 + others.len() as u64);
    // It is sent what its socket takes, until the others have had theirs.
    let status = wait_for_status(socket, "the count is complete", |status| {
        let lazy = &status["peers"][0];
        lazy["pending"].as_u64().zip(lazy["unread"].as_u64()).map(|(a, b)| a + b) == Some(all)
    });
    let lazy_status = &status["peers"][0];
    assert!(lazy_status["pending"].as_u64() > Some(0), "{lazy_status}");
    assert!(lazy_status["unread_bytes"].as_u64() >= lazy_status["unread"].as_u64());
    drop((lazy, others));
    daemon.stop();
}

#[test]
fn a_watcher_hears_of_each_join_departure_and_refusal_in_order() {
    let daemon = Daemon::builder().arg("--max-clients=1").start();
    let socket = daemon.socket_path();
    let mut watcher = Caller::of(socket);
    watcher.watch();
    let peer = Peer::join(socket, 1);
    let joined = watcher.event();
    assert_eq!(
        (&joined["kind"], &joined["id"], &joined["peers"]),
        (&json!("joined"), &json!(0), &json!(1))
    );
    assert_eq!(
        (&joined["pid"], &joined["uid"]),
        (&json!(std::process::id()), &json!(geteuid().as_raw()))
    );
    assert!(joined["program"].is_string() && joined["time"].as_u64() <= Some(now()));
    let refused = UnixStream::connect(socket).expect("it listens");
    let event = watcher.event();
    assert_eq!((&event["kind"], &event["reason"]), (&json!("refused"), &json!("too_many_clients")));
    assert_eq!(event["pid"], std::process::id());
    assert!(event["text"].as_str().is_some_and(|text| text.contains("limit allows: 1")), "{event}");
    drop((peer, refused));
    let event = watcher.event();
    assert_eq!((&event["kind"], &event["reason"]), (&json!("left"), &json!("hung_up")));
    assert_eq!((&event["id"], &event["peers"]), (&json!(0), &json!(0)));
    assert_eq!(status(socket)["refused"]["too_many_clients"], 1);
    daemon.stop();
}

#[test]
fn a_client_can_be_disconnected_by_its_id() {
    let daemon = Daemon::builder().start();
    let socket = daemon.socket_path();
    let mut peers = [Peer::join(socket, 1), Peer::join(socket, 1)];
    let mut caller = Caller::of(socket);
    let mut watcher = Caller::of(socket);
    watcher.watch();
    assert_eq!(caller.ask("Disconnect", json!({"id": 1})), json!({"parameters": {}}));
    peers[0].wait_for_peer(1);
    peers[0].wait_for_departure(1);
    assert_eq!(watcher.event()["reason"], "disconnected");
    let again = caller.ask("Disconnect", json!({"id": 1}));
    let expected = json!({"error": "org.ivshmem.Server.NoSuchPeer", "parameters": {"id": 1}});
    assert_eq!(again, expected);
    // A call without a reply.
    let call =
        json!({"method": "org.ivshmem.Server.Disconnect", "parameters": {"id": 0}, "oneway": true});
    caller.send(&call);
    assert_eq!(watcher.event()["id"], 0);
    assert_eq!(caller.status()["peers"], json!([]), "the next reply is that of the next call");
    daemon.stop();
}

#[test]
fn a_call_that_is_sent_before_the_end_of_the_connection_counts() {
    let daemon = Daemon::builder().start();
    let socket = daemon.socket_path();
    let _peer = Peer::join(socket, 1);
    let mut caller = Caller::of(socket);
    caller.send(&json!({"method": "org.ivshmem.Server.Disconnect", "parameters": {"id": 0}, "oneway": true}));
    drop(caller);
    wait_for_status(socket, "the peer left", |status| status["left"] == 1);
    let mut caller = Caller::of(socket);
    caller.send(&json!({"method": "org.ivshmem.Server.Status"}));
    caller.stream.shutdown(std::net::Shutdown::Write).expect("it is connected");
    assert!(caller.receive().is_some_and(|reply| reply["parameters"]["left"] == 1));
    assert_eq!(caller.receive(), None, "the server closes it then");
    daemon.stop();
}

#[test]
fn the_service_describes_itself() {
    let daemon = Daemon::builder().start();
    let mut caller = Caller::of(daemon.socket_path());
    let mut ask = |method: &str, parameters: Value| {
        caller.send(
            &json!({"method": format!("org.varlink.service.{method}"), "parameters": parameters}),
        );
        caller.receive().expect("a reply")
    };
    let info = ask("GetInfo", json!({}));
    let info = &info["parameters"];
    assert_eq!(info["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(info["interfaces"], json!(["org.varlink.service", "org.ivshmem.Server"]));
    for interface in ["org.varlink.service", "org.ivshmem.Server"] {
        let reply = ask("GetInterfaceDescription", json!({"interface": interface}));
        let text = reply["parameters"]["description"].as_str().expect("a text");
        assert!(text.contains(&format!("\ninterface {interface}\n")), "{text}");
        let file = format!("src/bin/ivshmem-server/control/{interface}.varlink");
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
        assert_eq!(text, std::fs::read_to_string(file).expect("it is there"));
        if interface == "org.ivshmem.Server" {
            let (_, shown) = text.split_once('\n').expect("a line with the licence");
            assert!(include_str!("../docs/control.md").contains(shown), "docs/control.md is old");
        }
    }
    let missing = ask("GetInterfaceDescription", json!({"interface": "a.b"}));
    assert_eq!(missing["error"], "org.varlink.service.InterfaceNotFound");
    let missing = ask("GetNothing", json!({}));
    assert_eq!(missing["error"], "org.varlink.service.MethodNotFound");
    let reply = caller.ask("Watch", json!({}));
    assert_eq!(reply["error"], "org.varlink.service.ExpectedMore");
    daemon.stop();
}

#[test]
fn the_status_after_a_restart_has_the_same_peers_and_counts_the_restart() {
    let supervisor = Supervisor::start_program(&server_program(), |command| {
        command.args(["-n", "2"]);
    });
    let socket = supervisor.place.socket();
    let mut server = supervisor.server_other_than(None);
    let peers = [Peer::join(&socket, 2), Peer::join(&socket, 2)];
    let ids = peers.each_ref().map(|peer| json!(peer.id()));
    for (restarts, signal) in [(1, Signal::SIGKILL), (2, Signal::SIGTERM)] {
        wait_for("the server waits for events", || common::is_asleep(server).then_some(()));
        kill(server, signal).expect("it runs");
        server = supervisor.wait_until_serving(Some(server));
        // The server's socket listened all the time; the control socket is a new one.
        let status = wait_for("there is a control socket", || Caller::try_of(&socket)).status();
        assert_eq!(status["restarts"], restarts, "after {signal}");
        assert_eq!(status["pid"], server.as_raw());
        let listed = status["peers"].as_array().expect("an array");
        assert_eq!(listed.iter().map(|peer| &peer["id"]).collect::<Vec<_>>(), [&ids[0], &ids[1]]);
        assert!(listed.iter().all(|peer| peer["resumed"] == true));
        assert!(listed.iter().all(|peer| peer["since"].as_u64() <= Some(now())));
    }
    let third = Peer::join(&socket, 2);
    let status = status(&socket);
    assert_eq!(status["peers"][2]["resumed"], false);
    drop((peers, third));
    drop(supervisor);
    assert!(control_of(&socket).exists() || !socket.exists(), "a killed server may leave both");
}
