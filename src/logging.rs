// SPDX-License-Identifier: GPL-2.0-or-later
//! The library's log lines, for a function of the C program.
//!
//! Lines are made while a server is locked, so they are not passed on at once: the function
//! could then call back into the library and wait for itself. They wait in the thread that made
//! them until the call is about to return, and [`deliver`] passes them on.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ffi::{CString, c_char, c_int, c_void};
use std::sync::{PoisonError, RwLock};

use log::{Level, LevelFilter, Log, Metadata, Record};
use nix::errno::Errno;

/// A function of the C program: severity, text, and the pointer that came with the function.
pub(super) type Function = unsafe extern "C" fn(c_int, *const c_char, *mut c_void);

#[derive(Clone, Copy)]
struct Target {
    function: Function,
    opaque: *mut c_void,
}

// SAFETY: the pointer is only passed on. ivshmem_server_set_log() says that the function is
// called from any thread.
unsafe impl Send for Target {}
// SAFETY: as above; nothing in it changes.
unsafe impl Sync for Target {}

/// Locked for reading while the function runs, so that to replace it waits for its end.
static TARGET: RwLock<Option<Target>> = RwLock::new(None);

thread_local! {
    /// Lines that wait for the end of the call.
    static PENDING: RefCell<VecDeque<(c_int, CString)>> = const { RefCell::new(VecDeque::new()) };
    /// Whether this thread is in the function.
    static DELIVERING: Cell<bool> = const { Cell::new(false) };
}

/// The library's end of the `log` crate.
struct Queue;

impl Log for Queue {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let text = record.args().to_string().replace('\0', "\u{fffd}");
        let Ok(text) = CString::new(text) else { return };
        // A thread that is ending has no list any more.
        let _ = PENDING.try_with(|pending| {
            pending.borrow_mut().push_back((severity(record.level()), text));
        });
    }

    fn flush(&self) {}
}

/// The severity of syslog(3).
fn severity(level: Level) -> c_int {
    match level {
        Level::Error => libc::LOG_ERR,
        Level::Warn => libc::LOG_WARNING,
        Level::Info => libc::LOG_INFO,
        Level::Debug | Level::Trace => libc::LOG_DEBUG,
    }
}

/// What is logged up to a severity of syslog(3).
fn filter(severity: c_int) -> LevelFilter {
    match severity {
        ..libc::LOG_ERR => LevelFilter::Off,
        libc::LOG_ERR => LevelFilter::Error,
        libc::LOG_WARNING | libc::LOG_NOTICE => LevelFilter::Warn,
        libc::LOG_INFO => LevelFilter::Info,
        _ => LevelFilter::Trace,
    }
}

/// Sets the function, or removes it. After the return the previous function is not called any more.
/// If that function itself calls this one, it returns false and does nothing.
pub(super) fn set(function: Option<Function>, opaque: *mut c_void, most: c_int) -> bool {
    if DELIVERING.get() {
        return false;
    }
    // From the second call on this fails, because the logger is set already.
    let _ = log::set_logger(&Queue);
    let mut target = TARGET.write().unwrap_or_else(PoisonError::into_inner);
    *target = function.map(|function| Target { function, opaque });
    log::set_max_level(if target.is_some() { filter(most) } else { LevelFilter::Off });
    true
}

/// Passes on the lines of this thread. Lines that the function causes itself come after those
/// that are there, without a call in a call. `errno` stays as it is.
pub(super) fn deliver() {
    let next = || PENDING.try_with(|pending| pending.borrow_mut().pop_front()).ok().flatten();
    if DELIVERING.try_with(Cell::get).unwrap_or(true) {
        return;
    }
    let mut line = next();
    if line.is_none() {
        return;
    }
    let errno = Errno::last_raw();
    let target = TARGET.read().unwrap_or_else(PoisonError::into_inner);
    DELIVERING.set(true);
    while let Some((severity, text)) = line {
        if let Some(Target { function, opaque }) = *target {
            // SAFETY: the caller of ivshmem_server_set_log() vouches for the function and for
            // `opaque` until they are replaced, which waits for the lock. `text` is valid during the call.
            unsafe { function(severity, text.as_ptr(), opaque) };
        }
        line = next();
    }
    DELIVERING.set(false);
    drop(target);
    Errno::set_raw(errno);
    // An empty list may keep memory, which a search for leaks would find.
    let _ = PENDING.try_with(|pending| pending.replace(VecDeque::new()));
}
