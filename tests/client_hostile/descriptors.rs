// SPDX-License-Identifier: GPL-2.0-or-later
//! Descriptors that a server should not send: too many, of the wrong kind, or changed later.

#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread;

use ivshmem::client::{Error, Event};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::epoll::{Epoll, EpollCreateFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::timerfd::{ClockId, TimerFd, TimerFlags};

use super::{
    PATIENCE, SHORT, Wrong, alone, client, connected, disconnected, eventfd, memory, refused, says,
};

#[test]
fn a_vector_with_two_descriptors_is_an_error() {
    alone(|| {
        let two = [eventfd(), eventfd()];
        let error = refused(|server| {
            server.greet();
            server.bytes(&3i64.to_le_bytes(), &[two[0].as_fd(), two[1].as_fd()]);
        });
        assert!(
            matches!(error, Error::SurplusDescriptors { value: 3, count: 2, right: 1, .. }),
            "{error:?}"
        );
        // The same, with one descriptor in each half of the message.
        let error = refused(|server| {
            server.greet();
            server.bytes(&3i64.to_le_bytes()[..4], &[two[0].as_fd()]);
            server.bytes(&3i64.to_le_bytes()[4..], &[two[1].as_fd()]);
        });
        assert!(matches!(error, Error::SurplusDescriptors { count: 2, .. }), "{error:?}");
    });
}

#[test]
fn a_hundred_descriptors_in_one_message_are_an_error_and_are_closed() {
    alone(|| {
        let many: Vec<_> = (0..100).map(|_| eventfd()).collect();
        let many: Vec<_> = many.iter().map(AsFd::as_fd).collect();
        let error = refused(|server| {
            server.greet();
            server.bytes(&3i64.to_le_bytes(), &many);
        });
        assert!(matches!(error, Error::SurplusDescriptors { count: 100, .. }), "{error:?}");
        let (_, error) = disconnected(|server| server.bytes(&4i64.to_le_bytes(), &many));
        assert!(matches!(error, Error::SurplusDescriptors { count: 100, .. }), "{error:?}");
    });
}

#[test]
fn with_no_descriptor_left_it_is_an_error_that_names_the_limit() {
    alone(|| {
        let (server, socket) = Wrong::pair();
        server.greet();
        server.vectors(3, 1);
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
        // One more descriptor can be opened. The memory gets it, and the vector gets none.
        let next = File::open("/").expect("one can be opened").as_raw_fd();
        setrlimit(Resource::RLIMIT_NOFILE, u64::try_from(next).expect("a number") + 1, hard)
            .expect("a lower limit");
        let error = client().vectors(1).adopt(socket).map(drop);
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard).expect("the old limit");
        let error = error.expect_err("it has no descriptor for its vector");
        assert!(matches!(error, Error::Truncated), "{error:?}");
        says(&error, &["RLIMIT_NOFILE"]);
    });
}

#[test]
fn a_vector_that_is_no_eventfd_is_an_error() {
    alone(|| {
        let (_reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC).expect("a pipe");
        let (socket, _other_end) = UnixStream::pair().expect("a socket pair");
        // These two have the same mode as an eventfd.
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).expect("an epoll instance");
        let timer =
            TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC).expect("a timer");
        let fds = [writer, OwnedFd::from(socket), memory(4096).into(), epoll.0, timer.into()];
        for fd in fds {
            let error = refused(|server| {
                server.greet();
                server.vectors(9, 1);
                server.give(9, &fd);
            });
            assert!(matches!(error, Error::NotAnEventfd { peer: 9, vector: 1 }), "{error:?}");
            let (events, error) = disconnected(|server| server.give(3, &fd));
            assert!(matches!(error, Error::NotAnEventfd { peer: 3, vector: 1 }), "{error:?}");
            assert!(events.is_empty(), "{events:?}");
        }
    });
}

#[test]
fn a_blocking_eventfd_is_made_non_blocking() {
    alone(|| {
        let (server, socket) = Wrong::pair();
        let blocking = EventFd::from_flags(EfdFlags::EFD_CLOEXEC).expect("an eventfd");
        server.greet();
        server.give(3, &blocking);
        let client = client().vectors(1).adopt(socket).expect("a right greeting");
        assert_eq!(client.vector(0).expect("it has one").take().expect("an eventfd"), 0);
        // A full eventfd counts as rung, and the client does not wait for room in it.
        blocking.write(u64::MAX - 1).expect("there is room");
        client.ring(3, 0).expect("it does not wait");
        assert_eq!(client.vector(0).expect("it has one").take().expect("an eventfd"), u64::MAX - 1);
    });
}

#[test]
fn a_vector_that_was_made_blocking_later_does_not_block_the_client() {
    alone(|| {
        let (server, socket) = Wrong::pair();
        let shared = eventfd();
        server.greet();
        server.give(3, &shared);
        let mut client = client().vectors(1).adopt(socket).expect("a right greeting");
        // QEMU does this to each eventfd that it receives, for a moment.
        fcntl(&shared, FcntlArg::F_SETFL(OFlag::empty())).expect("it is an open file");
        let vector = client.vector(0).expect("it has one");
        assert_eq!(vector.take().expect("it does not wait"), 0);
        assert!(!vector.spin(SHORT).wait(Some(SHORT)).expect("it ends in time"));
        assert!(client.dispatch().expect("it does not wait").is_empty());
        shared.write(2).expect("there is room");
        let events = client.dispatch().expect("it works");
        assert!(matches!(events[..], [Event::Rung { vector: 0, count: 2 }]), "{events:?}");
    });
}

#[test]
fn more_vectors_than_msix_has_are_an_error() {
    alone(|| {
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("up to the hard limit");
        let (server, socket) = Wrong::pair();
        // They do not fit in the socket, so a thread sends them.
        let sending = thread::spawn(move || {
            server.greet();
            let one = eventfd();
            for _ in 0..=2048 {
                server.give(9, &one);
            }
        });
        let error = client().vectors(1).adopt(socket).map(drop).unwrap_err();
        sending.join().expect("it could send");
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard).expect("the old limit");
        assert!(matches!(error, Error::TooManyVectors { peer: 9 }), "{error:?}");
        says(&error, &["2048", "9"]);
    });
}

#[test]
fn a_doorbell_that_is_full_and_blocking_does_not_block_the_client() {
    alone(|| {
        let (server, mut client) = connected();
        let shared = eventfd();
        server.give(7, &shared);
        client.wait(Some(PATIENCE)).expect("it joins");
        let doorbell = client.doorbell(7, 0).expect("it has joined");
        shared.write(u64::MAX - 1).expect("there is room");
        doorbell.ring().expect("full and non-blocking");
        fcntl(&shared, FcntlArg::F_SETFL(OFlag::empty())).expect("it is an open file");
        let (done, waits) = std::sync::mpsc::channel();
        let ringing = thread::spawn(move || done.send(doorbell.ring().is_ok()));
        let rung = waits.recv_timeout(PATIENCE);
        // With room in the eventfd, the thread ends also if the test fails.
        let count = shared.read().expect("it is full");
        assert_eq!((rung, count), (Ok(true), u64::MAX - 1));
        ringing.join().expect("no panic").expect("the receiver exists");
        client.ring(7, 0).expect("blocking, but not full");
        assert_eq!(shared.read(), Ok(1));
    });
}
