// SPDX-License-Identifier: GPL-2.0-or-later
//! The server's CPU time per message, compared with the kernel's and with another server's.
//!
//! The protocol fixes the number of messages, so the CPU time per message is the important figure.
//! No server can use less than the kernel needs for the sends alone; the ratio to this floor shows
//! how much could still be saved. Servers and floor are measured alternately in rounds, and ratios
//! are taken within a round, so that other load on the machine affects all of them.
//!
//! See docs/benchmarks.md.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use clap::Parser;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;

mod crowd;
mod floor;
mod measure;
mod process;
mod progress;
mod report;
mod sys;
mod thread_per_client;

use floor::How;
use measure::{Case, Pattern, Readers, Sample, Subject, measure};
use process::Failure;
use report::Outcome;

/// Measures the server's CPU time for each message beside the kernel's floor.
#[derive(Debug, Parser)]
#[command(name = "scale", bin_name = "cargo bench --bench scale --")]
struct Args {
    /// The ivshmem-server program to measure, in place of the one that was just built
    #[arg(long, value_name = "PROGRAM", env = "IVSHMEM_SERVER_BIN")]
    #[arg(default_value = env!("CARGO_BIN_EXE_ivshmem-server"), hide_default_value = true)]
    server: PathBuf,
    /// Another ivshmem-server program to measure beside ours
    #[arg(long, value_name = "PROGRAM", env = "OTHER")]
    other: Option<PathBuf>,
    /// Measure only this number of clients
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536))]
    clients: Option<u32>,
    /// Vectors, with --clients
    #[arg(long, short = 'n', value_name = "V", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=2048))]
    vectors: u32,
    /// With --clients: only all at once, not one after another
    #[arg(long, conflicts_with = "one_by_one")]
    at_once: bool,
    /// With --clients: only one after another, not all at once
    #[arg(long)]
    one_by_one: bool,
    /// With --clients: each client has its own reading thread, which sleeps until a message comes
    #[arg(long)]
    each: bool,
    /// With --clients: this number of other clients join before
    #[arg(long, value_name = "N", default_value_t = 0, requires = "clients")]
    residents: u32,
    /// Number of measurements of each case
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// Only small sizes; takes seconds
    #[arg(long)]
    quick: bool,
    /// Also the largest sizes; takes a quarter of an hour
    #[arg(long)]
    large: bool,
    /// Keep the server on one CPU and the clients on another
    #[arg(long)]
    pin: bool,
    /// The file for the figures
    #[arg(long, value_name = "FILE", default_value = concat!(env!("CARGO_TARGET_TMPDIR"), "/../bench/scale.json"))]
    json: Option<PathBuf>,
    /// The option that cargo bench passes
    #[arg(long, hide = true)]
    bench: bool,
    /// Run as one of the processes of a measurement
    #[arg(long, hide = true, num_args = 1.., allow_hyphen_values = true)]
    part: Vec<String>,
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if !words.iter().any(|word| word == "--bench" || word == "--part") {
        // cargo test runs this program, not cargo bench, and passes libtest's arguments.
        return smoke(&words);
    }
    let args = Args::parse();
    let outcome = if args.part.is_empty() { bench(&args) } else { part(&args.part) };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("scale: {error}");
            ExitCode::FAILURE
        }
    }
}

fn part(part: &[String]) -> Result<(), Failure> {
    // This process must end with its parent.
    set_pdeathsig(Signal::SIGKILL)?;
    let words: Vec<&str> = part.iter().map(String::as_str).collect();
    let pin = |cpu: &str| match cpu.parse() {
        Ok(cpu) => sys::pin(cpu),
        Err(_) => Ok(()),
    };
    match *words {
        ["crowd", path, vectors, cpu] => {
            pin(cpu)?;
            crowd::run(path.as_ref(), vectors.parse()?)
        }
        ["thread_per_client", path, vectors, cpu] => {
            pin(cpu)?;
            thread_per_client::run(path.as_ref(), vectors.parse()?)
        }
        ["floor", path, vectors, how, cpu] => {
            pin(cpu)?;
            let how = How::from_name(how).ok_or("the floor is sendmsg or sendmmsg")?;
            floor::run(path.as_ref(), vectors.parse()?, how)
        }
        ["exec", cpu, program, ref arguments @ ..] => {
            pin(cpu)?;
            Err(Command::new(program).args(arguments).exec().into())
        }
        _ => Err("unknown part".into()),
    }
}

