// SPDX-License-Identifier: GPL-2.0-or-later
//! Tests of the messages that a server may send, over a socket pair: how they become whole, and
//! what each does to the peer table.

use std::fs::File;
use std::io::IoSlice;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::super::connection::{Connection, Message};
use super::*;

/// A server's end of a connection, and the client's end.
struct Wire {
    server: UnixStream,
    client: Connection,
}

impl Wire {
    fn new() -> Self {
        let (server, client) = UnixStream::pair().expect("a socket pair");
        Self { server, client: Connection::new(client.into()) }
    }

    fn next(&mut self) -> Result<Option<Message>, Error> {
        self.client.next()
    }

    fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let fds: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let control = if fds.is_empty() { &[][..] } else { &rights[..] };
        let socket = self.server.as_raw_fd();
        let sent = sendmsg::<()>(socket, &[IoSlice::new(bytes)], control, MsgFlags::empty(), None);
        assert_eq!(sent, Ok(bytes.len()));
    }

    fn receive(&mut self, value: i64, fds: &[BorrowedFd<'_>]) -> Message {
        self.send(&value.to_le_bytes(), fds);
        let message = self.next().expect("the message is valid").expect("the message is complete");
        assert_eq!(message.value, value);
        message
    }
}

/// A peer table, and a server that fills it.
struct Session {
    wire: Wire,
    table: PeerTable,
}

impl Session {
    fn new() -> Self {
        Self { wire: Wire::new(), table: PeerTable::default() }
    }

    /// A session after the greeting of client 5.
    fn greeted() -> Self {
        let mut session = Self::new();
        let memory = memory(4096);
        for (value, fds) in [(0, &[][..]), (5, &[]), (-1, &[memory.as_fd()])] {
            assert_eq!(session.tell(value, fds).expect("a greeting"), Change::Greeting);
        }
        session
    }

    fn tell(&mut self, value: i64, fds: &[BorrowedFd<'_>]) -> Result<Change, Error> {
        let message = self.wire.receive(value, fds);
        self.table.apply(message)
    }

    /// Tells of `count` more vectors of a peer, and returns them.
    fn vectors(&mut self, peer: u16, count: usize) -> Vec<EventFd> {
        (0..count)
            .map(|_| {
                let vector = eventfd();
                let expected = if peer == 5 { Change::Own } else { Change::Peer(peer) };
                let change = self.tell(peer.into(), &[vector.as_fd()]);
                assert_eq!(change.expect("a vector"), expected);
                vector
            })
            .collect()
    }
}

fn memory(size: u64) -> File {
    let file = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).expect("a memfd"));
    file.set_len(size).expect("the memfd can grow");
    file
}

fn eventfd() -> EventFd {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).expect("an eventfd")
}

#[test]
fn a_message_that_comes_byte_by_byte_becomes_whole_and_keeps_its_descriptor() {
    let mut wire = Wire::new();
    assert!(wire.next().expect("nothing is wrong").is_none(), "nothing was sent");
    let value = 0x0102_0304_0506_0708_i64;
    let bytes = value.to_le_bytes();
    wire.send(&bytes[..1], &[eventfd().as_fd()]);
    for byte in 1..8 {
        assert!(wire.next().expect("nothing is wrong").is_none(), "{byte} bytes");
        wire.send(&bytes[byte..=byte], &[]);
    }
    let message = wire.next().expect("nothing is wrong").expect("a whole message");
    assert_eq!(message.value, value);
    assert!(message.descriptor("a test").expect("one descriptor").is_some());
    assert!(wire.receive(-3, &[]).descriptor("a test").expect("no descriptor").is_none());
}

#[test]
fn each_message_has_its_own_descriptors() {
    let mut wire = Wire::new();
    for (value, fds) in [(1_i64, 0), (2, 1), (3, 0), (4, 2)] {
        let sent: Vec<_> = (0..fds).map(|_| eventfd()).collect();
        let sent: Vec<_> = sent.iter().map(AsFd::as_fd).collect();
        wire.send(&value.to_le_bytes(), &sent);
    }
    let mut next = || wire.next().expect("nothing is wrong").expect("a whole message");
    next().bare("a test").expect("no descriptor");
    let error = next().bare("a test").expect_err("one descriptor");
    assert!(
        matches!(error, Error::SurplusDescriptors { value: 2, what: "a test", count: 1, right: 0 }),
        "{error:?}"
    );
    next().bare("a test").expect("no descriptor");
    let error = next().descriptor("a test").expect_err("two descriptors");
    assert!(
        matches!(error, Error::SurplusDescriptors { value: 4, what: "a test", count: 2, right: 1 }),
        "{error:?}"
    );
}

