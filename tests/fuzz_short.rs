// SPDX-License-Identifier: GPL-2.0-or-later
//! The fuzz targets without a fuzzer: each body over the committed seeds and over
//! pseudo-random bytes, the same ones every time. `make fuzz` runs the real thing.
//!
//! Each test also asserts that its inputs reached something: a generator that only makes
//! inputs that are refused at once tests nothing.

#![cfg(feature = "programs")]

#[path = "../fuzz/bodies/mod.rs"]
mod bodies;

use std::fs;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bodies::{client, command_line, interleave};

/// One at a time: descriptors are counted, and made scarce, for the whole process.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The pseudo-random numbers of SplitMix64.
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
/// `most` bytes at most, but no more of them than `limit` allows on a slow machine.
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
    let _turn = alone();
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
fn whatever_a_server_says_a_client_knows_what_was_said_or_ends() {
    let _turn = alone();
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
    let _turn = alone();
    let (mut all, mut accepted) = (0, 0);
    feed("command_line", 4000, 40, LIMIT, |input| {
        all += 2;
        accepted += usize::from(command_line::line(input));
        accepted += usize::from(command_line::likely_line(input));
    });
    assert!(accepted > 0 && accepted < all, "{accepted} of {all} accepted");
}

#[test]
fn sizes_and_vectors_are_what_a_second_reading_says() {
    let _turn = alone();
    let (mut all, mut accepted) = (0, 0);
    feed("number", 20_000, 9, LIMIT, |input| {
        all += 2;
        accepted += command_line::number(input);
    });
    assert!(accepted > all / 100 && accepted < all, "{accepted} of {all} accepted");
}
