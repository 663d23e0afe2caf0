// SPDX-License-Identifier: GPL-2.0-or-later
//! A Varlink client for tests: it can also send what is no call, and not read.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::common::{PATIENCE, wait_for};

/// The control socket of a server with this socket.
pub(crate) fn control_of(socket: &Path) -> PathBuf {
    let mut path = socket.as_os_str().to_owned();
    path.push(".control");
    path.into()
}

pub(crate) struct Caller {
    pub(crate) stream: UnixStream,
    input: Vec<u8>,
}

impl Caller {
    /// Connects to the control socket of the server with this socket.
    #[track_caller]
    pub(crate) fn of(socket: &Path) -> Self {
        Self::at(&control_of(socket))
    }

    #[track_caller]
    pub(crate) fn at(control: &Path) -> Self {
        Self::new(UnixStream::connect(control).expect("there is a control socket"))
    }

    /// `None` if the control socket does not listen.
    pub(crate) fn try_of(socket: &Path) -> Option<Self> {
        UnixStream::connect(control_of(socket)).ok().map(Self::new)
    }

    fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).expect("not zero");
        Self { stream, input: Vec::new() }
    }

    pub(crate) fn send(&mut self, call: &Value) {
        let mut bytes = call.to_string().into_bytes();
        bytes.push(0);
        self.stream.write_all(&bytes).expect("the server reads");
    }

    /// The next message; `None` at the end of the stream.
    #[track_caller]
    pub(crate) fn receive(&mut self) -> Option<Value> {
        loop {
            if let Some(end) = self.input.iter().position(|&byte| byte == 0) {
                let message = serde_json::from_slice(&self.input[..end]).expect("it is JSON");
                self.input.drain(..=end);
                return Some(message);
            }
            let mut part = [0; 64 << 10];
            match self.stream.read(&mut part) {
                Ok(0) => return None,
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return None,
                read => self.input.extend_from_slice(&part[..read.expect("an answer in time")]),
            }
        }
    }

    /// The whole reply to a call of the server's interface.
    #[track_caller]
    pub(crate) fn ask(&mut self, method: &str, parameters: Value) -> Value {
        let method = format!("org.ivshmem.Server.{method}");
        self.send(&json!({"method": method, "parameters": parameters}));
        self.receive().expect("a reply")
    }

    #[track_caller]
    pub(crate) fn status(&mut self) -> Value {
        let mut reply = self.ask("Status", json!({}));
        assert_eq!(reply.get("error"), None, "{reply}");
        reply["parameters"].take()
    }

    /// Begins to watch. From its return on no event is missing.
    #[track_caller]
    pub(crate) fn watch(&mut self) {
        self.send(&json!({"method": "org.ivshmem.Server.Watch", "more": true}));
        assert_eq!(self.event()["kind"], "ready");
    }

    /// The next event.
    #[track_caller]
    pub(crate) fn event(&mut self) -> Value {
        let mut message = self.receive().expect("an event");
        assert_eq!(message["continues"], true, "{message}");
        message["parameters"]["event"].take()
    }
}

/// The status of the server with this socket.
#[track_caller]
pub(crate) fn status(socket: &Path) -> Value {
    Caller::of(socket).status()
}

/// Waits until the status is as `is_right` says, and returns it.
#[track_caller]
pub(crate) fn wait_for_status(
    socket: &Path,
    what: &str,
    is_right: impl Fn(&Value) -> bool,
) -> Value {
    wait_for(what, || Some(status(socket)).filter(|status| is_right(status)))
}
