// SPDX-License-Identifier: GPL-2.0-or-later
//! A real server with actions of its clients.

#![no_main]

#[path = "../bodies/mod.rs"]
mod bodies;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    bodies::interleave::run(bytes);
});
