// SPDX-License-Identifier: GPL-2.0-or-later
//! Tests of the roster's rules: random histories, and named cases.

use proptest::prelude::*;
use proptest::test_runner::Config;

use super::{Message, Roster};
use crate::protocol::ID_SPACE;

mod lookups;
mod model;
mod restart;
use model::World;

/// One step of a history. The number of a client is taken modulo the number of clients.
#[derive(Clone, Debug)]
enum Step {
    Join,
    Leave(usize),
    /// It reads some messages.
    Tell(usize, usize),
    /// It reads all messages.
    TellAll(usize),
    /// All clients except this one read all messages.
    Stall(usize),
    /// Every client reads all its messages, this many at a time.
    Rest(usize),
    /// A client joins, reads some messages, and leaves.
    Visit(usize),
    Empty,
}

fn step() -> impl Strategy<Value = Step> {
    let who = 0..64usize;
    prop_oneof![
        12 => Just(Step::Join),
        8 => who.clone().prop_map(Step::Leave),
        12 => (who.clone(), 0..12usize).prop_map(|(who, count)| Step::Tell(who, count)),
        4 => who.clone().prop_map(Step::TellAll),
        3 => who.prop_map(Step::Stall),
        2 => (1..9usize).prop_map(Step::Rest),
        4 => (0..40usize).prop_map(Step::Visit),
        1 => Just(Step::Empty),
    ]
}

fn first_id() -> impl Strategy<Value = u16> {
    prop_oneof![Just(0), 65_520..=u16::MAX, any::<u16>()]
}

fn take(world: &mut World, step: &Step) {
    let here = world.model.clients.len();
    match *step {
        Step::Join => _ = world.join(),
        Step::Visit(count) => {
            if world.join().is_some() {
                world.tell(here, count);
                world.leave(here);
            }
        }
        Step::Rest(chunk) => world.rest(chunk),
        Step::Empty => (0..here).for_each(|_| _ = world.leave(0)),
        _ if here == 0 => {}
        Step::Leave(who) => _ = world.leave(who % here),
        Step::Tell(who, count) => _ = world.tell(who % here, count),
        Step::TellAll(who) => _ = world.tell(who % here, usize::MAX),
        Step::Stall(who) => {
            for at in (0..here).filter(|at| *at != who % here) {
                world.tell(at, usize::MAX);
            }
        }
    }
    world.check_bounds();
}

proptest! {
    #![proptest_config(Config { cases: 2500, failure_persistence: None, ..Config::default() })]

    #[test]
    fn no_history_makes_a_client_hear_what_it_must_not_or_miss_what_it_must_hear(
        vectors in 1..=4u32,
        space in 3..=12u32,
        first in first_id(),
        steps in prop::collection::vec(step(), 1..100),
        chunk in 1..7usize,
    ) {
        let mut world = World::new(vectors, first, space);
        prop_assert_eq!(world.join(), Some(first), "the first client gets the first id");
        for step in &steps {
            take(&mut world, step);
        }
        world.rest(chunk);
        // With no client connected, no id is remembered.
        take(&mut world, &Step::Empty);
        let mut ids: Vec<u16> = (0..space).filter_map(|_| world.join()).collect();
        let mut all: Vec<u16> = world.all_ids().collect();
        ids.sort_unstable();
        all.sort_unstable();
        prop_assert_eq!(ids, all, "all ids are free when nobody is here");
        prop_assert_eq!(world.join(), None, "more than there are ids");
        world.rest(chunk);
    }
}

/// The pending messages of the member at `index`: kind, id, vector.
fn waiting(roster: &Roster<u64>, index: usize) -> Vec<(&'static str, u16, usize)> {
    let flat = |message| match message {
        Message::Version => ("version", 0, 0),
        Message::YourId(id) => ("you", id, 0),
        Message::Memory => ("memory", 0, 0),
        Message::Vector { id, vector, .. } => ("vector", id, vector),
        Message::Gone(id) => ("gone", id, 0),
    };
    let messages: Vec<_> = roster.messages(index).map(flat).collect();
    assert_eq!(messages.len() as u64, roster.behind(index));
    messages
}

#[test]
fn a_client_is_greeted_and_told_of_the_others_then_itself_then_newcomers() {
    let mut world = World::new(2, 0, ID_SPACE);
    for _ in 0..3 {
        world.join();
    }
    let greeting = [("version", 0, 0), ("you", 1, 0), ("memory", 0, 0)];
    let walk = [0, 1, 2].map(|id| [("vector", id, 0), ("vector", id, 1)]);
    assert_eq!(waiting(&world.roster, 1), [&greeting[..], &walk.concat()].concat());
    world.rest(5);
}

