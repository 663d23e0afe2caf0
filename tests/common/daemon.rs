// SPDX-License-Identifier: GPL-2.0-or-later
//! The server program under test: starts it in its own directory, observes it from outside, and stops it.
//!
//! It uses only options that the reference has too, so `IVSHMEM_SERVER_BIN` can name any program that replaces the
//! reference.

#![forbid(unsafe_code)]

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use super::crowd::allow_most_descriptors;
use super::{PATIENCE, is_asleep, stop_process, text_of, wait_for, wait_for_exit, wait_up_to};

/// The path of the program under test.
pub(crate) fn program() -> PathBuf {
    std::env::var_os("IVSHMEM_SERVER_BIN")
        .or_else(|| option_env!("CARGO_BIN_EXE_ivshmem-server").map(OsString::from))
        .expect(
            "no ivshmem-server was built (feature `programs`), and IVSHMEM_SERVER_BIN is not set",
        )
        .into()
}

/// Ours, if it was built. Another program may know the options of the reference only.
fn our_program() -> PathBuf {
    option_env!("CARGO_BIN_EXE_ivshmem-server").map(PathBuf::from).unwrap_or_default()
}

/// All tests of the daemon run in the sandbox, unless IVSHMEM_SANDBOX=off.
fn sandbox() -> String {
    std::env::var("IVSHMEM_SANDBOX").unwrap_or_else(|_| "on".into())
}

/// The configuration of a daemon; see [`Daemon::builder`].
pub(crate) struct Builder {
    dir: TempDir,
    vectors: u16,
    size: String,
    memory_name: String,
    memory_dir: Option<PathBuf>,
    program: PathBuf,
    under: Vec<String>,
    extra: Vec<OsString>,
}

impl Builder {
    /// Starts another program with the same command line instead of [`program`].
    pub(crate) fn program(mut self, program: PathBuf) -> Self {
        self.program = program;
        self
    }

    /// Starts the program through this command. The command must replace itself with the program that
    /// follows, as `prlimit` and `setpriv` do.
    pub(crate) fn under(mut self, command: &[&str]) -> Self {
        self.under.extend(command.iter().map(|&word| word.to_owned()));
        self
    }

    /// Sets the limit of open files, hard and soft. Only root can raise it again.
    pub(crate) fn descriptors(self, limit: u64) -> Self {
        self.under(&["prlimit", &format!("--nofile={limit}:{limit}")])
    }

