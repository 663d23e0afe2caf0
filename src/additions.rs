// SPDX-License-Identifier: GPL-2.0-or-later
//! The functions that QEMU's header does not have. The comments are those of the C header.

use std::ffi::{c_char, c_int, c_void};

use nix::errno::Errno;

use super::abi::IvshmemServer;
use super::functions::with;
use super::logging;
use super::report::{self, Failure, answer};

/// Returns the server's one descriptor, for an event loop without an fd_set.
///
/// It is readable when ivshmem_server_dispatch() has work to do. It is an epoll instance: watch
/// it for reading with poll(2), epoll(7) or any event loop. Do not read from it or close it. It
/// stays the same until ivshmem_server_close().
///
/// Threads: any thread, at any time.
///
/// @param server the structure
/// @return
/// - 0 or more: the descriptor.
/// - -1, errno EINVAL: the pointer is NULL, or the server does not run.
/// - -1, errno EIO: the library has a bug and panicked in a call for this server.
///
/// # Safety
/// `server` is NULL or points to a structure.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ivshmem_server_get_fd(server: *const IvshmemServer) -> c_int {
    answer(-1, || {
        if server.is_null() {
            return Err(Failure::null("server"));
        }
        with(server, |state| Ok(state.descriptor()))?.ok_or_else(Failure::not_running)
    })
}

/// Does the work that is due, as ivshmem_server_handle_fds() does, without a look at an fd_set.
/// It never waits, and sends some 4,096 messages at most.
///
/// A level-triggered loop (select, poll, epoll without EPOLLET, glib) calls it once each time
/// the descriptor is readable, and needs to know only whether it failed. An edge-triggered loop
/// is not woken again for work that is left: it calls this function again until it returns 0,
/// and may serve its other descriptors in between.
///
/// Threads: as for ivshmem_server_handle_fds().
///
/// @param server the structure
/// @return
/// - 1: more work is due now.
/// - 0: no work is due. The descriptor becomes readable when there is some.
/// - -1, errno EINVAL: the pointer is NULL, or the server does not run.
/// - -1, errno EIO: the library has a bug and panicked, in this call or in one before for this
///   server. Only ivshmem_server_close() works then.
/// - -1, another errno: the system does not report events any more.
///
/// # Safety
/// `server` is NULL or points to a structure.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ivshmem_server_dispatch(server: *mut IvshmemServer) -> c_int {
    answer(-1, || {
        if server.is_null() {
            return Err(Failure::null("server"));
        }
        let more = with(server, |state| {
            // SAFETY: the server of this structure runs, so the caller has a structure there.
            unsafe { state.dispatch(server)? };
            Ok(c_int::from(state.is_ready()))
        })?;
        more.ok_or_else(Failure::not_running)
    })
}

/// Returns a sentence about the last call that failed in this thread: one that set errno.
///
/// It names the thing that is wrong, its value, and what would be right. A call that succeeds
/// does not change it.
///
/// Threads: each thread has its own.
///
/// @return the text, in UTF-8 and without a newline; "" if no call failed in this thread. It is
/// valid until the next call that fails in this thread, or until the thread ends.
#[unsafe(no_mangle)]
pub extern "C" fn ivshmem_server_last_error() -> *const c_char {
    report::last_error()
}

/// Sets the function that the library's log lines go to, for the whole process. Without one
/// they go nowhere.
///
/// The function is called at the end of the call that caused the line, in that call's thread,
/// with no lock of a server held. It may call the functions of this header, except this one:
/// that does nothing then, and sets errno to EDEADLK. It must return: no longjmp, and no C++
/// exception.
///
/// Threads: any thread, at any time. The function is called from every thread that calls this
/// library, and from several at once. After this call has returned, the function before is
/// neither running nor called again, so what its `opaque` points to may be freed.
///
/// @param log       the function, or NULL for none. Its `level` is a severity as in syslog(3), from
///                  3 (LOG_ERR) to 7 (LOG_DEBUG). Its `text` is UTF-8 without a newline, and
///                  valid until it returns.
/// @param opaque    a pointer that is passed to the function
/// @param max_level the largest level that is wanted, such as 4 (LOG_WARNING)
///
/// # Safety
/// `log` is NULL, or a function that may be called with `opaque` from any thread until it is
/// replaced.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ivshmem_server_set_log(
    log: Option<unsafe extern "C" fn(level: c_int, text: *const c_char, opaque: *mut c_void)>,
    opaque: *mut c_void,
    max_level: c_int,
) {
    answer((), || {
        if logging::set(log, opaque, max_level) {
            return Ok(());
        }
        let text = "ivshmem_server_set_log() was called by the log function itself";
        Err(Failure::new(Errno::EDEADLK, text))
    });
}

/// Returns the version of the library that the program runs with.
///
/// IVSHMEM_SERVER_VERSION is that of the header which the program was compiled with.
///
/// Threads: any thread, at any time.
///
/// @return the version, such as "1.2.3". It stays valid for as long as the library is loaded.
#[unsafe(no_mangle)]
pub extern "C" fn ivshmem_server_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}
