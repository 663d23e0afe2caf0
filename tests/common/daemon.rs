// SPDX-License-Identifier: GPL-2.0-or-later
//! The server program under test: started in a directory of its own, watched from outside, stopped cleanly.
//!
//! Only the command line that the reference has too is used, so any program that claims to replace it can be put here
//! by `IVSHMEM_SERVER_BIN`.

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
use super::{PATIENCE, is_asleep, text_of, wait_for, wait_for_exit, wait_up_to};

/// The program that the tests judge.
pub(crate) fn program() -> PathBuf {
    std::env::var_os("IVSHMEM_SERVER_BIN")
        .or_else(|| option_env!("CARGO_BIN_EXE_ivshmem-server").map(OsString::from))
        .expect(
            "no ivshmem-server was built (feature `programs`), and IVSHMEM_SERVER_BIN is not set",
        )
        .into()
}

/// What a daemon is to be started with; see [`Daemon::builder`].
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
    /// Another program with the same command line in place of [`program`].
    pub(crate) fn program(mut self, program: PathBuf) -> Self {
        self.program = program;
        self
    }

    /// Starts it by this command, which must replace itself by what follows, as `prlimit` and `setpriv` do.
    pub(crate) fn under(mut self, command: &[&str]) -> Self {
        self.under.extend(command.iter().map(|&word| word.to_owned()));
        self
    }

    /// With this limit of open files, which it cannot raise unless it is root.
    pub(crate) fn descriptors(self, limit: u64) -> Self {
        self.under(&["prlimit", &format!("--nofile={limit}:{limit}")])
    }

    /// As a user without any privilege, and of nobody else: the kernel counts descriptors in flight by user. Only root
    /// can ask for that.
    pub(crate) fn unprivileged(self) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let user = 1_000_000 + std::process::id() * 64 + NEXT.fetch_add(1, Ordering::Relaxed) % 64;
        std::os::unix::fs::chown(self.dir.path(), Some(user), Some(user)).expect("we are root");
        let words = [format!("--reuid={user}"), format!("--regid={user}")];
        self.under(&["setpriv", &words[0], &words[1], "--clear-groups"])
    }

    /// Interrupt vectors per peer (1 unless told).
    pub(crate) fn vectors(mut self, vectors: u16) -> Self {
        self.vectors = vectors;
        self
    }

    /// Size of the shared memory as `-l` takes it ("1M" unless told).
    pub(crate) fn size(mut self, size: &str) -> Self {
        size.clone_into(&mut self.size);
        self
    }

    /// A POSIX shared memory of this name instead of a unique one.
    pub(crate) fn memory_name(mut self, name: &str) -> Self {
        name.clone_into(&mut self.memory_name);
        self
    }

    /// A file in this directory instead of POSIX shared memory.
    pub(crate) fn memory_dir(mut self, dir: &Path) -> Self {
        self.memory_dir = Some(dir.to_owned());
        self
    }

    /// One more argument, after all others.
    pub(crate) fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.extra.push(arg.as_ref().to_owned());
        self
    }

    /// Starts the program and waits until it listens.
    #[track_caller]
    pub(crate) fn start(self) -> Daemon {
        // A test and its clients share one process; a shell's usual limit of 1,024 is too few for some.
        assert!(allow_most_descriptors(), "a soft limit can be raised to the hard one");
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
        daemon.idle_fds = daemon.open_fds();
        daemon
    }
}

/// A running daemon. Dropped, it is killed, and its shared memory removed.
pub(crate) struct Daemon {
    dir: TempDir,
    child: Child,
    socket: PathBuf,
    shm: PathBuf,
    idle_fds: usize,
}

