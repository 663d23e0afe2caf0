// SPDX-License-Identifier: GPL-2.0-or-later
//! Prints the figures as a table and writes them to a JSON file.

#![forbid(unsafe_code)]

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::measure::{Case, Pattern, Readers, Sample, Subject};
use crate::process::Failure;

/// All samples of one case: in each round, one of each subject.
pub(crate) struct Outcome {
    pub(crate) case: Case,
    pub(crate) rounds: Vec<Vec<Sample>>,
}

/// The figures that are printed for one subject.
struct Row {
    name: String,
    cpu: f64,
    least: f64,
    /// The median of the ratios to the lower floor of the same round.
    ratio: f64,
    ratio_of_least: f64,
    median: f64,
    p99: f64,
    greeted: f64,
    longest: f64,
    memory: f64,
    lost: f64,
}

fn middle(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => f64::midpoint(values[n / 2 - 1], values[n / 2]),
    }
}

fn least(values: impl Iterator<Item = f64>) -> f64 {
    // NaN if there is no value.
    values.fold(f64::NAN, f64::min)
}

impl Outcome {
    fn rows(&self, subjects: &[Subject]) -> Vec<Row> {
        let floor = |round: &Vec<Sample>| {
            least(subjects.iter().zip(round).filter(|(s, _)| s.is_floor()).map(|(_, r)| r.cpu))
        };
        let least_floor = least(self.rounds.iter().map(floor));
        let row = |(n, subject): (usize, &Subject)| {
            let of = |figure: fn(&Sample) -> f64| self.rounds.iter().map(move |r| figure(&r[n]));
            Row {
                name: subject.name(),
                cpu: middle(of(|sample| sample.cpu)),
                least: least(of(|sample| sample.cpu)),
                ratio: middle(self.rounds.iter().map(|round| round[n].cpu / floor(round))),
                ratio_of_least: least(of(|sample| sample.cpu)) / least_floor,
                median: middle(of(|sample| sample.median)),
                p99: middle(of(|sample| sample.p99)),
                greeted: middle(of(|sample| sample.greeted)),
                longest: middle(of(|sample| sample.longest)),
                memory: middle(of(|sample| sample.memory)),
                lost: of(|sample| sample.lost).sum(),
            }
        };
        subjects.iter().enumerate().map(row).collect()
    }

    /// Prints the case.
    pub(crate) fn print(&self, subjects: &[Subject]) {
        let messages = self.rounds[0][0].messages;
        println!("\n{}: {messages} messages, {} rounds", self.case, self.rounds.len());
        println!(
            "  {:16} {:>9} {:>9} {:>7} {:>9} {:>10} {:>10} {:>10} {:>10} {:>9} {:>7}",
            "",
            "ns/msg",
            "least",
            "ratio",
            "of least",
            "memory",
            "longest",
            "complete",
            "99th",
            "B/client",
            "lost"
        );
        for row in self.rows(subjects) {
            println!(
                "  {:16} {:9.0} {:9.0} {:7.3} {:9.3} {:8.3}ms {:8.3}ms {:8.3}ms {:8.3}ms {:9.0} {:7}",
                row.name,
                row.cpu,
                row.least,
                row.ratio,
                row.ratio_of_least,
                row.greeted * 1e3,
                row.longest * 1e3,
                row.median * 1e3,
                row.p99 * 1e3,
                row.memory,
                row.lost,
            );
        }
    }

    fn to_json(&self, subjects: &[Subject]) -> Value {
        let rows = self.rows(subjects);
        let subjects: Vec<Value> = rows
            .iter()
            .enumerate()
            .map(|(n, row)| {
                json!({
                    "name": row.name,
                    "cpu_ns_per_message": { "median": row.cpu, "least": row.least },
                    "ratio_to_floor": { "median": row.ratio, "of_least": row.ratio_of_least },
                    "memory_seconds": { "median": row.greeted, "longest": row.longest },
                    "complete_seconds": { "median": row.median, "p99": row.p99 },
                    "memory_bytes_per_client": row.memory,
                    "lost": row.lost,
                    "cpu_ns_per_message_of_rounds":
                        self.rounds.iter().map(|round| round[n].cpu).collect::<Vec<_>>(),
                })
            })
            .collect();
        json!({
            "clients": self.case.clients,
            "vectors": self.case.vectors,
            "residents": self.case.residents,
            "a_thread_for_each": self.case.readers == Readers::Each,
            "at_once": self.case.pattern == Pattern::AtOnce,
            "messages": self.rounds[0][0].messages,
            "subjects": subjects,
        })
    }
}

/// Prints the ratio of the CPU time of joins all at once to the CPU time of joins one after another,
/// if both were measured.
pub(crate) fn print_bursts(outcomes: &[Outcome], subjects: &[Subject]) {
    for at_once in outcomes.iter().filter(|o| o.case.pattern == Pattern::AtOnce) {
        let same = |o: &&Outcome| {
            o.case.pattern == Pattern::OneByOne
                && o.case.residents == at_once.case.residents
                && (o.case.clients, o.case.vectors, o.case.readers)
                    == (at_once.case.clients, at_once.case.vectors, at_once.case.readers)
        };
        let Some(one_by_one) = outcomes.iter().find(same) else { continue };
        println!("\n{}, CPU / of one after another:", at_once.case);
        for (burst, single) in at_once.rows(subjects).iter().zip(one_by_one.rows(subjects)) {
            println!(
                "  {:16} {:.3} (of the least: {:.3})",
                burst.name,
                burst.cpu / single.cpu,
                burst.least / single.least
            );
        }
    }
}

/// Writes all to a file.
pub(crate) fn write(
    path: &Path,
    outcomes: &[Outcome],
    subjects: &[Subject],
) -> Result<(), Failure> {
    let cases: Vec<Value> = outcomes.iter().map(|outcome| outcome.to_json(subjects)).collect();
    let all = json!({ "benchmark": "scale", "kernel": kernel(), "cases": cases });
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    fs::write(path, format!("{all:#}\n"))?;
    println!("\nwritten: {}", path.display());
    Ok(())
}

fn kernel() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().into()
}
