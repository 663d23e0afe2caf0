// SPDX-License-Identifier: GPL-2.0-or-later
//! Faults while clients join, stall and leave, and during the stop.

#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::unistd::geteuid;

use crate::common::daemon::Daemon;
use crate::common::target::Target;
use crate::common::wait_for;
use crate::crowd::Crowd;
use crate::matrix::{self, MATRIX, Phase, Row, Then};
use crate::on_each_server;
use crate::strace::{self, Attached};

on_each_server! {
    the_matrix_has_every_call_that_is_made_while_serving,
    one_failed_call_while_serving_affects_no_other_client,
    exhaustion_that_lasts_causes_no_spin_and_ends_with_its_cause,
}

/// With five new clients these are more than the 278 messages that a socket holds.
const VECTORS: u16 = 64;

/// A server for several cases, and the number of its descriptors without a client.
struct Subject {
    target: Target,
    daemon: Daemon,
    idle: usize,
}

impl Subject {
    fn new(target: Target) -> Self {
        // An unprivileged server with a small limit makes more calls, to limit the descriptors in flight.
        let mut builder = target.builder().vectors(VECTORS).descriptors(1024);
        if geteuid().is_root() {
            builder = builder.unprivileged();
        }
        let daemon = builder.start();
        let idle = daemon.idle_fds();
        Self { target, daemon, idle }
    }

    /// Connects two clients and serves both before the fault. Then the second one stops reading.
    fn crowd(&self) -> Crowd {
        let mut crowd = Crowd::new(self.daemon.socket_path(), VECTORS.into());
        crowd.join();
        crowd.join();
        crowd.settle();
        crowd.stalled = Some(1);
        crowd
    }

    /// All clients leave. Checks that the server has closed all their descriptors, except those whose close failed.
    #[track_caller]
    fn remove_all(&mut self, crowd: Crowd, leaked: usize, what: &str) {
        drop(crowd);
        let most = self.idle + leaked;
        wait_for(
            &format!("{what}: at most {most} descriptors after all clients have left"),
            || (self.daemon.open_fds() <= most).then_some(()),
        );
        self.idle = self.daemon.open_fds();
        self.daemon.assert_running();
    }
}

/// Plays all kinds of client actions, so that the server makes all its calls.
fn history(crowd: &mut Crowd) {
    crowd.join();
    crowd.join();
    crowd.send_data();
    crowd.close_one(2);
    for _ in 0..5 {
        crowd.join();
    }
    crowd.stalled = None;
    crowd.settle();
}

/// The number of calls by name that the history makes without a fault.
fn undisturbed(target: Target) -> BTreeMap<String, usize> {
    let mut subject = Subject::new(target);
    let mut crowd = subject.crowd();
    let attached = Attached::to(subject.daemon.pid(), "");
    history(&mut crowd);
    let log = attached.detach();
    assert_eq!(crowd.dropped(), 0);
    subject.remove_all(crowd, 0, "undisturbed");
    let mut counts = BTreeMap::new();
    for call in strace::calls(&log) {
        *counts.entry(call.name).or_default() += 1;
    }
    counts
}

fn the_matrix_has_every_call_that_is_made_while_serving(target: Target) {
    let calls = undisturbed(target);
    for needed in ["accept4", "eventfd2", "epoll_ctl", "epoll_wait", "sendmmsg", "close"] {
        assert!(calls.contains_key(needed), "the history makes no {needed}: {calls:?}");
    }
    for name in calls.keys() {
        let exempt = matrix::EXEMPT.iter().any(|(call, _)| call == name);
        // The first client of 64 ids needs it, so a history may make no such call. It is a hint for
        // the next server: `ivshmem/src/memory/id_locks.rs` has a test in which it fails.
        let exempt = exempt || name == "fcntl(F_OFD_SETLK)";
        let exempt = exempt || matrix::is_callers(target, name);
        let known = exempt || !matrix::rows(Phase::Serve, name).is_empty();
        assert!(known, "{name} is in no row of the matrix");
    }
}

