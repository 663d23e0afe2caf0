// SPDX-License-Identifier: GPL-2.0-or-later
//! A blocking client of a control socket. It knows Varlink, and which errors the server has.

#![forbid(unsafe_code)]

use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use serde_json::{Value, json};

/// How long a server may take to accept a connection, to take a call, and to send a part of its
/// reply.
const PATIENCE: Duration = Duration::from_secs(10);

/// A reply has as many bytes, at most: some 300 for each of 65,536 peers, and room.
const MAX_REPLY: usize = 64 << 20;

/// Why a command failed, as a sentence.
#[derive(Debug)]
pub(crate) struct Failure(String);

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<T: Into<String>> From<T> for Failure {
    fn from(text: T) -> Self {
        Self(text.into())
    }
}

pub(crate) struct Client {
    stream: UnixStream,
    /// The path, for errors.
    name: String,
    input: Vec<u8>,
    /// The first bytes of `input`, which have no end of a message: a long one comes in many parts.
    searched: usize,
}

impl Client {
    pub(crate) fn connect(path: &Path) -> Result<Self, Failure> {
        let name = format!("{path:?}");
        let failed = |errno: Errno| {
            let reason = match errno {
                Errno::ENOENT => "there is no such socket; is the server running, without \
                                  --no-control?"
                    .to_owned(),
                Errno::ECONNREFUSED => "no server listens there; it was killed".to_owned(),
                Errno::EACCES => {
                    "permission denied; root and the server's user may use it".to_owned()
                }
                Errno::EAGAIN => format!("the server accepts no connection for {PATIENCE:?}"),
                _ => errno.desc().to_owned(),
            };
            Failure(format!("cannot connect to the control socket {name}: {reason}"))
        };
        let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
            .map_err(failed)?;
        let limit = TimeVal::seconds(PATIENCE.as_secs() as i64);
        setsockopt(&fd, sockopt::SendTimeout, &limit).map_err(failed)?;
        setsockopt(&fd, sockopt::ReceiveTimeout, &limit).map_err(failed)?;
        let address = UnixAddr::new(path).map_err(failed)?;
        connect(fd.as_raw_fd(), &address).map_err(failed)?;
        Ok(Self { stream: fd.into(), name, input: Vec::new(), searched: 0 })
    }

    /// Calls a method of the server's interface, and returns the parameters of the reply.
    pub(crate) fn call(&mut self, method: &str, parameters: Value) -> Result<Value, Failure> {
        self.send(method, parameters, false)?;
        self.receive()
    }

    /// Calls a method that gives several replies.
    pub(crate) fn call_more(&mut self, method: &str) -> Result<(), Failure> {
        self.send(method, json!({}), true)
    }

    fn send(&mut self, method: &str, parameters: Value, more: bool) -> Result<(), Failure> {
        let method = format!("org.ivshmem.Server.{method}");
        let mut call = json!({"method": method, "parameters": parameters});
        if more {
            call["more"] = true.into();
        }
        let mut bytes = call.to_string().into_bytes();
        bytes.push(0);
        // If the server has refused the connection, its reply says why.
        match self.stream.write_all(&bytes) {
            Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(self.failed(&error)),
            _ => Ok(()),
        }
    }

    fn failed(&self, error: &std::io::Error) -> Failure {
        match error.kind() {
            ErrorKind::WouldBlock => {
                format!("the server at {} does not answer for {PATIENCE:?}", self.name)
            }
            _ => format!("the connection to {} failed: {error}", self.name),
        }
        .into()
    }

    /// The next reply.
    fn receive(&mut self) -> Result<Value, Failure> {
        loop {
            if let Some(reply) = self.next_reply()? {
                return Ok(reply);
            }
            if !self.read()? {
                return Err(self.ended());
            }
        }
    }

    fn ended(&self) -> Failure {
        format!("the server at {} has ended the connection", self.name).into()
    }

    /// Reads what has come, and waits if nothing has. Returns false at the end.
    pub(crate) fn read(&mut self) -> Result<bool, Failure> {
        let mut part = [0; 64 << 10];
        match self.stream.read(&mut part) {
            Ok(0) => Ok(false),
            Ok(count) => {
                self.input.extend_from_slice(&part[..count]);
                if self.input.len() > MAX_REPLY {
                    return Err(format!("the reply of {} is too long", self.name).into());
                }
                Ok(true)
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => Ok(true),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(false),
            Err(error) => Err(self.failed(&error)),
        }
    }

    /// Takes a reply that was read.
    pub(crate) fn next_reply(&mut self) -> Result<Option<Value>, Failure> {
        let new = &self.input[self.searched..];
        let Some(end) = new.iter().position(|&byte| byte == 0) else {
            self.searched = self.input.len();
            return Ok(None);
        };
        let end = self.searched + end;
        self.searched = 0;
        let message: Result<Value, _> = serde_json::from_slice(&self.input[..end]);
        self.input.drain(..=end);
        let wrong = || Failure(format!("{} sent something that is no reply", self.name));
        let mut message = message.map_err(|_| wrong())?;
        let parameters = message["parameters"].take();
        match message.get("error").and_then(Value::as_str) {
            Some(error) => Err(self.refusal(error, &parameters)),
            None if parameters.is_object() => Ok(Some(parameters)),
            None => Err(wrong()),
        }
    }

    fn refusal(&self, error: &str, parameters: &Value) -> Failure {
        let name = &self.name;
        match error {
            "org.ivshmem.Server.NoSuchPeer" => {
                format!("the server at {name} has no peer with the id {}", parameters["id"])
            }
            "org.ivshmem.Server.TooManyConnections" => format!(
                "the server at {name} has {} control connections, as many as it allows",
                parameters["limit"]
            ),
            "org.varlink.service.PermissionDenied" => {
                format!("permission denied: root and the server's user may use {name}")
            }
            _ => format!("the server at {name} answered {error}: {parameters}"),
        }
        .into()
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
