// SPDX-License-Identifier: GPL-2.0-or-later
//! `--ready-fd`: readiness for a caller that is no systemd. When the server listens, one line is written to an inherited
//! descriptor, and the descriptor is closed. A start that fails closes it without a line.
//!
//! It is taken before this process opens anything: the number could else be that of a descriptor of its own.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::Failure;
use crate::args::{self, Args};
use crate::supervise::take_descriptor;

/// What the line says; sd_notify(3) has the same.
const LINE: &[u8] = b"READY=1\n";

/// The caller's descriptor.
#[derive(Debug)]
pub(crate) struct ReadyFd {
    file: File,
    number: i32,
}

impl ReadyFd {
    /// Takes the descriptor that the command line names. `None` if it names none, or if it is the supervisor that has
    /// it.
    pub(crate) fn take(args: &Args) -> Result<Option<Self>, Failure> {
        let Some(number) = args.ready_fd.filter(|_| !args::is_child_of_supervisor()) else {
            return Ok(None);
        };
        let refused = |why: &str| Err(format!("--ready-fd {number}: {why}").into());
        if inherited().contains(&i64::from(number)) {
            return refused("this descriptor is one that LISTEN_FDS counts; use another number");
        }
        let Some(fd) = take_descriptor(number) else {
            return refused(&format!(
                "the descriptor is not open; the caller must open it, such as by {number}>FILE in a shell"
            ));
        };
        let flags = fcntl(&fd, FcntlArg::F_GETFL)
            .map_err(|errno| format!("--ready-fd {number}: {}", errno.desc()))?;
        if OFlag::from_bits_retain(flags) & OFlag::O_ACCMODE == OFlag::O_RDONLY {
            return refused("the descriptor is not open for writing");
        }
        Ok(Some(Self { file: fd.into(), number }))
    }

    /// The server listens. A caller that has closed its end, or does not read, does not stop the server.
    pub(crate) fn tell(mut self) {
        // The pipe may be full. Its flags belong to the caller, so it is asked before.
        let mut fds = [PollFd::new(self.file.as_fd(), PollFlags::POLLOUT)];
        let result = match poll(&mut fds, PollTimeout::ZERO) {
            Ok(0) => Err(io::ErrorKind::WouldBlock.into()),
            Ok(_) => self.file.write_all(LINE),
            Err(errno) => Err(errno.into()),
        };
        if let Err(error) = result {
            log::warn!("cannot write to the descriptor {} (--ready-fd): {error}", self.number);
        }
    }
}

/// The numbers of the descriptors that a service manager gave to this process (sd_listen_fds(3)).
fn inherited() -> std::ops::Range<i64> {
    let number = |name| std::env::var(name).ok()?.parse::<i64>().ok();
    let is_own = number("LISTEN_PID") == Some(i64::from(std::process::id()));
    let count = number("LISTEN_FDS").filter(|_| is_own).unwrap_or(0);
    3..3_i64.saturating_add(count)
}
