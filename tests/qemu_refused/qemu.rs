// SPDX-License-Identifier: GPL-2.0-or-later
//! Stock QEMU that starts with an ivshmem device, or gets one while its guest runs.
//!
//! A hot-plug goes through QMP, QEMU's JSON monitor, because its answer carries the error of `device_add`. This module
//! knows nothing about the server.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::common::{find_in_path, text_of, wait_up_to};

const PROGRAM: &str = "qemu-system-x86_64";

/// The time limit for the start of a QEMU, and for its answer to a command; long enough for a busy machine.
const LIMIT: Duration = Duration::from_secs(30);

/// A QEMU process. It is killed when this value is dropped.
pub(crate) struct Qemu {
    child: Child,
    dir: TempDir,
}

impl Qemu {
    #[track_caller]
    fn spawn(dir: TempDir, arguments: &[String]) -> Self {
        let program = find_in_path(PROGRAM).unwrap_or_else(|| {
            panic!("{PROGRAM} is not installed; on Debian: apt-get install qemu-system-x86")
        });
        let log = File::create(dir.path().join("log")).expect("a file for output");
        let child = Command::new(program)
            .args(["-accel", "tcg", "-machine", "pc", "-m", "16"])
            .args(["-no-user-config", "-nodefaults", "-display", "none"])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("dup works"))
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {PROGRAM}: {error}"));
        Self { child, dir }
    }

    /// Starts a QEMU with an ivshmem device, and does not wait for it.
    #[track_caller]
    pub(crate) fn with_device(socket: &Path) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let chardev = format!("socket,id=c,path={}", socket.display());
        let arguments = ["-chardev", &chardev, "-device", "ivshmem-doorbell,chardev=c"];
        Self::spawn(dir, &arguments.map(String::from))
    }

    /// Returns when its main thread waits in `recvmsg` for the server. QEMU's event loop calls `recvmsg` only for data
    /// that is there; a device that is added calls it to wait.
    #[track_caller]
    pub(crate) fn wait_until_receiving(&self) {
        let path = format!("/proc/{}/syscall", self.child.id());
        let recvmsg = nix::libc::SYS_recvmsg.to_string();
        let receives = || text_of(Path::new(&path)).split(' ').next() == Some(&recvmsg);
        wait_up_to(LIMIT, || receives().then_some(())).expect("QEMU waits for the server");
    }

    fn log(&self) -> String {
        text_of(&self.dir.path().join("log"))
    }

    /// Checks that QEMU ends with status 1 and with an error that contains `message`.
    #[track_caller]
    pub(crate) fn assert_fails_with(mut self, message: &str) {
        let status = wait_up_to(LIMIT, || self.child.try_wait().expect("waitpid works"))
            .unwrap_or_else(|| panic!("QEMU did not end within {LIMIT:?}"));
        assert_eq!(status.code(), Some(1), "{}", self.log());
        assert!(self.log().contains(message), "no {message:?} in {:?}", self.log());
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let ended = self.child.try_wait();
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- a QEMU ({ended:?}) ---\n{}\n--- end ---", self.log());
        }
    }
}

/// A QEMU without an ivshmem device whose guest runs, and its monitor.
pub(crate) struct Running {
    qemu: Qemu,
    monitor: BufReader<UnixStream>,
}

impl Running {
    #[track_caller]
    pub(crate) fn start() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("monitor");
        let listener = UnixListener::bind(&path).expect("a socket for the monitor");
        listener.set_nonblocking(true).expect("fcntl works");
        let monitor = format!("unix:{}", path.display());
        let qemu = Qemu::spawn(dir, &["-qmp", &monitor].map(String::from));
        let connected = wait_up_to(LIMIT, || listener.accept().ok());
        let (stream, _) = connected.expect("QEMU connects its monitor");
        stream.set_nonblocking(false).expect("fcntl works");
        stream.set_read_timeout(Some(LIMIT)).expect("the limit is not zero");
        let mut running = Self { qemu, monitor: BufReader::new(stream) };
        assert!(running.read().get("QMP").is_some(), "QMP begins with a greeting");
        running.execute("qmp_capabilities", json!({})).expect("the first command");
        running
    }

    #[track_caller]
    fn read(&mut self) -> Value {
        let mut line = String::new();
        match self.monitor.read_line(&mut line) {
            Ok(1..) => serde_json::from_str(&line).expect("QMP sends JSON"),
            Ok(0) => panic!("QEMU closed its monitor"),
            Err(error) => panic!("QEMU's monitor does not answer within {LIMIT:?}: {error}"),
        }
    }

    fn send(&mut self, command: &str, arguments: Value) {
        let command = json!({ "execute": command, "arguments": arguments });
        writeln!(self.monitor.get_mut(), "{command}").expect("QEMU reads its monitor");
    }

    /// Returns the result of the command that was sent last, or the text of its error.
    #[track_caller]
    fn answer(&mut self) -> Result<Value, String> {
        loop {
            let mut message = self.read();
            if let Some(error) = message.get("error") {
                return Err(error["desc"].as_str().expect("an error has a text").to_owned());
            }
            if message.get("return").is_some() {
                return Ok(message["return"].take());
            }
            // Every other message is an event.
        }
    }

    #[track_caller]
    fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        self.send(command, arguments);
        self.answer()
    }

    /// Connects to the server and begins to add a device, which waits until the server has sent the memory or an
    /// invalid message. Between the two commands the guest runs on.
    #[track_caller]
    pub(crate) fn plug(&mut self, socket: &Path) {
        self.connect(socket);
        // QEMU's loop runs: a connection that was closed is noticed now.
        self.execute("query-status", json!({})).expect("a status");
        self.begin_device_add();
    }

    #[track_caller]
    fn connect(&mut self, socket: &Path) {
        let address = json!({ "type": "unix", "data": { "path": socket } });
        let backend = json!({ "type": "socket", "data": { "addr": address, "server": false } });
        let chardev = self.execute("chardev-add", json!({ "id": "c", "backend": backend }));
        chardev.expect("the server listens");
    }

    fn begin_device_add(&mut self) {
        self.send("device_add", json!({ "driver": "ivshmem-doorbell", "id": "d", "chardev": "c" }));
    }

    /// As [`plug`](Self::plug), with a server that does not answer yet. Returns when QEMU waits.
    #[track_caller]
    pub(crate) fn begin_plug(&mut self, socket: &Path) {
        self.connect(socket);
        self.begin_device_add();
        self.qemu.wait_until_receiving();
    }

    /// Checks that the device was refused with an error that contains `message`, and that the guest still runs.
    #[track_caller]
    pub(crate) fn assert_plug_fails_with(&mut self, message: &str) {
        let error = self.answer().expect_err("the server refuses this client");
        assert!(error.contains(message), "no {message:?} in {error:?}");
        let status = self.execute("query-status", json!({})).expect("a status");
        assert_eq!(status["status"], "running", "{status}");
        self.execute("chardev-remove", json!({ "id": "c" })).expect("no device uses it");
    }

    /// Checks that the device was added, and that the guest still runs.
    #[track_caller]
    pub(crate) fn assert_plugged(&mut self) {
        self.answer().expect("the server admits this client");
        let status = self.execute("query-status", json!({})).expect("a status");
        assert_eq!(status["status"], "running", "{status}");
    }
}