    /// Runs the program as an unprivileged user that nothing else uses, because the kernel counts descriptors
    /// in flight per user. The test must be root.
    pub(crate) fn unprivileged(self) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let user = 1_000_000 + std::process::id() * 64 + NEXT.fetch_add(1, Ordering::Relaxed) % 64;
        std::os::unix::fs::chown(self.dir.path(), Some(user), Some(user)).expect("we are root");
        let words = [format!("--reuid={user}"), format!("--regid={user}")];
        self.under(&["setpriv", &words[0], &words[1], "--clear-groups"])
    }

    /// Lets every user connect.
    pub(crate) fn for_all_users(self) -> Self {
        use std::os::unix::fs::PermissionsExt;
        let mode = fs::Permissions::from_mode(0o755);
        fs::set_permissions(self.dir.path(), mode).expect("the directory is ours");
        self.under(&["sh", "-c", "umask 0; exec \"$@\"", "sh"])
    }

    /// The number of interrupt vectors per peer; defaults to 1.
    pub(crate) fn vectors(mut self, vectors: u16) -> Self {
        self.vectors = vectors;
        self
    }

    /// The size of the shared memory, in the form of `-l`; defaults to "1M".
    pub(crate) fn size(mut self, size: &str) -> Self {
        size.clone_into(&mut self.size);
        self
    }

    /// Uses POSIX shared memory of this name instead of a unique one.
    pub(crate) fn memory_name(mut self, name: &str) -> Self {
        name.clone_into(&mut self.memory_name);
        self
    }

    /// Uses a file in this directory instead of POSIX shared memory.
    pub(crate) fn memory_dir(mut self, dir: &Path) -> Self {
        self.memory_dir = Some(dir.to_owned());
        self
    }

    /// Adds one argument after all others.
    pub(crate) fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.extra.push(arg.as_ref().to_owned());
        self
    }

    /// Starts the program and waits until it listens.
    #[track_caller]
    pub(crate) fn start(self) -> Daemon {
        // A test and its clients are one process, and some tests need more than a shell's usual limit of 1,024.
        assert!(allow_most_descriptors(), "the soft limit can be raised to the hard limit");
        let socket = self.dir.path().join("socket");
        let output = |name| File::create(self.dir.path().join(name)).expect("a file for output");
        let program = &self.program;
        let mut command = match self.under.split_first() {
            Some((first, rest)) => {
                let mut command = Command::new(first);
                command.args(rest).arg(program);
                command
            }
            None => Command::new(program),
        };
        command.args(["-F", "-v", "-S"]).arg(&socket);
        match &self.memory_dir {
            Some(dir) => command.arg("-m").arg(dir),
            None => command.arg("-M").arg(&self.memory_name),
        };
        command.args(["-l", &self.size, "-n", &self.vectors.to_string()]);
        // valgrind needs more calls than the server.
        let is_watched = self.under.iter().any(|word| word.contains("valgrind"));
        if self.program == our_program() && !is_watched {
            command.args(["--sandbox", &sandbox()]);
        }
        command
            .args(&self.extra)
            .stdin(Stdio::null())
            .stdout(output("stdout"))
            .stderr(output("stderr"));
        let child =
            command.spawn().unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));

        let shm = Path::new("/dev/shm").join(self.memory_name.trim_start_matches('/'));
        let mut daemon = Daemon { dir: self.dir, child, socket, shm, idle_fds: 0 };
        wait_for("the daemon listens", || {
            daemon.assert_running();
            is_listening(&daemon.socket).then_some(())
        });
        // It enters the sandbox after that, with descriptors for the rules of Landlock.
        wait_for("the daemon waits for events", || {
            daemon.assert_running();
            waits_for_events(daemon.pid()).then_some(())
        });
        daemon.idle_fds = daemon.open_fds();
        daemon
    }
}

/// Whether a process is in a call that waits for events. True if the kernel does not tell.
fn waits_for_events(pid: Pid) -> bool {
    use nix::libc::{SYS_epoll_pwait, SYS_epoll_wait, SYS_pselect6, SYS_select};
    let text = text_of(Path::new(&format!("/proc/{pid}/syscall")));
    let calls = [SYS_epoll_wait, SYS_epoll_pwait, SYS_pselect6, SYS_select];
    match text.split_whitespace().next() {
        Some(call) => calls.iter().any(|number| number.to_string() == call),
        None => true,
    }
}

/// A running daemon. When this value is dropped, the daemon is killed and its shared memory removed.
pub(crate) struct Daemon {
    dir: TempDir,
    child: Child,
    socket: PathBuf,
    shm: PathBuf,
    idle_fds: usize,
}

impl Daemon {
    /// The defaults: foreground, verbose, unique names, one vector, 1 MiB.
    pub(crate) fn builder() -> Builder {
        let dir = tempfile::Builder::new()
            .prefix("ivshmem-test-")
            .tempdir()
            .expect("a temporary directory");
        // The directory's name is unique on this host, so the memory has the same name.
        let memory_name = dir.path().file_name().expect("the path has a name");
        Builder {
            memory_name: memory_name.to_string_lossy().into_owned(),
            dir,
            vectors: 1,
            size: "1M".to_owned(),
            memory_dir: None,
            program: program(),
            under: Vec::new(),
            extra: Vec::new(),
        }
    }

