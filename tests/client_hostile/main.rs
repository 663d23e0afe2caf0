// SPDX-License-Identifier: GPL-2.0-or-later
//! The client with servers that are faulty, slow or hostile: it reports a clear error, does not panic, leaks no
//! descriptor and does not wait without end.
//!
//! The server is one end of a socket pair with messages written by hand. Every test counts the descriptors of this
//! process, so they run one after another.

#![forbid(unsafe_code)]

mod descriptors;
mod greeting;
mod lingering;
#[path = "../common/lingering.rs"]
mod lingering_socket;
mod peers;
mod waiting;

use std::fs::File;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use ivshmem::client::{Builder, Client, Error, Event};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

/// The time limit for an action that takes a moment; long enough for a busy machine.
const PATIENCE: Duration = Duration::from_secs(10);

/// The time limit of a greeting that is meant to be too slow.
const SHORT: Duration = Duration::from_millis(300);

/// Runs a test while no other runs, and checks that it leaks no descriptor.
fn alone(test: impl FnOnce()) {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let before = descriptors();
    test();
    assert_eq!(descriptors(), before, "the test leaked descriptors");
}

/// The descriptors of this process and what they are, without the one that reads the directory.
fn descriptors() -> Vec<String> {
    let entries = std::fs::read_dir("/proc/self/fd").expect("Linux with /proc");
    let mut all: Vec<_> = entries
        .filter_map(|entry| {
            let path = entry.expect("an entry").path();
            let target = std::fs::read_link(&path).ok()?;
            (!target.starts_with("/proc")).then(|| format!("{path:?} {target:?}"))
        })
        .collect();
    all.sort();
    all
}

/// A faulty server: its end of the socket pair.
struct Wrong(UnixStream);

impl Wrong {
    fn pair() -> (Self, UnixStream) {
        let (server, client) = UnixStream::pair().expect("a socket pair");
        (Self(server), client)
    }

    fn bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        self.send(bytes, fds, MsgFlags::empty());
    }

    /// Sends a byte of urgent data with a descriptor.
    fn urgent(&self, fd: BorrowedFd<'_>) {
        self.send(b"!", &[fd], MsgFlags::MSG_OOB);
    }

    fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>], flags: MsgFlags) {
        let numbers: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        let rights = if fds.is_empty() { &[][..] } else { &rights[..] };
        let parts = [IoSlice::new(bytes)];
        let flags = flags | MsgFlags::MSG_NOSIGNAL;
        let sent = sendmsg::<()>(self.0.as_raw_fd(), &parts, rights, flags, None);
        assert_eq!(sent, Ok(bytes.len()));
    }

    fn say(&self, value: i64) {
        self.bytes(&value.to_le_bytes(), &[]);
    }

    fn give(&self, value: i64, fd: impl AsFd) {
        self.bytes(&value.to_le_bytes(), &[fd.as_fd()]);
    }

    fn vectors(&self, id: u16, count: usize) {
        for _ in 0..count {
            self.give(i64::from(id), eventfd());
        }
    }

    /// Version, id 3 and memory.
    fn greet(&self) {
        self.say(0);
        self.say(3);
        self.give(-1, memory(4096));
    }
}

fn eventfd() -> EventFd {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).expect("an eventfd")
}

fn memory(size: u64) -> File {
    let fd = memfd_create(c"test", MFdFlags::MFD_CLOEXEC).expect("a memfd");
    let file = File::from(fd);
    file.set_len(size).expect("it grows");
    file
}

fn client() -> Builder {
    Client::builder().connect_timeout(PATIENCE)
}

/// The error of a client that wants one vector, after `speak` was sent and the server closed.
fn refused(speak: impl FnOnce(&Wrong)) -> Error {
    let (server, socket) = Wrong::pair();
    speak(&server);
    match client().vectors(1).adopt(socket) {
        Err(error) => error,
        Ok(client) => panic!("the client accepted this greeting: {client:?}"),
    }
}

/// A connected client with one vector, and its server.
fn connected() -> (Wrong, Client) {
    let (server, socket) = Wrong::pair();
    server.greet();
    server.vectors(3, 1);
    (server, client().vectors(1).adopt(socket).expect("a right greeting"))
}

/// The events of a connected client, and the reason of its disconnection, after `speak` was sent.
fn disconnected(speak: impl FnOnce(&Wrong)) -> (Vec<Event>, Error) {
    let (server, mut client) = connected();
    speak(&server);
    let mut all = Vec::new();
    loop {
        let events = client.wait(Some(PATIENCE)).expect("what a server does is no error");
        assert!(!events.is_empty(), "nothing happened");
        all.extend(events);
        if matches!(all.last(), Some(Event::Disconnected { .. })) {
            break;
        }
    }
    assert!(!client.is_connected());
    assert!(client.dispatch().expect("it still works").is_empty(), "it comes once");
    // All that needs no server still works.
    client.ring(3, 0).expect("its own vector");
    assert!(matches!(client.dispatch().as_deref(), Ok([Event::Rung { vector: 0, count: 1 }])));
    client.memory().write(0, b"x").expect("the memory is there");
    match all.pop() {
        Some(Event::Disconnected { reason }) => (all, reason),
        other => panic!("{other:?}"),
    }
}

/// Checks that the text of an error has all these parts.
#[track_caller]
fn says(error: &Error, parts: &[&str]) {
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "no {part:?} in {text:?}");
    }
}
