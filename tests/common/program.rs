// SPDX-License-Identifier: GPL-2.0-or-later
//! The server program as a process: runs to the end, background daemons, and a [`Place`] for each test, which notices
//! files that a server leaves behind.

#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, geteuid};
use tempfile::TempDir;

use super::daemon::{is_listening, program};
use super::peer::Peer;
use super::target::Target;
use super::{PATIENCE, wait_for, wait_for_exit, wait_up_to};

/// The exit status and the output of a process that has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    /// Asserts that the start failed: the daemon's error contains each of `parts`, and the C program's error
    /// contains the text of one of `errnos`.
    #[track_caller]
    pub(crate) fn assert_refused_by(&self, target: Target, parts: &[&str], errnos: &[Errno]) {
        match target {
            Target::Daemon => self.assert_refused(parts),
            Target::SelectLoop => {
                self.assert_refused(&["cannot start: "]);
                let said = |errno: &Errno| self.stderr.contains(errno.desc());
                assert!(errnos.iter().any(said), "none of {errnos:?} in {self:?}");
            }
        }
    }

    /// Asserts exit code 1, and that stderr contains each of `parts`.
    #[track_caller]
    pub(crate) fn assert_refused(&self, parts: &[&str]) {
        assert_eq!(self.status.code(), Some(1), "{self:?}");
        for part in parts {
            assert!(self.stderr.contains(part), "no {part:?} in {self:?}");
        }
        assert!(!self.stderr.contains("panicked"), "{self:?}");
    }
}

/// A process whose output is read through pipes. It is killed when this value is dropped.
pub(crate) struct Process {
    child: Child,
    stdout: Receiver<String>,
    stderr: Receiver<String>,
}

impl Process {
    #[track_caller]
    pub(crate) fn spawn(command: &mut Command) -> Self {
        Self::start(command.stdin(Stdio::null()).stderr(Stdio::piped()))
    }

    /// Like `spawn`, with a copy of a descriptor for stdin.
    #[track_caller]
    pub(crate) fn spawn_with_input(command: &mut Command, input: BorrowedFd<'_>) -> Self {
        let input = input.try_clone_to_owned().expect("dup works");
        Self::start(command.stdin(input).stderr(Stdio::piped()))
    }

    /// Like `spawn`, with a file for stderr, which can be read while the process runs.
    #[track_caller]
    pub(crate) fn spawn_with_log(command: &mut Command, log: File) -> Self {
        Self::start(command.stdin(Stdio::null()).stderr(log))
    }

    #[track_caller]
    fn start(command: &mut Command) -> Self {
        let mut child = command
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        let stdout = text_of_pipe(child.stdout.take().expect("it is piped"));
        let stderr = match child.stderr.take() {
            Some(pipe) => text_of_pipe(pipe),
            None => text_of_pipe(io::empty()),
        };
        Self { child, stdout, stderr }
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).expect("a pid is an int"))
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).expect("it is our child");
    }

    /// Waits until the process listens on `socket`. A large memory may take the kernel a minute on a busy machine.
    #[track_caller]
    pub(crate) fn wait_until_listening(&mut self, socket: &Path) {
        let listens = wait_up_to(6 * PATIENCE, || {
            assert!(self.is_running(), "the process ended instead of listening");
            is_listening(socket).then_some(())
        });
        assert!(listens.is_some(), "the process does not listen at {}", socket.display());
    }

    /// Ends the process by SIGTERM and asserts exit code 0.
    #[track_caller]
    pub(crate) fn stop(mut self) -> Ended {
        assert!(self.is_running(), "the process ended before SIGTERM");
        self.signal(Signal::SIGTERM);
        let ended = self.end();
        assert_eq!(ended.status.code(), Some(0), "{ended:?}");
        ended
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("waitpid works").is_none()
    }

    /// Waits until the process has ended and both pipes are closed. No other process may keep the pipes open.
    #[track_caller]
    pub(crate) fn end(mut self) -> Ended {
        let status = wait_for_exit(&mut self.child, "the process");
        let text = |pipe: &Receiver<String>, name| match pipe.recv_timeout(PATIENCE) {
            Ok(text) => text,
            Err(_) => panic!("no end of file on its {name}, although the process ended: {status}"),
        };
        Ended { status, stdout: text(&self.stdout, "stdout"), stderr: text(&self.stderr, "stderr") }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // If it has ended and was waited for, both calls fail, which is harmless.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn text_of_pipe(mut pipe: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        // If the test has ended, no one receives the text.
        let _ = sender.send(String::from_utf8_lossy(&bytes).into_owned());
    });
    receiver
}

