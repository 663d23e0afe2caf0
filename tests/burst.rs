// SPDX-License-Identifier: GPL-2.0-or-later
//! A burst of joins on a server with thousands of connected clients: each new client gets its
//! greeting at once, and the burst delays neither the caller's loop nor a signal.

mod common;

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::crowd::{Crowd, allow_most_descriptors};
use common::target::{Target, full_size, room_for};
use ivshmem::Server;
use nix::sys::signal::Signal;
use nix::sys::time::TimeValLike;
use nix::time::{ClockId, clock_gettime};

on_each_server! {
    a_burst_delays_neither_the_greetings_nor_sigterm,
    departures_that_clients_have_not_read_take_little_server_memory,
}

/// Version, id and memory.
const GREETING: usize = 24;

/// A QEMU is blocked during `device_add` until it has its greeting, so each time has a limit on an
/// idle machine. The limits are multiplied by this factor because the machine may run other programs
/// at the same time. docs/benchmarks.md has the figures of an idle machine.
const MARGIN: u32 = 40;

/// How many clients are connected before the burst, in the full size or in the short form.
fn residents(test: &str) -> usize {
    if full_size(test) { 3000 } else { 1000 }
}

/// Connects `count` clients at once and returns the longest time until a client had its greeting.
fn burst(socket: &std::path::Path, count: usize) -> (Vec<UnixStream>, Duration) {
    let started = Instant::now();
    let mut streams: Vec<_> =
        (0..count).map(|_| UnixStream::connect(socket).expect("the server listens")).collect();
    let mut longest = Duration::ZERO;
    for stream in &mut streams {
        stream.set_read_timeout(Some(common::PATIENCE)).expect("a socket has time limits");
        stream.read_exact(&mut [0; GREETING]).expect("a greeting");
        longest = longest.max(started.elapsed());
    }
    (streams, longest)
}

fn a_burst_delays_neither_the_greetings_nor_sigterm(target: Target) {
    let wanted = residents("a burst") + 256;
    let Some((all, limit)) = room_for("a burst", 600, wanted, 1) else { return };
    assert!(allow_most_descriptors(), "up to the hard limit");
    let server = target.builder().descriptors(limit).start();
    let mut residents = Crowd::new(server.socket_path(), 1);
    residents.connect_many(all - 256);
    residents.settle();

    let path = server.socket_path().to_owned();
    let burst = thread::spawn(move || burst(&path, 256));
    while !burst.is_finished() {
        residents.read(Duration::from_millis(10));
    }
    let (_streams, greeted) = burst.join().expect("each client receives a greeting");
    // The server now broadcasts: 256 messages to each resident, and the messages of all clients to
    // each client of the burst.
    let signalled = Instant::now();
    server.signal(Signal::SIGTERM);
    server.stop();
    let stopped = signalled.elapsed();
    eprintln!(
        "256 new clients, {} residents: greeted within {greeted:?}, stopped within {stopped:?} after SIGTERM",
        all - 256
    );
    assert!(
        stopped < MARGIN * Duration::from_millis(100),
        "stopped within {stopped:?} after SIGTERM"
    );
    assert!(greeted < MARGIN * Duration::from_millis(50), "greeted within {greeted:?}");
}

/// The processor time of this thread. It does not depend on what else the machine does.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("a clock");
    Duration::from_nanos(time.num_nanoseconds() as u64)
}

#[test]
fn no_dispatch_takes_long_while_256_clients_join_3000_and_all_receive_everything() {
    let wanted = residents("a burst") + 256;
    // The clients run in this process and need descriptors too.
    let Some((all, _)) = room_for("a burst", 1200, 2 * wanted, 1) else { return };
    let residents = all / 2 - 256;
    assert!(allow_most_descriptors(), "up to the hard limit");
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("socket");
    let mut server = Server::builder().socket_path(&path).start().expect("a server");
    let done = AtomicBool::new(false);
    let (mut longest, mut most, mut dispatches) = (Duration::ZERO, 0, 0);
    thread::scope(|scope| {
        let clients = scope.spawn(|| {
            let mut crowd = Crowd::new(&path, 1);
            crowd.connect_many(residents);
            crowd.settle();
            crowd.connect_many(256);
            crowd.settle();
            done.store(true, Ordering::Relaxed);
        });
        while !done.load(Ordering::Relaxed) && !clients.is_finished() {
            let (start, sent) = (processor_time(), server.stats().messages);
            let events = server.wait(Some(Duration::from_millis(20))).expect("the wait succeeds");
            if server.stats().peers > residents {
                longest = longest.max(processor_time() - start);
                most = most.max(server.stats().messages - sent);
                dispatches += 1;
            }
            drop(events);
        }
        clients.join().expect("each client receives everything");
    });
    eprintln!("{dispatches} dispatches: {longest:?} and {most} messages at most");
    assert!(most <= 4096 + 256 * 4, "{most} messages in one dispatch");
    assert!(dispatches > 50, "the burst took {dispatches} dispatches only");
    assert!(longest < MARGIN * Duration::from_millis(20), "a dispatch took {longest:?}");
}

/// Each client knows all others and stops reading. Then half of them leave, one by one.
fn departures_that_clients_have_not_read_take_little_server_memory(target: Target) {
    let wanted = residents("departures");
    let Some((all, limit)) = room_for("departures", 600, wanted, 1) else { return };
    assert!(allow_most_descriptors(), "up to the hard limit");
    let server = target.builder().descriptors(limit).start();
    let mut crowd = Crowd::new(server.socket_path(), 1);
    crowd.connect_many(all);
    crowd.settle();
    crowd.set_all_reading(false);
    let before = server.resident_kib();
    let idle = server.idle_fds();
    // Each remaining client has one unread departure for each client that leaves.
    for number in crowd.numbers().into_iter().step_by(2) {
        crowd.leave(number);
    }
    let stay = crowd.numbers().len();
    common::wait_for("the departures", || (server.open_fds() <= idle + 2 * stay).then_some(()));
    let after = server.resident_kib();
    eprintln!("{all} clients, {} left: {before} KiB before, {after} KiB after", all - stay);
    assert!(after < before + 2048, "{before} KiB became {after} KiB");
    crowd.settle();
    server.stop();
}
