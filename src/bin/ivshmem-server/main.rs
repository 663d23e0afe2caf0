// SPDX-License-Identifier: GPL-2.0-or-later
//! The `ivshmem-server` program: command line, signals, output and pid file. The library does the
//! serving.
//!
//! Without `-F` the program starts itself again as a background process, and returns when that
//! process listens and has written its pid file, or has failed. A fork would copy a half-started
//! server; this way an error also reaches the caller's stderr and exit status.

// supervise::sys alone allows it.
#![deny(unsafe_code)]

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ivshmem::{Chain, Event, Keeper, MemorySource, Server, inherited_listener};
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};

mod args;
mod capabilities;
mod control;
mod detach;
mod hint;
mod lifecycle;
mod logging;
mod manager;
mod output;
mod pidfile;
mod privileges;
mod ready;
mod sandbox;
mod supervise;
#[path = "../../verbose.rs"]
mod verbose;

use args::{Args, Memory};
use control::{Control, Place};
use detach::ReleasedOutput;
use manager::Manager;
use output::Output;
use ready::ReadyFd;
use verbose::Line;

fn main() -> ExitCode {
    if capabilities::are_asked_for(std::env::args_os().skip(1)) {
        return capabilities::print();
    }
    let args = match args::parse(std::env::args_os()) {
        Ok(args) => args,
        Err(error) => {
            if error.use_stderr() && logging::is_in_journal() {
                logging::report(args::one_line(&error));
            } else {
                let _ = error.print();
            }
            // Like the reference, not 2 like clap.
            return if error.use_stderr() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    let outcome = if args.foreground || args.detached {
        run(&args)
    } else {
        // The process in the background gets all descriptors that this one has.
        detach::launch()
    };
    outcome.unwrap_or_else(|error| {
        logging::report(Chain(&*error));
        ExitCode::FAILURE
    })
}

fn run(args: &Args) -> Result<ExitCode, Failure> {
    let ready = ReadyFd::take(args)?;
    privileges::check(args.user.as_ref())?;
    if args.supervise { supervise::run(args, ready) } else { serve(args, ready) }
}
/// The token of the signals at the server. The control socket has another one.
const SIGNALS: u64 = 0;

/// Any error; its sources are printed with it.
type Failure = Box<dyn std::error::Error>;

/// Stdout.
struct Talk {
    out: Output<io::Stdout>,
    verbose: bool,
}

impl Talk {
    fn say(&mut self, line: impl std::fmt::Display) {
        self.out.line(format!("{line}\n").as_bytes());
    }

    /// Prints a line only with `-v`.
    fn detail(&mut self, line: Line<'_>) {
        if self.verbose {
            self.out.line(&[line.text(), b"\n".to_vec()].concat());
        }
    }
}

fn serve(args: &Args, ready: Option<ReadyFd>) -> Result<ExitCode, Failure> {
    // From here on a signal waits until the loop reads it, so that it never interrupts the start.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGHUP);
    // There is no other thread yet; later threads inherit the mask. (nix's `thread_block` ignores
    // errors.)
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&signals), None)
        .map_err(|errno| format!("cannot block signals: {}", io::Error::from(errno)))?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(|errno| format!("cannot make a signalfd: {}", io::Error::from(errno)))?;
    block_harmless_signals()?;
    logging::start(args);
    let out = if args.detached { Output::passing(io::stdout) } else { Output::new(io::stdout) };
    let mut talk = Talk { out, verbose: args.verbose };
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
        Memory::File(path) => {
            if talk.verbose {
                talk.say(format_args!("Using shared memory at {}", path.display()));
            }
            MemorySource::File(path)
        }
    };
    talk.detail(Line::Bind(args.socket.as_os_str()));
    let mut keeper = Keeper::from_environment()?;
    let listener = match &mut keeper {
        Some(keeper) => keeper.take_listener(),
        None => inherited_listener(),
    };
    lifecycle::starting(args, listener.is_some());
    // In a sticky directory, the server can remove its socket at the end only if it owns it.
    let new_user = args.user.as_ref().filter(|_| listener.is_none()).map(|user| user.uid);
    let socket = match &listener {
        Some(listener) => control::path_of(listener),
        None => Some(args.socket.clone()),
    };
    let socket_name = socket.as_ref().map_or(String::new(), |path| path.display().to_string());
    let owner = args.user.as_ref().map(|user| user.uid);
    let place = Place::choose(args.no_control, args.control.as_ref(), socket);
    let (mut builder, opening) = control::open_with(Server::builder(), place, socket_name, owner);
    builder = match listener {
        Some(listener) => builder.listener(listener),
        None => builder.socket_path(&args.socket),
    };
    if let Some(keeper) = keeper {
        builder = builder.keeper(keeper);
    }
    builder = builder.memory(source).first_id(args.first_id).vectors(args.vectors);
    builder = builder.numa_nodes(args.numa_node.iter().copied());
    if let Some(size) = args.size {
        builder = builder.size(size);
    }
    if let Some(size) = args.hugetlb {
        builder = builder.huge_pages(size);
    }
    if args.size_exact {
        builder = builder.exact_size();
    }
    if args.keep {
        builder = builder.keep_memory();
    }
    if let Some(mode) = args.socket_mode {
        builder = builder.socket_mode(mode);
    }
    if let Some(user) = args.socket_owner.or(new_user) {
        builder = builder.socket_owner(user);
    }
    if let Some(group) = args.socket_group {
        builder = builder.socket_group(group);
    }
    if let Some(mode) = args.shm_mode {
        builder = builder.memory_mode(mode);
    }
    if let Some(group) = args.shm_group {
        builder = builder.memory_group(group);
    }
    let access = args.access();
    if access.is_limited() {
        builder = builder.admit(move |applicant| access.check(applicant));
    }
    if let Some(clients) = args.max_clients {
        builder = builder.max_clients(clients);
    }
    if let Some(clients) = args.max_clients_per_uid {
        builder = builder.max_clients_per_uid(clients);
    }
    let mut server = builder.start()?;
    let is_kept = server.keeper().is_some();
    let announced = announce(args, &mut server, &signals, &mut talk, pid_file.as_ref(), opening);
    let (mut manager, mut control) = match announced {
        Ok(announced) => announced,
        Err(failure) => {
            // Clients of a server before must not end with this start.
            if is_kept && server.peers().len() > 0 {
                server.hand_over();
            }
            return Err(failure);
        }
    };
    lifecycle::ready(&server);
    if let Some(ready) = ready {
        ready.tell();
    }
    manager.ready(server.peers().len());
    let served = poll_events(&mut server, &signals, &mut talk, &mut manager, &mut control);
    // Before the server's own socket.
    drop(control);
    if is_kept && !matches!(served, Ok(End::ForGood)) {
        // An error, too, ends the process and not the service.
        lifecycle::hands_over(&server);
        server.hand_over();
        return served.map(|_| ExitCode::SUCCESS);
    }
    lifecycle::ending(&server);
    talk.say("server disconnected");
    let ids: Vec<u16> = server.peers().map(|peer| peer.id()).collect();
    talk.detail(Line::Close);
    drop(server);
    for id in ids {
        talk.detail(Line::FreePeer(id));
    }
    drop(pid_file);
    served.map(|_| ExitCode::SUCCESS)
}

