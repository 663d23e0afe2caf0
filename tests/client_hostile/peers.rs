// SPDX-License-Identifier: GPL-2.0-or-later
//! Messages about peers, in every order, and the end of the greeting.

#![forbid(unsafe_code)]

use std::io::Write;
use std::thread;
use std::time::Duration;

use ivshmem::client::{Error, Event};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::{
    PATIENCE, SHORT, Wrong, alone, client, connected, disconnected, eventfd, memory, refused,
};

#[test]
fn the_departure_of_an_unknown_peer_is_an_error() {
    alone(|| {
        let error = refused(|server| {
            server.greet();
            server.say(7);
        });
        assert!(matches!(error, Error::UnknownLeft { peer: 7 }), "{error:?}");
        let (events, error) = disconnected(|server| {
            server.vectors(7, 1);
            server.say(7);
            server.say(7);
        });
        assert!(
            matches!(events[..], [Event::Joined { peer: 7, vectors: 1 }, Event::Left { peer: 7 }]),
            "{events:?}"
        );
        assert!(matches!(error, Error::UnknownLeft { peer: 7 }), "{error:?}");
    });
}

#[test]
fn the_departure_of_the_client_itself_is_an_error() {
    alone(|| {
        let (_, error) = disconnected(|server| server.say(3));
        assert!(matches!(error, Error::SelfLeft { peer: 3 }), "{error:?}");
    });
}

#[test]
fn vectors_that_come_after_the_quiet_time_are_added() {
    alone(|| {
        let (server, socket) = Wrong::pair();
        server.greet();
        server.vectors(3, 1);
        let mut client = client().quiet_time(SHORT / 10).adopt(socket).expect("a right greeting");
        assert_eq!(client.vectors(), 1);
        server.vectors(3, 1);
        let events = client.wait(Some(PATIENCE)).expect("it can wait");
        assert!(matches!(events[..], [Event::Vector { vector: 1 }]), "{events:?}");
        client.ring(3, 1).expect("it is there now");
        let events = client.wait(Some(PATIENCE)).expect("it can wait");
        assert!(matches!(events[..], [Event::Rung { vector: 1, count: 1 }]), "{events:?}");
    });
}

#[test]
fn the_greeting_is_complete_when_the_server_goes_on_to_another_peer() {
    alone(|| {
        let (server, socket) = Wrong::pair();
        server.greet();
        server.vectors(3, 2);
        server.vectors(4, 1);
        let long = Duration::from_secs(3600);
        let mut client = client().quiet_time(long).adopt(socket).expect("a right greeting");
        assert_eq!(client.vectors(), 2);
        assert!(client.dispatch().expect("it works").is_empty(), "half of a peer is no event");
        server.vectors(4, 1);
        let events = client.wait(Some(PATIENCE)).expect("it can wait");
        assert!(matches!(events[..], [Event::Joined { peer: 4, vectors: 2 }]), "{events:?}");
    });
}

#[test]
fn a_peer_that_left_before_it_was_complete_does_not_show_the_number_of_vectors() {
    alone(|| {
        let (server, socket) = Wrong::pair();
        server.greet();
        server.vectors(9, 1);
        server.say(9);
        server.vectors(8, 3);
        server.vectors(3, 3);
        let long = Duration::from_secs(3600);
        let client = client().quiet_time(long).adopt(socket).expect("a right greeting");
        assert_eq!((client.vectors(), client.peers().len()), (3, 1));
    });
}

#[test]
fn a_peer_with_fewer_vectors_is_complete_when_the_next_peer_comes() {
    alone(|| {
        let (server, socket) = Wrong::pair();
        server.greet();
        server.vectors(3, 2);
        let mut client = client().vectors(2).adopt(socket).expect("a right greeting");
        server.vectors(4, 1);
        server.vectors(5, 2);
        let events = client.wait(Some(PATIENCE)).expect("it can wait");
        assert!(
            matches!(
                events[..],
                [Event::Joined { peer: 4, vectors: 1 }, Event::Joined { peer: 5, vectors: 2 }]
            ),
            "{events:?}"
        );
    });
}

#[test]
fn a_departure_between_two_vectors_of_a_peer_does_not_complete_the_peer() {
    alone(|| {
        let (server, socket) = Wrong::pair();
        server.greet();
        server.vectors(3, 2);
        server.vectors(4, 2);
        let mut client = client().vectors(2).adopt(socket).expect("a right greeting");
        let events = client.wait(Some(PATIENCE)).expect("it can wait");
        assert!(matches!(events[..], [Event::Joined { peer: 4, vectors: 2 }]), "{events:?}");
        server.vectors(5, 1);
        server.say(4);
        server.vectors(5, 1);
        let events = client.wait(Some(PATIENCE)).expect("it can wait");
        assert!(
            matches!(events[..], [Event::Left { peer: 4 }, Event::Joined { peer: 5, vectors: 2 }]),
            "{events:?}"
        );
    });
}

#[test]
fn a_greeting_costs_the_same_for_each_message_however_many_peers_there_are() {
    const PEERS: u16 = 10_000;
    const MORE: usize = 100_000;
    alone(|| {
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("up to the hard limit");
        let (server, socket) = Wrong::pair();
        let sending = thread::spawn(move || {
            server.say(0);
            server.say(PEERS.into());
            server.give(-1, memory(4096));
            let one = eventfd();
            (0..PEERS).for_each(|peer| server.give(peer.into(), &one));
            for _ in 0..MORE {
                server.give(60_000, &one);
                server.say(60_000);
            }
            server.vectors(PEERS, 1);
            server
        });
        let clock = nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID;
        let before = clock.now().expect("a clock");
        // The client does not know how many vectors there are, so each message may complete the greeting.
        let client = client().connect_timeout(6 * PATIENCE).adopt(socket);
        let took = Duration::from(clock.now().expect("a clock") - before);
        assert_eq!(client.as_ref().map(|client| client.peers().len()).ok(), Some(PEERS.into()));
        drop((client, sending.join().expect("it could send")));
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard).expect("the old limit");
        assert!(took < Duration::from_secs(3), "{took:?}");
    });
}

#[test]
fn a_client_never_sends_anything_to_the_server() {
    alone(|| {
        let (server, mut client) = connected();
        server.vectors(7, 1);
        client.wait(Some(PATIENCE)).expect("it works");
        client.ring_all().expect("both peers are known");
        drop(client);
        let mut left = Vec::new();
        let read = std::io::Read::read_to_end(&mut &server.0, &mut left);
        assert_eq!(read.expect("its end"), 0);
        assert!((&server.0).write(&[0]).is_err(), "the client closed the connection");
    });
}
