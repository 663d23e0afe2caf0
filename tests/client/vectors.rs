// SPDX-License-Identifier: GPL-2.0-or-later
//! Vectors: waiting, polling, taking them out of the client and giving them back.

#![forbid(unsafe_code)]

use std::os::fd::AsFd;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use ivshmem::client::{Client, Error, Event, Vector};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::next;
use crate::common::PATIENCE;
use crate::common::daemon::Daemon;
use crate::common::program::run;

#[test]
fn a_client_is_one_descriptor_that_is_readable_when_something_happened() {
    let daemon = Daemon::builder().start();
    let mut one = Client::connect(daemon.socket_path()).expect("the first");
    let readable = |client: &Client, time: PollTimeout| {
        poll(&mut [PollFd::new(client.as_fd(), PollFlags::POLLIN)], time).expect("poll") == 1
    };
    let patience = PollTimeout::try_from(PATIENCE).expect("it fits");
    assert!(!readable(&one, PollTimeout::ZERO));
    let two = Client::connect(daemon.socket_path()).expect("the second");
    assert!(readable(&one, patience), "somebody joined");
    assert_eq!(one.dispatch().expect("it works").len(), 1);
    assert!(!readable(&one, PollTimeout::ZERO));
    two.ring(0, 0).expect("it is here");
    assert!(readable(&one, patience), "somebody rang");
    assert_eq!(one.dispatch().expect("it works").len(), 1);
    assert!(!readable(&one, PollTimeout::ZERO));
    drop(two);
    assert!(readable(&one, patience), "somebody left");
}

#[test]
fn a_wait_ends_when_its_time_is_up() {
    let daemon = Daemon::builder().start();
    let mut client = Client::connect(daemon.socket_path()).expect("a server");
    let time = Duration::from_millis(50);
    let start = Instant::now();
    assert!(client.wait(Some(time)).expect("it can wait").is_empty());
    assert!(start.elapsed() >= time);
    let mut vector = client.vector(0).expect("it has one");
    let start = Instant::now();
    assert!(!vector.wait(Some(time)).expect("it can wait"));
    assert!(start.elapsed() >= time);
    assert_eq!(vector.take().expect("it can look"), 0);
}

#[test]
fn a_vector_and_a_doorbell_work_in_threads_of_their_own() {
    let daemon = Daemon::builder().vectors(2).start();
    let mut one = Client::connect(daemon.socket_path()).expect("the first");
    let two = Client::connect(daemon.socket_path()).expect("the second");
    assert!(matches!(next(&mut one)[..], [Event::Joined { peer: 1, .. }]));
    // With polling and without. The rounds are enough for both ways to be used.
    for spin in [Duration::ZERO, Duration::from_micros(20)] {
        const ROUNDS: usize = 2000;
        let mut ping = one.vector(1).expect("it has two").spin(spin);
        let mut pong = two.vector(1).expect("it has two").spin(spin);
        let back = one.doorbell(1, 1).expect("it has joined");
        let there = two.doorbell(0, 1).expect("it was here before");
        let echo = thread::spawn(move || {
            for _ in 0..ROUNDS {
                assert!(ping.wait(Some(PATIENCE)).expect("it can wait"));
                back.ring().expect("it rings");
            }
        });
        for _ in 0..ROUNDS {
            there.ring().expect("it rings");
            assert!(pong.wait(Some(PATIENCE)).expect("it can wait"));
        }
        echo.join().expect("it got them all");
    }
}

#[test]
fn an_interrupt_is_reported_once_by_the_client_or_by_the_vector_that_was_taken() {
    let daemon = Daemon::builder().start();
    let mut client = Client::connect(daemon.socket_path()).expect("a server");
    let ring = |client: &Client| client.ring(0, 0).expect("itself");
    let rung = |client: &mut Client| match &client.dispatch().expect("it works")[..] {
        [] => 0,
        [Event::Rung { vector: 0, count }] => *count,
        other => panic!("{other:?}"),
    };
    ring(&client);
    assert_eq!(rung(&mut client), 1);
    ring(&client);
    let mut vector = client.vector(0).expect("it has one").spin(Duration::ZERO);
    assert!(matches!(client.vector(0), Err(Error::VectorTaken { vector: 0 })));
    assert_eq!(rung(&mut client), 0, "the vector reports it, as the client has not");
    let waits = |vector: &mut Vector| vector.wait(Some(Duration::ZERO)).expect("it can look");
    assert!(waits(&mut vector));
    assert!(!waits(&mut vector), "once");
    for _ in 0..3 {
        ring(&client);
    }
    assert!(waits(&mut vector), "several at once are one");
    assert!(!waits(&mut vector));
    assert_eq!(vector.take().expect("it can look"), 4, "`take` tells how many");
    assert_eq!(vector.take().expect("it can look"), 0);
    ring(&client);
    assert_eq!(vector.take().expect("it can look"), 1);
    assert!(!waits(&mut vector), "a wait does not report what was taken");
    ring(&client);
    assert!(waits(&mut vector));
    drop(vector);
    assert_eq!(rung(&mut client), 0, "the wait has reported it");
    let mut vector = client.vector(0).expect("it is free again");
    assert!(!waits(&mut vector));
    ring(&client);
    drop(vector);
    assert_eq!(rung(&mut client), 1, "the client reports what the vector did not");
    let vector = client.vector(0).expect("it is free again");
    ring(&client);
    drop(vector);
    assert_eq!(rung(&mut client), 1, "also after a vector that never waited");
    // A vector may outlive its client.
    let vector = client.vector(0).expect("it is free again");
    drop(client);
    drop(vector);
}

