// SPDX-License-Identifier: GPL-2.0-or-later
//! Connections of other users from this process, which must be root.

use std::thread;

/// Runs `act` in a thread with the effective user and group `uid`. The kernel reports a connection that
/// it makes as one of that user; nothing else of this process changes.
#[expect(unsafe_code, reason = "no library changes the user of a single thread")]
pub(crate) fn as_user<T: Send>(uid: u32, act: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // The libc crate's functions change all threads; the system calls change only this one.
            // SAFETY: the calls take integers only, and -1 leaves an id as it is.
            let changed = unsafe {
                libc::syscall(libc::SYS_setresgid, -1, uid, -1) == 0
                    && libc::syscall(libc::SYS_setresuid, -1, uid, -1) == 0
            };
            assert!(changed, "only root can connect as user {uid}");
            act()
        });
        thread.join().expect("the thread ends without a panic")
    })
}
