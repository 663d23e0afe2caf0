// SPDX-License-Identifier: GPL-2.0-or-later
//! The servers that a test can run on. Each server must behave the same, so a test is written once, as a function of a
//! [`Target`], and [`on_each_server!`](crate::on_each_server) runs it on each of them.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use nix::sys::resource::{Resource, getrlimit};

use super::daemon::{Builder, Daemon, program};
use super::skip::skip;

#[path = "../c/mod.rs"]
pub(crate) mod c;

/// A server program with the command line of `ivshmem-server`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// The program of this project, or the one that `IVSHMEM_SERVER_BIN` names.
    Daemon,
    /// `c-tests/servers/select_loop.c`: the C API under an unchanged `select` loop.
    SelectLoop,
}

impl Target {
    /// A builder for this server, in its own directory.
    pub(crate) fn builder(self) -> Builder {
        Daemon::builder().program(self.program())
    }

    /// The path of the program.
    pub(crate) fn program(self) -> PathBuf {
        match self {
            Self::Daemon => program(),
            Self::SelectLoop => select_loop(),
        }
    }

    /// Whether the program prints the library's log. The C program does not.
    pub(crate) fn logs(self) -> bool {
        matches!(self, Self::Daemon)
    }

    /// The descriptors that this server has for its control socket.
    pub(crate) fn control_fds(self) -> u64 {
        match self {
            Self::Daemon => 5,
            Self::SelectLoop => 0,
        }
    }

    /// The names that this server makes for a socket of this name.
    pub(crate) fn names_of(self, socket: &str) -> Vec<String> {
        match self {
            Self::Daemon => vec![socket.to_owned(), format!("{socket}.control")],
            Self::SelectLoop => vec![socket.to_owned()],
        }
    }

    /// The largest number of vectors per peer that this server supports.
    pub(crate) fn max_vectors(self) -> u16 {
        match self {
            Self::Daemon => 2048,
            Self::SelectLoop => 64,
        }
    }
}

/// The path of the select loop's program. The first call builds it in cargo's directory for temporary test files. If
/// there is no compiler, `IVSHMEM_SELECT_LOOP_BIN` names a program that was built elsewhere.
fn select_loop() -> PathBuf {
    static PROGRAM: LazyLock<PathBuf> = LazyLock::new(|| {
        if let Some(program) = std::env::var_os("IVSHMEM_SELECT_LOOP_BIN") {
            return program.into();
        }
        let test = std::env::current_exe().expect("the path of the test program");
        let name = test.file_name().expect("the path has a file name");
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::create_dir_all(&directory).expect("the directory can be created");
        // A running program's file cannot be overwritten, but it can be removed.
        let _ = std::fs::remove_file(directory.join("program"));
        c::build("c-tests/servers/select_loop.c", c::Mode::Static, &directory)
    });
    PROGRAM.clone()
}

/// Makes one test per server from each of these functions, which take a `Target`.
#[macro_export]
macro_rules! on_each_server {
    ($($test:ident),+ $(,)?) => {
        mod daemon {
            $(
                #[test]
                fn $test() {
                    super::$test($crate::common::target::Target::Daemon);
                }
            )+
        }

        mod select_loop {
            $(
                #[test]
                fn $test() {
                    super::$test($crate::common::target::Target::SelectLoop);
                }
            )+
        }
    };
}

/// Whether the test runs its full size, which may take minutes. Otherwise prints that the test runs its short
/// form; this is not a skip.
pub(crate) fn full_size(test: &str) -> bool {
    let full = std::env::var_os("IVSHMEM_FULL").is_some_and(|value| value == "1");
    if !full {
        eprintln!("{test}: the short form; IVSHMEM_FULL=1 runs the full size");
    }
    full
}

/// The number of descriptors that a server or a test needs besides those of the clients.
const OWN: u64 = 60;

/// How many clients more than it admits a server of this limit must have descriptors for: it reserves the
/// descriptors of some for other users.
fn reserved(limit: u64, each: u64) -> u64 {
    match limit / 64 / each {
        0..4 => 0,
        clients => clients.min(16) + 1,
    }
}

/// Returns how many clients with `vectors` vectors the limit of open files allows, at most `wanted`, and the limit that
/// their server needs. If it allows fewer than `least`, the test is skipped.
pub(crate) fn room_for(
    what: &str,
    least: usize,
    wanted: usize,
    vectors: u16,
) -> Option<(usize, u64)> {
    let each = u64::from(vectors) + 1;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("getrlimit works");
    let own = OWN + reserved(hard, each) * each;
    let clients = (hard.saturating_sub(own) / each).min(wanted as u64);
    if clients < least as u64 {
        skip(&format!(
            "{what}: the hard limit of open files must be {}",
            least as u64 * each + own
        ));
        return None;
    }
    if clients < wanted as u64 {
        eprintln!("{what}: {clients} clients, as the hard limit of open files is {hard}");
    }
    Some((clients as usize, clients * each + own))
}

/// Whether this process is root. If it is not, the test is recorded as skipped.
pub(crate) fn is_root(what_for: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        skip(&format!("only root can {what_for}"));
    }
    root
}