#[test]
fn the_end_of_a_connection_says_whether_it_cut_a_message_short() {
    for unread in [false, true] {
        for bytes in [0, 3] {
            let mut wire = Wire::new();
            if unread {
                // A socket that is closed with unread data resets the connection.
                nix::unistd::write(&wire.client, b"x").expect("the socket is open");
            }
            if bytes > 0 {
                wire.send(&[0; 3], &[]);
                assert!(wire.next().expect("nothing is wrong").is_none());
            }
            drop(mem::replace(&mut wire.server, UnixStream::pair().expect("a socket pair").0));
            let error = wire.next().expect_err("the connection is closed");
            match bytes {
                0 => assert!(matches!(error, Error::Closed), "{error:?}"),
                _ => assert!(matches!(error, Error::CutShort { bytes: 3 }), "{error:?}"),
            }
        }
    }
}

#[test]
fn surplus_descriptors_and_an_error_of_the_socket_are_errors() {
    let mut wire = Wire::new();
    let fds: Vec<_> = (0..17).map(|_| eventfd()).collect();
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    wire.send(&[0; 8], &fds);
    let message = wire.next().expect("they are received").expect("a whole message");
    let error = message.descriptor("a vector").expect_err("it should have one");
    assert!(matches!(error, Error::SurplusDescriptors { count: 17, right: 1, .. }), "{error:?}");

    wire.client = Connection::new(memory(1).into());
    let error = wire.next().expect_err("a file is no socket");
    assert!(
        matches!(&error, Error::Receive { source } if source.raw_os_error() == Some(libc::ENOTSOCK)),
        "{error:?}"
    );
}

#[test]
fn the_greeting_must_be_a_known_version_and_an_id() {
    let fd = eventfd();
    let error = Session::new().tell(7, &[]).expect_err("an unknown version");
    assert!(matches!(error, Error::Version { version: 7 }), "{error:?}");
    let error = Session::new().tell(0, &[fd.as_fd()]).expect_err("a descriptor");
    assert!(matches!(error, Error::SurplusDescriptors { value: 0, right: 0, .. }), "{error:?}");

    for id in [-1, 65_536] {
        let mut session = Session::new();
        session.tell(0, &[]).expect("the version");
        let error = session.tell(id, &[]).expect_err("not an id");
        assert!(matches!(error, Error::Unexpected { value, .. } if value == id), "{error:?}");
    }
    let mut session = Session::new();
    session.tell(0, &[]).expect("the version");
    let error = session.tell(3, &[fd.as_fd()]).expect_err("a descriptor");
    assert!(matches!(error, Error::SurplusDescriptors { value: 3, right: 0, .. }), "{error:?}");
    assert_eq!(session.table.id, None);
    session.tell(65_535, &[]).expect("the largest id");
    assert_eq!(session.table.id, Some(65_535));
}

#[test]
fn the_memory_comes_once_and_with_a_descriptor() {
    let mut session = Session::new();
    session.tell(0, &[]).expect("the version");
    session.tell(5, &[]).expect("the id");
    let error = session.tell(-1, &[]).expect_err("no descriptor");
    assert!(matches!(error, Error::NoDescriptor { value: -1, .. }), "{error:?}");
    assert!(session.table.memory.is_none());
    let file = memory(8192);
    assert_eq!(session.tell(-1, &[file.as_fd()]).expect("the memory"), Change::Greeting);
    assert_eq!(session.table.memory.take().map(|memory| memory.len()), Some(8192));
    let error = session.tell(-1, &[file.as_fd()]).expect_err("a second memory");
    assert!(matches!(error, Error::Unexpected { value: -1, .. }), "{error:?}");
    assert!(session.table.memory.is_none());
}

