// SPDX-License-Identifier: GPL-2.0-or-later
//! How 1,000 hostile connections slow down a new client. It measures the time until the new client has everything
//! that a QEMU waits for at its start, and the server's processor time for this client. The same is measured with
//! 1,000 well-behaved clients: the protocol makes the server send the new client all of them in both cases, so
//! the difference of the two rows counts. The kernel's part is measured separately: a bare `sendmmsg` of the new
//! client's greeting and of its vectors to the clients that read.
//!
//! Run it by `cargo bench --bench hostile`. It prints one tab-separated line per case, with medians of 25 new clients,
//! for the daemon and the C API in turn.

// One function in common::peer takes ownership of received descriptors.
#![deny(unsafe_code)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::io::{IoSlice, Read};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::crowd::{Crowd, allow_descriptors};
use common::daemon::Daemon;
use common::target::Target;
use nix::cmsg_space;
use nix::sys::eventfd::EventFd;
use nix::sys::socket::{ControlMessage, MsgFlags, MultiHeaders, sendmmsg};
use nix::time::{ClockId, clock_gettime};

const TARGETS: [Target; 2] = [Target::Daemon, Target::SelectLoop];
const HOSTILE: usize = 1000;
const NEW_CLIENTS: usize = 25;

fn median(mut of: Vec<Duration>) -> f64 {
    of.sort();
    of[of.len() / 2].as_secs_f64() * 1e6
}

/// The numbers of the clients connected before: all, and those that read and so receive the new client.
#[derive(Clone, Copy)]
struct Others {
    connected: usize,
    reading: usize,
}

/// The processor time of this thread.
fn now() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("each thread has this clock").into()
}

/// The processor time of only the sends that one new client causes.
fn floor(vectors: u16, others: Others) -> Duration {
    const RUN: usize = 256;
    let vectors = usize::from(vectors);
    let vector = EventFd::new().expect("an eventfd");
    let fds = [vector.as_fd().as_raw_fd()];
    let bytes = [0; 8];
    let slices = [[IoSlice::new(&bytes)]; RUN];
    let mut cost = Duration::ZERO;
    for socket in 0..=others.reading {
        let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
        let mut left = if socket == 0 { 3 + (others.connected + 1) * vectors } else { vectors };
        while left > 0 {
            let run = left.min(RUN);
            let mut headers = MultiHeaders::<()>::preallocate(run, Some(cmsg_space!(RawFd)));
            let start = now();
            let sent = sendmmsg(
                ours.as_raw_fd(),
                &mut headers,
                &slices[..run],
                [None; RUN],
                [ControlMessage::ScmRights(&fds)],
                MsgFlags::empty(),
            );
            cost += now() - start;
            left -= sent.expect("there is room").count();
            // A read without space for descriptors closes them and returns one message at a time.
            for _ in 0..run {
                (&theirs).read_exact(&mut [0; 8]).expect("it was sent");
            }
        }
    }
    cost
}

/// Connects new clients one after another, each alone. The other clients call `between` before each. Without `others`
/// there is no floor to compare with.
fn measure(
    row: &str,
    vectors: u16,
    server: &Daemon,
    others: Option<Others>,
    mut between: impl FnMut(),
) {
    let (mut times, mut costs, mut floors) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..NEW_CLIENTS {
        between();
        let (cost, start) = (server.run_time(), Instant::now());
        let mut client = Crowd::new(server.socket_path(), vectors);
        client.connect(true);
        client.read_greetings();
        times.push(start.elapsed());
        costs.push(server.run_time() - cost);
        floors.extend(others.map(|others| floor(vectors, others)));
    }
    let time = median(times);
    // During a flood, the cost of a new client cannot be separated from the cost of the flood.
    let costs = match floors.is_empty() {
        true => "-\t-\t-".to_owned(),
        false => {
            let (cost, floor) = (median(costs), median(floors));
            format!("{cost:.0}\t{floor:.0}\t{:.2}", cost / floor)
        }
    };
    println!("{vectors}\t{row}\t{time:.0}\t{costs}");
}

fn main() {
    assert!(allow_descriptors(15_000), "the hard limit of open files must be 15,000");
    println!(
        "vectors\tothers\tnew client complete after, µs\tserver's processor time, µs\tsends alone, µs\tratio"
    );
    for (vectors, target) in
        [1, 8].into_iter().flat_map(|vectors| TARGETS.map(|target| (vectors, target)))
    {
        let start = || {
            let server = target.builder().vectors(vectors).start();
            let mut crowd = Crowd::new(server.socket_path(), vectors);
            crowd.connect_many(10);
            crowd.settle();
            (server, crowd)
        };
        let row = |text: &str| format!("{target:?}: {text}");
        let drain = |crowd: &mut Crowd| while crowd.read(Duration::from_millis(2)) {};

        let (server, mut crowd) = start();
        let others = Some(Others { connected: 10, reading: 10 });
        measure(&row("10 well-behaved"), vectors, &server, others, || drain(&mut crowd));

        let (server, mut crowd) = start();
        crowd.connect_many(HOSTILE);
        crowd.settle();
        let others = Some(Others { connected: 10 + HOSTILE, reading: 10 + HOSTILE });
        measure(&row("10 and 1,000 well-behaved"), vectors, &server, others, || drain(&mut crowd));

        let (server, mut crowd) = start();
        let silent: Vec<_> =
            (0..HOSTILE).map(|_| UnixStream::connect(server.socket_path())).collect();
        crowd.read_until("the admission of all clients", |crowd| {
            crowd.view(0).known().len() == 10 + HOSTILE
        });
        let others = Some(Others { connected: 10 + HOSTILE, reading: 10 });
        measure(&row("10 and 1,000 that never read"), vectors, &server, others, || {
            drain(&mut crowd)
        });
        drop(silent);

        let (server, mut crowd) = start();
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    drop(UnixStream::connect(server.socket_path()));
                }
            });
            let flood = row("10 and one that connects and closes all the time");
            measure(&flood, vectors, &server, None, || {
                crowd.read(Duration::ZERO);
            });
            over.store(true, Ordering::Relaxed);
        });
    }
}
