// SPDX-License-Identifier: GPL-2.0-or-later
//! strace(1): injects faults into system calls and logs the calls.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::common::{find_in_path, text_of, wait_for, wait_for_exit};

/// One logged call: its name in the matrix, its ordinal among the calls of the same kind, and its line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) name: String,
    pub(crate) ordinal: usize,
    pub(crate) line: String,
}

/// Parses the calls in a log of strace.
pub(crate) fn calls(log: &str) -> Vec<Call> {
    let mut counts = HashMap::new();
    let lines = log.lines().filter(|line| line.starts_with(|c: char| c.is_ascii_lowercase()));
    lines
        .map(|line| {
            let (name, arguments) = line.split_once('(').unwrap_or((line, ""));
            let ordinal: &mut usize = counts.entry(name.to_owned()).or_default();
            *ordinal += 1;
            // The matrix has separate rows for the commands of fcntl.
            let name = match (name, arguments.split([',', ')']).nth(1)) {
                ("fcntl", Some(command)) => format!("fcntl({})", command.trim()),
                _ => name.to_owned(),
            };
            Call { name, ordinal: *ordinal, line: line.to_owned() }
        })
        .collect()
}

/// The number of injected faults in a log.
pub(crate) fn injected(log: &str) -> usize {
    log.matches("(INJECTED)").count()
}

fn strace() -> PathBuf {
    find_in_path("strace")
        .expect("strace is not installed: as root, apt-get install strace (Debian package strace)")
}

/// strace's arguments for faults of the form `CALL:error=ERRNO:when=N`, separated by spaces.
fn inject(faults: &str) -> Vec<String> {
    let mut arguments = Vec::new();
    for fault in faults.split_whitespace() {
        arguments.push("-e".to_owned());
        arguments.push(format!("inject={fault}"));
    }
    arguments
}

/// A command that runs `program` directly as the child, with strace as a separate process (-D).
pub(crate) fn command(log: &Path, faults: &str, program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(strace());
    command.args(["-D", "-o"]).arg(log).args(inject(faults)).arg(program);
    command
}

/// The complete log of a `command` that has ended.
pub(crate) fn finished_log(log: &Path) -> String {
    wait_for("the end of strace's log", || {
        let text = text_of(log);
        let last = text.lines().last().unwrap_or_default();
        (last.starts_with("+++") || last.contains("exit_group")).then_some(text)
    })
}

/// A strace that is attached to a running process. It is killed when this value is dropped.
pub(crate) struct Attached {
    dir: TempDir,
    child: Child,
    pid: Pid,
}

impl Attached {
    /// Attaches strace to `pid`. From now on it counts the calls and injects `faults`.
    #[track_caller]
    pub(crate) fn to(pid: Pid, faults: &str) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let words = dir.path().join("stderr");
        let child = Command::new(strace())
            .args(["-p", &pid.to_string(), "-o"])
            .arg(dir.path().join("log"))
            .args(inject(faults))
            .stdin(Stdio::null())
            .stderr(File::create(&words).expect("a file"))
            .spawn()
            .expect("strace starts");
        let mut attached = Self { dir, child, pid };
        wait_for("strace attaches (ptrace must be allowed)", || {
            let said = text_of(&words);
            if let Some(status) = attached.child.try_wait().expect("waitpid works") {
                panic!("strace ended, {status}: {said}");
            }
            said.contains("attached").then_some(())
        });
        attached
    }

    /// The log so far. The last line may be incomplete.
    pub(crate) fn log(&self) -> String {
        text_of(&self.dir.path().join("log"))
    }

    /// Detaches strace and returns the complete log.
    pub(crate) fn detach(mut self) -> String {
        self.end();
        fs::read_to_string(self.dir.path().join("log")).expect("strace wrote a log")
    }

    fn end(&mut self) {
        // strace injects a fault in two steps: it first replaces the call with an invalid one, and sets the error when
        // that returns. If it detaches in between, the process gets ENOSYS. So the process is stopped first: a stopped
        // process is not inside a call.
        let stopped = self.is_tracing() && kill(self.pid, Signal::SIGSTOP).is_ok();
        if stopped {
            wait_for("strace sees the process stopped, or its end", || {
                let stopped = self.log().contains("--- stopped by SIGSTOP ---");
                (stopped || !self.is_tracing()).then_some(())
            });
        }
        if let Ok(pid) = i32::try_from(self.child.id()) {
            // strace has ended by itself if the process has ended.
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        wait_for_exit(&mut self.child, "strace");
        if stopped {
            // The process may have ended.
            let _ = kill(self.pid, Signal::SIGCONT);
        }
    }

    /// Whether strace still traces the process. While it does, the process id cannot belong to another process.
    fn is_tracing(&self) -> bool {
        let status = text_of(Path::new(&format!("/proc/{}/status", self.pid)));
        status.contains(&format!("\nTracerPid:\t{}\n", self.child.id()))
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