#[test]
fn the_vectors_of_each_peer_are_counted_and_ring_its_eventfds() {
    let mut session = Session::greeted();
    let own = session.vectors(5, 2);
    let peer = session.vectors(9, 3);
    assert_eq!(session.table.own.len(), 2);
    for (id, eventfds) in [(5, &own), (9, &peer)] {
        assert_eq!(session.table.vectors(id).expect("it is known").len(), eventfds.len());
        for (number, eventfd) in (0..).zip(eventfds) {
            session.table.vector(id, number).expect("it is known").ring().expect("an eventfd");
            assert_eq!(eventfd.read(), Ok(1), "vector {number} of {id}");
        }
        let has = eventfds.len() as u32;
        let error = session.table.vector(id, has).expect_err("one vector too many");
        assert!(
            matches!(error, Error::UnknownVector { peer, vector, has: h }
                if (peer, vector, h) == (id, has, has)),
            "{error:?}"
        );
    }
    let error = session.table.vectors(8).expect_err("an unknown peer");
    assert!(matches!(error, Error::UnknownPeer { peer: 8 }), "{error:?}");
}

#[test]
fn most_vectors_follows_the_peers_that_come_and_go() {
    let mut session = Session::greeted();
    session.vectors(5, 4);
    assert_eq!(session.table.most_vectors(), None, "the client's own vectors do not count");
    let most = |session: &mut Session, peer, count| {
        session.vectors(peer, count);
        session.table.most_vectors()
    };
    assert_eq!(most(&mut session, 1, 1), Some(1));
    assert_eq!(most(&mut session, 2, 2), Some(2));
    assert_eq!(most(&mut session, 3, 2), Some(2));
    assert_eq!(most(&mut session, 1, 2), Some(3));
    for (peer, left) in [(1, Some(2)), (2, Some(2)), (3, None)] {
        assert_eq!(
            session.tell(peer.into(), &[]).expect("a known peer"),
            Change::Left(peer, false)
        );
        assert_eq!(session.table.most_vectors(), left, "after {peer} left");
    }
    assert!(session.table.with_vectors.is_empty(), "no count is left over");
}

#[test]
fn a_peer_leaves_once_and_the_client_itself_never() {
    let mut session = Session::greeted();
    session.vectors(9, 1);
    session.table.peers.get_mut(&9).expect("it is known").announced = true;
    assert_eq!(session.tell(9, &[]).expect("a known peer"), Change::Left(9, true));
    let error = session.tell(9, &[]).expect_err("it has left");
    assert!(matches!(error, Error::UnknownLeft { peer: 9 }), "{error:?}");
    let error = session.tell(5, &[]).expect_err("the client itself");
    assert!(matches!(error, Error::SelfLeft { peer: 5 }), "{error:?}");
    for value in [-3, 65_536] {
        let error = session.tell(value, &[]).expect_err("not an id");
        assert!(matches!(error, Error::Unexpected { value: v, .. } if v == value), "{error:?}");
    }
}

#[test]
fn a_vector_must_be_an_eventfd_and_a_peer_has_2048_at_most() {
    let mut session = Session::greeted();
    let file = memory(1);
    for peer in [5, 9] {
        let error = session.tell(peer, &[file.as_fd()]).expect_err("a file");
        let id = peer as u16;
        assert!(
            matches!(error, Error::NotAnEventfd { peer, vector: 0 } if peer == id),
            "{error:?}"
        );
    }
    assert!(session.table.peers.is_empty(), "a peer without a vector is not known");
    let vector = eventfd();
    for peer in [5, 9] {
        for _ in 0..MAX_VECTORS {
            session.tell(peer, &[vector.as_fd()]).expect("a vector");
        }
        let id = peer as u16;
        let error = session.tell(peer, &[vector.as_fd()]).expect_err("one vector too many");
        assert!(matches!(error, Error::TooManyVectors { peer } if peer == id), "{error:?}");
    }
}

#[test]
fn missing_names_the_next_part_of_the_greeting() {
    let mut session = Session::new();
    assert_eq!(session.table.missing(None), "the protocol version");
    session.tell(0, &[]).expect("the version");
    assert_eq!(session.table.missing(None), "the client's id");
    session.tell(5, &[]).expect("the id");
    assert_eq!(session.table.missing(Some(2)), "the shared memory");
    session.tell(-1, &[memory(1).as_fd()]).expect("the memory");
    assert_eq!(session.table.missing(Some(2)), "the client's own first vector");
    session.vectors(5, 1);
    assert_eq!(session.table.missing(None), "another one of the client's own vectors");
    let text = session.table.missing(Some(2));
    assert!(text.starts_with("the client's own vector 1, of 2 asked for"), "{text}");
}
