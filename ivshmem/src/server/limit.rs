// SPDX-License-Identifier: GPL-2.0-or-later
//! A log line that can be provoked from outside comes at most once a second.

#![forbid(unsafe_code)]

use std::fmt::Arguments;
use std::time::{Duration, Instant};

const PERIOD: Duration = Duration::from_secs(1);

/// Counts what it keeps from the log, and tells with the next line.
#[derive(Debug, Default)]
pub struct LogLimit {
    last: Option<Instant>,
    kept: u64,
}

impl LogLimit {
    /// Logs `line` as a warning, if it is time to.
    pub fn warn(&mut self, line: Arguments<'_>) {
        self.tell(line, |line| log::warn!("{line}"));
    }

    /// Has `write` write the line, if it is time to.
    pub fn tell(&mut self, line: Arguments<'_>, write: impl FnOnce(Arguments<'_>)) {
        self.tell_at(Instant::now(), |kept| match kept {
            0 => write(line),
            kept => write(format_args!("{line} (and {kept} times more since the last such line)")),
        });
    }

    fn tell_at(&mut self, now: Instant, write: impl FnOnce(u64)) {
        if self.last.is_some_and(|last| now.duration_since(last) < PERIOD) {
            self.kept += 1;
        } else {
            self.last = Some(now);
            write(std::mem::take(&mut self.kept));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_a_second_and_the_rest_is_counted() {
        let mut limit = LogLimit::default();
        let start = Instant::now();
        let mut lines = Vec::new();
        for millis in [0, 10, 999, 1000, 1001, 2500] {
            limit.tell_at(start + Duration::from_millis(millis), |kept| lines.push((millis, kept)));
        }
        assert_eq!(lines, [(0, 0), (1000, 2), (2500, 1)]);
    }
}