    /// The process id.
    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).expect("a pid is an int"))
    }

    /// The path of its socket.
    pub(crate) fn socket_path(&self) -> &Path {
        &self.socket
    }

    /// The file of its POSIX shared memory; it does not exist with `memory_dir`.
    pub(crate) fn shm_path(&self) -> &Path {
        &self.shm
    }

    /// Its output so far, stdout before stderr. A program that buffers its output, as the reference does, may
    /// write it only at its end.
    pub(crate) fn output(&self) -> String {
        let mut text = text_of(&self.dir.path().join("stdout"));
        text.push_str(&text_of(&self.dir.path().join("stderr")));
        text
    }

    /// Panics if the daemon has ended.
    #[track_caller]
    pub(crate) fn assert_running(&mut self) {
        if let Some(status) = self.child.try_wait().expect("waitpid works") {
            panic!("the daemon ended: {status}");
        }
    }

    /// The processor time that the daemon has used, in steps of 10 ms.
    pub(crate) fn cpu_time(&self) -> Duration {
        let stat =
            fs::read_to_string(format!("/proc/{}/stat", self.pid())).expect("the daemon runs");
        // The program's name is in parentheses and may contain any characters. utime and stime are fields 14 and 15, in
        // units of USER_HZ, which is always 100 in Linux's ABI.
        let (_, fields) = stat.rsplit_once(')').expect("the name has its parentheses");
        let ticks: u64 = fields
            .split_ascii_whitespace()
            .skip(11)
            .take(2)
            .map(|field| field.parse::<u64>().expect("a number"))
            .sum();
        Duration::from_millis(10 * ticks)
    }

    /// The time for which the daemon has run on a processor, in nanoseconds. The kernel updates the value
    /// when the daemon starts to wait; if it does not wait, the value is up to 10 ms old.
    pub(crate) fn run_time(&self) -> Duration {
        let _ = wait_up_to(Duration::from_millis(20), || is_asleep(self.pid()).then_some(()));
        let stat =
            fs::read_to_string(format!("/proc/{}/schedstat", self.pid())).expect("the daemon runs");
        let first = stat.split_ascii_whitespace().next().expect("schedstat has three fields");
        Duration::from_nanos(first.parse().expect("a number"))
    }

    /// Its resident memory, in KiB.
    pub(crate) fn resident_kib(&self) -> u64 {
        let status =
            fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("the daemon runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
        line.trim().trim_end_matches("kB").trim().parse().expect("a number")
    }

    /// The number of its open descriptors.
    pub(crate) fn open_fds(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid())).expect("the daemon runs").count()
    }

    /// The number of its open descriptors before the first client, inherited ones included.
    pub(crate) fn idle_fds(&self) -> usize {
        self.idle_fds
    }

    /// Sends the daemon a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).expect("it is our child");
    }

    /// Stops the daemon: see [`stop_process`].
    #[track_caller]
    pub(crate) fn pause(&self) {
        stop_process(self.pid());
    }

    /// Waits until the daemon ends.
    #[track_caller]
    pub(crate) fn wait(&mut self) -> ExitStatus {
        wait_for_exit(&mut self.child, "the daemon")
    }

    /// Stops the daemon by SIGTERM, checks that its socket and memory are removed, and returns its output.
    #[track_caller]
    pub(crate) fn stop(self) -> String {
        self.stop_within(PATIENCE)
    }

    /// Like `stop`, with a time limit for a daemon that must close very many descriptors.
    #[track_caller]
    pub(crate) fn stop_within(mut self, limit: Duration) -> String {
        self.assert_running();
        self.signal(Signal::SIGTERM);
        let ended = wait_up_to(limit, || self.child.try_wait().expect("waitpid works"));
        let status = ended.unwrap_or_else(|| panic!("the daemon did not end within {limit:?}"));
        assert_eq!(status.code(), Some(0), "exit status after SIGTERM: {status}");
        for left in [&self.shm, &self.socket] {
            assert!(!left.exists(), "left behind: {}", left.display());
        }
        self.output()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // If it has ended and was waited for, both calls fail, which is harmless.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.shm);
        if std::thread::panicking() {
            eprintln!("--- output of the daemon ---\n{}--- end ---", self.output());
        }
    }
}

/// Whether a process listens on this socket. It does not connect, because a connection would use up an id, and the
/// reference ends when a connection closes at once.
pub(crate) fn is_listening(socket: &Path) -> bool {
    /// The flag of a listening socket in /proc/net/unix (`__SO_ACCEPTCON`).
    const LISTENING: u32 = 1 << 16;
    let socket = socket.to_str().expect("the path is UTF-8");
    fs::read_to_string("/proc/net/unix")
        .expect("Linux with /proc")
        .lines()
        // Num RefCount Protocol Flags Type St Inode Path
        .filter_map(|line| {
            let mut fields = line.split_ascii_whitespace();
            let flags = u32::from_str_radix(fields.nth(3)?, 16).ok()?;
            Some((flags, fields.nth(3)?))
        })
        .any(|(flags, path)| flags & LISTENING != 0 && path == socket)
}
