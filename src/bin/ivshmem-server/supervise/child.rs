// SPDX-License-Identifier: GPL-2.0-or-later
//! The server process that runs now, and the rule when to give up.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;

use super::END_LIMIT;
use super::program::Choice;

#[derive(Debug)]
pub(super) struct Child {
    pub(super) pid: Pid,
    pub(super) choice: Choice,
    pub(super) ready: bool,
    pub(super) asked_to_end: bool,
    /// When it is killed; `None` is never.
    pub(super) kill_at: Option<Instant>,
}

impl Child {
    pub(super) fn ask_to_end(&mut self, signal: Signal) {
        // It is not reaped yet, so the number is still its own.
        let _ = kill(self.pid, signal);
        if !std::mem::replace(&mut self.asked_to_end, true) {
            self.kill_at = Some(Instant::now() + END_LIMIT);
        }
    }
}

/// How a process ended, after "the server".
pub(super) fn in_words(status: WaitStatus) -> String {
    match status {
        WaitStatus::Exited(_, code) => format!("exited with status {code}"),
        WaitStatus::Signaled(_, signal, core) => {
            let core = if core { " and left a core file" } else { "" };
            format!("was killed by {signal}{core}")
        }
        other => format!("changed its state to {other:?}"),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Start again after this time.
    Retry(Duration),
    GiveUp,
}

/// The last deaths before a server was ready, with none that was ready in between.
#[derive(Debug, Default)]
pub(super) struct Deaths(Vec<Instant>);

impl Deaths {
    pub(super) const MOST: usize = 5;
    pub(super) const WITHIN: Duration = Duration::from_secs(10);

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    pub(super) fn add(&mut self, now: Instant) -> Verdict {
        self.0.retain(|&death| now.duration_since(death) < Self::WITHIN);
        self.0.push(now);
        match self.0.len() {
            count if count >= Self::MOST => Verdict::GiveUp,
            1 => Verdict::Retry(Duration::ZERO),
            // What is missing may be there a moment later.
            count => Verdict::Retry(Duration::from_millis(125 << count)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn five_deaths_within_ten_seconds_are_given_up() {
        let (mut deaths, start) = (Deaths::default(), Instant::now());
        for i in 0..4 {
            let verdict = deaths.add(start + Duration::from_secs(2 * i));
            assert!(matches!(verdict, Verdict::Retry(_)), "death {i}");
        }
        // The first is ten seconds old now.
        let late = start + Deaths::WITHIN;
        assert!(matches!(deaths.add(late), Verdict::Retry(_)));
        assert_eq!(deaths.add(late), Verdict::GiveUp);
    }

    #[test]
    fn the_delays_leave_room_for_five_deaths() {
        let (mut deaths, mut now) = (Deaths::default(), Instant::now());
        let start = now;
        while let Verdict::Retry(delay) = deaths.add(now) {
            now += delay;
        }
        assert!(now - start < Deaths::WITHIN / 2, "{:?}", now - start);
    }
}
