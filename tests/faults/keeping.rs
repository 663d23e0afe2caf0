// SPDX-License-Identifier: GPL-2.0-or-later
//! Faults while a server stores a client at its keeper, and while the next server resumes.
//!
//! A fault in a resume may end that start. The supervisor then starts another server, and each
//! client must go on. A fault while a client is stored may end that client at the next restart;
//! the log must name it.

#![forbid(unsafe_code)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::common::daemon::program;
use crate::common::{is_asleep, text_of, wait_for};
use crate::crowd::Crowd;
use crate::matrix::{self, EXEMPT, Phase, is_full};
use crate::strace::{self, Attached, Call};
use crate::supervisor::Supervisor;

/// The clients that a server resumes.
const CLIENTS: usize = 3;

/// The vectors of each client.
const VECTORS: usize = 2;

/// Calls of a server that resumes, and errnos. The first one is tried at each occurrence of the call.
#[rustfmt::skip]
const RESUME: &[(&str, &[&str])] = &[
    ("rt_sigprocmask", &["EINVAL"]),
    ("signalfd4", &["EMFILE", "ENOMEM"]),
    ("epoll_create1", &["EMFILE", "ENOMEM"]),
    ("timerfd_create", &["EMFILE", "ENOMEM"]),
    ("eventfd2", &["EMFILE", "ENOMEM"]),
    ("epoll_ctl", &["ENOMEM", "ENOSPC"]),
    ("prlimit64", &["EPERM"]),
    // The sandbox.
    ("landlock_create_ruleset", &["ENOMEM"]),
    ("landlock_add_rule", &["ENOMEM"]),
    ("landlock_restrict_self", &["E2BIG"]),
    ("seccomp", &["EINVAL", "ENOMEM"]),
    ("prctl", &["EINVAL"]),
    ("socket", &["EMFILE", "ENOBUFS"]),
    ("socketpair", &["EMFILE", "ENOMEM"]),
    ("connect", &["ECONNREFUSED", "EAGAIN"]),
    ("getsockopt", &["ENOMEM", "EBADF"]),
    ("setsockopt", &["ENOMEM", "ENOPROTOOPT"]),
    ("listen", &["EADDRINUSE"]),
    ("newfstatat", &["ENOMEM", "EIO"]),
    ("statx", &["ENOMEM", "EIO"]),
    ("fstatfs", &["EIO"]),
    ("fallocate", &["ENOSPC", "EINTR"]),
    ("pread64", &["EIO", "ENOMEM"]),
    // The number of restarts.
    ("lseek", &["EINVAL"]),
    ("openat", &["EMFILE", "ENOMEM"]),
    ("read", &["EIO", "EINTR"]),
    ("close", &["EIO"]),
    ("fcntl(F_GET_SEALS)", &["EINVAL"]),
    ("fcntl(F_SETFD)", &["ENOMEM"]),
    ("mmap", &["ENOMEM"]),
    ("ioctl", &["ENOMEM"]),
    ("poll", &["EINTR", "ENOMEM"]),
    ("write", &["EAGAIN", "EPIPE"]),
    ("sendto", &["ENOBUFS"]),
    ("sendmsg", &["EAGAIN", "ECONNREFUSED"]),
    ("sendmmsg", &["EAGAIN", "ENOMEM"]),
];

/// Calls of a server with a keeper while a client joins and another one leaves, each with errnos and the occurrences
/// that are tried. The matrix has the calls that every server makes.
#[rustfmt::skip]
const STORE: &[(&str, &[&str], usize)] = &[
    // To the keeper: the new client's descriptors, and the name of the one that left.
    ("sendmsg", &["EAGAIN", "ENOBUFS", "ETOOMANYREFS", "ECONNREFUSED", "EPIPE", "EMSGSIZE"], 2),
    // The identity of the client's eventfds and its socket.
    ("openat", &["EMFILE", "ENOMEM"], 4),
    ("read", &["EIO", "EINTR"], 4),
    ("getsockopt", &["ENOMEM"], 3),
    // Room for the client's record.
    ("fallocate", &["ENOSPC", "EINTR"], 2),
    // The server cannot go on, and the next one does.
    ("epoll_wait", &["EINVAL"], 1),
];

/// A supervisor whose server runs below strace when a test says so.
struct Subject {
    supervisor: Supervisor,
    crowd: Crowd,
}

impl Subject {
    fn start() -> Self {
        let supervisor = Supervisor::start_program(&program(), |command| {
            // `tests/control` makes the calls for the control socket fail.
            command.args(["-n", &VECTORS.to_string(), "--no-control"]);
        });
        let crowd = Crowd::new(&supervisor.place.socket(), VECTORS);
        Self { supervisor, crowd }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.supervisor.place.path(name)
    }

