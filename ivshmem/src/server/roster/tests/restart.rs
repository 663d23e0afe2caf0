// SPDX-License-Identifier: GPL-2.0-or-later
//! A roster that is restored from its state file goes on as if nothing had happened: after each
//! step of a history, and when the server is killed at any store of a step.

use std::os::fd::AsFd;

use proptest::prelude::*;
use proptest::test_runner::Config;

use super::super::{Progress, Roster, Saved};
use super::model::World;
use super::{Step, first_id, step, take};
use crate::server::state::{Image, State};

impl World {
    /// Reads the state file, as a new process does.
    fn image(&self) -> (State, Image) {
        let fd = self.state.as_fd().try_clone_to_owned().expect("a descriptor");
        State::open(fd).expect("the state file is right")
    }

    /// The process ends, and another one goes on.
    fn restart(&mut self) {
        self.state.sync_free(&self.roster);
        let (state, image) = self.image();
        assert_eq!(comparable(&image.roster), comparable(&self.roster.save()));
        for (saved, client) in image.clients.iter().zip(&self.model.clients) {
            assert_eq!((saved.slot, saved.is_unknown), (client.slot, false));
        }
        self.go_on(state, image.roster);
    }

    fn go_on(&mut self, state: State, saved: Saved) {
        let numbers: Vec<u64> = self.roster_numbers(&saved);
        self.roster = Roster::restore(saved, numbers);
        self.state = state;
    }

    /// The payloads of the members.
    fn roster_numbers(&self, saved: &Saved) -> Vec<u64> {
        let number = |key: u64| {
            let client = self.model.clients.iter().find(|client| client.key.to_u64() == key);
            client.expect("the model has it").number
        };
        saved.members.iter().map(|member| number(member.key)).collect()
    }
}

/// Without numbers that the file may have smaller, as nothing that a client hears depends on them.
fn comparable(saved: &Saved) -> Saved {
    let mut saved = Saved { frees: 0, ..saved.clone() };
    for member in &mut saved.members {
        member.progress = Progress { heard: 0, ..member.progress };
    }
    saved
}

proptest! {
    #![proptest_config(Config { cases: 1000, failure_persistence: None, ..Config::default() })]

    #[test]
    fn a_restart_after_each_step_changes_nothing_that_a_client_hears(
        vectors in 1..=4u32,
        space in 3..=12u32,
        first in first_id(),
        steps in prop::collection::vec(step(), 1..60),
        chunk in 1..7usize,
    ) {
        let mut world = World::new(vectors, first, space);
        world.restart();
        for step in &steps {
            take(&mut world, step);
            world.restart();
        }
        world.rest(chunk);
        world.restart();
        world.rest(chunk);
    }

    #[test]
    fn a_server_that_is_killed_at_any_store_has_done_a_step_or_not_or_says_that_it_does_not_know(
        vectors in 1..=3u32,
        space in 3..=6u32,
        first in first_id(),
        steps in prop::collection::vec((step(), 0..16usize), 1..40),
        chunk in 1..7usize,
    ) {
        let mut world = World::new(vectors, first, space);
        for (step, stores) in &steps {
            if !matches!(step, Step::Join | Step::Leave(_) | Step::Tell(..)) {
                take(&mut world, step);
                continue;
            }
            world.state.sync_free(&world.roster);
            let (before, model) = (world.roster.save(), world.model.clone());
            world.state.stop_after(*stores);
            take(&mut world, step);
            let after = world.roster.save();
            let (mut state, mut image) = world.image();
            let unknown: Vec<usize> = (0..image.clients.len())
                .filter(|&index| image.clients[index].is_unknown)
                .collect();
            if let [index] = unknown[..] {
                // It can only be ended. The other clients go on.
                prop_assert!(matches!(step, Step::Tell(..)));
                let slot = image.clients[index].slot;
                let departure = image.roster.leave(index);
                state.left(slot, &departure);
                let mut model = model;
                model.end(index);
                world.model = model;
            } else {
                prop_assert!(unknown.is_empty());
                let saved = comparable(&image.roster).members;
                // A step that tells of departures only changes `heard` only.
                let is_told = after.members.iter().zip(&image.roster.members).all(|(new, saved)| {
                    before.members.contains(new) || new == saved
                });
                if saved == comparable(&after).members && is_told {
                    // It was done.
                } else {
                    prop_assert_eq!(saved, comparable(&before).members);
                    world.model = model;
                }
            }
            world.go_on(state, image.roster);
            world.check_bounds();
        }
        world.rest(chunk);
    }
}
