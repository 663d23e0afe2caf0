// SPDX-License-Identifier: GPL-2.0-or-later
//! `--supervise`: a parent that keeps a server running, and that keeps the server's descriptors while there is none.
//!
//! The server is a child that speaks systemd's protocol for that (sd_notify(3), FDSTORE) to the parent, and that gets
//! its descriptors back as a service does (sd_listen_fds(3)): LISTEN_FDS, LISTEN_PID and LISTEN_FDNAMES, descriptors at
//! 3 and up in no particular order. Besides, the child's environment has
//! - NOTIFY_SOCKET: a path in a private directory;
//! - FDSTORE: how many descriptors the parent stores, as systemd 254 and later say it;
//! - IVSHMEM_SUPERVISOR: the parent's pid. If it is the child's parent, the number above is a real one: systemd needs
//!   time that grows with the square.
//!
//! SIGTERM tells the child to hand over: it ends without a message to its clients, and removes no names. SIGINT tells it
//! to end for good. The parent itself has the same rule where it has a service manager to which it notifies; without
//! one, both signals end everything for good.
//!
//! The parent does not know what the descriptors are, and reads nothing from clients.

// Its module `sys` alone allows it.
#![deny(unsafe_code)]

mod child;
mod closing;
mod keeper;
mod message;
pub(crate) mod notify;
mod program;
mod start;
mod store;
mod sys;
mod upstream;

use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::SignalFd;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

use crate::args::{self, Args};
use crate::detach::ReleasedOutput;
use crate::pidfile::PidFile;
use crate::ready::ReadyFd;
use crate::{Failure, detach, logging};
use child::{Child, Deaths, Verdict, in_words};
use closing::Closing;
use keeper::Keeper;
use message::Message;
use program::Programs;
use store::Store;
pub(crate) use sys::take_descriptor;
use upstream::Upstream;

/// How long a child may take to end before it is killed.
const END_LIMIT: Duration = Duration::from_secs(10);

/// How long a child may take to be ready before it is killed.
const START_LIMIT: Duration = Duration::from_secs(60);

/// Messages that are handled before signals and times are looked at again.
const MESSAGES_AT_A_TIME: usize = 500;

/// Runs a server until a signal ends it.
pub(crate) fn run(args: &Args, ready_fd: Option<ReadyFd>) -> Result<ExitCode, Failure> {
    logging::start(args);
    log::info!("version {} supervises a server", env!("CARGO_PKG_VERSION"));
    let mut supervisor = Supervisor::new(args, ready_fd)?;
    let outcome = supervisor.serve();
    if outcome.is_err() && supervisor.child.is_some() {
        // No server goes on behind an error. The first error is the one to tell.
        supervisor.end(End::ForGood);
        let _ = supervisor.serve();
    }
    // Descriptors are closed before the pid file says that it is over.
    let Supervisor { mut store, mut closing, pid_file, .. } = supervisor;
    closing.close(store.remove_all());
    drop(closing);
    drop(pid_file);
    outcome
}

/// How the supervisor ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    HandOver,
    ForGood,
}

struct Supervisor<'a> {
    args: &'a Args,
    /// The arguments of the next child.
    arguments: Vec<OsString>,
    /// Those of the last one that was ready, if others were read since.
    good_arguments: Option<Vec<OsString>>,
    ready_fd: Option<ReadyFd>,
    signals: SignalFd,
    /// Blocked signals of a child.
    child_mask: SigSet,
    pid_file: Option<PidFile>,
    keeper: Keeper,
    store: Store,
    closing: Closing,
    upstream: Option<Upstream>,
    programs: Programs,
    child: Option<Child>,
    /// When to start the next one.
    start_at: Instant,
    deaths: Deaths,
    /// One was ready, or there are descriptors of an earlier supervisor: nothing ends because one start fails.
    established: bool,
    /// The caller of a background process was told.
    announced: bool,
    end: Option<End>,
}

