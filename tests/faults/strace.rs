// SPDX-License-Identifier: GPL-2.0-or-later
//! strace(1), which makes system calls fail, and tells which were made.

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

/// One call that was made: what it is called here, and the how manyth of its kind it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) name: String,
    pub(crate) ordinal: usize,
    pub(crate) line: String,
}

/// The calls in a log of strace's.
pub(crate) fn calls(log: &str) -> Vec<Call> {
    let mut counts = HashMap::new();
    let lines = log.lines().filter(|line| line.starts_with(|c: char| c.is_ascii_lowercase()));
    lines
        .map(|line| {
            let (name, arguments) = line.split_once('(').unwrap_or((line, ""));
            let ordinal: &mut usize = counts.entry(name.to_owned()).or_default();
            *ordinal += 1;
            // fcntl is a family.
            let name = match (name, arguments.split([',', ')']).nth(1)) {
                ("fcntl", Some(command)) => format!("fcntl({})", command.trim()),
                _ => name.to_owned(),
            };
            Call { name, ordinal: *ordinal, line: line.to_owned() }
        })
        .collect()
}

/// How many calls were made to fail.
pub(crate) fn injected(log: &str) -> usize {
    log.matches("(INJECTED)").count()
}

fn strace() -> PathBuf {
    find_in_path("strace")
        .expect("strace is not installed: as root, apt-get install strace (Debian package strace)")
}

/// strace's arguments for a fault: `CALL:error=ERRNO:when=N`, several with a space between.
fn inject(faults: &str) -> Vec<String> {
    let mut arguments = Vec::new();
    for fault in faults.split_whitespace() {
        arguments.push("-e".to_owned());
        arguments.push(format!("inject={fault}"));
    }
    arguments
}

/// A command that runs `program` as its own process, with strace as a by-stander.
pub(crate) fn command(log: &Path, faults: &str, program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(strace());
    command.args(["-D", "-o"]).arg(log).args(inject(faults)).arg(program);
    command
}

/// The log of a `command` that has ended, whole.
pub(crate) fn finished_log(log: &Path) -> String {
    wait_for("the end of strace's log", || {
        let text = text_of(log);
        let last = text.lines().last().unwrap_or_default();
        (last.starts_with("+++") || last.contains("exit_group")).then_some(text)
    })
}

/// A strace on a running process, gone when dropped.
pub(crate) struct Attached {
    dir: TempDir,
    child: Child,
    pid: Pid,
}

impl Attached {
    /// Attaches; from here on the calls of `pid` are counted, and fail as told.
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

    /// What it saw until now; a line may be missing at the end.
    pub(crate) fn log(&self) -> String {
        text_of(&self.dir.path().join("log"))
    }

    /// Lets the process go, and returns all that was seen.
    pub(crate) fn detach(mut self) -> String {
        self.end();
        fs::read_to_string(self.dir.path().join("log")).expect("strace wrote a log")
    }

    fn end(&mut self) {
        // A call to be failed is first made to be no call, and is given its error when it returns. Whoever lets go in
        // between leaves it with ENOSYS. So the process is to be stopped, which it is where it makes no call.
        let stopped = self.is_at_it() && kill(self.pid, Signal::SIGSTOP).is_ok();
        if stopped {
            wait_for("strace sees the process stopped, or its end", || {
                let stopped = self.log().contains("--- stopped by SIGSTOP ---");
                (stopped || !self.is_at_it()).then_some(())
            });
        }
        if let Ok(pid) = i32::try_from(self.child.id()) {
            // It has ended by itself if the process has.
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        wait_for_exit(&mut self.child, "strace");
        if stopped {
            // It may have come to its end.
            let _ = kill(self.pid, Signal::SIGCONT);
        }
    }

    /// Whether it still traces the process, which so can be no other with its number.
    fn is_at_it(&self) -> bool {
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
