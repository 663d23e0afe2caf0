// SPDX-License-Identifier: GPL-2.0-or-later
//! Finds the programs of clients, and the names of their virtual machines, in a thread of its own.
//!
//! A process can keep a reader of its `/proc/PID/cmdline` waiting (its address space is locked
//! meanwhile), so the server itself never reads it. The thread starts with the first question. If
//! it does not answer for [`PATIENCE`], it gets no more questions until it does.

#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};

/// How long an answer may take.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);

/// The questions that may wait at a time.
const QUESTIONS: usize = 32;

/// The bytes of a command line that are read.
const COMMAND_LINE: u64 = 64 << 10;

/// The program of one process. Nothing is known of a process that has ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Program {
    /// The name of its program: `/proc/PID/comm`.
    pub(super) program: Option<String>,
    /// `-name` of a QEMU.
    pub(super) name: Option<String>,
}

/// An answer, for each process that was asked for.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) question: u64,
    pub(super) programs: Vec<Program>,
}

/// The thread.
#[derive(Debug)]
pub(super) struct Programs {
    questions: Sender<(u64, Vec<i32>)>,
    answers: Receiver<Found>,
    wake: Arc<EventFd>,
    last: u64,
    /// Questions without an answer, and the time since which there is none.
    waiting: usize,
    since: Instant,
}

impl Programs {
    /// Starts the thread. It inherits the signal mask.
    pub(super) fn start() -> io::Result<Self> {
        let (questions, asked) = channel::<(u64, Vec<i32>)>();
        let (answer, answers) = channel();
        let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let waker = Arc::clone(&wake);
        let run = move || {
            for (question, pids) in asked {
                let programs = pids.into_iter().map(find).collect();
                if answer.send(Found { question, programs }).is_err() {
                    return;
                }
                let _ = waker.write(1);
            }
        };
        thread::Builder::new().name("programs".to_owned()).spawn(run)?;
        Ok(Self { questions, answers, wake, last: 0, waiting: 0, since: Instant::now() })
    }

    /// Asks for the programs of these processes. Returns the number of the question, or None if
    /// the thread does not answer now.
    pub(super) fn ask(&mut self, pids: Vec<i32>) -> Option<u64> {
        if self.waiting == 0 {
            self.since = Instant::now();
        }
        if self.waiting >= QUESTIONS || self.since.elapsed() > PATIENCE {
            return None;
        }
        self.last += 1;
        self.questions.send((self.last, pids)).ok()?;
        self.waiting += 1;
        Some(self.last)
    }

    /// The answers that have come.
    pub(super) fn take(&mut self) -> Vec<Found> {
        let _ = self.wake.read();
        let found: Vec<Found> = self.answers.try_iter().collect();
        if !found.is_empty() {
            self.waiting -= found.len();
            self.since = Instant::now();
        }
        found
    }
}

impl AsFd for Programs {
    /// Readable when an answer has come.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

/// The name of a process's program. It never waits.
pub(super) fn program_of(pid: i32) -> Option<String> {
    let name = fs::read(format!("/proc/{pid}/comm")).ok()?;
    Some(String::from_utf8_lossy(&name).trim_end_matches('\n').to_owned())
}

fn find(pid: i32) -> Program {
    if pid <= 0 {
        return Program::default();
    }
    let mut line = Vec::new();
    let read = File::open(format!("/proc/{pid}/cmdline"))
        .and_then(|file| file.take(COMMAND_LINE).read_to_end(&mut line));
    let name = read.ok().and_then(|_| machine_name(&line));
    Program { program: program_of(pid), name }
}

/// The name of the virtual machine in QEMU's command line: `-name NAME`, `-name NAME,…` or
/// `-name …,guest=NAME,…`, where a comma in NAME is doubled.
fn machine_name(command_line: &[u8]) -> Option<String> {
    let mut words = command_line.split(|&byte| byte == 0).map(String::from_utf8_lossy);
    let program = words.next()?;
    let file = program.rsplit('/').next().unwrap_or_default();
    if !file.contains("qemu") && !file.contains("kvm") {
        return None;
    }
    // The last one counts, as for QEMU.
    let mut name = None;
    while let Some(word) = words.next() {
        if word == "-name" || word == "--name" {
            name = words.next().and_then(|value| guest(&value)).or(name);
        }
    }
    name
}

/// The name in the value of `-name`.
fn guest(value: &str) -> Option<String> {
    // A doubled comma is none that separates.
    let value = value.replace(",,", "\0");
    let mut options = value.split(',').enumerate();
    let name = options.find_map(|(number, option)| match option.split_once('=') {
        Some(("guest", name)) => Some(name),
        None if number == 0 => Some(option),
        _ => None,
    })?;
    Some(name.replace('\0', ",")).filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::poll::{PollFd, PollFlags, poll};

    #[test]
    fn the_name_of_a_machine_is_found_in_each_form() {
        let name = |words: &[&str]| machine_name(words.join("\0").as_bytes());
        for (words, found) in [
            (&["/usr/bin/qemu-system-x86_64", "-name", "red"][..], Some("red")),
            (&["qemu-kvm", "-name", "guest=red,debug-threads=on"], Some("red")),
            (&["/usr/libexec/qemu-kvm", "--name", "debug-threads=on,guest=r=d"], Some("r=d")),
            (&["kvm", "-name", "a,,b,process=x"], Some("a,b")),
            (&["qemu", "-name", "one", "-name", "two"], Some("two")),
            (&["qemu", "-name", "process=x"], None),
            (&["qemu", "-name"], None),
            (&["qemu", "-m", "16"], None),
            (&["/bin/other", "-name", "red"], None),
            (&[""], None),
        ] {
            assert_eq!(name(words).as_deref(), found, "{words:?}");
        }
    }

    #[test]
    fn the_thread_finds_the_program_of_a_process_and_nothing_of_one_that_is_not_there() {
        let mut programs = Programs::start().expect("a thread");
        let own = i32::try_from(std::process::id()).expect("a pid is an int");
        let question = programs.ask(vec![own, 0, -1, i32::MAX]).expect("it answers");
        poll(&mut [PollFd::new(programs.as_fd(), PollFlags::POLLIN)], 10_000u16).expect("poll");
        let found = programs.take();
        assert_eq!((found.len(), found[0].question), (1, question));
        assert_eq!(found[0].programs.len(), 4);
        assert_eq!(found[0].programs[0].program, program_of(own));
        assert!(found[0].programs[1..].iter().all(|program| *program == Program::default()));
        assert_eq!(programs.waiting, 0);
    }

    #[test]
    fn a_thread_that_does_not_answer_gets_no_more_questions() {
        let mut programs = Programs::start().expect("a thread");
        assert!(programs.ask(vec![]).is_some());
        programs.since = Instant::now() - 2 * PATIENCE;
        assert_eq!(programs.ask(vec![]), None);
        poll(&mut [PollFd::new(programs.as_fd(), PollFlags::POLLIN)], 10_000u16).expect("poll");
        assert_eq!(programs.take().len(), 1);
        assert!(programs.ask(vec![]).is_some());
    }
}
