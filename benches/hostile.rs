// SPDX-License-Identifier: GPL-2.0-or-later
//! What 1,000 hostile connections cost a newcomer: the time until it has all that a QEMU waits for when it starts, and
//! the server's processor time for it, beside the same with 1,000 that behave. The protocol itself has the newcomer
//! told of each of them, so it is the one row beside the other that counts; and that the kernel alone takes its share
//! of: a bare `sendmmsg` of the newcomer's greeting and of what those who read are told of it.
//!
//! `cargo bench --bench hostile`; one line a row, tab-separated, medians of 25 newcomers, for daemon and C API in turn.

// One function in common::peer takes over received descriptors.
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
const NEWCOMERS: usize = 25;

fn median(mut of: Vec<Duration>) -> f64 {
    of.sort();
    of[of.len() / 2].as_secs_f64() * 1e6
}

/// Who is there already: those the newcomer is told of, and those of them who read, and so are told of it.
#[derive(Clone, Copy)]
struct Others {
    here: usize,
    reading: usize,
}

/// Processor time of this thread.
fn now() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("a thread has one").into()
}

/// Processor time of the sends alone that one newcomer makes.
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
        let mut left = if socket == 0 { 3 + (others.here + 1) * vectors } else { vectors };
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
            // Without room for descriptors a read closes them, and takes one message at a time.
            for _ in 0..run {
                (&theirs).read_exact(&mut [0; 8]).expect("it was sent");
            }
        }
    }
    cost
}

/// Lets newcomers in one after another, each alone; `between` is what the others do before each. Without `others` there
/// are no sends to compare with.
fn measure(
    row: &str,
    vectors: u16,
    server: &Daemon,
    others: Option<Others>,
    mut between: impl FnMut(),
) {
    let (mut times, mut costs, mut floors) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..NEWCOMERS {
        between();
        let (cost, start) = (server.run_time(), Instant::now());
        let mut newcomer = Crowd::new(server.socket_path(), vectors);
        newcomer.connect(true);
        newcomer.welcome();
        times.push(start.elapsed());
        costs.push(server.run_time() - cost);
        floors.extend(others.map(|others| floor(vectors, others)));
    }
    let time = median(times);
    // In a flood what a newcomer costs cannot be told from what the flood does.
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
        "vectors\tothers\tnewcomer complete after, µs\tserver's processor time, µs\tsends alone, µs\tratio"
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
        let others = Some(Others { here: 10, reading: 10 });
        measure(&row("10 that behave"), vectors, &server, others, || drain(&mut crowd));

        let (server, mut crowd) = start();
        crowd.connect_many(HOSTILE);
        crowd.settle();
        let others = Some(Others { here: 10 + HOSTILE, reading: 10 + HOSTILE });
        measure(&row("10 and 1,000 that behave"), vectors, &server, others, || drain(&mut crowd));

        let (server, mut crowd) = start();
        let silent: Vec<_> =
            (0..HOSTILE).map(|_| UnixStream::connect(server.socket_path())).collect();
        crowd.read_until("they are let in", |crowd| crowd.view(0).known().len() == 10 + HOSTILE);
        let others = Some(Others { here: 10 + HOSTILE, reading: 10 });
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
