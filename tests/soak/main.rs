// SPDX-License-Identifier: GPL-2.0-or-later
//! Some time in the life of several servers: churn, stalls, slow readers, clients that are
//! killed, hostile ones, descriptors that run out, servers that are killed.
//!
//! Every client judges each message that it hears; at each checkpoint all of them read all,
//! and then each one's view is the roster. `SOAK_SECONDS` says how long (`make soak`: some
//! minutes), `SOAK_SEED` which history: the seed is printed, and gives the same one again.

#[path = "../common/mod.rs"]
mod common;
mod world;

use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use common::member::{Heard, Member};
use common::target::Target;
use world::World;

/// Tells the child what to be: `VECTORS:SOCKET`.
const CHILD: &str = "IVSHMEM_SOAK_CHILD";

/// Things that happen between two checkpoints.
const ROUND: usize = 150;

/// Checkpoints in the life of a server, about. It may then be killed.
const LIFE: u64 = 20;

/// The pseudo-random numbers of SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }
}

/// What happened.
#[derive(Debug, Default)]
struct Sum {
    joins: u64,
    leaves: u64,
    kills: u64,
    hostile: u64,
    squeezes: u64,
    refused: u64,
    servers: u64,
    /// Heard, and judged, by clients in this process.
    messages: u64,
    /// Views held against the roster.
    compared: u64,
    checkpoints: u64,
}

on_each_server! {
    churn_stalls_and_kills_leave_every_view_right,
}

fn churn_stalls_and_kills_leave_every_view_right(target: Target) {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse().expect("a number"));
    let seconds = number("SOAK_SECONDS").unwrap_or(6);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970");
    let seed = number("SOAK_SEED").unwrap_or(now.as_nanos() as u64);
    println!("{target:?}: SOAK_SEED={seed} SOAK_SECONDS={seconds}");

    let mut random = Random(seed);
    let mut sum = Sum::default();
    let vectors = [1, 4, 64];
    let mut worlds = vectors.map(|vectors| World::new(target, vectors));
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(seconds) {
        for _ in 0..ROUND {
            let which = random.below(worlds.len() as u64) as usize;
            worlds[which].act(&mut random, &mut sum);
        }
        for world in &mut worlds {
            world.check(&mut sum);
        }
        sum.checkpoints += 1;
        if random.below(LIFE / 3) == 0 {
            let which = random.below(worlds.len() as u64) as usize;
            let next = World::new(target, vectors[which]);
            std::mem::replace(&mut worlds[which], next).kill(&mut sum);
        }
    }
    for world in worlds {
        world.end(&mut sum);
    }
    println!("{target:?}, {:.0?}: {sum:?}", start.elapsed());
    let Sum { joins, leaves, kills, hostile, squeezes, messages, compared, .. } = sum;
    let least = [joins, leaves, kills, hostile, squeezes, messages, compared].into_iter().min();
    assert!(least > Some(0), "something never happened: {sum:?}");
}

#[test]
#[ignore = "the soak starts it, as a process to be killed"]
fn as_a_child_be_a_client() {
    let role = std::env::var(CHILD).expect("what to be");
    let (vectors, socket) = role.split_once(':').expect("VECTORS:SOCKET");
    let stream = UnixStream::connect(socket).expect("the server listens");
    let mut member = Member::new(stream, vectors.parse().expect("a number"), false);
    let mut random = Random(std::process::id().into());
    loop {
        match member.hear(1 + random.below(600) as usize) {
            Ok(Heard::Bytes(_)) => {}
            Ok(Heard::Nothing) => thread::sleep(Duration::from_millis(1 + random.below(20))),
            // The server was killed, or had no descriptors left; its clients' views are judged
            // by those that stay. Whoever started this one kills it.
            Ok(Heard::End) => thread::sleep(Duration::from_secs(1)),
            Err(error) => panic!("{error}: {:?}", member.view()),
        }
    }
}
