// SPDX-License-Identifier: GPL-2.0-or-later
//! What C is told besides a value: `errno`, and lines on its stdout.

use std::ffi::CString;
use std::panic::{AssertUnwindSafe, catch_unwind};

use nix::errno::Errno;

/// Why a call failed, as C is told.
#[derive(Debug)]
pub(super) struct Failure(i32);

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        Self(errno as i32)
    }
}

impl From<&ivshmem::Error> for Failure {
    fn from(error: &ivshmem::Error) -> Self {
        Self(error.errno())
    }
}

/// The funnel that every function goes through: what `body` gives, or else `failed` with
/// `errno` set. A panic is a failure (`EIO`): it must not unwind into C.
pub(super) fn answer<T>(failed: T, body: impl FnOnce() -> Result<T, Failure>) -> T {
    let Failure(errno) = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(value)) => return value,
        Ok(Err(failure)) => failure,
        Err(_) => Failure::from(Errno::EIO),
    };
    Errno::set_raw(errno);
    failed
}

/// Prints a line through C's stdout: its buffer is C's, and another one would mix up the order.
pub(super) fn say(line: impl Into<Vec<u8>>) {
    // The texts come from C strings and numbers, so there is no NUL in them.
    let Ok(line) = CString::new(line) else { return };
    // SAFETY: the format takes one string, and both end with a NUL and outlive the call.
    // That a line cannot be written is no failure of the server.
    unsafe { libc::printf(c"%s\n".as_ptr(), line.as_ptr()) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_the_value_of_failure_and_eio() {
        Errno::clear();
        assert_eq!(answer(-1, || panic!("inside of the library")), -1);
        assert_eq!(Errno::last(), Errno::EIO);
    }

    #[test]
    fn a_failure_sets_errno_and_success_leaves_it_alone() {
        Errno::EDOM.set();
        assert_eq!(answer(-1, || Ok(0)), 0);
        assert_eq!(Errno::last(), Errno::EDOM);
        assert_eq!(answer(-1, || Err(Errno::EBUSY.into())), -1);
        assert_eq!(Errno::last(), Errno::EBUSY);
    }
}
