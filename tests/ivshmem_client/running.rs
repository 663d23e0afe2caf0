// SPDX-License-Identifier: GPL-2.0-or-later
//! The client program as a process whose input is written and whose output is read while it runs.

#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use crate::common::{wait_for, wait_for_exit};

pub(crate) fn program() -> PathBuf {
    let built = option_env!("CARGO_BIN_EXE_ivshmem-client");
    built.expect("no ivshmem-client was built (feature `programs`)").into()
}

pub(crate) fn client(socket: &Path) -> Command {
    let mut command = Command::new(program());
    command.arg("-S").arg(socket);
    command
}

/// A running client whose output can be read while it runs. It is killed when this value is dropped.
pub(crate) struct Running {
    pub(crate) child: Child,
    output: Arc<Mutex<String>>,
    errors: Arc<Mutex<String>>,
}

impl Running {
    #[track_caller]
    pub(crate) fn start(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let output = follow(child.stdout.take().expect("a pipe"));
        let errors = follow(child.stderr.take().expect("a pipe"));
        Self { child, output, errors }
    }

    pub(crate) fn output(&self) -> String {
        self.output.lock().expect("no panic").clone()
    }

    pub(crate) fn errors(&self) -> String {
        self.errors.lock().expect("no panic").clone()
    }

    #[track_caller]
    pub(crate) fn write_input(&mut self, text: &str) {
        self.child
            .stdin
            .as_mut()
            .expect("a pipe")
            .write_all(text.as_bytes())
            .expect("the client reads its input");
    }

    /// Waits until the output contains `text`.
    #[track_caller]
    pub(crate) fn wait_for_output(&self, text: &str) {
        wait_for(&format!("{text:?} in the output"), || self.output().contains(text).then_some(()));
    }

    /// Closes stdin, waits until the client ends, and returns its exit status.
    #[track_caller]
    pub(crate) fn end(&mut self) -> i32 {
        drop(self.child.stdin.take());
        wait_for_exit(&mut self.child, "the client").code().expect("no signal ended it")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("--- output ---\n{}\n--- errors ---\n{}", self.output(), self.errors());
        }
    }
}

/// Collects the data from a pipe in a thread.
fn follow(mut pipe: impl Read + Send + 'static) -> Arc<Mutex<String>> {
    let text = Arc::new(Mutex::new(String::new()));
    let collected = Arc::clone(&text);
    thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = pipe.read(&mut bytes) {
            let part = String::from_utf8_lossy(&bytes[..count]);
            collected.lock().expect("no panic").push_str(&part);
        }
    });
    text
}

/// Runs a client to its end with `input` on its stdin. Returns the exit status, stdout and stderr.
#[track_caller]
pub(crate) fn run(command: &mut Command, input: &str) -> (i32, String, String) {
    let mut running = Running::start(command);
    running.write_input(input);
    let status = running.end();
    // The last output may still be in the pipe.
    wait_for("the end of its output", || {
        (Arc::strong_count(&running.output) == 1 && Arc::strong_count(&running.errors) == 1)
            .then_some(())
    });
    (status, running.output(), running.errors())
}
