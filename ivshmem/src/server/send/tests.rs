// SPDX-License-Identifier: GPL-2.0-or-later
//! Tests of sending over real sockets.
//!
//! A UNIX socket takes a message of 8 bytes whole or not at all. So the tests of partial writes use
//! a TCP connection, whose segments end inside a message.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{setsockopt, sockopt};

use super::*;
use crate::sys::receive;

/// Sends the messages `from`, `from + 1`, … without descriptors. Returns the number that was sent.
fn send_numbers(
    sender: &mut Sender,
    socket: BorrowedFd<'_>,
    partial: &mut Option<Partial>,
    from: u64,
    most: usize,
    available: usize,
) -> (usize, Verdict) {
    sender.send(socket, partial, most, |run, room| {
        assert_eq!(room, most.min(RUN));
        for value in (from..).take(available.min(room)) {
            run.push(value.to_le_bytes(), None);
        }
    })
}

/// Reads everything that is in the socket.
fn drain(mut socket: impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    match socket.read_to_end(&mut bytes) {
        Err(error) if error.kind() != ErrorKind::WouldBlock => panic!("{error}"),
        _ => bytes,
    }
}

fn numbers(bytes: &[u8]) -> Vec<u64> {
    let messages = bytes.chunks_exact(MESSAGE);
    assert!(messages.remainder().is_empty(), "a part of a message is missing");
    messages.map(|value| u64::from_le_bytes(value.try_into().expect("8 bytes"))).collect()
}

fn pair() -> (UnixStream, UnixStream) {
    let (server, client) = UnixStream::pair().expect("a socket pair");
    client.set_nonblocking(true).expect("a socket");
    (server, client)
}

#[test]
fn each_error_of_a_send_has_its_verdict() {
    let verdict = |errno: Errno| Verdict::from(io::Error::from(errno));
    assert_eq!(verdict(Errno::EAGAIN), Verdict::Full);
    for errno in [Errno::ETOOMANYREFS, Errno::ENOBUFS, Errno::ENOMEM] {
        assert_eq!(verdict(errno), Verdict::Exhausted(errno));
    }
    for errno in [Errno::EPIPE, Errno::ECONNRESET, Errno::EBADF] {
        assert_eq!(verdict(errno), Verdict::Broken(errno));
    }
    assert_eq!(Verdict::from(io::Error::other("no number")), Verdict::Broken(Errno::EIO));
}

#[test]
fn the_verdict_tells_whether_there_may_be_more_messages() {
    let (server, client) = pair();
    let mut sender = Sender::new();
    let mut send =
        |most, available| send_numbers(&mut sender, server.as_fd(), &mut None, 1, most, available);
    assert_eq!(send(5, 0), (0, Verdict::Done));
    assert_eq!(send(5, 3), (3, Verdict::Done), "the caller had fewer messages than allowed");
    assert_eq!(send(5, 5), (5, Verdict::More), "the caller may have more messages");
    assert_eq!(numbers(&drain(&client)), [1, 2, 3, 1, 2, 3, 4, 5]);
    // A socket of the usual size takes one whole run, and a part of the next.
    assert_eq!(send(usize::MAX, usize::MAX), (RUN, Verdict::More));
    let (sent, verdict) = send(RUN, RUN);
    assert_eq!(verdict, Verdict::Full);
    assert!((1..RUN).contains(&sent), "{sent} messages fitted into the socket");
    assert_eq!(send(5, 5), (0, Verdict::Full));
    assert_eq!(drain(&client).len(), (RUN + sent) * MESSAGE);
    drop(client);
    assert_eq!(send(5, 5), (0, Verdict::Broken(Errno::EPIPE)));
}

#[test]
fn each_message_carries_its_own_descriptor() {
    let (server, client) = pair();
    let eventfds = [(); 3]
        .map(|()| OwnedFd::from(EventFd::from_flags(EfdFlags::EFD_NONBLOCK).expect("an eventfd")));
    let result = Sender::new().send(server.as_fd(), &mut None, 4, |run, _| {
        run.push([0; MESSAGE], None);
        for (eventfd, value) in eventfds.iter().zip(1u64..) {
            nix::unistd::write(eventfd, &value.to_ne_bytes()).expect("an eventfd");
            run.push(value.to_le_bytes(), Some(eventfd.as_fd()));
        }
    });
    assert_eq!(result, (4, Verdict::More));
    for value in 0..4u64 {
        let mut bytes = [0; MESSAGE];
        let received = receive(client.as_fd(), &mut bytes).expect("a message is there");
        assert_eq!((received.bytes, bytes), (MESSAGE, value.to_le_bytes()));
        let counts: Vec<_> = received
            .fds
            .iter()
            .map(|fd| {
                let mut count = [0; 8];
                nix::unistd::read(fd, &mut count).expect("it was written");
                u64::from_ne_bytes(count)
            })
            .collect();
        assert_eq!(counts, if value == 0 { vec![] } else { vec![value] });
    }
}

#[test]
fn the_rest_of_a_partial_write_is_sent_before_the_next_message() {
    let (server, client) = pair();
    let mut sender = Sender::new();
    let mut partial = Some(Partial { value: 7u64.to_le_bytes(), sent: 5 });
    let result = send_numbers(&mut sender, server.as_fd(), &mut partial, 8, 2, 1);
    assert_eq!(result, (1, Verdict::Done));
    assert!(partial.is_none());
    assert_eq!(drain(&client), [&[0; 3][..], &8u64.to_le_bytes()].concat());
    // The rest alone.
    let mut partial = Some(Partial { value: [1, 2, 3, 4, 5, 6, 7, 8], sent: 1 });
    let result = send_numbers(&mut sender, server.as_fd(), &mut partial, 8, 2, 0);
    assert_eq!((result, partial.is_none()), ((0, Verdict::Done), true));
    assert_eq!(drain(&client), [2, 3, 4, 5, 6, 7, 8]);
}

