// SPDX-License-Identifier: GPL-2.0-or-later
//! A server cannot make the client sleep in close(2): not by a TCP socket with SO_LINGER in any message, in a message
//! that the client never reads, or in the queue of a UNIX socket.

#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::{Duration, Instant};

use ivshmem::client::{Error, Event};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{setsockopt, sockopt};

use super::lingering_socket::Lingering;
use super::{PATIENCE, Wrong, alone, client, connected, eventfd, memory};

/// How long close(2) would sleep.
const LINGER: Duration = Duration::from_secs(5);

/// The time limit for the client; it needs some milliseconds.
const AT_ONCE: Duration = Duration::from_secs(2);

/// Runs `act`, which must not sleep.
#[track_caller]
fn at_once<T>(what: &str, act: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = act();
    let took = start.elapsed();
    assert!(took < AT_ONCE, "{what}: {took:?}");
    result
}

/// The error of a client whose server sends a lingering socket and keeps no copy of it. It must come at once.
#[track_caller]
fn refused_at_once(what: &str, speak: impl FnOnce(&Wrong, BorrowedFd<'_>)) -> Error {
    let Lingering { socket: lingering, peer: _peer } = Lingering::new(LINGER);
    let (server, socket) = Wrong::pair();
    speak(&server, lingering.as_fd());
    drop(lingering);
    match at_once(what, || client().vectors(1).adopt(socket)) {
        Err(error) => error,
        Ok(client) => panic!("{what}: the client accepted this greeting: {client:?}"),
    }
}

/// Sends a message with a descriptor.
fn send(socket: impl Into<OwnedFd>, fd: BorrowedFd<'_>) {
    Wrong(UnixStream::from(socket.into())).bytes(&[0], &[fd]);
}

#[test]
fn the_sockets_of_these_tests_do_make_close_sleep() {
    alone(|| {
        let time = Duration::from_secs(1);
        let start = Instant::now();
        drop(Lingering::new(time).socket);
        assert!(start.elapsed() >= time, "{:?}", start.elapsed());
    });
}

#[test]
fn a_lingering_socket_in_a_greeting_does_not_make_connect_sleep() {
    alone(|| {
        let error = refused_at_once("with the version", |server, fd| server.give(0, fd));
        assert!(matches!(error, Error::SurplusDescriptors { right: 0, .. }), "{error:?}");
        let error = refused_at_once("with the id", |server, fd| {
            server.say(0);
            server.give(3, fd);
        });
        assert!(matches!(error, Error::SurplusDescriptors { right: 0, .. }), "{error:?}");
        let error = refused_at_once("as the memory", |server, fd| {
            server.say(0);
            server.say(3);
            server.give(-1, fd);
        });
        assert!(matches!(error, Error::MemoryKind { kind: "a socket" }), "{error:?}");
        let error = refused_at_once("as a vector", |server, fd| {
            server.greet();
            server.give(3, fd);
        });
        assert!(matches!(error, Error::NotAnEventfd { peer: 3, vector: 0 }), "{error:?}");
        let error = refused_at_once("with an unknown value", |server, fd| {
            server.greet();
            server.give(-7, fd);
        });
        assert!(matches!(error, Error::Unexpected { value: -7, .. }), "{error:?}");
        let error = refused_at_once("with half a message", |server, fd| {
            server.bytes(&[0; 4], &[fd]);
            server.0.shutdown(std::net::Shutdown::Both).expect("it is connected");
        });
        assert!(matches!(error, Error::CutShort { bytes: 4 }), "{error:?}");
    });
}

#[test]
fn the_most_descriptors_that_a_message_can_have_are_all_closed_without_sleeping() {
    alone(|| {
        let error = refused_at_once("as the last of 253", |server, fd| {
            server.greet();
            let other = eventfd();
            let mut fds = vec![other.as_fd(); 252];
            fds.push(fd);
            server.bytes(&3i64.to_le_bytes(), &fds);
        });
        assert!(matches!(error, Error::SurplusDescriptors { count: 253, .. }), "{error:?}");
    });
}

#[test]
fn a_lingering_socket_in_an_unread_message_does_not_make_the_client_sleep() {
    alone(|| {
        let error = refused_at_once("behind a refusal", |server, fd| {
            server.say(1);
            server.give(0, fd);
        });
        assert!(matches!(error, Error::Refused { .. }), "{error:?}");

        let Lingering { socket: lingering, peer: _peer } = Lingering::new(LINGER);
        let (server, client) = connected();
        server.give(7, lingering);
        at_once("the end of a client", || drop(client));
    });
}

#[test]
fn a_lingering_socket_that_comes_later_does_not_make_dispatch_sleep() {
    alone(|| {
        let Lingering { socket: lingering, peer: _peer } = Lingering::new(LINGER);
        let (server, mut client) = connected();
        server.give(7, lingering);
        let events = at_once("a dispatch", || client.wait(Some(PATIENCE))).expect("it works");
        assert!(
            matches!(
                events[..],
                [Event::Disconnected { reason: Error::NotAnEventfd { peer: 7, vector: 0 } }]
            ),
            "{events:?}"
        );
    });
}

#[test]
fn a_lingering_socket_in_the_queue_of_another_socket_does_not_make_the_client_sleep() {
    alone(|| {
        refused_at_once("in a stream", |server, fd| {
            let (here, there) = UnixStream::pair().expect("a socket pair");
            send(here, fd);
            server.give(0, there);
        });
        refused_at_once("as the last of 253, with credentials", |server, fd| {
            let (here, there) = UnixStream::pair().expect("a socket pair");
            setsockopt(&there, sockopt::PassCred, &true).expect("it is a UNIX socket");
            let other = eventfd();
            let mut fds = vec![other.as_fd(); 252];
            fds.push(fd);
            Wrong(here).bytes(&[0], &fds);
            server.give(0, there);
        });
        refused_at_once("behind an empty datagram", |server, fd| {
            let (here, there) = UnixDatagram::pair().expect("a socket pair");
            here.send(&[]).expect("there is room");
            send(here, fd);
            server.give(0, there);
        });
        refused_at_once("two queues deep", |server, fd| {
            let (here, there) = UnixStream::pair().expect("a socket pair");
            send(here, fd);
            let (outer_here, outer_there) = UnixStream::pair().expect("a socket pair");
            send(outer_here, there.as_fd());
            drop(there);
            server.give(0, outer_there);
        });
        refused_at_once("in a connection that was not accepted", |server, fd| {
            let name = format!("ivshmem-lingering-{}", std::process::id());
            let address = SocketAddr::from_abstract_name(name).expect("a short name");
            let listener = UnixListener::bind_addr(&address).expect("a new name");
            send(UnixStream::connect_addr(&address).expect("it listens"), fd);
            server.give(0, listener);
        });
    });
}

/// Urgent data (MSG_OOB) is not in the order of the stream, and a read that passes it closes its descriptors.
#[test]
fn a_lingering_socket_with_urgent_data_does_not_make_the_client_sleep() {
    alone(|| {
        refused_at_once("in a greeting", |server, fd| {
            server.urgent(fd);
            server.say(0);
        });
        refused_at_once("in a stream", |server, fd| {
            let (here, there) = UnixStream::pair().expect("a socket pair");
            Wrong(here).urgent(fd);
            server.give(0, there);
        });

        let Lingering { socket: lingering, peer: _peer } = Lingering::new(LINGER);
        let (server, client) = connected();
        server.urgent(lingering.as_fd());
        drop(lingering);
        at_once("the end of a client", || drop(client));

        let Lingering { socket: lingering, peer: _peer } = Lingering::new(LINGER);
        let (server, mut client) = connected();
        server.urgent(lingering.as_fd());
        drop(lingering);
        server.say(7);
        at_once("a dispatch", || client.wait(Some(PATIENCE))).expect("it works");
        at_once("the end of a client", || drop(client));
    });
}

#[test]
fn a_client_that_is_dropped_closes_what_it_did_not_read() {
    alone(|| {
        let (server, client) = connected();
        let kept = memory(4096);
        (0..100).for_each(|_| server.give(-1, &kept));
        drop(client);
    });
}

/// Runs `act` while this process can open only so many more descriptors.
fn with_room_for<T>(descriptors: usize, act: impl FnOnce() -> T) -> T {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
    let open = || File::open("/");
    // No number below the limit is free, apart from the last ones.
    let mut files: Vec<_> = (0..100).map(|_| open().expect("it opens")).collect();
    let highest = files.iter().map(AsRawFd::as_raw_fd).max().expect("there are some");
    setrlimit(Resource::RLIMIT_NOFILE, u64::try_from(highest).expect("a number") + 1, hard)
        .expect("a lower limit");
    files.extend(std::iter::from_fn(|| open().ok()));
    files.drain(..descriptors);
    let result = catch_unwind(AssertUnwindSafe(act));
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).expect("the old limit");
    result.unwrap_or_else(|panic| resume_unwind(panic))
}

#[test]
fn a_lingering_socket_for_which_no_descriptor_is_left_does_not_make_connect_sleep() {
    alone(|| {
        let Lingering { socket: lingering, peer: _peer } = Lingering::new(LINGER);
        let (server, socket) = Wrong::pair();
        server.greet();
        server.vectors(9, 4);
        server.give(9, lingering);
        // For the memory and four vectors.
        let error = with_room_for(5, || at_once("connect", || client().vectors(1).adopt(socket)));
        assert!(matches!(error, Err(Error::Truncated)), "{error:?}");
    });
}

#[test]
fn a_lingering_socket_for_which_a_connected_client_has_no_descriptor_does_not_make_it_sleep() {
    alone(|| {
        let Lingering { socket: lingering, peer: _peer } = Lingering::new(LINGER);
        let (server, mut client) = connected();
        server.give(9, lingering);
        with_room_for(0, || {
            let events = at_once("a dispatch", || client.wait(Some(PATIENCE))).expect("it works");
            assert!(
                matches!(events[..], [Event::Disconnected { reason: Error::Truncated }]),
                "{events:?}"
            );
            assert!(client.dispatch().expect("it works").is_empty());
            at_once("the end of the client", || drop(client));
        });
    });
}
