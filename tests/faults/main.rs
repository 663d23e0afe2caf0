// SPDX-License-Identifier: GPL-2.0-or-later
//! Every system call that the server makes, made to fail in turn.
//!
//! strace does it, to the real program: at the start, while it serves, at the end. What must
//! come of each fault is a table (`matrix`). `IVSHMEM_FULL=1` tries each errno at each place;
//! without it the likely ones, at two.

#[path = "../common/mod.rs"]
mod common;
mod crowd;
mod matrix;
mod serving;

mod starting;
mod strace;
