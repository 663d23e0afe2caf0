// SPDX-License-Identifier: GPL-2.0-or-later
//! Results for C besides the return value: `errno`, the text of the last error, and lines on its stdout.

use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use ivshmem::Chain;

use super::logging;

/// The failure of a call, in the form for C.
#[derive(Debug)]
pub(super) struct Failure {
    errno: i32,
    text: String,
}

impl Failure {
    /// A failure that the C API found itself. `text` is a whole sentence.
    pub(super) fn new(errno: Errno, text: impl Into<String>) -> Self {
        Self { errno: errno as i32, text: text.into() }
    }

    /// The argument of this name is NULL.
    pub(super) fn null(name: &str) -> Self {
        Self::new(Errno::EINVAL, format!("{name} is NULL"))
    }

    /// The server of the structure does not run.
    pub(super) fn not_running() -> Self {
        Self::new(Errno::EINVAL, "the server does not run; call ivshmem_server_start() first")
    }
}

impl From<&ivshmem::Error> for Failure {
    fn from(error: &ivshmem::Error) -> Self {
        Self { errno: error.errno(), text: Chain(error).to_string() }
    }
}

thread_local! {
    /// The text of the last failure in this thread.
    static LAST: RefCell<Option<CString>> = const { RefCell::new(None) };
}

/// The text of the last failure in this thread. It is valid until the next failure.
pub(super) fn last_error() -> *const c_char {
    let text = LAST.try_with(|last| last.borrow().as_ref().map(|text| text.as_ptr()));
    text.ok().flatten().unwrap_or(c"".as_ptr())
}

/// Each C function returns the value of this call: the result of `body`. If `body` fails, that is
/// `failed`, and `errno` and the text of the last error are set. A panic is a failure (`EIO`),
/// because it must not unwind into C. The log lines of the call go to the caller's function here,
/// where no lock is held.
pub(super) fn answer<T>(failed: T, body: impl FnOnce() -> Result<T, Failure>) -> T {
    let outcome = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|_| {
        let text = "the library has a bug: it panicked in this call; see stderr";
        Err(Failure::new(Errno::EIO, text))
    });
    logging::deliver();
    outcome.unwrap_or_else(|Failure { errno, text }| {
        let text = CString::new(text.replace('\0', "\u{fffd}")).ok();
        let _ = LAST.try_with(|last| last.replace(text));
        Errno::set_raw(errno);
        failed
    })
}

/// Prints a line through C's stdout: its buffer is C's, and another one would mix up the order.
pub(super) fn say(line: impl Into<Vec<u8>>) {
    // The texts come from C strings and numbers, so there is no NUL in them.
    let Ok(line) = CString::new(line) else { return };
    // SAFETY: the format takes one string, and both end with a NUL and outlive the call.
    // That a line cannot be written is no failure of the server.
    unsafe { libc::printf(c"%s\n".as_ptr(), line.as_ptr()) };
}

/// A rate limit for a line that clients can cause: once a second. It counts the lines that it
/// suppresses; the next line says how many.
#[derive(Debug, Default)]
pub(super) struct RateLimit {
    last: Option<Instant>,
    suppressed: u64,
}

impl RateLimit {
    /// The line to print, if it is time for one.
    pub(super) fn pass(&mut self, line: impl Display) -> Option<String> {
        self.pass_at(Instant::now(), line)
    }

    fn pass_at(&mut self, now: Instant, line: impl Display) -> Option<String> {
        if self.last.is_some_and(|last| now.duration_since(last) < Duration::from_secs(1)) {
            self.suppressed += 1;
            return None;
        }
        self.last = Some(now);
        Some(match std::mem::take(&mut self.suppressed) {
            0 => line.to_string(),
            count => format!("{line} ({count} more since the last such line)"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;

    fn last() -> &'static str {
        // SAFETY: the text lives until the next failure, and each test looks at it before.
        unsafe { CStr::from_ptr(last_error()) }.to_str().expect("text")
    }

    #[test]
    fn a_panic_becomes_the_value_of_failure_and_eio() {
        Errno::clear();
        assert_eq!(answer(-1, || panic!("inside of the library")), -1);
        assert_eq!(Errno::last(), Errno::EIO);
        assert!(last().contains("panicked"), "{}", last());
    }

    #[test]
    fn a_failure_sets_errno_and_the_text_and_success_leaves_both_alone() {
        Errno::EDOM.set();
        assert_eq!(answer(-1, || Ok(0)), 0);
        assert_eq!((Errno::last(), last()), (Errno::EDOM, ""));
        assert_eq!(answer(-1, || Err(Failure::new(Errno::EBUSY, "it\0 is busy"))), -1);
        assert_eq!((Errno::last(), last()), (Errno::EBUSY, "it\u{fffd} is busy"));
        assert_eq!(answer(-1, || Ok(0)), 0);
        assert_eq!((Errno::last(), last()), (Errno::EBUSY, "it\u{fffd} is busy"));
    }

    #[test]
    fn one_line_a_second_passes_and_the_next_says_how_many_did_not() {
        let mut limit = RateLimit::default();
        let start = Instant::now();
        let lines: Vec<_> = [0, 10, 999, 1000, 1001, 2500]
            .into_iter()
            .filter_map(|millis| limit.pass_at(start + Duration::from_millis(millis), "refused"))
            .collect();
        let more = |count| format!("refused ({count} more since the last such line)");
        assert_eq!(lines, ["refused".into(), more(2), more(1)]);
    }
}
