// SPDX-License-Identifier: GPL-2.0-or-later
//! A soak test of several servers: churn, stalls, slow readers, killed clients, hostile clients,
//! ended clients that keep their sockets, clients that connect and close without end, servers
//! without free descriptors, and killed servers.
//!
//! Each client checks each message that it receives. At each checkpoint all clients read all
//! messages, and then each view must equal the roster. `SOAK_SECONDS` is the duration (`make
//! soak`: some minutes). `SOAK_SEED` selects the pseudo-random actions; the seed is printed, and the
//! same seed repeats them.

#[path = "../common/mod.rs"]
mod common;
mod scenario;

use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use common::checked_client::{CheckedClient, Received};
use common::target::Target;
use scenario::Scenario;

/// The variable that tells a child process its server, as `VECTORS:SOCKET`.
const CHILD: &str = "IVSHMEM_SOAK_CHILD";

/// The number of actions between two checkpoints.
const ROUND: usize = 150;

/// About how many checkpoints a server sees before it is killed.
const LIFE: u64 = 20;

/// Pseudo-random numbers by the SplitMix64 algorithm.
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

/// The counts of all actions and checks.
#[derive(Debug, Default)]
struct Sum {
    joins: u64,
    leaves: u64,
    kills: u64,
    hostile: u64,
    /// Clients that were removed and keep their sockets.
    ended: u64,
    /// Connections that close at once, or as soon as they are admitted.
    knocks: u64,
    limits: u64,
    refused: u64,
    servers: u64,
    /// Messages that clients in this process received and checked.
    messages: u64,
    /// Views that were compared with the roster.
    compared: u64,
    checkpoints: u64,
}

on_each_server! {
    after_churn_stalls_and_kills_every_view_is_correct,
}

fn after_churn_stalls_and_kills_every_view_is_correct(target: Target) {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse().expect("a number"));
    let seconds = number("SOAK_SECONDS").unwrap_or(6);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970");
    let seed = number("SOAK_SEED").unwrap_or(now.as_nanos() as u64);
    println!("{target:?}: SOAK_SEED={seed} SOAK_SECONDS={seconds}");

    let mut random = Random(seed);
    let mut sum = Sum::default();
    let vectors = [1, 4, 64];
    let mut scenarios = vectors.map(|vectors| Scenario::new(target, vectors));
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(seconds) {
        for _ in 0..ROUND {
            let which = random.below(scenarios.len() as u64) as usize;
            scenarios[which].act(&mut random, &mut sum);
        }
        for scenario in &mut scenarios {
            scenario.check(&mut sum);
        }
        sum.checkpoints += 1;
        if random.below(LIFE / 3) == 0 {
            let which = random.below(scenarios.len() as u64) as usize;
            let next = Scenario::new(target, vectors[which]);
            std::mem::replace(&mut scenarios[which], next).kill(&mut sum);
        }
    }
    for scenario in scenarios {
        scenario.end(&mut sum);
    }
    println!("{target:?}, {:.0?}: {sum:?}", start.elapsed());
    let Sum { joins, leaves, kills, hostile, ended, knocks, limits, messages, compared, .. } = sum;
    let counts = [joins, leaves, kills, hostile, ended, knocks, limits, messages, compared];
    let least = counts.into_iter().min();
    assert!(least > Some(0), "a kind of action never happened: {sum:?}");
}

#[test]
#[ignore = "the soak test starts this as a child process and kills it"]
fn client_in_a_child_process() {
    let role = std::env::var(CHILD).expect("the parent sets the variable");
    let (vectors, socket) = role.split_once(':').expect("VECTORS:SOCKET");
    let stream = UnixStream::connect(socket).expect("the server listens");
    let mut client = CheckedClient::new(stream, vectors.parse().expect("a number"), false);
    let mut random = Random(std::process::id().into());
    loop {
        match client.receive(1 + random.below(600) as usize) {
            Ok(Received::Bytes(_)) => {}
            Ok(Received::Nothing) => thread::sleep(Duration::from_millis(1 + random.below(20))),
            // The server was killed or had no free descriptor. This process waits until its parent
            // kills it.
            Ok(Received::End) => thread::sleep(Duration::from_secs(1)),
            Err(error) => panic!("{error}: {:?}", client.view()),
        }
    }
}