#[test]
fn the_rest_of_a_partial_write_waits_while_the_socket_is_full() {
    let (mut server, client) = pair();
    server.set_nonblocking(true).expect("a socket");
    while server.write(&[0; 64]).is_ok() {}
    // A blocking socket must not make the server wait.
    server.set_nonblocking(false).expect("a socket");
    let mut partial = Some(Partial { value: [9; MESSAGE], sent: 6 });
    let mut sender = Sender::new();
    let result = send_numbers(&mut sender, server.as_fd(), &mut partial, 8, 2, 2);
    assert_eq!(result, (0, Verdict::Full));
    assert_eq!(partial.map(|partial| partial.sent), Some(6));
    refuse(server.as_fd(), 1, partial);
    drain(&client);
    refuse(server.as_fd(), 1, partial);
    let refused = [&[9, 9][..], &REFUSED_VALUE.to_le_bytes()].concat();
    assert_eq!(drain(&client), refused, "the value comes after the rest, and only once");
    drop(client);
    let result = send_numbers(&mut sender, server.as_fd(), &mut partial, 8, 2, 2);
    assert_eq!(result, (0, Verdict::Broken(Errno::EPIPE)), "and no signal ends the process");
}

#[test]
fn a_refusal_depends_on_how_much_of_the_greeting_was_sent() {
    for (greeted, value) in [(0, REFUSED_VERSION), (1, REFUSED_VALUE), (2, REFUSED_VALUE)] {
        let (server, client) = pair();
        refuse(server.as_fd(), greeted, None);
        assert_eq!(drain(&client), value.to_le_bytes(), "after {greeted} messages");
    }
}

#[test]
fn a_refusal_does_not_wait_for_a_full_socket() {
    let (mut server, client) = pair();
    server.set_nonblocking(true).expect("a socket");
    while server.write(&[1; 64]).is_ok() {}
    server.set_nonblocking(false).expect("a socket");
    refuse(server.as_fd(), 0, None);
    assert!(drain(&client).iter().all(|byte| *byte == 1), "there was no room for the refusal");
    drop(client);
    refuse(server.as_fd(), 0, None);
}

/// A TCP connection whose segments do not end where messages end.
fn tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a loopback address");
    setsockopt(&listener, sockopt::RcvBuf, &4096).expect("a socket");
    setsockopt(&listener, sockopt::TcpMaxSeg, &1001).expect("a TCP socket");
    let server =
        TcpStream::connect(listener.local_addr().expect("it is bound")).expect("it listens");
    setsockopt(&server, sockopt::SndBuf, &4096).expect("a socket");
    let (client, _) = listener.accept().expect("a connection");
    client.set_nonblocking(true).expect("a socket");
    (server, client)
}

/// Sends single messages to a new TCP connection until it is full, and then the rest and one more
/// message. Returns whether the write that filled the connection was partial.
fn fill_and_go_on() -> bool {
    let (mut server, client) = tcp();
    server.write_all(&[0; 3]).expect("there is room");
    let mut sender = Sender::new();
    let (mut next, mut partial) = (0, None);
    let mut send = |next: &mut u64, partial: &mut _| {
        let (sent, verdict) = send_numbers(&mut sender, server.as_fd(), partial, *next, 1, 1);
        *next += sent as u64;
        verdict
    };
    while send(&mut next, &mut partial) != Verdict::Full {}
    let was_partial = partial.is_some();
    if let Some(Partial { value, sent }) = partial {
        assert_eq!(value, (next - 1).to_le_bytes());
        assert!((1..8).contains(&sent));
    }
    let mut received = drain(&client);
    let before = next;
    while next == before {
        send(&mut next, &mut partial);
        received.extend(drain(&client));
    }
    drop(server);
    client.set_nonblocking(false).expect("a socket");
    received.extend(drain(&client));
    assert_eq!(numbers(&received[3..]), (0..next).collect::<Vec<_>>());
    was_partial
}

#[test]
fn a_partial_write_counts_as_sent_and_its_rest_comes_next() {
    // Nearly every connection is full inside a message, but the kernel does not promise it.
    assert!((0..100).any(|_| fill_and_go_on()), "no partial write on 100 connections");
}

/// Completes partial writes on a new TCP connection until it is full, and then the last one.
/// Returns whether the connection took a part of that last one.
fn complete_until_full() -> bool {
    let (mut server, client) = tcp();
    server.write_all(&[0; 3]).expect("there is room");
    let mut expected = vec![0; 3];
    for number in 0..u64::MAX {
        let value = number.to_le_bytes();
        expected.extend(&value[1..]);
        let mut partial = Some(Partial { value, sent: 1 });
        let Err(verdict) = complete(server.as_fd(), &mut partial) else { continue };
        assert_eq!(verdict, Verdict::Full);
        let in_two = partial.is_some_and(|partial| partial.sent > 1);
        let mut received = drain(&client);
        while complete(server.as_fd(), &mut partial).is_err() {
            received.extend(drain(&client));
        }
        drop(server);
        client.set_nonblocking(false).expect("a socket");
        received.extend(drain(&client));
        assert_eq!(received, expected);
        return in_two;
    }
    unreachable!("the connection is full at some time")
}

#[test]
fn the_rest_of_a_partial_write_can_be_sent_in_two_parts() {
    assert!((0..100).any(|_| complete_until_full()), "no partial write on 100 connections");
}