/// Gives up root, and says to the caller that the server listens.
fn announce(
    args: &Args,
    server: &mut Server,
    signals: &SignalFd,
    talk: &mut Talk,
    pid_file: Option<&pidfile::PidFile>,
    opening: control::Opening,
) -> Result<(Manager, Option<Control>), Failure> {
    server.wake_on(signals, SIGNALS)?;
    let control = opening.finish(server);
    if args.hint {
        talk.out.line(hint::text(args, server).as_bytes());
    }
    if let Some(pid_file) = pid_file {
        pid_file.write()?;
    }
    // Only root may reach the supervisor's socket.
    let manager = Manager::connect();
    if let Some(account) = &args.user {
        privileges::give_up(account)?;
    }
    if args.detached {
        detach::leave_session()?;
    }
    let is_behind = args.detached || args.supervised;
    let output = is_behind.then(ReleasedOutput::prepare).transpose()?;
    sandbox::enter(args.sandbox, &directories_of_names(args, server, control.as_ref(), pid_file))?;
    match output {
        Some(output) if args.detached => detach::ready(output)?,
        Some(output) => detach::release_output(output),
        None => {}
    }
    Ok((manager, control))
}

/// The directories of the names that the server removes at its end.
fn directories_of_names(
    args: &Args,
    server: &Server,
    control: Option<&Control>,
    pid_file: Option<&pidfile::PidFile>,
) -> Vec<PathBuf> {
    let socket = server.socket_path().map(Path::to_owned);
    let control = control.map(|control| control.path().to_owned());
    let pid_file = pid_file.map(|_| args.pid_file.clone());
    let memory = match args.memory() {
        Memory::File(path) => Some(path),
        _ => None,
    };
    let names = [socket, control, pid_file, memory].into_iter().flatten();
    let directories = names.map(|name| match name.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    });
    // Objects of -M, and lock files.
    directories.chain([PathBuf::from("/dev/shm")]).collect()
}

