// SPDX-License-Identifier: GPL-2.0-or-later
//! The client against servers that are wrong, late or hostile: an error that says what, no panic, no descriptor left
//! over, no endless wait.
//!
//! The server is one end of a socket pair with messages written by hand. Every test counts the descriptors of this
//! process, so they run one after another.

#![forbid(unsafe_code)]

mod descriptors;
mod greeting;
mod lingering;
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

/// How long a thing that needs a moment may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(10);

/// The greeting may take this long where it is to fail for being late.
const SHORT: Duration = Duration::from_millis(300);

/// Runs a test alone, and checks that it leaves no descriptor over.
fn alone(test: impl FnOnce()) {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let before = descriptors();
    test();
    assert_eq!(descriptors(), before, "descriptors left over");
}

/// What each descriptor of this process is, the one that reads the directory excepted.
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

/// The server's end.
struct Wrong(UnixStream);

impl Wrong {
    fn pair() -> (Self, UnixStream) {
        let (server, client) = UnixStream::pair().expect("a socket pair");
        (Self(server), client)
    }

    fn bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let numbers: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        let rights = if fds.is_empty() { &[][..] } else { &rights[..] };
        let parts = [IoSlice::new(bytes)];
        let sent = sendmsg::<()>(self.0.as_raw_fd(), &parts, rights, MsgFlags::MSG_NOSIGNAL, None);
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

/// What a client that has this many vectors makes of what the server says before it goes.
fn refused(speak: impl FnOnce(&Wrong)) -> Error {
    let (server, socket) = Wrong::pair();
    speak(&server);
    match client().vectors(1).adopt(socket) {
        Err(error) => error,
        Ok(client) => panic!("it took that for a greeting: {client:?}"),
    }
}

/// A connected client with one vector, and its server.
fn connected() -> (Wrong, Client) {
    let (server, socket) = Wrong::pair();
    server.greet();
    server.vectors(3, 1);
    (server, client().vectors(1).adopt(socket).expect("a right greeting"))
}

/// How a connected client ends after what the server says.
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
    // What needs no server still works.
    client.ring(3, 0).expect("its own vector");
    assert!(matches!(client.dispatch().as_deref(), Ok([Event::Rung { vector: 0, count: 1 }])));
    client.memory().write(0, b"x").expect("the memory is there");
    match all.pop() {
        Some(Event::Disconnected { reason }) => (all, reason),
        other => panic!("{other:?}"),
    }
}

/// Checks what an error says: the thing, its value, what would be right.
#[track_caller]
fn says(error: &Error, parts: &[&str]) {
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "no {part:?} in {text:?}");
    }
}
