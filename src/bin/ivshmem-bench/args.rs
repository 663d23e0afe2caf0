// SPDX-License-Identifier: GPL-2.0-or-later
//! The command line.

#![forbid(unsafe_code)]

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

/// A part of the measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    /// Doorbell round trips between two peers.
    Doorbell,
    /// Copies to and from the shared memory.
    Memory,
    /// The time to join.
    Join,
}

/// Measures the performance of ivshmem peers on this host: doorbell round trips, the throughput
/// of the shared memory, and the time to join. The bare system calls are measured beside them.
#[derive(Clone, Debug, Parser)]
#[command(name = "ivshmem-bench", version, disable_help_flag = true)]
#[command(
    after_help = "With -S the peers of this program join a server that other clients may use. Their \
                  ids are not given again while a client that saw them stays connected. The \
                  memory is only read, unless --overwrite is given."
)]
pub(crate) struct Args {
    /// Show this help
    #[arg(short = 'h', long, action = clap::ArgAction::Help)]
    help: Option<bool>,

    /// Use the server at this socket instead of starting one
    #[arg(short = 'S', long, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,

    /// Vectors of each peer; with -S the server determines it
    #[arg(
        short = 'n',
        long,
        value_name = "VECTORS",
        default_value_t = 1,
        conflicts_with = "socket"
    )]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=2048))]
    pub(crate) vectors: u32,

    /// Measure only this; may be given more than once
    #[arg(long, value_name = "WHAT")]
    only: Vec<Part>,

    /// Doorbell round trips of each kind in each round
    #[arg(long, value_name = "N", default_value_t = 1000)]
    #[arg(value_parser = clap::value_parser!(u32).range(2..=1_000_000))]
    pub(crate) trips: u32,

    /// Rounds; library and bare system calls take turns in each
    #[arg(short, long, value_name = "N", default_value_t = 21)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) rounds: u32,

    /// Clients that join, one after another
    #[arg(long, value_name = "N", default_value_t = 100)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) joins: u32,

    /// With -S: also measure writing, which destroys the content of the shared memory
    #[arg(long, requires = "socket")]
    pub(crate) overwrite: bool,

    /// Write one JSON object instead of a table
    #[arg(short, long)]
    pub(crate) json: bool,

    /// Run as the other peer of a measurement
    #[arg(long, hide = true, num_args = 1.., exclusive = true)]
    pub(crate) echo: Vec<String>,
}

impl Args {
    /// Whether this part should be measured.
    pub(crate) fn wants(&self, part: Part) -> bool {
        self.only.is_empty() || self.only.contains(&part)
    }

    /// Whether the shared memory may be written to.
    pub(crate) fn may_write(&self) -> bool {
        self.socket.is_none() || self.overwrite
    }
}
