// SPDX-License-Identifier: GPL-2.0-or-later
//! The `ivshmem-bench` program: measures the performance of peers on this host, beside that of the
//! bare system calls. docs/benchmarks.md explains the figures.

#![forbid(unsafe_code)]

use std::io::{self, Write};
use std::process::ExitCode;
use std::thread;
use std::time::Instant;

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};

mod args;
mod bell;
mod doorbell;
mod host;
mod memory;
mod report;
mod stats;

use args::{Args, Part};
use bell::Receiver;
use host::Host;
use memory::Way;
use report::Report;
use stats::Spread;

/// Any error; its sources are printed with it.
type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    let outcome = if args.echo.is_empty() { bench(&args) } else { doorbell::echo(&args.echo) };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "ivshmem-bench: {}", ivshmem::Chain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn bench(args: &Args) -> Result<(), Failure> {
    let host = Host::open(args)?;
    let mut receivers = vec![Receiver::Blocking];
    // On one processor, two busy receivers would wait for each other's time slice.
    if thread::available_parallelism()?.get() > 1 {
        receivers.push(Receiver::Busy);
    } else {
        let _ =
            writeln!(io::stderr(), "ivshmem-bench: no busy receivers: there is only one processor");
    }
    let ways: &[Way] = if args.may_write() { &[Way::Write, Way::Read] } else { &[Way::Read] };
    let resident = host.join()?;

    let mut steps = 0;
    if args.wants(Part::Doorbell) {
        steps += receivers.len() as u64 * u64::from(args.rounds);
    }
    if args.wants(Part::Memory) {
        steps += ways.len() as u64 * memory::blocks(resident.memory()) * u64::from(args.rounds);
    }
    if args.wants(Part::Join) {
        steps += u64::from(args.joins);
    }
    // The progress bar is visible only if stderr is a terminal.
    let progress = ProgressBar::new(steps)
        .with_style(ProgressStyle::with_template("{msg:10} {wide_bar} {percent}% {eta}")?);
    let tick = || progress.inc(1);

    let mut report = Report::default();
    if args.wants(Part::Doorbell) {
        progress.set_message("doorbell");
        for receiver in receivers {
            let outcome = doorbell::measure(&host, receiver, args.trips, args.rounds, tick)?;
            report.doorbell.push(outcome);
        }
    }
    if args.wants(Part::Memory) {
        progress.set_message("memory");
        if host.is_own() {
            // Writing first gives the memory its pages.
            resident.memory().write(0, &vec![1; resident.memory().len()])?;
        }
        for &way in ways {
            report.memory.extend(memory::measure(resident.memory(), way, args.rounds, tick)?);
        }
    }
    if args.wants(Part::Join) {
        progress.set_message("join");
        let mut times = Vec::new();
        for _ in 0..args.joins {
            let start = Instant::now();
            let client = host.join()?;
            times.push(start.elapsed().as_secs_f64());
            drop(client);
            tick();
        }
        report.join = Some((host.vectors(), Spread::of(times)));
    }
    progress.finish_and_clear();
    let written = if args.json { report.print_json() } else { report.print() };
    match written {
        // The reader has closed the pipe.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}
