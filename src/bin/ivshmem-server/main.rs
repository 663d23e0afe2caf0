// SPDX-License-Identifier: GPL-2.0-or-later
//! The `ivshmem-server` program: command line, signals, pid file; the server is the library's.
//!
//! Without `-F` it goes to the background: it starts itself once more, detached, and returns
//! when that one is listening and has written its pid file, or has failed. Nothing is forked
//! with half a state in it, and an error reaches the caller's stderr and exit code.

// supervise::sys alone allows it.
#![deny(unsafe_code)]

use std::io;
use std::process::ExitCode;

use ivshmem::{Chain, Event, MemorySource, Server};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};

mod args;
mod detach;
mod logging;
mod output;
mod pidfile;
mod supervise;
#[path = "../../verbose.rs"]
mod verbose;

use args::{Args, Memory};
use output::Output;
use verbose::Line;

fn main() -> ExitCode {
    let args = match args::parse(std::env::args_os()) {
        Ok(args) => args,
        Err(error) => {
            let _ = error.print();
            // The reference exits with 1 where clap would with 2.
            return if error.use_stderr() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    let outcome = match (args.foreground || args.detached, args.supervise) {
        (true, true) => supervise::run(&args),
        (true, false) => serve(&args),
        (false, _) => detach::launch(),
    };
    outcome.unwrap_or_else(|error| {
        let error = Chain(&*error);
        Output::new(io::stderr()).line(format!("ivshmem-server: {error}\n").as_bytes());
        ExitCode::FAILURE
    })
}

/// An error whose text says everything.
type Failure = Box<dyn std::error::Error>;

/// What is said on stdout.
struct Talk {
    out: Output<io::Stdout>,
    verbose: bool,
}

impl Talk {
    fn say(&mut self, line: impl std::fmt::Display) {
        self.out.line(format!("{line}\n").as_bytes());
    }

    /// Only with `-v`.
    fn detail(&mut self, line: Line<'_>) {
        if self.verbose {
            self.out.line(&[line.text(), b"\n".to_vec()].concat());
        }
    }
}

fn serve(args: &Args) -> Result<ExitCode, Failure> {
    logging::start(args);
    let mut talk = Talk { out: Output::new(io::stdout()), verbose: args.verbose };
    // From here on a signal waits for the loop, so it never leaves a half-made thing behind.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    // There is no other thread. (nix's `thread_block` does not see its errors.)
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&signals), None)
        .map_err(|errno| format!("cannot block signals: {}", io::Error::from(errno)))?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(|errno| format!("cannot make a signalfd: {}", io::Error::from(errno)))?;
    outlive_large_output()?;
    raise_descriptor_limit();

    let pid_file =
        if args.detached { Some(pidfile::PidFile::claim(&args.pid_file)?) } else { None };
    let source = match args.memory() {
        Memory::Name(name) => {
            talk.detail(Line::PosixMemory(name.as_ref()));
            MemorySource::posix(name)
        }
        Memory::Directory(directory) => {
            talk.detail(Line::DirectoryMemory(directory.as_os_str()));
            MemorySource::Directory(directory)
        }
        Memory::Sealed => {
            if talk.verbose {
                talk.say("Using sealed anonymous shared memory");
            }
            MemorySource::Sealed
        }
    };
    talk.detail(Line::Bind(args.socket.as_os_str()));
    let mut builder = Server::builder()
        .socket_path(&args.socket)
        .memory(source)
        .size(args.size)
        .vectors(args.vectors);
    if let Some(mode) = args.socket_mode {
        builder = builder.socket_mode(mode);
    }
    if let Some(mode) = args.shm_mode {
        builder = builder.memory_mode(mode);
    }
    let mut server = builder.start()?;
    server.wake_on(&signals, 0)?;
    if args.hint {
        talk.out.line(args::hint(args, &server).as_bytes());
    }
    if let Some(pid_file) = &pid_file {
        pid_file.write()?;
    }
    if args.detached {
        detach::ready()?;
    }
    if args.supervised {
        detach::release_output()?;
    }
    supervise::notify_ready();
    let served = poll_events(&mut server, &mut talk);
    talk.say("server disconnected");
    let ids: Vec<u16> = server.peers().map(|peer| peer.id()).collect();
    talk.detail(Line::Close);
    drop(server);
    for id in ids {
        talk.detail(Line::FreePeer(id));
    }
    drop(pid_file);
    served.map(|()| ExitCode::SUCCESS)
}

/// Serves until a signal comes, which wakes the server.
fn poll_events(server: &mut Server, talk: &mut Talk) -> Result<(), Failure> {
    let mut signalled = false;
    while !signalled {
        for event in server.wait(None)? {
            // The library logs refusals, at most once a second.
            verbose::lines_of(&event).for_each(|line| talk.detail(line));
            // The caller's descriptor is the signals'.
            signalled |= matches!(event, Event::Woken { .. });
        }
    }
    Ok(())
}

/// Output that reaches the limit of file sizes (RLIMIT_FSIZE) raises a signal that kills.
/// Blocked, it leaves an error, which is no reason to end.
fn outlive_large_output() -> Result<(), Failure> {
    let signal = SigSet::from(Signal::SIGXFSZ);
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&signal), None)
        .map_err(|errno| format!("cannot block a signal: {}", io::Error::from(errno)).into())
}

/// Every client costs descriptors: take all that the administrator allows.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(errno) = raised {
        log::warn!("cannot raise the limit of open files: {}", io::Error::from(errno));
    }
}