impl Daemon {
    /// The usual: foreground, verbose, unique names, one vector, one megabyte.
    pub(crate) fn builder() -> Builder {
        let dir = tempfile::Builder::new()
            .prefix("ivshmem-test-")
            .tempdir()
            .expect("a temporary directory");
        // The directory's name is unique on this host, so it serves as the memory's too.
        let memory_name = dir.path().file_name().expect("it has a name");
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

    /// Where it listens.
    pub(crate) fn socket_path(&self) -> &Path {
        &self.socket
    }

    /// The file of its POSIX shared memory (not there if it uses a directory).
    pub(crate) fn shm_path(&self) -> &Path {
        &self.shm
    }

    /// All it printed so far, standard output before standard error. A program that buffers (the reference does)
    /// may show its lines only when it has ended.
    pub(crate) fn output(&self) -> String {
        let mut text = text_of(&self.dir.path().join("stdout"));
        text.push_str(&text_of(&self.dir.path().join("stderr")));
        text
    }

    /// Panics, with its output, if it has ended.
    #[track_caller]
    pub(crate) fn assert_running(&mut self) {
        if let Some(status) = self.child.try_wait().expect("waitpid works") {
            panic!("the daemon ended: {status}");
        }
    }

    /// The processor time that it used so far, to 10 ms.
    pub(crate) fn cpu_time(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid())).expect("it runs");
        // The program's name, in parentheses, may hold anything; utime and stime are fields 14 and 15, in units of
        // USER_HZ, which is 100 in Linux's ABI whatever the kernel's own tick is.
        let (_, fields) = stat.rsplit_once(')').expect("the name has its parentheses");
        let ticks: u64 = fields
            .split_ascii_whitespace()
            .skip(11)
            .take(2)
            .map(|field| field.parse::<u64>().expect("a number"))
            .sum();
        Duration::from_millis(10 * ticks)
    }

    /// The time for which it ran on a processor so far, to the nanosecond. The kernel brings it up to date when it
    /// begins to wait; of one that does not, the time is up to 10 ms old.
    pub(crate) fn run_time(&self) -> Duration {
        let _ = wait_up_to(Duration::from_millis(20), || is_asleep(self.pid()).then_some(()));
        let stat = fs::read_to_string(format!("/proc/{}/schedstat", self.pid())).expect("it runs");
        let first = stat.split_ascii_whitespace().next().expect("schedstat has three fields");
        Duration::from_nanos(first.parse().expect("a number"))
    }

    /// The memory that it has in use, in KiB.
    pub(crate) fn resident_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
        line.trim().trim_end_matches("kB").trim().parse().expect("a number")
    }

    /// How many descriptors it has open.
    pub(crate) fn open_fds(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid())).expect("it runs").count()
    }

    /// How many it had before its first client: its own, and what it inherited.
    pub(crate) fn idle_fds(&self) -> usize {
        self.idle_fds
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).expect("it is our child");
    }

    /// Waits for its end.
    #[track_caller]
    pub(crate) fn wait(&mut self) -> ExitStatus {
        wait_for_exit(&mut self.child, "the daemon")
    }

    /// Stops it by SIGTERM, checks that it left nothing behind, and returns what it had printed.
    #[track_caller]
    pub(crate) fn stop(self) -> String {
        self.stop_within(PATIENCE)
    }

    /// The same for one with so much to close that it takes longer than a moment.
    #[track_caller]
    pub(crate) fn stop_within(mut self, limit: Duration) -> String {
        self.assert_running();
        self.signal(Signal::SIGTERM);
        let ended = wait_up_to(limit, || self.child.try_wait().expect("waitpid works"));
        let status = ended.unwrap_or_else(|| panic!("not within {limit:?}: the end of the daemon"));
        assert_eq!(status.code(), Some(0), "exit status after SIGTERM: {status}");
        for left in [&self.shm, &self.socket] {
            assert!(!left.exists(), "left behind: {}", left.display());
        }
        self.output()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended and been waited for: then both fail, and nothing is lost.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.shm);
        if std::thread::panicking() {
            eprintln!("--- output of the daemon ---\n{}--- end ---", self.output());
        }
    }
}

/// Whether someone listens on this socket, found without connecting: a connection would use up an id, and one that is
/// closed at once is the end of the reference.
pub(crate) fn is_listening(socket: &Path) -> bool {
    /// The flag of a listening socket in /proc/net/unix (`__SO_ACCEPTCON`).
    const LISTENING: u32 = 1 << 16;
    let socket = socket.to_str().expect("a path that we named");
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