/// Runs a command to its end.
#[track_caller]
pub(crate) fn run(command: &mut Command) -> Ended {
    Process::spawn(command).end()
}

/// A background process, which became a child of this process when its parent ended. It is killed when this value is
/// dropped.
pub(crate) struct Background {
    pid: Pid,
    ended: bool,
}

impl Background {
    /// Runs a command that leaves a process in the background and writes its id to `pid_file`.
    #[track_caller]
    pub(crate) fn start(command: &mut Command, pid_file: &Path) -> (Self, Ended) {
        adopt_orphans();
        let ended = run(command);
        assert!(ended.status.success(), "{ended:?}");
        // The file is read at once: it must be complete when the parent ends.
        let text = fs::read_to_string(pid_file).expect("the pid file");
        (Self::adopted(&text), ended)
    }

    /// The process whose id is the line `text`.
    #[track_caller]
    pub(crate) fn adopted(text: &str) -> Self {
        let pid = text.strip_suffix('\n').expect("a whole line");
        let pid = Pid::from_raw(pid.parse().expect("a process id"));
        Self { pid, ended: false }
    }

    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(self.pid, signal).expect("the process runs");
    }

    /// Waits until it ends. Returns its exit code.
    #[track_caller]
    pub(crate) fn wait(&mut self) -> i32 {
        let status = wait_for("the end of the background process", || {
            match waitpid(self.pid, Some(WaitPidFlag::WNOHANG)) {
                // Its parent has not ended yet, so it is not our child yet.
                Err(Errno::ECHILD) | Ok(WaitStatus::StillAlive) => None,
                other => Some(other.expect("waitpid works")),
            }
        });
        self.ended = true;
        match status {
            WaitStatus::Exited(_, code) => code,
            other => panic!("the background process ended by {other:?}"),
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if !self.ended {
            let _ = kill(self.pid, Signal::SIGKILL);
            let _ = waitpid(self.pid, None);
        }
    }
}

/// From now on, a process whose parent ends becomes a child of this process, which can then wait for it.
pub(crate) fn adopt_orphans() {
    prctl::set_child_subreaper(true).expect("Linux 3.4 or later");
}

/// A directory and a name in /dev/shm that only one test uses.
pub(crate) struct Place {
    dir: TempDir,
    pub(crate) name: String,
}

