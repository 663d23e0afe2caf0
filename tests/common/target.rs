// SPDX-License-Identifier: GPL-2.0-or-later
//! Which server a test is about. The promises are the same through every door of the library, so a test is written
//! once, as a function of a [`Target`], and [`on_each_server!`](crate::on_each_server) runs it on all of them.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use nix::sys::resource::{Resource, getrlimit};

use super::daemon::{Builder, Daemon, program};
use super::skip::skip;

#[path = "../c/mod.rs"]
mod c;

/// A program that serves, by the command line of `ivshmem-server`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// The program of this project, or the one that `IVSHMEM_SERVER_BIN` names.
    Daemon,
    /// `c-tests/servers/select_loop.c`: the C API under an unchanged `select` loop.
    SelectLoop,
}

impl Target {
    /// Sets out to start one, on a directory of its own.
    pub(crate) fn builder(self) -> Builder {
        Daemon::builder().program(self.program())
    }

    /// The program itself.
    pub(crate) fn program(self) -> PathBuf {
        match self {
            Self::Daemon => program(),
            Self::SelectLoop => select_loop(),
        }
    }

    /// Whether it prints what the library logs: in C there is nobody to take it.
    pub(crate) fn logs(self) -> bool {
        matches!(self, Self::Daemon)
    }

    /// The most vectors that a peer can have there.
    pub(crate) fn max_vectors(self) -> u16 {
        match self {
            Self::Daemon => 2048,
            Self::SelectLoop => 64,
        }
    }
}

/// The select loop's program, built when the first test asks for it. It lies where cargo lets tests keep things.
/// Where there is no compiler, `IVSHMEM_SELECT_LOOP_BIN` names one that was built elsewhere.
fn select_loop() -> PathBuf {
    static PROGRAM: LazyLock<PathBuf> = LazyLock::new(|| {
        if let Some(program) = std::env::var_os("IVSHMEM_SELECT_LOOP_BIN") {
            return program.into();
        }
        let test = std::env::current_exe().expect("a test knows its own file");
        let name = test.file_name().expect("it is a file");
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::create_dir_all(&directory).expect("cargo made the directory above");
        // A binary that still runs cannot be written to, but it can be removed.
        let _ = std::fs::remove_file(directory.join("program"));
        c::build("c-tests/servers/select_loop.c", c::Mode::Static, &directory)
    });
    PROGRAM.clone()
}

/// Makes a test for each server of each of these functions, which take a `Target`.
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

/// Whether the sizes that the promises name are to be run where that takes minutes; said aloud, as it is no skip.
pub(crate) fn full_size(test: &str) -> bool {
    let full = std::env::var_os("IVSHMEM_FULL").is_some_and(|value| value == "1");
    if !full {
        eprintln!("{test}: the short form; IVSHMEM_FULL=1 runs the full size");
    }
    full
}

/// Descriptors that are not a client's, of a server or of a test.
const OWN: u64 = 60;

/// How many clients of so many vectors the limit of open files has room for, `wanted` at most, and the limit that their
/// server then needs. Where not even `least` fit, the test is skipped.
pub(crate) fn room_for(
    what: &str,
    least: usize,
    wanted: usize,
    vectors: u16,
) -> Option<(usize, u64)> {
    let each = u64::from(vectors) + 1;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("getrlimit works");
    let clients = (hard.saturating_sub(OWN) / each).min(wanted as u64);
    if clients < least as u64 {
        skip(&format!(
            "{what}: the hard limit of open files must be {}",
            least as u64 * each + OWN
        ));
        return None;
    }
    if clients < wanted as u64 {
        eprintln!("{what}: {clients} clients, as the hard limit of open files is {hard}");
    }
    Some((clients as usize, clients * each + OWN))
}

/// Whether this process may do what only root can; if not, the test is recorded as skipped.
pub(crate) fn is_root(what_for: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        skip(&format!("only root can {what_for}"));
    }
    root
}
