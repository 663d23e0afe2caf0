// SPDX-License-Identifier: GPL-2.0-or-later
//! Prints the figures, as a table or as JSON.

#![forbid(unsafe_code)]

use std::io::{self, Write};

use serde_json::{Value, json};

use crate::memory::Way;
use crate::stats::Spread;
use crate::{doorbell, memory};

/// All results.
#[derive(Default)]
pub(crate) struct Report {
    pub(crate) doorbell: Vec<doorbell::Outcome>,
    pub(crate) memory: Vec<memory::Outcome>,
    /// The number of vectors of each peer, and the seconds to join.
    pub(crate) join: Option<(u32, Spread)>,
}

impl Report {
    /// Writes a table to stdout.
    pub(crate) fn print(&self) -> io::Result<()> {
        let mut out = io::stdout().lock();
        if !self.doorbell.is_empty() {
            writeln!(out, "doorbell round trip, µs       median       99th     99.9th   ratio")?;
        }
        for outcome in &self.doorbell {
            let receiver = outcome.receiver.name();
            let line = |who: &str, Spread { median, p99, p999 }: Spread| {
                let name = format!("{receiver}, {who}");
                format!("  {name:23} {:10.2} {:10.2} {:10.2}", median * 1e6, p99 * 1e6, p999 * 1e6)
            };
            writeln!(out, "{} {:7.3}", line("library", outcome.library), outcome.ratio)?;
            writeln!(out, "{}", line("bare eventfd", outcome.bare))?;
        }
        if !self.memory.is_empty() {
            writeln!(out, "shared memory, GB/s          library     memcpy              ratio")?;
        }
        for outcome in &self.memory {
            let name = format!("{}, {} KiB", way(outcome.way), outcome.block >> 10);
            writeln!(
                out,
                "  {name:23} {:10.2} {:10.2} {:18.3}",
                outcome.library / 1e9,
                outcome.memcpy / 1e9,
                outcome.ratio
            )?;
        }
        if let Some((vectors, Spread { median, p99, p999 })) = self.join {
            writeln!(out, "time to join, µs              median       99th     99.9th")?;
            let name = format!("{vectors} vectors");
            let (median, p99, p999) = (median * 1e6, p99 * 1e6, p999 * 1e6);
            writeln!(out, "  {name:23} {median:10.1} {p99:10.1} {p999:10.1}")?;
        }
        Ok(())
    }

    /// Writes one JSON object to stdout.
    pub(crate) fn print_json(&self) -> io::Result<()> {
        let doorbell = self.doorbell.iter().map(|outcome| {
            json!({
                "receiver": outcome.receiver.name(),
                "library_seconds": spread(outcome.library),
                "eventfd_seconds": spread(outcome.bare),
                "ratio": outcome.ratio,
            })
        });
        let memory = self.memory.iter().map(|outcome| {
            json!({
                "way": way(outcome.way),
                "block_bytes": outcome.block,
                "library_bytes_per_second": outcome.library,
                "memcpy_bytes_per_second": outcome.memcpy,
                "ratio": outcome.ratio,
            })
        });
        let join = self
            .join
            .map(|(vectors, seconds)| json!({ "vectors": vectors, "seconds": spread(seconds) }));
        let all = json!({
            "doorbell": doorbell.collect::<Vec<_>>(),
            "memory": memory.collect::<Vec<_>>(),
            "join": join,
        });
        writeln!(io::stdout(), "{all:#}")
    }
}

fn spread(spread: Spread) -> Value {
    json!({ "median": spread.median, "p99": spread.p99, "p99_9": spread.p999 })
}

fn way(way: Way) -> &'static str {
    match way {
        Way::Read => "read",
        Way::Write => "write",
    }
}
