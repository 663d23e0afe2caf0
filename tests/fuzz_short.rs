// SPDX-License-Identifier: GPL-2.0-or-later
//! Runs the fuzz targets without a fuzzer: each body gets the committed seeds and pseudo-random
//! bytes, the same ones in each run. `make fuzz` runs the real fuzzer.
//!
//! Each test also asserts that its inputs reached the code under test. A generator whose inputs
//! are all rejected at once would test nothing.

#![cfg(feature = "programs")]

#[path = "../fuzz/bodies/mod.rs"]
mod bodies;

use std::fs;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bodies::{client, command_line, interleave};

/// Lets one test run at a time: the tests count and limit the descriptors of the whole process.
fn exclusive() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Pseudo-random numbers by the SplitMix64 algorithm.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn bytes(&mut self, most: u64) -> Vec<u8> {
        (0..self.next() % most).map(|_| self.next() as u8).collect()
    }
}

/// Gives `body` the committed seeds of `target`, and then `count` pseudo-random inputs of
/// `most` bytes at most. On a slow machine it stops after the time `limit`.
fn feed(target: &str, count: u64, most: u64, limit: Duration, mut body: impl FnMut(&[u8])) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(target);
    let seeds = fs::read_dir(&directory)
        .unwrap_or_else(|error| panic!("no seeds in {}: {error}", directory.display()));
    let mut run = |name: &str, input: &[u8]| {
        // libtest shows this only when the body panics.
        println!("{target}: {name}: {input:02x?}");
        body(input);
    };
    for seed in seeds {
        let path = seed.expect("the directory can be read").path();
        run(&path.display().to_string(), &fs::read(&path).expect("a seed can be read"));
    }
    let start = Instant::now();
    for number in 0..count {
        run(&format!("number {number}"), &Random(number).bytes(most));
        if start.elapsed() > limit {
            break;
        }
    }
}

const LIMIT: Duration = Duration::from_secs(3);

#[test]
fn any_interleaving_of_clients_leaves_every_view_equal_to_the_roster() {
    let _turn = exclusive();
    let mut all = interleave::Seen::default();
    feed("interleave", 1500, 400, LIMIT, |input| {
        let seen = interleave::run(input);
        all.joined += seen.joined;
        all.left += seen.left;
        all.refused += seen.refused;
        all.compared += seen.compared;
        all.rung += seen.rung;
    });
    println!("{all:?}");
    let least = [all.joined, all.left, all.refused, all.compared, all.rung].into_iter().min();
    assert!(least > Some(0), "the inputs reach too little: {all:?}");
}

#[test]
fn for_any_server_messages_the_client_state_matches_them_or_the_client_disconnects() {
    let _turn = exclusive();
    let mut all = client::Seen::default();
    feed("client", 4000, 150, LIMIT, |input| {
        let seen = client::run(input);
        all.connected += seen.connected;
        all.refused += seen.refused;
        all.joined += seen.joined;
        all.left += seen.left;
        all.rung += seen.rung;
    });
    println!("{all:?}");
    let least = [all.connected, all.refused, all.joined, all.left, all.rung].into_iter().min();
    assert!(least > Some(0), "the inputs reach too little: {all:?}");
}

#[test]
fn no_command_line_makes_the_parser_panic() {
    let _turn = exclusive();
    let (mut all, mut accepted) = (0, 0);
    feed("command_line", 4000, 40, LIMIT, |input| {
        all += 2;
        accepted += usize::from(command_line::line(input));
        accepted += usize::from(command_line::likely_line(input));
    });
    assert!(accepted > 0 && accepted < all, "{accepted} of {all} accepted");
}

#[test]
fn sizes_and_vectors_match_a_second_parser() {
    let _turn = exclusive();
    let (mut all, mut accepted) = (0, 0);
    feed("number", 20_000, 9, LIMIT, |input| {
        all += 2;
        accepted += command_line::number(input);
    });
    assert!(accepted > all / 100 && accepted < all, "{accepted} of {all} accepted");
}
