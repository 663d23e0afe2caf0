// SPDX-License-Identifier: GPL-2.0-or-later
//! Control clients that do what they should not: the server goes on, keeps its size, and answers others.

use std::io::{ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use serde_json::json;

use crate::caller::{Caller, control_of, status, wait_for_status};
use crate::common::daemon::Daemon;
use crate::common::peer::Peer;
use crate::common::{PATIENCE, stop_process, wait_for};

/// Control connections that the server allows.
const LIMIT: usize = 16;

/// More memory than the server may need for control clients, in KiB.
const GROWTH: u64 = 24 << 10;

const STATUS: &[u8] = b"{\"method\":\"org.ivshmem.Server.Status\"}\0";

/// Sends without end until the server takes no more, or ends the connection. Returns the bytes that it took.
fn flood(stream: &UnixStream, part: &[u8]) -> usize {
    stream.set_write_timeout(Some(Duration::from_millis(300))).expect("not zero");
    let mut sent = 0;
    loop {
        match (&*stream).write(part) {
            Ok(count) => sent += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return sent,
        }
        assert!(sent < 64 << 20, "the server takes everything");
    }
}

#[test]
fn what_is_no_call_ends_the_connection() {
    let daemon = Daemon::builder().start();
    let socket = daemon.socket_path();
    for bytes in [
        &b"\0"[..],
        b"garbage\0",
        b"[]\0",
        b"{}\0",
        b"{\"method\":\"org.ivshmem.Server.Status\",\"parameters\":3}\0",
        b"\xff\xfe\0",
        b"GET / HTTP/1.1\r\n\r\n\0",
    ] {
        let mut caller = Caller::of(socket);
        caller.stream.write_all(bytes).expect("the server reads");
        assert_eq!(caller.receive(), None, "{bytes:?}");
    }
    // The calls before it are answered.
    let mut caller = Caller::of(socket);
    caller.stream.write_all(&[STATUS, STATUS, b"x\0"].concat()).expect("the server reads");
    assert!(caller.receive().is_some() && caller.receive().is_some());
    assert_eq!(caller.receive(), None);
    daemon.stop();
}

#[test]
fn a_call_without_end_ends_the_connection() {
    let daemon = Daemon::builder().start();
    let before = daemon.resident_kib();
    for part in [vec![b'x'; 4096], vec![b'['; 4096], b"{\"method\":\"".repeat(400)] {
        let caller = Caller::of(daemon.socket_path());
        // What its socket's buffer holds may come on top.
        assert!(flood(&caller.stream, &part) < 4 << 20);
    }
    let grown = daemon.resident_kib().saturating_sub(before);
    assert!(grown < GROWTH, "the server has grown by {grown} KiB");
    status(daemon.socket_path());
    daemon.stop();
}

#[test]
fn clients_that_do_not_read_their_replies_neither_block_the_server_nor_make_it_grow() {
    let daemon = Daemon::builder().vectors(1).start();
    let socket = daemon.socket_path();
    // The status of many peers is long.
    let peers: Vec<UnixStream> =
        (0..400).map(|_| UnixStream::connect(socket).expect("it listens")).collect();
    wait_for_status(socket, "all have joined", |status| status["joined"] == 400);
    let before = daemon.resident_kib();
    let metrics = b"{\"method\":\"org.ivshmem.Server.Metrics\"}\0";
    let callers: Vec<Caller> = (0..LIMIT - 2).map(|_| Caller::of(socket)).collect();
    for (number, caller) in callers.iter().enumerate() {
        flood(
            &caller.stream,
            &if number % 2 == 0 { STATUS.repeat(64) } else { metrics.repeat(64) },
        );
    }
    let grown = daemon.resident_kib().saturating_sub(before);
    assert!(grown < GROWTH, "the server has grown by {grown} KiB");
    let peer = Peer::join(socket, 1);
    assert_eq!(usize::from(peer.id()), peers.len());
    let listed = status(socket);
    assert_eq!(listed["peers"].as_array().map(Vec::len), Some(401), "no peer is missing");
    drop((callers, peers));
    daemon.stop();
}

#[test]
fn a_server_with_clients_that_do_not_read_does_not_spin() {
    let daemon = Daemon::builder().start();
    let socket = daemon.socket_path();
    let mut watcher = Caller::of(socket);
    watcher.watch();
    let idle = Caller::of(socket);
    let full = Caller::of(socket);
    flood(&full.stream, &STATUS.repeat(64));
    // A half-closed one, and one with half a call.
    watcher.stream.shutdown(std::net::Shutdown::Write).expect("it is connected");
    idle.stream.set_nonblocking(true).expect("fcntl works");
    (&idle.stream).write_all(&STATUS[..9]).expect("the socket has room");
    wait_for("the server waits for events", || {
        crate::common::is_asleep(daemon.pid()).then_some(())
    });
    let before = daemon.run_time();
    std::thread::sleep(Duration::from_secs(1));
    let used = daemon.run_time() - before;
    assert!(used < Duration::from_millis(300), "{used:?} of processor time in a second");
    // The half-closed watcher still gets its events.
    drop(Peer::join(socket, 1));
    assert_eq!(watcher.event()["kind"], "joined");
    assert_eq!(watcher.event()["kind"], "left");
    // Clients that go are noticed, whatever they were doing. One descriptor is for the names of programs.
    drop((watcher, idle, full));
    wait_for("their connections are closed", || {
        (daemon.open_fds() == daemon.idle_fds() + 1).then_some(())
    });
    daemon.stop();
}

#[test]
fn a_watcher_that_does_not_read_is_disconnected() {
    let daemon = Daemon::builder().arg("--max-clients=1").start();
    let socket = daemon.socket_path();
    let mut watcher = Caller::of(socket);
    watcher.watch();
    let before = daemon.resident_kib();
    let _peer = Peer::join(socket, 1);
    // Each connection is an event.
    let mut refused = 0;
    wait_for("the server ends the connection", || {
        for _ in 0..50 {
            drop(UnixStream::connect(socket));
            refused += 1;
        }
        use nix::poll::{PollFd, PollFlags, poll};
        use std::os::fd::AsFd;
        let mut fds = [PollFd::new(watcher.stream.as_fd(), PollFlags::empty())];
        poll(&mut fds, 0u16).expect("poll works");
        fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP)).then_some(())
    });
    let grown = daemon.resident_kib().saturating_sub(before);
    assert!(grown < GROWTH, "the server has grown by {grown} KiB for {refused} events");
    assert_eq!(watcher.event()["kind"], "joined", "what was sent can be read");
    status(socket);
    daemon.stop();
}

