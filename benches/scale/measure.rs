// SPDX-License-Identifier: GPL-2.0-or-later
//! One measurement: a new server, new clients, one pattern of joining.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::floor::How;
use crate::process::{Failure, Process};

/// How the clients join.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pattern {
    /// Each client joins when the previous one is complete.
    OneByOne,
    /// All clients connect before any of them reads.
    AtOnce,
}

/// Which threads read for the clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Readers {
    /// One thread reads for all clients.
    One,
    /// One thread per client, which sleeps until a message comes.
    Each,
}

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    pub(crate) clients: u32,
    pub(crate) vectors: u32,
    pub(crate) pattern: Pattern,
    pub(crate) readers: Readers,
    pub(crate) rounds: u32,
    /// The number of clients that join before the measurement.
    pub(crate) residents: u32,
}

impl Case {
    /// The number of descriptors that the server needs for this case.
    pub(crate) fn descriptors(self) -> u64 {
        u64::from(self.clients + self.residents) * u64::from(self.vectors + 1) + 64
    }
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let pattern = match self.pattern {
            Pattern::OneByOne => "one after another",
            Pattern::AtOnce => "all at once",
        };
        let readers = match self.readers {
            Readers::One => "",
            Readers::Each => ", one sleeping thread per client",
        };
        write!(f, "{} clients × {} vectors, {pattern}{readers}", self.clients, self.vectors)?;
        match self.residents {
            0 => Ok(()),
            residents => write!(f, ", beside {residents}"),
        }
    }
}

/// The name of a server that is not ours.
pub(crate) const OTHER: &str = "other";

/// The program that is measured.
#[derive(Clone, Debug)]
pub(crate) enum Subject {
    /// An ivshmem-server program.
    Server { name: &'static str, program: PathBuf },
    /// Only the sends.
    Floor(How),
}

impl Subject {
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Server { name, .. } => (*name).into(),
            Self::Floor(how) => format!("floor, {}", how.name()),
        }
    }

    /// Whether it is another server, which may fail because of its own limits.
    pub(crate) fn is_other(&self) -> bool {
        matches!(self, Self::Server { name: OTHER, .. })
    }

    pub(crate) fn is_floor(&self) -> bool {
        matches!(self, Self::Floor(_))
    }
}

/// The result of one measurement.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    /// CPU time of the server, in nanoseconds per message.
    pub(crate) cpu: f64,
    pub(crate) messages: f64,
    /// The number of messages that did not come.
    pub(crate) lost: f64,
    /// Seconds from connect to the last of the client's own vectors: the median and the 99th
    /// percentile.
    pub(crate) median: f64,
    pub(crate) p99: f64,
    /// Seconds from connect to the memory message: the median and the longest.
    pub(crate) greeted: f64,
    pub(crate) longest: f64,
    /// Bytes of memory that the server allocated per client.
    pub(crate) memory: f64,
}

impl Sample {
    /// The sample of a server that failed.
    pub(crate) const FAILED: Self = Self {
        cpu: f64::NAN,
        messages: f64::NAN,
        lost: f64::NAN,
        median: f64::NAN,
        p99: f64::NAN,
        greeted: f64::NAN,
        longest: f64::NAN,
        memory: f64::NAN,
    };
}

/// Measures `subject` once.
pub(crate) fn measure(subject: &Subject, case: Case, pinned: bool) -> Result<Sample, Failure> {
    let directory = tempfile::tempdir()?;
    let socket = directory.path().join("socket");
    let path = socket.to_str().ok_or("the temporary directory's name is not UTF-8")?;
    let vectors = case.vectors.to_string();
    let order = match case.pattern {
        Pattern::OneByOne => format!("one {}", case.clients),
        Pattern::AtOnce => format!("all {}", case.clients),
    };
    let readers = match case.readers {
        Readers::One => "crowd",
        Readers::Each => "thread_per_client",
    };
    let mut server = match subject {
        Subject::Floor(how) => {
            Process::part(&["floor", path, &vectors, how.name(), if pinned { "0" } else { "-" }])?
        }
        Subject::Server { program, .. } => {
            let mut command = if pinned {
                // This part pins itself to a CPU and then executes the program.
                let mut command = Command::new(std::env::current_exe()?);
                command.args(["--part", "exec", "0"]).arg(program);
                command
            } else {
                Command::new(program)
            };
            command.args(["-F", "-S", path, "-l", "1M", "-n", &vectors, "-m"]);
            command.arg(directory.path());
            command.stdin(Stdio::null()).stdout(Stdio::null());
            Process::start(command)?
        }
    };
    server.wait_until_listening(&socket)?;
    let mut crowd = Process::part(&[readers, path, &vectors, if pinned { "1" } else { "-" }])?;
    if case.residents > 0 {
        let order = format!("all {}", case.residents);
        if subject.is_floor() {
            server.send_line(&order)?;
        }
        crowd.send_line(&order)?;
        crowd.read_figures()?;
        if subject.is_floor() {
            server.read_figures()?;
        }
    }
    let cpu = server.cpu()?;
    let memory = server.memory()?;
    if subject.is_floor() {
        server.send_line(&order)?;
    }
    crowd.send_line(&order)?;
    let figures = crowd.read_figures()?;
    let messages = figures.get("messages")?;
    let cpu = if subject.is_floor() {
        server.read_figures()?.get("cpu")?
    } else {
        (server.cpu()? - cpu) as f64
    };
    let memory = (server.memory()? as f64 - memory as f64) / f64::from(case.clients);
    // The server ends first, so that it need not process the end of each client.
    drop(server);
    Ok(Sample {
        cpu: cpu / messages,
        messages,
        lost: figures.get("lost")?,
        median: figures.get("median")?,
        p99: figures.get("p99")?,
        greeted: figures.get("greeted")?,
        longest: figures.get("longest")?,
        memory,
    })
}
