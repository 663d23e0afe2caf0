// SPDX-License-Identifier: GPL-2.0-or-later
//! Tests of what the model test does not see: the lookups that the server uses, and the memory that
//! the tables use.

use super::super::departures::{Departure, Departures};
use super::super::{Key, Roster};
use crate::protocol::ID_SPACE;

fn join(roster: &mut Roster<u64>, payload: u64) -> Result<u16, u64> {
    roster.join(0, payload)
}

fn departure(id: u16, left: u64) -> Departure {
    Departure { id, key: 1, left, owner: 0 }
}

/// A roster of the ids 40, 41, 42 with the payloads 10, 20, 30, and the keys of its members.
fn three() -> (Roster<u64>, [Key; 3]) {
    let mut roster = Roster::new(3, 40, ID_SPACE);
    let keys = [10, 20, 30].map(|payload| {
        let key = roster.next_key();
        join(&mut roster, payload).expect("an id is free");
        key
    });
    (roster, keys)
}

#[test]
fn a_key_is_a_number_that_comes_back_unchanged() {
    for number in [0, 1, 7, u64::MAX] {
        assert_eq!(Key::from_u64(number).to_u64(), number);
    }
}

#[test]
fn each_member_is_found_by_position_key_and_id() {
    let (mut roster, keys) = three();
    assert_eq!((roster.len(), roster.vectors()), (3, 3));
    for (index, (key, (id, payload))) in
        keys.into_iter().zip([(40, 10), (41, 20), (42, 30)]).enumerate()
    {
        assert_eq!(roster.key(index), key);
        assert_eq!(roster.id(index), id);
        assert_eq!(*roster.payload(index), payload);
        assert_eq!((roster.index(key), roster.index_of_id(id)), (Some(index), Some(index)));
        *roster.payload_mut(index) += 1;
        assert_eq!(*roster.payload(index), payload + 1);
    }
    for id in [0, 39, 43, u16::MAX] {
        assert_eq!(roster.index_of_id(id), None, "no member has the id {id}");
    }
}

#[test]
fn index_from_is_the_first_member_with_at_least_that_key() {
    let (mut roster, [first, second, third]) = three();
    let after = |key: Key| Key::from_u64(key.to_u64() + 1);
    assert_eq!([first, second, third].map(|key| roster.index_from(key)), [0, 1, 2]);
    assert_eq!(roster.index_from(Key::from_u64(0)), 0);
    assert_eq!(roster.index_from(after(third)), 3);
    roster.leave(second).expect("it is connected");
    assert_eq!([first, second, third].map(|key| roster.index_from(key)), [0, 1, 1]);
}

#[test]
fn greeting_left_counts_down_to_zero() {
    let (mut roster, _) = three();
    let left: Vec<_> = (0..5)
        .map(|_| {
            let left = roster.greeting_left(1);
            roster.note_told(1, 1);
            left
        })
        .collect();
    assert_eq!(left, [3, 2, 1, 0, 0]);
    assert_eq!(roster.greeting_left(0), 3, "the other members are where they were");
}

#[test]
fn a_limit_of_messages_stops_the_walk() {
    let (roster, _) = three();
    for most in 0..=12 {
        let mut seen = 0;
        roster.for_each_message(2, most, |_| {
            seen += 1;
            true
        });
        assert_eq!(seen, most, "the greeting has 3 messages, and the members have 9 vectors");
    }
    let mut seen = 0;
    roster.for_each_message(2, 100, |_| {
        seen += 1;
        seen < 5
    });
    assert_eq!(seen, 5, "the callback stops the walk too");
}

#[test]
fn an_id_stays_remembered_until_no_other_id_is_left() {
    let mut roster = Roster::new(1, 0, 3);
    for _ in 0..2 {
        join(&mut roster, 0).expect("an id is free");
    }
    roster.leave(roster.key(1)).expect("it is connected");
    assert_eq!(roster.ids_left(), (1, 1));
    assert_eq!(roster.next_id(), Some(2));
    assert_eq!(roster.ids_left(), (1, 1), "an id was free, so no other id was looked for");
    join(&mut roster, 0).expect("an id is free");
    assert_eq!(roster.ids_left(), (0, 1));
    assert_eq!(roster.next_id(), Some(1), "no client was told of its last owner");
    assert_eq!(roster.ids_left(), (1, 0));
}

#[test]
fn the_table_of_ids_grows_by_as_much_as_is_needed() {
    let mut roster = Roster::new(1, 0, ID_SPACE);
    for _ in 0..=1024 {
        join(&mut roster, 0).expect("an id is free");
    }
    assert_eq!(roster.keys.len(), 2048);
    assert!(roster.keys.capacity() < 3000, "{}", roster.keys.capacity());
}

#[test]
fn the_log_of_departures_gives_memory_back_when_less_than_a_quarter_is_used() {
    for (remaining, shrinks) in [(256, false), (255, true)] {
        let mut departures = Departures::default();
        for id in 0..1024 {
            departures.add(departure(id, u64::from(id) + 2));
        }
        let room = departures.capacity();
        assert_eq!(room, 1024, "Vec doubles its capacity");
        departures.forget(|departure| departure.id >= remaining);
        assert_eq!(departures.len(), usize::from(remaining));
        assert_eq!(departures.capacity() < room, shrinks, "{remaining} of {room}");
    }
}

#[test]
fn the_log_of_departures_is_searched_from_the_number_on() {
    let mut departures = Departures::default();
    assert!(!departures.has_grown());
    for (id, left) in [(1, 10), (2, 20), (3, 30)] {
        departures.add(departure(id, left));
    }
    for (number, ids) in
        [(0, &[1, 2, 3][..]), (10, &[1, 2, 3]), (11, &[2, 3]), (30, &[3]), (31, &[])]
    {
        let found: Vec<_> = departures.since(number).iter().map(|departure| departure.id).collect();
        assert_eq!(found, ids, "from {number} on");
    }
    assert!(departures.has_grown());
    departures.forget(|_| false);
    assert!(!departures.has_grown());
}