impl Place {
    pub(crate) fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("ivshmem-test-")
            .tempdir()
            .expect("a temporary directory");
        // The directory's name is unique on this host, so the memory has the same name.
        let name = dir.path().file_name().expect("it has a name").to_string_lossy().into_owned();
        Self { dir, name }
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path("socket")
    }

    pub(crate) fn pid_file(&self) -> PathBuf {
        self.path("pid")
    }

    pub(crate) fn shm(&self) -> PathBuf {
        Path::new("/dev/shm").join(&self.name)
    }

    /// The command of the program, with all paths in this place, and `args`.
    /// The file whose lock a server of the memory holds.
    pub(crate) fn shm_lock(&self) -> PathBuf {
        Path::new("/dev/shm").join(format!(".ivshmem-lock.{}", self.name))
    }

    /// The program with everything in this place, to which arguments may be added.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(program());
        command.args(self.args()).args(args);
        command
    }

    /// The arguments that set all paths to this place.
    pub(crate) fn args(&self) -> Vec<String> {
        let text = |path: PathBuf| path.into_os_string().into_string().expect("the path is UTF-8");
        let (socket, pid_file) = (text(self.socket()), text(self.pid_file()));
        let args = ["-S", &socket, "-p", &pid_file, "-M", &self.name, "-l", "64K"];
        args.map(str::to_owned).to_vec()
    }

    /// Like `args`, for any server.
    pub(crate) fn args_of(&self, target: Target) -> Vec<String> {
        let mut args = self.args();
        if target == Target::SelectLoop {
            // This server has no pid file option.
            let at = args.iter().position(|arg| arg == "-p").expect("`args` has this option");
            args.drain(at..at + 2);
        }
        args
    }

    /// The command of any server, with all paths in this place, in the foreground.
    pub(crate) fn command_of(&self, target: Target) -> Command {
        let mut command = Command::new(target.program());
        command.args(self.args_of(target)).arg("-F");
        command
    }

    /// Starts the program in the foreground and waits until it listens.
    #[track_caller]
    pub(crate) fn serve(&self, args: &[&str]) -> Process {
        self.listening(self.command(args).arg("-F"))
    }

    /// Starts any server in the foreground and waits until it listens.
    #[track_caller]
    pub(crate) fn serve_by(&self, target: Target) -> Process {
        self.listening(&mut self.command_of(target))
    }

    #[track_caller]
    fn listening(&self, command: &mut Command) -> Process {
        let mut process = Process::spawn(command);
        process.wait_until_listening(&self.socket());
        process
    }

    /// Starts a daemon in the background.
    #[track_caller]
    pub(crate) fn daemonize(&self, args: &[&str]) -> Background {
        Background::start(&mut self.command(args), &self.pid_file()).0
    }

    /// The names in the directory.
    pub(crate) fn names(&self) -> Vec<String> {
        let name = |entry: Result<fs::DirEntry, _>| {
            entry.expect("it can be read").file_name().to_string_lossy().into_owned()
        };
        let mut names: Vec<_> =
            fs::read_dir(self.dir()).expect("the directory exists").map(name).collect();
        names.sort();
        names
    }

    /// Asserts that the directory has only the expected names, and /dev/shm nothing of this place.
    #[track_caller]
    pub(crate) fn assert_holds_only(&self, expected: &[&str]) {
        assert_eq!(self.names(), expected, "in {}", self.dir().display());
        let memory = self.memory();
        assert!(memory.is_empty(), "left behind: {memory:?}");
    }

    /// The files in /dev/shm whose name begins with that of this place.
    /// What /dev/shm has whose name begins with that of this place, lock files included.
    fn memory(&self) -> Vec<PathBuf> {
        let all = fs::read_dir("/dev/shm").expect("the directory exists");
        let ours = |path: &PathBuf| {
            path.file_name().is_some_and(|name| {
                let name = name.to_string_lossy();
                name.strip_prefix(".ivshmem-lock.").unwrap_or(&name).starts_with(&self.name)
            })
        };
        all.map(|entry| entry.expect("it can be read").path()).filter(ours).collect()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Kills a daemon that a failed test left running. The process id comes from the pid file. Because
        // another process may have that id by now, its arguments must contain the name of this place.
        let text = fs::read_to_string(self.pid_file()).unwrap_or_default();
        let arguments = fs::read(format!("/proc/{}/cmdline", text.trim())).unwrap_or_default();
        if String::from_utf8_lossy(&arguments).contains(&self.name) {
            if let Ok(pid) = text.trim().parse() {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        for path in self.memory() {
            let _ = fs::remove_file(path);
        }
    }
}

/// The memory that a client received.
pub(crate) fn memory_of(peer: &Peer) -> File {
    File::from(peer.memory().try_clone_to_owned().expect("dup works"))
}

/// The size of the memory that a client received.
pub(crate) fn size_of(peer: &Peer) -> u64 {
    memory_of(peer).metadata().expect("fstat works").len()
}

/// A command that runs a shell script in its own mount namespace, where the script may mount file systems. `$0`
/// is the program, and `$@` are the arguments. The namespace ends with its processes. Returns `None` if the
/// kernel allows no new namespace.
pub(crate) fn in_own_mounts(script: &str, args: &[String]) -> Option<Command> {
    // A user that is not root needs a user namespace too, in which it is root.
    let flags = if geteuid().is_root() { "-m" } else { "-rm" };
    let mut probe = Command::new("unshare");
    let probe = probe.args([flags, "mount", "-t", "tmpfs", "none", "/mnt"]);
    let probe = probe.stderr(Stdio::null()).status();
    if !probe.expect("unshare (Debian package util-linux)").success() {
        return None;
    }
    let mut command = Command::new("unshare");
    command.args([flags, "sh", "-ec", script]).arg(program()).args(args);
    Some(command)
}