/// strace makes each read of a vector take half a second. So the interrupt comes when the dropped vector has polled
/// already, and has not read yet.
#[test]
fn an_interrupt_while_a_vector_is_dropped_is_not_lost() {
    let slowly = "-f -qq -o /dev/null -e trace=preadv2 -e inject=preadv2:delay_enter=500000";
    let ended = run(Command::new("strace")
        .args(slowly.split(' '))
        .arg(std::env::current_exe().expect("this program"))
        .args(["--exact", "vectors::drops_a_vector_while_it_is_rung", "--ignored", "--nocapture"]));
    assert!(ended.status.success(), "{ended:?}");
    assert!(ended.stdout.contains("test result: ok. 1 passed"), "{ended:?}");
}

#[test]
#[ignore = "another test starts it, as a process whose reads take long"]
fn drops_a_vector_while_it_is_rung() {
    let daemon = Daemon::builder().start();
    let mut client = Client::connect(daemon.socket_path()).expect("a server");
    let doorbell = client.doorbell(0, 0).expect("it has one");
    let mut vector = client.vector(0).expect("it has one");
    doorbell.ring().expect("it can be rung");
    assert!(vector.wait(Some(PATIENCE)).expect("it can wait"));
    let again = thread::spawn(move || {
        thread::sleep(Duration::from_millis(100));
        doorbell.ring().expect("it can be rung");
    });
    drop(vector);
    again.join().expect("no panic");
    assert!(matches!(next(&mut client)[..], [Event::Rung { vector: 0, count: 1 }]));
}

#[test]
fn a_vector_that_was_read_many_times_can_still_be_waited_for() {
    let daemon = Daemon::builder().start();
    let client = Client::connect(daemon.socket_path()).expect("a server");
    let mut vector = client.vector(0).expect("it has one");
    for _ in 0..3 {
        assert!(!vector.wait(Some(Duration::ZERO)).expect("it can look"));
        client.ring(0, 0).expect("itself");
        assert!(vector.wait(Some(PATIENCE)).expect("it can wait"));
        assert_eq!(vector.take().expect("it can look"), 1);
        for _ in 0..100 {
            assert_eq!(vector.take().expect("it can look"), 0);
            client.ring(0, 0).expect("itself");
            assert_eq!(vector.take().expect("it can look"), 1);
        }
        client.ring(0, 0).expect("itself");
        assert!(
            vector.wait(Some(PATIENCE)).expect("it can wait"),
            "an interrupt after the last `take`"
        );
        assert!(!vector.wait(Some(Duration::ZERO)).expect("it can look"), "once");
        assert_eq!(vector.take().expect("it can look"), 1);
    }
}

#[test]
fn a_vector_that_a_peer_filled_up_still_reports_interrupts() {
    let daemon = Daemon::builder().start();
    let client = Client::connect(daemon.socket_path()).expect("a server");
    let doorbell = client.doorbell(0, 0).expect("its own");
    let mut vector = client.vector(0).expect("it has one").spin(Duration::ZERO);
    assert!(!vector.wait(Some(Duration::ZERO)).expect("it can look"));
    for _ in 0..3 {
        nix::unistd::write(&doorbell, &(u64::MAX - 1).to_ne_bytes()).expect("there is room");
        assert!(vector.wait(Some(PATIENCE)).expect("it can wait"));
        doorbell.ring().expect("it rings");
        assert!(vector.wait(Some(PATIENCE)).expect("it can wait"), "there is room again");
        vector.take().expect("it can look");
    }
}