/// The cases, in the order in which they are measured.
fn cases(args: &Args) -> Vec<Case> {
    use Pattern::{AtOnce, OneByOne};
    let case = |clients, vectors, pattern, rounds| Case {
        clients,
        vectors,
        pattern,
        readers: if args.each { Readers::Each } else { Readers::One },
        rounds: args.rounds.unwrap_or(rounds),
        residents: args.residents,
    };
    let beside = |case: Case| Case { residents: 3000, ..case };
    let each = |case: Case| Case { readers: Readers::Each, ..case };
    if let Some(clients) = args.clients {
        let mut cases = Vec::new();
        if !args.at_once {
            cases.push(case(clients, args.vectors, OneByOne, 5));
        }
        if !args.one_by_one {
            cases.push(case(clients, args.vectors, AtOnce, 5));
        }
        return cases;
    }
    if args.quick {
        return vec![case(20, 1, OneByOne, 2), each(case(20, 4, AtOnce, 2))];
    }
    let mut cases = vec![
        case(200, 1, OneByOne, 21),
        case(30, 8, OneByOne, 21),
        case(256, 1, OneByOne, 11),
        case(256, 1, AtOnce, 11),
        each(case(256, 1, OneByOne, 5)),
        each(case(256, 1, AtOnce, 5)),
        case(100, 1, OneByOne, 21),
        case(1000, 1, OneByOne, 3),
        case(1000, 1, AtOnce, 3),
        case(100, 64, OneByOne, 3),
        beside(case(256, 1, AtOnce, 3)),
    ];
    if args.large {
        cases.extend([
            case(1000, 64, OneByOne, 1),
            case(100, 2048, OneByOne, 1),
            case(10_000, 1, AtOnce, 1),
        ]);
    }
    cases
}

/// The quick cases as one test of cargo test: they must succeed, and no message may be lost.
fn smoke(words: &[String]) -> ExitCode {
    const NAME: &str = "scale_measures_and_nothing_is_lost";
    let mut filters = words.iter().filter(|word| !word.starts_with('-')).peekable();
    let filtered = filters.peek().is_some() && !filters.any(|word| NAME.contains(&**word));
    if filtered || words.iter().any(|word| word == "--list" || word == "--ignored") {
        return ExitCode::SUCCESS;
    }
    let outcome = Args::try_parse_from(["scale", "--bench", "--quick"])
        .map_err(Failure::from)
        .and_then(|args| bench(&Args { json: None, ..args }));
    let (word, passed) = if outcome.is_ok() { ("ok", 1) } else { ("FAILED", 0) };
    println!("\ntest {NAME} ... {word}");
    if let Err(error) = &outcome {
        println!("{error}");
    }
    println!("\ntest result: {word}. {passed} passed; {} failed", 1 - passed);
    if passed == 1 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn bench(args: &Args) -> Result<(), Failure> {
    let server = |option: &str, name, path: &Path| {
        let program = std::path::absolute(path)?;
        if program.is_file() {
            Ok(Subject::Server { name, program })
        } else {
            Err(Failure::from(format!("{option}: there is no program {}", path.display())))
        }
    };
    let mut subjects = vec![
        server("--server", "ours", &args.server)?,
        Subject::Floor(How::Sendmsg),
        Subject::Floor(How::Sendmmsg),
    ];
    if let Some(other) = &args.other {
        subjects.insert(1, server("--other", measure::OTHER, other)?);
    }
    let pinned = args.pin && std::thread::available_parallelism()?.get() > 1;
    let cases = cases(args);
    raise_limit(cases.iter().map(|case| case.descriptors()).max().unwrap_or(0));
    let (_, limit) = getrlimit(Resource::RLIMIT_NOFILE)?;

    let mut outcomes = Vec::new();
    for case in cases {
        if case.descriptors() > limit {
            println!(
                "\n{case}: skipped: it takes {} descriptors, and the limit is {limit}; raise it \
                 (ulimit -Hn), which takes CAP_SYS_RESOURCE",
                case.descriptors()
            );
            continue;
        }
        let mut rounds = Vec::new();
        let mut failed = Vec::new();
        for turn in 0..case.rounds as usize {
            let mut samples = vec![None; subjects.len()];
            for n in 0..subjects.len() {
                // Each round begins with another subject.
                let n = (n + turn) % subjects.len();
                let sample = if failed.contains(&n) {
                    Ok(Sample::FAILED)
                } else {
                    measure(&subjects[n], case, pinned)
                };
                samples[n] = Some(match sample {
                    Err(error) if subjects[n].is_other() => {
                        println!("\n{case}: the other server failed: {error}");
                        failed.push(n);
                        Sample::FAILED
                    }
                    result => result
                        .map_err(|error| format!("{case}: {}: {error}", subjects[n].name()))?,
                });
            }
            rounds.push(samples.into_iter().flatten().collect());
        }
        let outcome = Outcome { case, rounds };
        outcome.print(&subjects);
        outcomes.push(outcome);
    }
    report::print_bursts(&outcomes, &subjects);
    if let Some(path) = &args.json {
        report::write(path, &outcomes, &subjects)?;
    }
    // Only lost messages of our server are an error.
    match outcomes.iter().find(|outcome| outcome.rounds.iter().any(|round| round[0].lost > 0.0)) {
        Some(outcome) => Err(format!("{}: messages were lost", outcome.case).into()),
        None => Ok(()),
    }
}

/// Raises the limit of open files to what the largest case needs, if that is allowed.
fn raise_limit(wanted: u64) {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let limit = wanted.max(hard);
        if setrlimit(Resource::RLIMIT_NOFILE, limit, limit).is_err() {
            let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
        }
    }
}
