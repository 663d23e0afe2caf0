// SPDX-License-Identifier: GPL-2.0-or-later
//! Which server a test is about. The promises are the same through every door of the library, so a test is written
//! once, as a function of a [`Target`], and [`on_each_server!`](crate::on_each_server) runs it on all of them.

#![forbid(unsafe_code)]

use super::daemon::{Builder, Daemon};

/// A program that serves, by the command line of `ivshmem-server`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target {
    /// The program of this project, or the one that `IVSHMEM_SERVER_BIN` names.
    Daemon,
}

impl Target {
    /// Sets out to start one, on a directory of its own.
    pub(crate) fn builder(self) -> Builder {
        match self {
            Self::Daemon => Daemon::builder(),
        }
    }
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

/// Whether this process may do what only root can; if not, the test is recorded as skipped.
pub(crate) fn is_root(what_for: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        super::skip::skip(&format!("only root can {what_for}"));
    }
    root
}
