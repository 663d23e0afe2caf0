// SPDX-License-Identifier: GPL-2.0-or-later
//! The processes of a measurement: starts them, exchanges lines with them, reads their use of CPU and
//! memory, and ends them.

#![forbid(unsafe_code)]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// An error with a complete text.
pub(crate) type Failure = Box<dyn std::error::Error>;

/// The time limit for an action that takes a moment.
const PATIENCE: Duration = Duration::from_secs(10);

/// A child process. It is killed when this value is dropped.
pub(crate) struct Process {
    child: Child,
    input: Option<ChildStdin>,
    output: Option<BufReader<ChildStdout>>,
}

impl Process {
    /// Starts this program again in one of its other parts, with pipes to its stdin and stdout.
    pub(crate) fn part(arguments: &[&str]) -> Result<Self, Failure> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("--part").args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        Self::start(command)
    }

    /// Starts a program.
    pub(crate) fn start(mut command: Command) -> Result<Self, Failure> {
        // It has its own process group, so that Ctrl-C does not end it before our Drop does.
        command.process_group(0);
        let mut child =
            command.spawn().map_err(|error| format!("cannot start {command:?}: {error}"))?;
        let input = child.stdin.take();
        let output = child.stdout.take().map(BufReader::new);
        Ok(Self { child, input, output })
    }

    /// Sends a line.
    pub(crate) fn send_line(&mut self, line: &str) -> Result<(), Failure> {
        let input = self.input.as_mut().ok_or("the process has no stdin pipe")?;
        Ok(writeln!(input, "{line}")?)
    }

    /// Reads the answer, a line of names and numbers.
    pub(crate) fn read_figures(&mut self) -> Result<Figures, Failure> {
        let mut line = String::new();
        let output = self.output.as_mut().ok_or("the process has no stdout pipe")?;
        if output.read_line(&mut line)? == 0 {
            return Err("a part of the benchmark ended early; see above".into());
        }
        Ok(Figures(line))
    }

    fn proc(&self, file: &str) -> Result<String, Failure> {
        let path = format!("/proc/{}/{file}", self.child.id());
        fs::read_to_string(&path).map_err(|error| format!("cannot read {path}: {error}").into())
    }

    /// The CPU time of all threads, in nanoseconds, after the process has become idle.
    ///
    /// It is the scheduler's sum, because `utime` and `stime` of /proc/PID/stat count in 10 ms.
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

    /// The resident anonymous memory of the process, in bytes, without the kernel's memory.
    pub(crate) fn memory(&self) -> Result<u64, Failure> {
        let status = self.proc("status")?;
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
        let kib = line.and_then(|line| line.split_ascii_whitespace().next());
        Ok(kib.ok_or("no RssAnon in /proc/PID/status")?.parse::<u64>()? * 1024)
    }

    /// Waits until the process listens at `path`. Does not connect, because a connection could end it.
    pub(crate) fn wait_until_listening(&mut self, path: &Path) -> Result<(), Failure> {
        let deadline = Instant::now() + PATIENCE;
        let wanted = path.to_str().ok_or("the path is not UTF-8")?;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Err(format!("the server ended: {status}").into());
            }
            // The flag 00010000 is __SO_ACCEPTCON, a listening socket.
            let sockets = fs::read_to_string("/proc/net/unix")?;
            if sockets.lines().any(|line| line.ends_with(wanted) && line.contains(" 00010000 ")) {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(format!("no process listens at {wanted} within {PATIENCE:?}").into());
            }
            thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // A normal end of the server would take long with thousands of clients. Nothing remains to
        // be removed: the socket is in a temporary directory, and the memory has no name.
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
