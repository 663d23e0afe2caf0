// SPDX-License-Identifier: GPL-2.0-or-later
//! A server that does not answer, or never ends its greeting, keeps the client for its time limit and no longer.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::IoSlice;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use ivshmem::client::{Client, Error};
use nix::sys::socket::{Backlog, ControlMessage, MsgFlags, sendmsg};

use super::{PATIENCE, SHORT, Wrong, alone, client, eventfd, says};

/// The messages of a server that then sends nothing more, and what is missing.
type Stage = (&'static dyn Fn(&Wrong), &'static str);

#[test]
fn a_server_that_sends_nothing_more_gives_a_timeout() {
    alone(|| {
        let stages: [Stage; 5] = [
            (&|_| (), "protocol version"),
            (&|server| server.say(0), "client's id"),
            (
                &|server| {
                    server.say(0);
                    server.say(3);
                },
                "shared memory",
            ),
            (&Wrong::greet, "own first vector"),
            (
                &|server| {
                    server.greet();
                    server.vectors(3, 1);
                },
                "own vector 1, of 2 asked for",
            ),
        ];
        for (speak, missing) in stages {
            let (server, socket) = Wrong::pair();
            speak(&server);
            let start = Instant::now();
            let error = client().vectors(2).connect_timeout(SHORT).adopt(socket).unwrap_err();
            assert!(start.elapsed() >= SHORT, "it waits for the whole time");
            assert!(start.elapsed() < PATIENCE, "and no longer");
            assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
            says(&error, &[missing, "300ms"]);
        }
    });
}

#[test]
fn a_server_that_never_ends_its_greeting_gives_a_timeout() {
    alone(|| {
        let (server, socket) = Wrong::pair();
        let sending = thread::spawn(move || {
            server.say(0);
            server.say(3);
            let one = eventfd();
            let parts = [IoSlice::new(&[7, 0, 0, 0, 0, 0, 0, 0])];
            let number = [one.as_raw_fd()];
            let rights = [ControlMessage::ScmRights(&number)];
            // A peer joins and leaves until the client gives up.
            for turn in 0u64.. {
                let rights = if turn % 2 == 0 { &rights[..] } else { &[] };
                let flags = MsgFlags::MSG_NOSIGNAL;
                if sendmsg::<()>(server.0.as_raw_fd(), &parts, rights, flags, None).is_err() {
                    return;
                }
            }
        });
        let error = client().connect_timeout(SHORT).adopt(socket).unwrap_err();
        assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
        sending.join().expect("it ends when the client is gone");
    });
}

#[test]
fn a_server_that_does_not_accept_gives_a_timeout() {
    alone(|| {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).expect("a socket");
        nix::sys::socket::listen(&listener, Backlog::new(0).expect("0 is one")).expect("listen");
        let _queued = UnixStream::connect(&path).expect("the queue has room for one");
        let error = client().connect_timeout(SHORT).connect(&path).unwrap_err();
        assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
        says(&error, &["the acceptance of the connection"]);
    });
}

#[test]
fn an_impossible_path_is_an_error() {
    alone(|| {
        let long = "x".repeat(108);
        assert!(matches!(Client::connect(&long), Err(Error::SocketPathLength { .. })));
        assert!(matches!(Client::connect(""), Err(Error::SocketPathLength { .. })));
        for path in ["/nowhere/at/all", "/etc/passwd", "a\0b", "\0abstract"] {
            let error = Client::connect(path).unwrap_err();
            assert!(matches!(error, Error::Connect { .. }), "{path:?}: {error:?}");
        }
        let file = File::open("/etc/passwd").expect("a file");
        assert!(Client::adopt(file).is_err(), "a file is no socket");
        assert!(!Path::new("a").exists());
    });
}

#[test]
fn a_client_may_have_no_time_limit() {
    alone(|| {
        let (server, socket) = Wrong::pair();
        server.greet();
        server.vectors(3, 1);
        let client = client().connect_timeout(Duration::MAX).adopt(socket);
        assert_eq!(client.expect("a right greeting").vectors(), 1);
    });
}
