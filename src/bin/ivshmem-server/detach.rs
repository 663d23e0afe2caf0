// SPDX-License-Identifier: GPL-2.0-or-later
//! Going to the background.
//!
//! The parent's end of the child's stdout is how the child says that it is ready; end of file
//! before that means that it failed, and its exit code says how.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::process::{Command, ExitCode, Stdio};

use nix::unistd::{dup2_stderr, dup2_stdout, setsid};

use crate::Failure;

const READY: u8 = b'+';

/// Starts the background process, and waits until it serves or has failed.
pub(crate) fn launch() -> Result<ExitCode, Failure> {
    let program = std::env::current_exe()
        .map_err(|error| format!("cannot find this program to start it detached: {error}"))?;
    let mut child = Command::new(&program)
        .args(std::env::args_os().skip(1))
        .arg("--detached")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("cannot start {program:?} detached: {error}"))?;
    let mut byte = [0];
    let mut pipe = child.stdout.take().expect("it was asked for");
    match pipe.read_exact(&mut byte) {
        Ok(()) if byte[0] == READY => Ok(ExitCode::SUCCESS),
        _ => {
            let status = child.wait()?;
            Ok(ExitCode::from(status.code().and_then(|code| code.try_into().ok()).unwrap_or(1)))
        }
    }
}

/// In the background process: leaves the caller's session, lets the caller return, and lets
/// go of what it has open, so that nobody waits for the end of it. A stderr that goes to a
/// file stays.
pub(crate) fn ready() -> Result<(), Failure> {
    setsid().map_err(|errno| format!("cannot leave the session: {}", io::Error::from(errno)))?;
    let null = File::options().read(true).write(true).open("/dev/null");
    let null = null.map_err(|error| format!("cannot open \"/dev/null\": {error}"))?;
    io::stdout().write_all(&[READY])?;
    io::stdout().flush()?;
    dup2_stdout(&null)?;
    let kind = File::from(std::os::fd::AsFd::as_fd(&io::stderr()).try_clone_to_owned()?);
    let kind = kind.metadata()?.file_type();
    if kind.is_fifo() || kind.is_socket() || kind.is_char_device() {
        dup2_stderr(&null)?;
    }
    Ok(())
}
