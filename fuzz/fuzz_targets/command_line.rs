// SPDX-License-Identifier: GPL-2.0-or-later
//! Whole command lines: any bytes, and valid options in any order.

#![no_main]

#[path = "../bodies/mod.rs"]
mod bodies;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    bodies::command_line::line(bytes);
    bodies::command_line::likely_line(bytes);
});