impl Supervisor<'_> {
    fn serve(&mut self) -> Result<ExitCode, Failure> {
        loop {
            if self.child.is_none() && self.end.is_none() && self.start_at <= Instant::now() {
                self.start_child();
            }
            self.wait()?;
            self.take_messages(MESSAGES_AT_A_TIME)?;
            // Before the children that have ended: a signal says what to do about it.
            self.take_signals()?;
            if let Some(code) = self.take_ended()? {
                return Ok(code);
            }
            self.kill_if_late();
            if let (Some(_), None) = (self.end, &self.child) {
                return Ok(self.finish(true));
            }
        }
    }

    /// Waits for a message, a signal, or the next time at which something is due.
    fn wait(&self) -> Result<(), Failure> {
        let due = match &self.child {
            Some(child) => child.kill_at,
            None => Some(self.start_at),
        };
        let left = due.map(|due| due.saturating_duration_since(Instant::now()));
        // Rounded up, so that it is due then.
        let timeout = left.map_or(PollTimeout::NONE, |left| {
            PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX)
        });
        let mut fds = vec![
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.keeper.as_fd(), PollFlags::POLLIN),
        ];
        if let Some(upstream) = self.upstream.as_ref().filter(|upstream| upstream.is_waiting()) {
            fds.push(PollFd::new(upstream.as_fd(), PollFlags::POLLOUT));
        }
        match poll(&mut fds, timeout) {
            Err(errno) if errno != Errno::EINTR => {
                Err(format!("cannot poll: {}", errno.desc()).into())
            }
            _ => Ok(()),
        }
    }

    /// Handles up to `most` messages of the child.
    fn take_messages(&mut self, most: usize) -> Result<(), Failure> {
        if let Some(upstream) = &mut self.upstream {
            upstream.flush(&self.store);
        }
        let pid = self.child.as_ref().map_or(Pid::from_raw(-1), |child| child.pid);
        for _ in 0..most {
            let next = self.keeper.next(pid);
            let next = next.map_err(|error| format!("cannot receive notifications: {error}"))?;
            let Some((text, received)) = next else { break };
            if received.truncated {
                log::error!(
                    "did not store the descriptors of a notification, as it came incomplete ({} descriptors \
                     are stored, the limit is {}): {text:?}",
                    self.store.count(),
                    self.store.limit()
                );
                continue;
            }
            self.handle(&Message::parse(&text), received.fds)?;
        }
        Ok(())
    }

    fn handle(&mut self, message: &Message<'_>, fds: Vec<OwnedFd>) -> Result<(), Failure> {
        let upstream = &mut self.upstream;
        if message.remove {
            match message.name {
                Some(name) => {
                    self.closing.close(self.store.remove(name));
                    if let Some(upstream) = upstream {
                        upstream.removed(name, &self.store);
                    }
                }
                None => log::warn!("ignored FDSTOREREMOVE=1 without a valid FDNAME"),
            }
        }
        // Descriptors of any other message, such as a barrier, are closed here.
        if message.store && !fds.is_empty() {
            let (name, count) = (message.name.unwrap_or(message::UNNAMED), fds.len());
            if !self.store.add(name, fds) {
                log::error!(
                    "cannot store {count} descriptors named {name:?}: {} are stored, and the limit is {} \
                     (raise the limit of open files)",
                    self.store.count(),
                    self.store.limit()
                );
            } else if let Some(upstream) = upstream {
                upstream.stored(name, count, message.keep_hung_up, &self.store);
            }
        }
        if let (Some(status), Some(upstream)) = (message.status, &mut self.upstream) {
            upstream.text(format!("STATUS={status}"), &self.store);
        }
        if message.ready { self.ready() } else { Ok(()) }
    }

    /// The child is ready.
    fn ready(&mut self) -> Result<(), Failure> {
        let Some(child) = self.child.as_mut().filter(|child| !child.ready) else { return Ok(()) };
        child.ready = true;
        if !child.asked_to_end {
            child.kill_at = None;
        }
        self.programs.is_good(&mut child.choice);
        self.good_arguments = None;
        self.deaths.clear();
        self.established = true;
        log::info!("the server (pid {}) is ready", child.pid);
        if let Some(upstream) = &mut self.upstream {
            upstream.text("READY=1", &self.store);
        }
        if !std::mem::replace(&mut self.announced, true) {
            if let Some(pid_file) = &self.pid_file {
                pid_file.write()?;
            }
            if self.args.detached {
                detach::leave_session()?;
                detach::ready(ReleasedOutput::prepare()?)?;
            }
            if let Some(ready) = self.ready_fd.take() {
                ready.tell();
            }
        }
        Ok(())
    }

    fn take_signals(&mut self) -> Result<(), Failure> {
        loop {
            let signal = self.signals.read_signal();
            let signal =
                signal.map_err(|errno| format!("cannot read signals: {}", errno.desc()))?;
            let Some(signal) = signal else { return Ok(()) };
            match Signal::try_from(signal.ssi_signo as i32) {
                Ok(Signal::SIGTERM) if self.upstream.is_some() => self.end(End::HandOver),
                Ok(Signal::SIGTERM | Signal::SIGINT) => self.end(End::ForGood),
                Ok(Signal::SIGHUP) => self.upgrade(),
                // SIGCHLD: see `take_ended`.
                _ => {}
            }
        }
    }

    fn end(&mut self, end: End) {
        if self.end == Some(End::ForGood) || self.end == Some(end) {
            return;
        }
        self.end = Some(end);
        if let Some(upstream) = &mut self.upstream {
            upstream.text("STOPPING=1", &self.store);
        }
        let signal = if end == End::ForGood { Signal::SIGINT } else { Signal::SIGTERM };
        if let Some(child) = &mut self.child {
            child.ask_to_end(signal);
        }
    }

    /// SIGHUP: ends the server, and starts the program file that is there now.
    fn upgrade(&mut self) {
        if self.end.is_some() {
            return;
        }
        let mut text = String::from("RELOADING=1");
        if let Ok(now) = clock_gettime(ClockId::CLOCK_MONOTONIC) {
            let now = now.tv_sec() * 1_000_000 + now.tv_nsec() / 1_000;
            text.push_str(&format!("\nMONOTONIC_USEC={now}"));
        }
        if let Some(upstream) = &mut self.upstream {
            upstream.text(text, &self.store);
        }
        if let Err(error) = self.check_upgrade() {
            log::error!("cannot upgrade, and the server goes on: {error}");
            if let (Some(upstream), Some(true)) =
                (&mut self.upstream, self.child.as_ref().map(|child| child.ready))
            {
                upstream.text("READY=1", &self.store);
            }
            return;
        }
        self.deaths.clear();
        match &mut self.child {
            Some(child) => child.ask_to_end(Signal::SIGTERM),
            None => self.start_at = Instant::now(),
        }
    }

    /// Reads the configuration files anew, and checks that there is a program. An error changes nothing.
    fn check_upgrade(&mut self) -> Result<(), String> {
        let args = args::parse(std::env::args_os()).map_err(|error| args::one_line(&error))?;
        self.programs.check().map_err(|error| {
            format!("cannot open the program {:?}: {error}", self.programs.path())
        })?;
        if args.words != self.arguments {
            let before = std::mem::replace(&mut self.arguments, args.words);
            self.good_arguments.get_or_insert(before);
        }
        Ok(())
    }

    /// Collects all children that have ended: as process 1 of a container, also those of others.
    fn take_ended(&mut self) -> Result<Option<ExitCode>, Failure> {
        loop {
            let status = match waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(None),
                Err(Errno::EINTR) => continue,
                status => status.map_err(|errno| format!("cannot wait: {}", errno.desc()))?,
            };
            if let Some(pid) = status.pid() {
                self.closing.ended(pid);
            }
            if self.child.as_ref().is_some_and(|child| Some(child.pid) == status.pid()) {
                // It sent all of its messages before it ended.
                self.take_messages(usize::MAX)?;
                let child = self.child.take();
                // A terminal sends SIGINT to both processes, and the child may end first.
                self.take_signals()?;
                let Some(child) = child else { continue };
                if let Some(code) = self.ended(&child, status)? {
                    return Ok(Some(code));
                }
            }
        }
    }

    /// What follows from the end of the child; an exit code ends the supervisor.
    fn ended(&mut self, child: &Child, status: WaitStatus) -> Result<Option<ExitCode>, Failure> {
        let (pid, words) = (child.pid, in_words(status));
        self.start_at = Instant::now();
        if self.end.is_some() {
            let clean = matches!(status, WaitStatus::Exited(_, 0));
            if !clean {
                log::error!("the server (pid {pid}) was told to end and {words}");
            }
            return Ok(Some(self.finish(clean)));
        }
        if child.asked_to_end {
            log::info!("the server (pid {pid}) handed over and {words}");
            return Ok(None);
        }
        if child.ready {
            log::error!("the server (pid {pid}) {words}; starting it again");
            return Ok(None);
        }
        if let (false, WaitStatus::Exited(_, code)) = (self.established, status) {
            // It has said why.
            let code =
                u8::try_from(code).ok().filter(|&code| code != 0 && code != 127).unwrap_or(1);
            return Ok(Some(ExitCode::from(code)));
        }
        if let Some(arguments) = self.good_arguments.take() {
            log::error!(
                "the server (pid {pid}) {words} before it was ready, with other options than before; starting it \
                 with the options of before"
            );
            self.arguments = arguments;
            self.deaths.clear();
            return Ok(None);
        }
        if child.choice.is_new() {
            self.programs.has_refused(&child.choice);
            self.deaths.clear();
            log::error!(
                "the new program {:?} (pid {pid}) {words} before it was ready; starting the one that ran \
                 before",
                self.programs.path()
            );
            return Ok(None);
        }
        match self.deaths.add(Instant::now()) {
            Verdict::Retry(delay) => {
                log::error!("the server (pid {pid}) {words} before it was ready; starting it again");
                self.start_at += delay;
                Ok(None)
            }
            Verdict::GiveUp => Err(format!(
                "the server {words} before it was ready, {} times within {} s: giving up; its clients are \
                 disconnected",
                Deaths::MOST,
                Deaths::WITHIN.as_secs()
            )
            .into()),
        }
    }

    fn finish(&mut self, clean: bool) -> ExitCode {
        if let (Some(End::ForGood), Some(upstream)) = (self.end, &mut self.upstream) {
            let names: Vec<String> = self.store.names().map(str::to_owned).collect();
            for name in names {
                self.closing.close(self.store.remove(&name));
                upstream.removed(&name, &self.store);
            }
        }
        if let Some(upstream) = self.upstream.as_mut().filter(|upstream| upstream.is_waiting()) {
            upstream.finish(&self.store);
        }
        if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }

    fn kill_if_late(&mut self) {
        let Some(child) = &mut self.child else { return };
        if child.kill_at.is_some_and(|due| due <= Instant::now()) {
            let what = if child.asked_to_end { "has not ended" } else { "is not ready" };
            log::error!("the server (pid {}) {what} in time and is killed", child.pid);
            let _ = kill(child.pid, Signal::SIGKILL);
            child.kill_at = None;
        }
    }
}
