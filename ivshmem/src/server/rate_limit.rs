// SPDX-License-Identifier: GPL-2.0-or-later
//! A rate limit for log lines that clients can cause: one line a second of each kind.

#![forbid(unsafe_code)]

use std::fmt::{Arguments, Display};
use std::time::{Duration, Instant};

const PERIOD: Duration = Duration::from_secs(1);

/// The rate limit for one kind of line. It counts the suppressed lines, and adds the count to the
/// next line.
#[derive(Debug, Default)]
pub(super) struct RateLimit {
    last: Option<Instant>,
    suppressed: u64,
}

impl RateLimit {
    /// Logs `line` as a warning, unless one was logged less than a second ago.
    pub(super) fn warn(&mut self, line: Arguments<'_>) {
        self.limit(|| line);
    }

    /// Makes a line and logs it as a warning, unless one was logged less than a second ago.
    pub(super) fn limit<L: Display>(&mut self, line: impl FnOnce() -> L) {
        self.limit_at(Instant::now(), |suppressed| match suppressed {
            0 => log::warn!("{}", line()),
            suppressed => log::warn!("{} ({suppressed} more since the last such line)", line()),
        });
    }

    fn limit_at(&mut self, now: Instant, write: impl FnOnce(u64)) {
        if self.last.is_some_and(|last| now.duration_since(last) < PERIOD) {
            self.suppressed += 1;
        } else {
            self.last = Some(now);
            write(std::mem::take(&mut self.suppressed));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_a_second_and_the_rest_is_counted() {
        let mut limit = RateLimit::default();
        let start = Instant::now();
        let mut lines = Vec::new();
        for millis in [0, 10, 999, 1000, 1001, 2500] {
            limit.limit_at(start + Duration::from_millis(millis), |suppressed| {
                lines.push((millis, suppressed))
            });
        }
        assert_eq!(lines, [(0, 0), (1000, 2), (2500, 1)]);
    }
}
