// SPDX-License-Identifier: GPL-2.0-or-later
//! What 1,000 hostile connections cost a newcomer: the time until it has all that a QEMU waits for when it starts, and
//! the server's processor time for it, beside the same with 1,000 that behave. The protocol itself has the newcomer
//! told of each of them, so it is the one row beside the other that counts.
//!
//! `cargo bench --bench hostile`; one line a row, tab-separated, medians of 25 newcomers.

// One function in common::peer takes over received descriptors.
#![deny(unsafe_code)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::crowd::{Crowd, allow_descriptors};
use common::daemon::Daemon;

const HOSTILE: usize = 1000;
const NEWCOMERS: usize = 25;

fn median(mut of: Vec<Duration>) -> f64 {
    of.sort();
    of[of.len() / 2].as_secs_f64() * 1e6
}

/// Lets newcomers in one after another, each alone; `between` is what the others do before each.
fn measure(row: &str, vectors: u16, server: &Daemon, mut between: impl FnMut()) {
    let (mut times, mut costs) = (Vec::new(), Vec::new());
    for _ in 0..NEWCOMERS {
        between();
        let (start, cost) = (Instant::now(), server.run_time());
        let mut newcomer = Crowd::new(server.socket_path(), vectors);
        newcomer.connect(true);
        newcomer.welcome();
        times.push(start.elapsed());
        costs.push(server.run_time() - cost);
    }
    println!("{vectors}\t{row}\t{:.0}\t{:.0}", median(times), median(costs));
}

fn main() {
    assert!(allow_descriptors(15_000), "the hard limit of open files must be 15,000");
    println!("vectors\tothers\tnewcomer complete after, µs\tserver's processor time, µs");
    for vectors in [1, 8] {
        let start = || {
            let server = Daemon::builder().vectors(vectors).start();
            let mut crowd = Crowd::new(server.socket_path(), vectors);
            crowd.connect_many(10);
            crowd.settle();
            (server, crowd)
        };
        let drain = |crowd: &mut Crowd| while crowd.read(Duration::from_millis(2)) {};

        let (server, mut crowd) = start();
        measure("10 that behave", vectors, &server, || drain(&mut crowd));

        let (server, mut crowd) = start();
        crowd.connect_many(HOSTILE);
        crowd.settle();
        measure("10 and 1,000 that behave", vectors, &server, || drain(&mut crowd));

        let (server, mut crowd) = start();
        let silent: Vec<_> =
            (0..HOSTILE).map(|_| UnixStream::connect(server.socket_path())).collect();
        crowd.read_until("they are let in", |crowd| crowd.view(0).known().len() == 10 + HOSTILE);
        measure("10 and 1,000 that never read", vectors, &server, || drain(&mut crowd));
        drop(silent);

        let (server, mut crowd) = start();
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    drop(UnixStream::connect(server.socket_path()));
                }
            });
            measure("10 and one that connects and closes all the time", vectors, &server, || {
                crowd.read(Duration::ZERO);
            });
            over.store(true, Ordering::Relaxed);
        });
    }
}
