// SPDX-License-Identifier: GPL-2.0-or-later
//! Sizes and numbers of vectors.

#![no_main]

#[path = "../bodies/mod.rs"]
mod bodies;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    bodies::command_line::number(bytes);
});