/// Plays the history with one fault. Returns how often the fault was injected.
#[track_caller]
fn serve_with(subject: &mut Subject, row: &Row, errno: &str, when: usize) -> usize {
    let fault = format!("{}:error={errno}:when={when}", row.call);
    let faults = [row.after.unwrap_or_default(), &fault].join(" ");
    println!("serving with {faults}");
    let mut crowd = subject.crowd();
    let before = crowd.len();
    let attached = Attached::to(subject.daemon.pid(), &faults);
    if row.then == Then::Ends {
        // The server may have ended already: attaching strace ends a wait, and the next wait fails.
        let _ = UnixStream::connect(subject.daemon.socket_path());
        let status = subject.daemon.wait();
        assert_eq!(status.code(), Some(1), "{faults}: {status}");
        let output = subject.daemon.output();
        let said = match subject.target {
            Target::Daemon => "ivshmem-server: cannot wait for events: ",
            Target::SelectLoop => "cannot serve: ",
        };
        assert!(output.contains(said), "{faults}: {output}");
        assert!(!subject.daemon.socket_path().exists(), "{faults}: the socket is left");
        assert!(!subject.daemon.shm_path().exists(), "{faults}: the memory is left");
        let hits = strace::injected(&attached.detach());
        *subject = Subject::new(subject.target);
        return hits;
    }
    history(&mut crowd);
    let log = attached.detach();
    let mine = log.lines().filter(|line| line.starts_with(row.call) && line.contains(errno));
    let hits = strace::injected(&mine.collect::<Vec<_>>().join("\n"));
    let dropped = crowd.dropped();
    let allowed = if row.then == Then::MayDropOne { strace::injected(&log) } else { 0 };
    assert!(dropped <= allowed, "{faults}: {dropped} clients dropped\n{}", subject.daemon.output());
    // The calls work again, so a new client must be served.
    crowd.join();
    crowd.settle();
    assert_eq!(crowd.dropped(), dropped, "{faults}: a client dropped after the fault");
    assert_eq!(crowd.len(), before + 6 - dropped, "{faults}: connected clients");
    let leaked = if row.call == "close" { hits } else { 0 };
    subject.remove_all(crowd, leaked, &faults);
    hits
}

fn one_failed_call_while_serving_affects_no_other_client(target: Target) {
    let counts = undisturbed(target);
    let mut subject = Subject::new(target);
    let mut sum = 0;
    for row in MATRIX.iter().filter(|row| row.phase == Phase::Serve) {
        if matrix::is_callers(target, row.call) {
            continue;
        }
        let last = counts.get(row.call).copied().unwrap_or(1).clamp(1, 10);
        let places: Vec<usize> = match (matrix::is_full(), row.then) {
            (_, Then::Ends) => vec![1],
            (false, _) => BTreeSet::from([1, last.min(4)]).into_iter().collect(),
            (true, _) => (1..=last).collect(),
        };
        for errno in row.errnos() {
            let tried = places.iter().map(|&when| serve_with(&mut subject, row, errno, when));
            let hits: usize = tried.sum();
            assert!(hits > 0, "{} was never made to fail with {errno}", row.call);
            sum += hits;
        }
    }
    println!("{sum} faults while serving");
    subject.daemon.stop();
}

/// Faults that last, with the number of new clients that may be dropped.
const LASTING: &[(&str, usize)] = &[
    ("accept4:error=ENOMEM:when=1+", 0),
    ("accept4:error=ENFILE:when=1+", 0),
    ("accept4:error=EMFILE:when=1+", 0),
    ("accept4:error=EPERM:when=1+", 0),
    ("accept4:error=ENOMEM:when=1+ timerfd_settime:error=EINVAL:when=1..4", 0),
    ("accept4:error=ENOMEM:when=1 epoll_ctl:error=ENOMEM:when=2..4", 0),
    ("eventfd2:error=EMFILE:when=1+", 3),
    ("eventfd2:error=ENOMEM:when=1+", 3),
    ("accept4:error=EMFILE:when=1+ eventfd2:error=EMFILE:when=1+", 0),
    ("epoll_ctl:error=ENOSPC:when=1+", 3),
    ("sendmmsg:error=ETOOMANYREFS:when=1+", 0),
    ("sendmmsg:error=ENOBUFS:when=1+", 0),
    ("sendmmsg:error=ENOMEM:when=1+", 0),
    ("write:error=ENOSPC:when=1+", 0),
];

