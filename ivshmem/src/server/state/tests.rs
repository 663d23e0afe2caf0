// SPDX-License-Identifier: GPL-2.0-or-later
//! Damaged and foreign files are refused, with the number that is wrong.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use super::super::roster::Roster;
use super::*;

/// A file with three clients, of which the first has left, and the file's roster.
fn state() -> (State, Roster<u32>) {
    let things = Things { memory_size: 4096, listener: 9, ..Things::default() };
    let mut state = State::create(2, 5, 10, &things).expect("a memfd");
    let mut roster = Roster::new(2, 5, 10);
    for cookie in 1..=3 {
        let id = roster.next_id().expect("ids are left");
        let slot = state.reserve(id).expect("there is memory");
        roster.join(7, slot).expect("ids are left");
        let member = roster.saved_member(roster.len() - 1);
        state.joined(slot, &roster, &member, cookie, &[10, 11]);
    }
    let key = roster.key(0);
    let (_, slot) = roster.leave(key).expect("it is there");
    state.left(slot, &roster.last_departure().expect("it has left"));
    (state, roster)
}

fn copy_of(state: &State) -> OwnedFd {
    state.as_fd().try_clone_to_owned().expect("a descriptor")
}

/// What is wrong with the file once these bytes are at this offset.
fn problem_with(offset: usize, bytes: &[u8]) -> String {
    let (state, _) = state();
    state.file.write_all_at(bytes, offset as u64).expect("it may be written");
    match State::open(copy_of(&state)) {
        Ok((_, image)) => panic!("{bytes:?} at {offset} was accepted: {image:?}"),
        Err(problem) => problem,
    }
}

#[test]
fn a_file_gives_back_what_was_stored() {
    let (state, roster) = state();
    assert!(is_state(state.as_fd()).expect("it can be read"));
    let (_, image) = State::open(copy_of(&state)).expect("it is right");
    assert_eq!(image.roster, roster.save());
    let client = &image.clients[1];
    assert_eq!((client.cookie, &client.eventfds[..], client.slot), (3, &[10, 11][..], 2));
    assert_eq!((image.things.listener, image.things.memory_size), (9, 4096));
}

#[test]
fn what_was_sent_and_the_rest_of_a_partial_write_are_given_back() {
    let (state, mut roster) = state();
    roster.note_told(0, 4);
    state.record_of(1).sending(4);
    let (_, image) = State::open(copy_of(&state)).expect("it is right");
    assert!(image.clients[0].is_unknown && !image.clients[1].is_unknown);
    let partial = (6i64.to_le_bytes(), 5);
    state.record_of(1).sent(&roster.progress(0), Some(partial));
    let (_, image) = State::open(copy_of(&state)).expect("it is right");
    assert_eq!(image.roster, roster.save());
    assert_eq!((image.clients[0].is_unknown, image.clients[0].partial), (false, Some(partial)));
    state.record_of(1).sending(1);
    state.record_of(1).sent(&roster.progress(0), None);
    let (_, image) = State::open(copy_of(&state)).expect("it is right");
    assert_eq!((image.clients[0].is_unknown, image.clients[0].partial), (false, None));
}

#[test]
fn a_damaged_file_is_refused_with_the_number_that_is_wrong() {
    let layout = Layout::new(2, 10);
    let second = layout.client(1);
    let id = layout.id(0);
    let cases: [(usize, u32, &str); 16] = [
        (header::MAGIC, 0, "begins with"),
        (header::FORMAT, 77, "its format is 77; this program knows format 1 only"),
        (header::VECTORS, 0, "0 vectors"),
        (header::VECTORS, 2049, "2049 vectors"),
        (header::VECTORS, 900, "with 900 vectors and 10 ids"),
        (header::FIRST, 65_536, "first id is 65536"),
        (header::SPACE, 0, "0 ids"),
        (header::GIVEN, 11, "11 of 10 ids"),
        (header::GIVEN, 2, "id 7, which was not given"),
        (header::SLOTS, 11, "11 client records"),
        (second + client::KEY, 3, "two clients have the key 3"),
        (second + client::ID, 7, "two clients have the id 7"),
        (second + client::COOKIE, 3, "two clients have the socket 0x3"),
        (second + client::GREETED, 4, "client 6 was sent 4 messages"),
        (second + client::HEARD, 900, "departures up to 900"),
        (id + id::KEY, 50, "joined as 50 and left as 4"),
    ];
    for (offset, value, expected) in cases {
        let problem = problem_with(offset, &value.to_ne_bytes());
        assert!(problem.contains(expected), "{problem:?} does not say {expected:?}");
    }
    let problem = problem_with(second + client::CURSOR_VECTORS, &3u32.to_ne_bytes());
    assert!(problem.contains("3 vectors of join 0"), "{problem}");
    let problem = problem_with(second + client::PARTIAL_SENT, &8u32.to_ne_bytes());
    assert!(problem.contains("8 bytes"), "{problem}");
}

#[test]
fn a_file_whose_size_can_change_is_refused() {
    let file = tempfile::tempfile().expect("a temporary file");
    file.set_len(1 << 20).expect("it grows");
    let problem = State::open(file.into()).expect_err("anybody may cut it off");
    assert!(problem.contains("seals"), "{problem}");
    let empty = tempfile::tempfile().expect("a temporary file");
    let problem = State::open(empty.into()).expect_err("it has no header");
    assert!(problem.contains("it has 0 bytes"), "{problem}");
}

#[test]
fn random_damage_never_panics_and_what_is_accepted_can_be_restored() {
    let (original, _) = state();
    let size = original.layout.client(3);
    let mut random = 1u64;
    for _ in 0..3000 {
        let (state, _) = state();
        for _ in 0..3 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let offset = (random >> 33) as usize % size;
            // The header and the records, which are a small part of the file.
            let bytes = [(random >> 20) as u8];
            state.file.write_all_at(&bytes, offset as u64).expect("it may be written");
        }
        if let Ok((_, image)) = State::open(copy_of(&state)) {
            let clients = image.clients.len();
            let mut roster = Roster::restore(image.roster, 0..clients);
            for index in 0..clients {
                assert_eq!(roster.index_of_id(roster.id(index)), Some(index));
                let behind = roster.behind(index);
                roster.note_told(index, behind as usize);
                assert_eq!(roster.behind(index), 0);
            }
            roster.next_id();
        }
    }
}