#[test]
fn idle_connections_make_room_for_an_operator() {
    let daemon = Daemon::builder().start();
    let socket = daemon.socket_path();
    let mut callers: Vec<Caller> = (0..LIMIT).map(|_| Caller::of(socket)).collect();
    for caller in &mut callers {
        caller.status();
    }
    // All have just been active.
    let full = Caller::of(socket).receive().expect("an error");
    let expected =
        json!({"error": "org.ivshmem.Server.TooManyConnections", "parameters": {"limit": LIMIT}});
    assert_eq!(full, expected);
    let start = Instant::now();
    wait_for("one is so idle that it is ended", || {
        let mut caller = Caller::of(socket);
        let _ = caller.stream.write_all(STATUS);
        caller.receive().filter(|reply| reply.get("error").is_none())
    });
    assert!(start.elapsed() < PATIENCE);
    assert_eq!(callers[0].receive(), None, "the one that was idle for the longest time");
    daemon.stop();
}

#[test]
fn thousands_of_connections_leave_the_server_as_it_was() {
    let daemon = Daemon::builder().start();
    let socket = daemon.socket_path();
    status(socket);
    wait_for("that connection is closed", || {
        (daemon.open_fds() == daemon.idle_fds() + 1).then_some(())
    });
    let before = daemon.resident_kib();
    for round in 0..3000 {
        let stream = UnixStream::connect(control_of(socket)).expect("it listens");
        if round % 3 == 0 {
            let _ = (&stream).write_all(STATUS);
        }
    }
    // The clients that have gone do not keep one out that comes, although the server has not accepted all of them yet.
    status(socket);
    wait_for("all are closed", || (daemon.open_fds() == daemon.idle_fds() + 1).then_some(()));
    let grown = daemon.resident_kib().saturating_sub(before);
    assert!(grown < GROWTH, "the server has grown by {grown} KiB");
    let _peer = Peer::join(socket, 1);
    assert_eq!(status(socket)["joined"], 1);
    daemon.stop();
}

#[test]
fn a_server_without_a_free_descriptor_can_still_be_looked_at() {
    let daemon = Daemon::builder().descriptors(64).start();
    let socket = daemon.socket_path();
    let mut peers = Vec::new();
    let mut watcher = Caller::of(socket);
    watcher.watch();
    loop {
        peers.push(UnixStream::connect(socket).expect("it listens"));
        assert!(peers.len() < 64, "all are admitted");
        if watcher.event()["kind"] == "refused" {
            break;
        }
    }
    // The watcher took a descriptor before; the ones in reserve are left.
    let status = status(socket);
    assert_eq!(status["refused"]["no_descriptors"], 1, "{}", status["refused"]);
    assert!(
        status["peers"]
            .as_array()
            .is_some_and(|peers| peers.iter().all(|peer| peer["program"].is_string())),
        "{status}"
    );
    drop(peers);
    daemon.stop();
}

#[test]
fn a_process_that_is_stopped_is_shown_like_any_other() {
    let daemon = Daemon::builder().start();
    let socket = daemon.socket_path();
    let code = "import socket, sys, time; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); time.sleep(1000)";
    let mut client = std::process::Command::new("/usr/bin/python3")
        .args(["-c", code])
        .arg(socket)
        .spawn()
        .expect("python3 (Debian package python3)");
    wait_for_status(socket, "it joined", |status| status["joined"] == 1);
    let pid = nix::unistd::Pid::from_raw(i32::try_from(client.id()).expect("a pid is an int"));
    stop_process(pid);
    assert_eq!(status(socket)["peers"][0]["pid"], client.id());
    kill(pid, Signal::SIGKILL).expect("it is our child");
    client.wait().expect("it is our child");
    daemon.stop();
}