#[test]
fn a_peer_that_leaves_when_half_told_of_is_gone_and_the_rest_of_it_is_not_told() {
    let mut world = World::new(4, 0, ID_SPACE);
    world.join();
    world.rest(1);
    world.join();
    world.join();
    assert_eq!(world.tell(0, 2), 2, "two of the four vectors of 1");
    world.leave(1);
    let rest = [0, 1, 2, 3].map(|vector| ("vector", 2, vector));
    assert_eq!(waiting(&world.roster, 0), [&[("gone", 1, 0)], &rest[..]].concat());
    world.rest(1);
    assert_eq!(world.model.clients[0].view(), [0, 2]);
}

#[test]
fn a_peer_that_leaves_before_its_first_vector_is_told_is_never_heard_of() {
    let mut world = World::new(4, 0, ID_SPACE);
    world.join();
    world.rest(1);
    world.join();
    world.leave(1);
    assert_eq!(waiting(&world.roster, 0), []);
}

#[test]
fn a_peer_that_leaves_while_another_is_half_told_of_is_said_at_once() {
    let mut world = World::new(3, 0, ID_SPACE);
    world.join();
    world.join();
    world.rest(1);
    world.join();
    world.tell(0, 1);
    world.leave(1);
    let rest = [("gone", 1, 0), ("vector", 2, 1), ("vector", 2, 2)];
    assert_eq!(waiting(&world.roster, 0), rest);
    world.rest(1);
}

#[test]
fn a_client_stalled_in_the_greeting_never_hears_of_those_who_came_and_went() {
    for told in 0..=3 {
        let mut world = World::new(2, 0, 8);
        world.join();
        world.join();
        assert_eq!(world.tell(1, told), told);
        for _ in 0..1000 {
            world.join().expect("an id that nobody was told of");
            world.tell(2, usize::MAX);
            world.leave(2);
        }
        world.leave(0);
        world.join().expect("an id that nobody was told of");
        let ids: Vec<_> = waiting(&world.roster, 0).into_iter().skip(3 - told).collect();
        let newest = world.model.clients[1].id;
        let expected = [1, newest].map(|id| [("vector", id, 0), ("vector", id, 1)]).concat();
        assert_eq!(ids, expected, "after {told} messages of the greeting");
        world.rest(1);
    }
}

#[test]
fn a_stalled_client_holds_no_ids_of_those_it_was_never_told_of() {
    let mut world = World::new(1, 0, ID_SPACE);
    world.join();
    world.tell(0, 2);
    for visit in 0..100_000u32 {
        let id = world.join().unwrap_or_else(|| panic!("visit {visit} was refused"));
        assert_ne!(id, 0, "visit {visit} got the stalled client's id");
        world.tell(1, 5);
        world.leave(1);
    }
    assert_eq!(world.roster.behind(0), 2, "the memory, and its own vector");
    world.check_bounds();
    world.rest(1);
}

#[test]
fn a_resident_that_was_told_of_everybody_holds_their_ids_until_it_leaves() {
    let mut world = World::new(1, 7, ID_SPACE);
    world.join();
    for _ in 1..ID_SPACE {
        world.join().expect("ids that were never given");
        world.tell(0, usize::MAX);
        world.leave(1);
    }
    world.check_bounds();
    for _ in 0..3 {
        assert_eq!(world.roster.next_id(), None);
        assert_eq!(world.roster.join(0, 0), Err(0), "each id was told of to the resident");
    }
    world.tell(0, usize::MAX);
    assert_eq!(world.model.clients[0].view(), [7], "the resident is unharmed");
    world.leave(0);
    // The id that was given back first is given first.
    assert_eq!(world.join(), Some(8));
    for _ in 1..ID_SPACE {
        world.roster.join(0, 0).expect("nobody is left who remembers");
    }
    assert_eq!(world.roster.join(0, 0), Err(0), "all ids are in use");
}

#[test]
fn a_client_that_reads_on_after_a_stall_holds_only_what_it_may_have_heard_of() {
    let mut world = World::new(1, 0, 3);
    world.join();
    world.tell(0, 3);
    // The client is never told of 1. Its id comes back after 2, the last id that was never given.
    world.join();
    world.leave(1);
    world.join();
    world.leave(1);
    assert_eq!(world.join(), Some(1), "nobody was told of the one before");
    world.rest(1);
    world.leave(1);
    world.rest(1);
    assert_eq!(world.join(), Some(2), "it left before the client could hear of it");
    world.rest(1);
    world.leave(1);
    assert_eq!(world.join(), None, "the client was told of both");
}