/// How the server ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The next server goes on with the clients.
    HandOver,
    ForGood,
}

/// Serves until SIGTERM or SIGINT comes. Each signal wakes the server.
fn poll_events(
    server: &mut Server,
    signals: &SignalFd,
    talk: &mut Talk,
    manager: &mut Manager,
    control: &mut Option<Control>,
) -> Result<End, Failure> {
    loop {
        let due = manager.due().into_iter().chain(control.as_ref().and_then(Control::due)).min();
        let mut is_woken = false;
        for event in server.wait(due)? {
            is_woken |= matches!(event, Event::Woken { token: control::TOKEN, .. });
            // The library logs the refusals itself.
            verbose::lines_of(&event).for_each(|line| talk.detail(line));
            if let Some(control) = control {
                control.tell(&event, server);
            }
            if matches!(event, Event::Woken { token: SIGNALS, .. }) {
                if let Some(end) = take_signals(signals, server.keeper().is_some()) {
                    return Ok(end);
                }
            }
        }
        if let Some(control) = control.as_mut().filter(|control| control.is_ready(is_woken)) {
            control.serve(server);
        }
        manager.show(server.peers().len());
    }
}

/// Reads the signals that came. Returns how the server has to end, if it has to.
fn take_signals(signals: &SignalFd, is_kept: bool) -> Option<End> {
    let mut end = None;
    loop {
        match signals.read_signal() {
            Ok(Some(signal)) => match Signal::try_from(signal.ssi_signo as i32) {
                Ok(Signal::SIGHUP) => {
                    log::warn!("SIGHUP: there is nothing to reload; the server goes on");
                }
                Ok(Signal::SIGTERM) if is_kept && end.is_none() => end = Some(End::HandOver),
                _ => end = Some(End::ForGood),
            },
            // The descriptor stays readable while a signal is left.
            Ok(None) | Err(Errno::EINTR) => return end,
            Err(errno) => {
                log::error!("cannot read which signal came, so the server ends: {errno}");
                return Some(if is_kept { End::HandOver } else { End::ForGood });
            }
        }
    }
}

/// Blocks the signals by which output would kill or stop the server: SIGXFSZ when a file reaches
/// the limit of file sizes (RLIMIT_FSIZE), and SIGTTOU on a terminal with `stty tostop`. If they
/// are blocked, the write fails or succeeds.
fn block_harmless_signals() -> Result<(), Failure> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGXFSZ);
    signals.add(Signal::SIGTTOU);
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&signals), None)
        .map_err(|errno| format!("cannot block signals: {}", io::Error::from(errno)).into())
}

/// Each client needs descriptors, so the soft limit is raised to the hard limit.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(errno) = raised {
        log::warn!(
            "cannot raise the limit of open files to the hard limit: {}",
            io::Error::from(errno)
        );
    }
}
