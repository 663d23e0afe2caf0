// SPDX-License-Identifier: GPL-2.0-or-later
//! The supervisor's own start, and that of a child: its arguments, environment and descriptors.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::child::{Child, Deaths};
use super::closing::Closing;
use super::keeper::Keeper;
use super::program::Programs;
use super::store::Store;
use super::upstream::Upstream;
use super::{START_LIMIT, Supervisor, message, sys};
use crate::args::Args;
use crate::ready::ReadyFd;
use crate::{Failure, block_harmless_signals, pidfile, raise_descriptor_limit};

/// Descriptors that the supervisor, and the start of a child, need for themselves.
const RESERVE: usize = 48;

/// The most bytes of one environment variable, its name and the final zero included (MAX_ARG_STRLEN).
const VARIABLE_BYTES: usize = 128 << 10;

/// Variables that a service manager sets for this process alone.
const OWN_VARIABLES: [&str; 5] =
    ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_PID", "WATCHDOG_USEC"];

impl<'a> Supervisor<'a> {
    pub(super) fn new(args: &'a Args, ready_fd: Option<ReadyFd>) -> Result<Self, Failure> {
        let failed = |what: &'static str| {
            move |error: io::Error| Failure::from(format!("cannot {what}: {error}"))
        };
        // Before anything of this process could have one of the numbers.
        let taken = taken_over();
        let mut signals = SigSet::empty();
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGCHLD] {
            signals.add(signal);
        }
        let mut child_mask = SigSet::empty();
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(&signals), Some(&mut child_mask))
            .map_err(|errno| failed("block signals")(errno.into()))?;
        // A signal that comes before the server looks waits, so it leaves no half-made thing behind.
        child_mask.add(Signal::SIGTERM);
        child_mask.add(Signal::SIGINT);
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = SignalFd::with_flags(&signals, flags)
            .map_err(|errno| failed("make a signalfd")(errno.into()))?;
        sys::keep_ended_children().map_err(failed("set the action of SIGCHLD"))?;
        block_harmless_signals()?;
        raise_descriptor_limit();
        let pid_file =
            args.detached.then(|| pidfile::PidFile::claim(&args.pid_file)).transpose()?;
        let files = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
        let limit = usize::try_from(files).unwrap_or(usize::MAX).saturating_sub(RESERVE);

        let mut store = Store::new(limit);
        let mut upstream = Upstream::connect().map_err(failed("reach the service manager"))?;
        let established = !taken.is_empty();
        for (name, fd) in taken {
            if let Some(upstream) = &mut upstream {
                upstream.has(&name, 1);
            }
            store.add(&name, vec![fd]);
        }
        Ok(Self {
            args,
            arguments: args.words.clone(),
            good_arguments: None,
            ready_fd,
            signals,
            child_mask,
            pid_file,
            keeper: Keeper::new(args.user.as_ref().map(|user| user.uid))?,
            store,
            closing: Closing::default(),
            upstream,
            programs: Programs::new().map_err(failed("find the own program"))?,
            child: None,
            start_at: Instant::now(),
            deaths: Deaths::default(),
            established,
            announced: false,
            end: None,
        })
    }

    pub(super) fn start_child(&mut self) {
        let choice = match self.programs.choose(self.store.count()) {
            Ok(choice) => choice,
            Err(error) => {
                log::error!("cannot open the program that ran before: {error}; trying again");
                self.start_at = Instant::now() + Duration::from_millis(500);
                return;
            }
        };
        let mut command = Command::new(&choice.path);
        // The options go first, as a `--` may end them.
        command.arg0(self.programs.path()).arg("-F");
        if self.args.detached {
            command.arg("--supervised");
        }
        // No option has a value that is one of these: it would begin with a dash.
        let own = ["--supervise", "--detached"];
        command.args(self.arguments.iter().filter(|word| own.iter().all(|own| word != own)));
        for name in OWN_VARIABLES {
            command.env_remove(name);
        }
        command
            .env("NOTIFY_SOCKET", self.keeper.path())
            .env("FDSTORE", self.store.limit().to_string())
            .env("IVSHMEM_SUPERVISOR", std::process::id().to_string());
        let stored = self.store.sorted();
        let fds: Vec<BorrowedFd<'_>> = stored.iter().map(|(fd, _)| *fd).collect();
        if !fds.is_empty() {
            command.env("LISTEN_FDS", fds.len().to_string());
            let names: Vec<&str> = stored.iter().map(|(_, name)| *name).collect();
            let names = names.join(":");
            if names.len() + "LISTEN_FDNAMES=".len() < VARIABLE_BYTES {
                command.env("LISTEN_FDNAMES", names);
            } else {
                log::warn!(
                    "the names of {} descriptors need {} bytes, and {VARIABLE_BYTES} is the \
                     limit: the server gets the descriptors without LISTEN_FDNAMES",
                    fds.len(),
                    names.len()
                );
            }
        }
        match sys::start(&mut command, &fds, &self.child_mask) {
            Ok(pid) => {
                log::info!("started {:?} as process {pid}", choice.path);
                let kill_at = Some(Instant::now() + START_LIMIT);
                self.child =
                    Some(Child { pid, choice, ready: false, asked_to_end: false, kill_at });
            }
            Err(error) => {
                log::error!("cannot start a process for the server: {error}; trying again");
                self.start_at = Instant::now() + Duration::from_millis(500);
            }
        }
    }
}

/// Descriptors of an earlier supervisor that the service manager gives back, and what it opened for this one.
fn taken_over() -> Vec<(String, OwnedFd)> {
    let variable = |name| std::env::var(name).ok();
    if variable("LISTEN_PID") != Some(std::process::id().to_string()) {
        return Vec::new();
    }
    let count = variable("LISTEN_FDS").and_then(|text| text.parse().ok()).unwrap_or(0);
    let names = variable("LISTEN_FDNAMES").unwrap_or_default();
    let names = names.split(':').map(str::to_owned);
    let names = names.chain(std::iter::repeat(message::UNNAMED.to_owned()));
    let taken = names.zip(sys::adopt(count));
    taken.filter_map(|(name, fd)| Some((name, fd?))).collect()
}
