// SPDX-License-Identifier: GPL-2.0-or-later
//! Fault injection: each system call that the server makes fails in turn.
//!
//! strace injects the faults into the real program: at the start, while it serves, and during the
//! stop. The table in `matrix` has the expected result of each fault. `IVSHMEM_FULL=1` tries each
//! errno at each occurrence of the call; the short form tries the likely errnos at two of them.

#[path = "../common/mod.rs"]
mod common;
mod crowd;
mod keeping;
mod matrix;
mod serving;
mod starting;
mod strace;
#[path = "../supervise/supervisor.rs"]
#[allow(dead_code, reason = "the tests of the supervisor use the rest")]
mod supervisor;
