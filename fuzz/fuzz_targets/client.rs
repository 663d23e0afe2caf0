// SPDX-License-Identifier: GPL-2.0-or-later
//! A client with a server that sends any bytes.

#![no_main]

#[path = "../bodies/mod.rs"]
mod bodies;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    bodies::client::run(bytes);
});
