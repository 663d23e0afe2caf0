// SPDX-License-Identifier: GPL-2.0-or-later
//! Runs the server in the background.
//!
//! The parent reads the child's stdout from a pipe and passes the text on. A zero byte means that
//! the child is ready. The end of the file before it means that the child failed; the parent then
//! exits with the child's exit status.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::process::{Command, ExitCode, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, dup2_stderr, dup2_stdout, setsid};

use crate::Failure;

/// No path contains this byte, so no other output does.
const READY: u8 = 0;

/// Starts the background process and waits until it serves or has failed.
pub(crate) fn launch() -> Result<ExitCode, Failure> {
    let program = std::env::current_exe()
        .map_err(|error| format!("cannot find this program to start it detached: {error}"))?;
    let mut child = Command::new(&program)
        // This option comes first, because the arguments may contain `--`.
        .arg("--detached")
        .args(std::env::args_os().skip(1))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("cannot start {program:?} detached: {error}"))?;
    let mut text = Vec::new();
    let pipe = child.stdout.take().expect("stdout is piped");
    if let Err(error) = BufReader::new(pipe).read_until(READY, &mut text) {
        // The child may be serving, but the caller gets an error: so the child must end.
        let _ = kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM);
        child.wait()?;
        return Err(format!("cannot read from the background process: {error}").into());
    }
    let ready = text.last() == Some(&READY);
    if ready {
        text.pop();
    }
    // If the reader has closed the pipe, the daemon still runs.
    let _ = io::stdout().write_all(&text);
    if ready {
        return Ok(ExitCode::SUCCESS);
    }
    let status = child.wait()?;
    Ok(ExitCode::from(status.code().and_then(|code| code.try_into().ok()).unwrap_or(1)))
}

/// In the background process: leaves the caller's session. The sandbox does not allow it later.
pub(crate) fn leave_session() -> Result<(), Failure> {
    setsid().map_err(|errno| format!("cannot leave the session: {}", io::Error::from(errno)))?;
    Ok(())
}

/// In the background process: tells the parent that the server is ready, and closes the caller's
/// stdout and stderr, so that no reader waits for their end. A stderr that is a file stays open.
///
/// The steps that can fail come before the parent is told.
pub(crate) fn ready(released: ReleasedOutput) -> Result<(), Failure> {
    // Not through the buffer of `stdout`: after an error, the buffer would write the byte at exit.
    let caller = io::stdout().as_fd().try_clone_to_owned().map(File::from);
    caller.and_then(|mut caller| caller.write_all(&[READY])).map_err(|error| {
        format!("cannot tell the parent process that the server is ready: {error}")
    })?;
    released.release();
    Ok(())
}

/// Replaces stdout and stderr by /dev/null, so that no reader waits for their end. A stderr that is a file stays open.
pub(crate) fn release_output(released: ReleasedOutput) {
    // The buffer of `stdout` is for the caller. A reader that has gone is no error.
    let _ = io::stdout().flush();
    released.release();
}

/// The caller's output, about to be closed. What can fail is done.
pub(crate) struct ReleasedOutput {
    null: File,
    stderr_too: bool,
}

impl ReleasedOutput {
    pub(crate) fn prepare() -> Result<Self, Failure> {
        let null = File::options().read(true).write(true).open("/dev/null");
        let null = null.map_err(|error| format!("cannot open \"/dev/null\": {error}"))?;
        let stderr = io::stderr().as_fd().try_clone_to_owned().map(File::from);
        let kind = stderr
            .and_then(|stderr| stderr.metadata())
            .map_err(|error| format!("cannot find what stderr is: {error}"))?
            .file_type();
        let stderr_too = kind.is_fifo() || kind.is_socket() || kind.is_char_device();
        Ok(Self { null, stderr_too })
    }

    fn release(self) {
        let mut closed = dup2_stdout(&self.null);
        if self.stderr_too {
            closed = closed.and(dup2_stderr(&self.null));
        }
        if let Err(errno) = closed {
            log::warn!("cannot close the caller's output: {}", io::Error::from(errno));
        }
    }
}
