// SPDX-License-Identifier: GPL-2.0-or-later
//! A client, and a server that says anything.

#![no_main]

#[path = "../bodies/mod.rs"]
mod bodies;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    bodies::client::run(bytes);
});
