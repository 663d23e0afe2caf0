// SPDX-License-Identifier: GPL-2.0-or-later
//! Going to the background.
//!
//! The parent's end of the child's stdout is how the child says that it is ready; end of file
//! before that means that it failed, and its exit code says how. What the child prints before
//! is passed on.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::process::{Command, ExitCode, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, dup2_stderr, dup2_stdout, setsid};

use crate::Failure;

/// No path has it, so no text does.
const READY: u8 = 0;

/// Starts the background process, and waits until it serves or has failed.
pub(crate) fn launch() -> Result<ExitCode, Failure> {
    let program = std::env::current_exe()
        .map_err(|error| format!("cannot find this program to start it detached: {error}"))?;
    let mut child = Command::new(&program)
        // First, as a `--` may end the options.
        .arg("--detached")
        .args(std::env::args_os().skip(1))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("cannot start {program:?} detached: {error}"))?;
    let mut text = Vec::new();
    let pipe = child.stdout.take().expect("it was asked for");
    if let Err(error) = BufReader::new(pipe).read_until(READY, &mut text) {
        // It may serve well, and never end; but nobody would know of it.
        let _ = kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM);
        child.wait()?;
        return Err(format!("cannot hear from the background process: {error}").into());
    }
    let ready = text.last() == Some(&READY);
    if ready {
        text.pop();
    }
    // A reader that has gone is no reason to fail.
    let _ = io::stdout().write_all(&text);
    if ready {
        return Ok(ExitCode::SUCCESS);
    }
    let status = child.wait()?;
    Ok(ExitCode::from(status.code().and_then(|code| code.try_into().ok()).unwrap_or(1)))
}

/// In the background process: leaves the caller's session, lets the caller return, and releases the output.
///
/// What can fail comes first: once the caller has been told that all is well, it is.
pub(crate) fn ready() -> Result<(), Failure> {
    setsid().map_err(|errno| format!("cannot leave the session: {}", io::Error::from(errno)))?;
    let released = ReleasedOutput::prepare()?;
    // Past the buffer of `stdout`, which would say it at the exit, after an error.
    let caller = io::stdout().as_fd().try_clone_to_owned().map(File::from);
    caller
        .and_then(|mut caller| caller.write_all(&[READY]))
        .map_err(|error| format!("cannot say on stdout that all is ready: {error}"))?;
    released.release();
    Ok(())
}

/// Replaces stdout and stderr by /dev/null, so that nobody waits for the end of them. A stderr that goes to a file stays.
pub(crate) fn release_output() -> Result<(), Failure> {
    // What is in the buffer of `stdout` is for the caller. A reader that has gone is no reason to fail.
    let _ = io::stdout().flush();
    ReleasedOutput::prepare()?.release();
    Ok(())
}

/// Everything about it that can fail is done.
struct ReleasedOutput {
    null: File,
    stderr_too: bool,
}

impl ReleasedOutput {
    fn prepare() -> Result<Self, Failure> {
        let null = File::options().read(true).write(true).open("/dev/null");
        let null = null.map_err(|error| format!("cannot open \"/dev/null\": {error}"))?;
        let stderr = io::stderr().as_fd().try_clone_to_owned().map(File::from);
        let kind = stderr
            .and_then(|stderr| stderr.metadata())
            .map_err(|error| format!("cannot look at stderr: {error}"))?
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
            log::warn!("cannot release the caller's output: {}", io::Error::from(errno));
        }
    }
}