    /// Makes a script the program of the supervisor. It runs the server, once below strace if there
    /// are faults for it.
    fn replace_program(&self) {
        let (script, faults) = (self.path("script"), self.path("faults"));
        let text = format!(
            "#!/bin/sh\nif mv {faults} {faults}.taken 2>/dev/null; then\n  exec strace -D -o {log} \
             $(cat {faults}.taken) {program} \"$@\"\nfi\nexec {program} \"$@\"\n",
            faults = faults.display(),
            log = self.path("strace").display(),
            program = program().display(),
        );
        fs::write(&script, text).expect("the directory is ours");
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).expect("it is our file");
        self.supervisor.replace_program(&script);
    }

    fn server(&self) -> Pid {
        self.supervisor.server_other_than(None)
    }

    /// The server hands over, and the next one starts with a fault. Returns strace's log of that
    /// start.
    fn resume_with(&mut self, fault: &str) -> String {
        println!("resuming with {fault}");
        let before = self.server();
        wait_for("the server waits for events", || is_asleep(before).then_some(()));
        let _ = fs::remove_file(self.path("strace"));
        let words = if fault.is_empty() { String::new() } else { format!("-e inject={fault}") };
        fs::write(self.path("new faults"), words).expect("the directory is ours");
        fs::rename(self.path("new faults"), self.path("faults")).expect("the directory is ours");
        self.supervisor.signal(Signal::SIGHUP);
        wait_for("the start of another server", || {
            self.path("faults.taken").exists().then_some(())
        });
        // It waits in the backlog until there is a server that serves.
        self.crowd.join();
        self.crowd.settle();
        self.crowd.close_one(CLIENTS);
        self.crowd.settle();
        let log = text_of(&self.path("strace"));
        fs::remove_file(self.path("faults.taken")).expect("it is there");
        log
    }
}

/// What a resuming server does by itself, up to its first wait.
fn own_calls(log: &str) -> Vec<Call> {
    let calls = strace::calls(log);
    let find = |start: &str| {
        let place = calls.iter().position(|call| call.line.starts_with(start));
        place.unwrap_or_else(|| panic!("no {start}…: {log}"))
    };
    calls[find("rt_sigprocmask(SIG_BLOCK, [HUP INT TERM]")..find("epoll_wait(")].to_vec()
}

#[test]
fn after_a_fault_in_a_resume_every_client_goes_on() {
    let mut subject = Subject::start();
    for _ in 0..CLIENTS {
        subject.crowd.join();
    }
    subject.replace_program();
    // The first start of the script is without a fault: a new program that fails is not tried again.
    subject.resume_with("");
    let calls = own_calls(&subject.resume_with(""));
    let mut sum = 0;
    for call in &calls {
        let row = RESUME.iter().find(|(name, _)| *name == call.name);
        let is_exempt = EXEMPT.iter().any(|(name, _)| *name == call.name);
        assert!(is_exempt || row.is_some(), "in no row: {}", call.line);
        let errnos = row.map_or(&[][..], |(_, errnos)| errnos);
        for errno in &errnos[..errnos.len().min(if is_full() { usize::MAX } else { 1 })] {
            let name = call.line.split('(').next().unwrap_or_default();
            let fault = format!("{name}:error={errno}:when={}", call.ordinal);
            let log = subject.resume_with(&fault);
            assert_eq!(strace::injected(&log), 1, "{fault} was not injected: {log}");
            let said = || text_of(&subject.supervisor.log());
            assert_eq!(subject.crowd.dropped(), 0, "{fault}: {}\n{}", call.line, said());
            sum += 1;
        }
    }
    println!("{sum} faults in a resume");
    assert!(sum > 50, "{sum} faults");
}

/// A client joins and another one leaves, with a fault. Then the server is killed. Returns strace's log.
#[track_caller]
fn store_with(subject: &mut Subject, fault: &str) -> String {
    println!("storing with {fault}");
    let server = subject.server();
    let attached = Attached::to(server, fault);
    subject.crowd.join();
    subject.crowd.close_one(0);
    // Also where the newest one was refused.
    subject.crowd.settle();
    let log = attached.detach();
    let server = subject.server();
    wait_for("the server waits for events", || is_asleep(server).then_some(()));
    kill(server, Signal::SIGKILL).expect("it runs");
    subject.supervisor.server_other_than(Some(server));
    while subject.crowd.len() < CLIENTS {
        subject.crowd.join();
        subject.crowd.settle();
    }
    log
}

#[test]
fn a_fault_while_a_client_is_stored_ends_no_client_that_the_log_does_not_name() {
    let mut subject = Subject::start();
    for _ in 0..CLIENTS {
        subject.crowd.join();
    }
    for call in strace::calls(&store_with(&mut subject, "")) {
        let known = STORE.iter().any(|(name, ..)| *name == call.name)
            || EXEMPT.iter().any(|(name, _)| *name == call.name)
            || !matrix::rows(Phase::Serve, &call.name).is_empty();
        assert!(known, "in no row: {}", call.line);
    }
    assert_eq!(subject.crowd.dropped(), 0);
    let (mut sum, mut ended) = (0, 0);
    for &(call, errnos, times) in STORE {
        for errno in errnos {
            let mut hits = 0;
            for when in 1..=times {
                let fault = format!("{call}:error={errno}:when={when}");
                hits += strace::injected(&store_with(&mut subject, &fault));
                let said = text_of(&subject.supervisor.log());
                let new = &subject.crowd.ended()[ended..];
                assert!(new.len() <= 2, "{fault}: {new:?} were ended\n{said}");
                for id in new {
                    // A client that was refused has no id.
                    let text = id.map_or("refused".into(), |id| format!("peer {id} is ended"));
                    assert!(said.contains(&text), "{fault}: no {text:?} in the log\n{said}");
                }
                ended = subject.crowd.dropped();
            }
            assert!(hits > 0, "{call} was never made to fail with {errno}");
            sum += hits;
        }
    }
    println!("{sum} faults while storing; {ended} clients ended");
}
