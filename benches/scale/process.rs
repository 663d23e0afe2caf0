// SPDX-License-Identifier: GPL-2.0-or-later
//! The processes of a measurement: started, spoken to line by line, read from outside, ended.

#![forbid(unsafe_code)]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// An error whose text says everything.
pub(crate) type Failure = Box<dyn std::error::Error>;

/// How long a thing that needs a moment may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// A child process, ended when dropped.
pub(crate) struct Process {
    child: Child,
    input: Option<ChildStdin>,
    output: Option<BufReader<ChildStdout>>,
}

impl Process {
    /// Starts this program itself in one of its other parts, and talks with it.
    pub(crate) fn part(arguments: &[&str]) -> Result<Self, Failure> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("--part").args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        Self::start(command)
    }

    /// Starts a program, on `cpu` if that is said.
    pub(crate) fn start(mut command: Command) -> Result<Self, Failure> {
        // Its own group: a Ctrl-C reaches it through our Drop, not past it.
        command.process_group(0);
        let mut child =
            command.spawn().map_err(|error| format!("cannot start {command:?}: {error}"))?;
        let input = child.stdin.take();
        let output = child.stdout.take().map(BufReader::new);
        Ok(Self { child, input, output })
    }

    /// Sends a line.
    pub(crate) fn say(&mut self, line: &str) -> Result<(), Failure> {
        let input = self.input.as_mut().ok_or("nobody to talk to")?;
        Ok(writeln!(input, "{line}")?)
    }

    /// The answer: words and numbers in turn.
    pub(crate) fn hear(&mut self) -> Result<Figures, Failure> {
        let mut line = String::new();
        let output = self.output.as_mut().ok_or("nobody to listen to")?;
        if output.read_line(&mut line)? == 0 {
            return Err("a part of the benchmark ended early; see above".into());
        }
        Ok(Figures(line))
    }

    fn proc(&self, file: &str) -> Result<String, Failure> {
        let path = format!("/proc/{}/{file}", self.child.id());
        fs::read_to_string(&path).map_err(|error| format!("cannot read {path}: {error}").into())
    }

    /// CPU time of all threads, in nanoseconds, once the process sleeps.
    ///
    /// The scheduler's own sum: `utime` and `stime` of /proc/PID/stat come in ticks of 10 ms.
    pub(crate) fn cpu(&self) -> Result<u64, Failure> {
        let deadline = Instant::now() + PATIENCE;
        let mut before = None;
        loop {
            let mut cpu = 0;
            for task in fs::read_dir(format!("/proc/{}/task", self.child.id()))? {
                let text = fs::read_to_string(task?.path().join("schedstat"))?;
                let first = text.split_ascii_whitespace().next().ok_or("schedstat is empty")?;
                cpu += first.parse::<u64>()?;
            }
            if before == Some(cpu) || Instant::now() > deadline {
                return Ok(cpu);
            }
            before = Some(cpu);
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Memory of its own that the process has touched, in bytes; the kernel's is not in it.
    pub(crate) fn memory(&self) -> Result<u64, Failure> {
        let status = self.proc("status")?;
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
        let kib = line.and_then(|line| line.split_ascii_whitespace().next());
        Ok(kib.ok_or("no RssAnon in /proc/PID/status")?.parse::<u64>()? * 1024)
    }

    /// Waits until the process listens at `path`, without knocking: that could end it.
    pub(crate) fn listens_at(&mut self, path: &Path) -> Result<(), Failure> {
        let deadline = Instant::now() + PATIENCE;
        let wanted = path.to_str().ok_or("the path is not UTF-8")?;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Err(format!("the server ended: {status}").into());
            }
            // Flags 00010000: __SO_ACCEPTCON, it listens.
            let sockets = fs::read_to_string("/proc/net/unix")?;
            if sockets.lines().any(|line| line.ends_with(wanted) && line.contains(" 00010000 ")) {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(format!("nobody listens at {wanted} within {PATIENCE:?}").into());
            }
            thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // A server that ends in order tells thousands of clients of thousands. There is nothing
        // left to clean up: the socket lies in a temporary directory, the memory has no name.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A line of names and numbers.
pub(crate) struct Figures(String);

impl Figures {
    pub(crate) fn get(&self, name: &str) -> Result<f64, Failure> {
        let mut words = self.0.split_ascii_whitespace();
        while let (Some(word), Some(number)) = (words.next(), words.next()) {
            if word == name {
                return Ok(number.parse()?);
            }
        }
        Err(format!("no {name} in {:?}", self.0.trim_end()).into())
    }
}
