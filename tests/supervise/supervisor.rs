// SPDX-License-Identifier: GPL-2.0-or-later
//! A supervisor under test, and the program `child.py` that it starts in place of the server.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::common::daemon::{is_listening, program};
use crate::common::program::{Ended, Place, Process};
use crate::common::{text_of, wait_for};

/// The program that does what a test says.
pub(crate) const CHILD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/supervise/child.py");

/// A running supervisor. Its program file is a link in a directory of its own, which [`Supervisor::replace_program`]
/// changes.
pub(crate) struct Supervisor {
    pub(crate) place: Place,
    process: Option<Process>,
    control: UnixListener,
}

/// The command of a supervisor in `place` whose program file is there too.
pub(crate) fn command(place: &Place) -> Command {
    command_of(place, &program())
}

fn command_of(place: &Place, program: &Path) -> Command {
    let file = place.path("ivshmem-server");
    if !file.exists() {
        symlink(program, &file).expect("the place is empty");
    }
    let mut command = Command::new(file);
    command.args(["--supervise", "--memfd", "--sandbox", "on", "-S"]).arg(place.socket());
    command.env("RUNTIME_DIRECTORY", place.dir()).env("RUST_LOG", "info");
    command.env_remove("NOTIFY_SOCKET");
    command
}

impl Supervisor {
    /// Starts it in the foreground and waits until its server listens.
    pub(crate) fn start() -> Self {
        Self::start_with(Place::new(), |_| ())
    }

    pub(crate) fn start_with(place: Place, change: impl FnOnce(&mut Command)) -> Self {
        let mut command = command(&place);
        change(command.arg("-F"));
        Self::started(place, Process::spawn(&mut command))
    }

    /// Starts another program. Its log is at [`log`](Self::log).
    #[allow(dead_code, reason = "the tests of restarts use it")]
    pub(crate) fn start_program(program: &Path, change: impl FnOnce(&mut Command)) -> Self {
        let place = Place::new();
        let mut command = command_of(&place, program);
        let log = File::create(place.path("log")).expect("the place is empty");
        change(command.arg("-F"));
        let process = Process::spawn_with_log(&mut command, log);
        Self::started(place, process)
    }

    /// The log of a supervisor that was started by [`start_program`](Self::start_program).
    #[allow(dead_code, reason = "the tests of restarts use it")]
    pub(crate) fn log(&self) -> PathBuf {
        self.place.path("log")
    }

    fn started(place: Place, mut process: Process) -> Self {
        let control = UnixListener::bind(place.path("control")).expect("the place is empty");
        control.set_nonblocking(true).expect("fcntl works");
        process.wait_until_listening(&place.socket());
        Self { place, process: Some(process), control }
    }

    /// Starts it, and replaces its server by `child.py`.
    pub(crate) fn with_child() -> (Self, FakeChild) {
        let supervisor = Self::start();
        let child = supervisor.upgrade_to_child();
        (supervisor, child)
    }

    pub(crate) fn upgrade_to_child(&self) -> FakeChild {
        self.replace_program(Path::new(CHILD));
        self.signal(Signal::SIGHUP);
        let mut child = self.next_child();
        child.ask("ready");
        child
    }

    pub(crate) fn replace_program(&self, file: &Path) {
        replace_program(&self.place, file);
    }

    /// The next `child.py` that starts.
    #[track_caller]
    pub(crate) fn next_child(&self) -> FakeChild {
        next_child(&self.control)
    }