fn exhaustion_that_lasts_causes_no_spin_and_ends_with_its_cause(target: Target) {
    let mut subject = Subject::new(target);
    for &(faults, allowed) in LASTING {
        if faults.split(':').next().is_some_and(|call| matrix::is_callers(target, call)) {
            continue;
        }
        println!("serving with {faults}");
        let mut crowd = subject.crowd();
        crowd.stalled = None;
        let attached = Attached::to(subject.daemon.pid(), faults);
        for _ in 0..3 {
            crowd.connect();
        }
        wait_for("faults", || (strace::injected(&attached.log()) >= 3).then_some(()));
        // The timer repeats every 10 ms and causes about 10 calls; a busy loop would make thousands.
        let (start, before) = (Instant::now(), attached.log().lines().count());
        std::thread::sleep(Duration::from_millis(200));
        let made = attached.log().lines().count() - before;
        let most = 40 + 20 * start.elapsed().as_millis() / 10;
        assert!((made as u128) < most, "{faults}: {made} calls in {:?}", start.elapsed());
        let log = attached.detach();
        crowd.settle();
        let output = subject.daemon.output();
        // Without a free descriptor the server calls accept4 a second time, to refuse the client. If strace detached
        // between the two calls, the second one succeeds.
        let full = |line: &&str| {
            line.starts_with("accept4") && (line.contains("EMFILE") || line.contains("ENFILE"))
        };
        let allowed = allowed + log.lines().filter(full).count() % 2;
        assert!(crowd.dropped() <= allowed, "{faults}: {} dropped\n{output}", crowd.dropped());
        let dropped = crowd.dropped();
        crowd.join();
        crowd.settle();
        assert_eq!(crowd.dropped(), dropped, "{faults}: a client dropped after the fault ended");
        subject.remove_all(crowd, 0, faults);
    }
    subject.daemon.stop();
}

/// Sends SIGTERM to a server with a connected client, under `faults`. Returns strace's log.
#[track_caller]
fn stop_with(faults: &str, leaves: bool) -> String {
    println!("stopping with {faults}");
    let mut daemon = Daemon::builder().start();
    let mut crowd = Crowd::new(daemon.socket_path(), 1);
    crowd.join();
    let attached = Attached::to(daemon.pid(), faults);
    daemon.signal(Signal::SIGTERM);
    let status = daemon.wait();
    assert_eq!(status.code(), Some(0), "{faults}: {status}\n{}", daemon.output());
    let left = [daemon.socket_path(), daemon.shm_path()].map(|path| path.exists());
    assert!(leaves || left == [false; 2], "{faults}: socket, memory left behind: {left:?}");
    assert_ne!(left, [true; 2], "{faults}: one fault, but both are left behind");
    wait_for("the end of the client's connection", || {
        crowd.read();
        crowd.settle();
        (crowd.len() == 0).then_some(())
    });
    attached.detach()
}

#[test]
fn one_failed_call_during_the_stop_still_gives_exit_code_0() {
    let calls = strace::calls(&stop_with("", false));
    for row in MATRIX.iter().filter(|row| row.phase == Phase::Stop) {
        let made = calls.iter().any(|call| call.name == row.call);
        // The wait that SIGTERM ends may have begun before strace attached.
        assert!(made || row.call == "epoll_wait", "no {} during the stop", row.call);
    }
    let mut sum = 0;
    for call in &calls {
        let rows = matrix::rows(Phase::Stop, &call.name);
        let exempt = matrix::EXEMPT.iter().any(|(name, _)| *name == call.name);
        assert!(exempt || !rows.is_empty(), "in no row of the matrix: {}", call.line);
        for row in rows {
            for errno in row.errnos() {
                let faults = format!("{}:error={errno}:when={}", row.call, call.ordinal);
                sum += strace::injected(&stop_with(&faults, row.then == Then::MayLeaveBehind));
            }
        }
    }
    println!("{sum} faults during the stop");
    assert!(sum > 5, "{sum} faults during the stop");
}