    pub(crate) fn pid(&self) -> Pid {
        self.process.as_ref().expect("it runs").pid()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).expect("it runs");
    }

    /// The process of the server, once there is one other than `old`.
    #[track_caller]
    pub(crate) fn server_other_than(&self, old: Option<Pid>) -> Pid {
        wait_for("another server", || {
            let mut servers = servers(self.pid()).into_iter();
            servers.find(|&pid| Some(pid) != old)
        })
    }

    /// Waits until its server, other than `old`, listens.
    #[track_caller]
    pub(crate) fn wait_until_serving(&self, old: Option<Pid>) -> Pid {
        let server = self.server_other_than(old);
        let socket = self.place.socket();
        // The old one is dead, so it is the new one's socket.
        wait_for("a server that listens", || is_listening(&socket).then_some(()));
        server
    }

    /// Waits for its end.
    #[track_caller]
    pub(crate) fn end(&mut self) -> Ended {
        self.process.take().expect("it runs").end()
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "--- the supervisor's log ---\n{}\n--- end ---",
                text_of(&self.place.path("log"))
            );
        }
        let Some(process) = self.process.take() else { return };
        let children = children(process.pid());
        drop(process);
        for child in children {
            let _ = kill(child, Signal::SIGKILL);
        }
    }
}

/// Puts a link to `file` where the program file is, as an installation does.
pub(crate) fn replace_program(place: &Place, file: &Path) {
    let new = place.path("new");
    symlink(file, &new).expect("no other upgrade runs");
    fs::rename(new, place.path("ivshmem-server")).expect("rename works");
}

pub(crate) fn next_child(control: &UnixListener) -> FakeChild {
    let stream = wait_for("a start of child.py", || control.accept().ok()).0;
    stream.set_nonblocking(false).expect("fcntl works");
    stream.set_read_timeout(Some(3 * crate::common::PATIENCE)).expect("not zero");
    let mut stream = BufReader::new(stream);
    let hello = line(&mut stream).expect("its first line");
    let words: Vec<&str> = hello.splitn(6, ' ').collect();
    let [_, pid, stored, checked, notify, blocked] = words[..] else { panic!("{hello}") };
    FakeChild {
        pid: Pid::from_raw(pid.parse().expect("a pid")),
        stored: stored.parse().expect("a number"),
        checked: checked.to_owned(),
        notify: notify.into(),
        blocked: blocked.to_owned(),
        stream,
    }
}

/// A running `child.py`.
pub(crate) struct FakeChild {
    /// In its own pid namespace.
    pub(crate) pid: Pid,
    /// LISTEN_FDS.
    pub(crate) stored: usize,
    /// How many of them were right, or what is wrong.
    pub(crate) checked: String,
    pub(crate) notify: PathBuf,
    /// The numbers of the signals that were blocked when it started.
    pub(crate) blocked: String,
    stream: BufReader<UnixStream>,
}

impl FakeChild {
    /// Lets it do something, and returns its answer.
    #[track_caller]
    pub(crate) fn ask(&mut self, command: &str) -> String {
        self.tell(command);
        line(&mut self.stream).expect("an answer")
    }

    pub(crate) fn tell(&mut self, command: &str) {
        writeln!(self.stream.get_mut(), "{command}").expect("it reads");
    }

    /// What it says next; `None` if it has ended.
    pub(crate) fn next_line(&mut self) -> Option<String> {
        line(&mut self.stream)
    }

    pub(crate) fn kill(self) {
        kill(self.pid, Signal::SIGKILL).expect("it runs");
    }
}

fn line(stream: &mut impl BufRead) -> Option<String> {
    let mut line = String::new();
    match stream.read_line(&mut line) {
        Ok(0) => None,
        // Killed with an unread command.
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => None,
        read => read.map(|_| line.trim_end().to_owned()).expect("it answers in time").into(),
    }
}

/// The child processes of a process.
pub(crate) fn children(pid: Pid) -> Vec<Pid> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().map(|pid| Pid::from_raw(pid.parse().expect("a pid"))).collect()
}

/// The children of a supervisor that execute their program already: until then they look like the supervisor.
pub(crate) fn servers(supervisor: Pid) -> Vec<Pid> {
    let executes = |pid: &Pid| {
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        !words.is_empty() && words.split(|&byte| byte == 0).all(|word| word != b"--supervise")
    };
    children(supervisor).into_iter().filter(executes).collect()
}
