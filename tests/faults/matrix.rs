// SPDX-License-Identifier: GPL-2.0-or-later
//! What is made to fail, with what, and what must come of it.
//!
//! One row is a system call with errnos that it can return, in one phase of the server's
//! life. The tests hold the table against what the server really calls: a call that is in no
//! row fails them.

#![forbid(unsafe_code)]

use crate::common::target::Target;

/// When the call is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// From the first thing that this program does by itself to its waiting for clients.
    Start,
    /// While clients come, stall and go.
    Serve,
    /// From SIGTERM to the end.
    Stop,
}

/// What must come of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Then {
    /// Start: a clear error, exit code 1, nothing left behind.
    Fails,
    /// Start and stop: as if nothing had happened.
    Harmless,
    /// Start: one of the two above. It depends on what the call was for.
    FailsOrHarmless,
    /// Serve: everybody is served, nobody dropped.
    LosesNobody,
    /// Serve: the client that was hit may be dropped, no other.
    MayDropOne,
    /// Serve: the server cannot wait for events any more: a clear error, exit code 1, nothing
    /// left behind.
    Ends,
    /// Start: fails, or is harmless. Stop: exit code 0. But the thing that could not be removed may stay.
    MayLeaveBehind,
}

pub(crate) struct Row {
    pub(crate) phase: Phase,
    pub(crate) call: &'static str,
    /// The first `short` of them are tried in every `make check`.
    pub(crate) errnos: &'static [&'static str],
    pub(crate) short: usize,
    pub(crate) then: Then,
    /// What else must fail so that the call is made at all.
    pub(crate) after: Option<&'static str>,
}

const fn row(
    phase: Phase,
    call: &'static str,
    then: Then,
    short: usize,
    errnos: &'static [&'static str],
) -> Row {
    Row { phase, call, errnos, short, then, after: None }
}

use Phase::{Serve, Start, Stop};
use Then::{Ends, Fails, FailsOrHarmless, Harmless, LosesNobody, MayDropOne, MayLeaveBehind};

#[rustfmt::skip]
pub(crate) const MATRIX: &[Row] = &[
    // Waiting for signals, and for events.
    row(Start, "rt_sigprocmask", Fails, 1, &["EINVAL", "EFAULT"]),
    row(Start, "signalfd4", Fails, 1, &["EMFILE", "ENFILE", "ENODEV", "ENOMEM", "EINVAL"]),
    // Of open files: it does without. Of a file's size: it must know.
    row(Start, "prlimit64", FailsOrHarmless, 1, &["EPERM", "EINVAL", "EFAULT"]),
    // Before a line is printed.
    row(Start, "poll", Harmless, 1, &["EINTR", "ENOMEM", "EINVAL", "EFAULT"]),
    row(Start, "epoll_create1", Fails, 1, &["EMFILE", "ENFILE", "ENOMEM", "EINVAL"]),
    row(Start, "timerfd_create", Fails, 1, &["EMFILE", "ENFILE", "ENODEV", "ENOMEM", "EPERM"]),
    row(Start, "eventfd2", Fails, 1, &["EMFILE", "ENFILE", "ENODEV", "ENOMEM", "EINVAL"]),
    row(Start, "epoll_ctl", Fails, 1, &["ENOMEM", "ENOSPC", "EPERM", "EINVAL"]),
    // The shared memory. What is opened may also be the directory of a left-over socket.
    row(Start, "openat", FailsOrHarmless, 3, &["EMFILE", "EACCES", "EOPNOTSUPP", "EINTR",
        "EINVAL", "EISDIR", "ELOOP", "ENAMETOOLONG", "ENFILE", "ENOMEM", "ENOSPC",
        "ENOTDIR", "ENXIO", "EPERM", "EROFS", "ETXTBSY", "EBUSY", "EDQUOT", "EEXIST", "EIO"]),
    // (EAGAIN would say that another server has it, and that one's memory must stay.)
    // That it cannot be unlocked is harmless: it ends with the process.
    row(Start, "flock", FailsOrHarmless, 2, &["ENOLCK", "EINTR", "EINVAL", "EBADF"]),
    row(Start, "statx", FailsOrHarmless, 2, &["EACCES", "ENOMEM", "EBADF", "EIO", "ELOOP",
        "ENOTDIR"]),
    // A socket that seems to be gone right after it was bound is left: another's may be there by now.
    row(Start, "openat", MayLeaveBehind, 1, &["ENOENT"]),
    row(Start, "fstatfs", Fails, 1, &["EIO", "ENOMEM", "EINTR", "EOVERFLOW", "EBADF"]),
    row(Start, "fallocate", FailsOrHarmless, 4, &["ENOSPC", "EOPNOTSUPP", "EINTR", "EFBIG",
        "EIO", "EPERM", "EINVAL", "ENODEV", "ESPIPE", "ETXTBSY"]),
    row(Start, "memfd_create", Fails, 1, &["EMFILE", "ENFILE", "ENOMEM", "EPERM", "EINVAL"]),
    row(Start, "fcntl(F_ADD_SEALS)", Fails, 1, &["EPERM", "EBUSY", "EINVAL"]),
    // The socket.
    row(Start, "socket", Fails, 2, &["EMFILE", "EACCES", "EAFNOSUPPORT", "EINVAL", "ENFILE",
        "ENOBUFS", "ENOMEM", "EPROTONOSUPPORT"]),
    row(Start, "bind", FailsOrHarmless, 3, &["EACCES", "EADDRINUSE", "ENOENT", "EADDRNOTAVAIL",
        "EFAULT", "EINVAL", "ELOOP", "ENAMETOOLONG", "ENOMEM", "ENOSPC", "ENOTDIR", "EROFS"]),
    row(Start, "connect", FailsOrHarmless, 3, &["EACCES", "EPROTOTYPE", "ENOENT", "EAGAIN",
        "ECONNREFUSED", "EINTR", "EPERM", "ETIMEDOUT"]),
    row(Start, "listen", Fails, 1, &["EADDRINUSE", "EBADF", "ENOTSOCK", "EOPNOTSUPP", "EINVAL"]),
    row(Start, "chmod", Fails, 1, &["EPERM", "EROFS", "ENOENT", "EIO", "ENOMEM"]),
    // Going to the background, and the pid file.
    row(Start, "mkdirat", FailsOrHarmless, 2, &["EACCES", "EEXIST", "ENOSPC", "EROFS", "ENOMEM", "EDQUOT"]),
    // What cannot be looked at is left: it may be another's by now.
    row(Start, "newfstatat", MayLeaveBehind, 1, &["EACCES", "ENOMEM", "EIO"]),
    // The length of a lock file is a note for the next start.
    row(Start, "ftruncate", FailsOrHarmless, 1, &["EIO", "EFBIG", "EPERM", "EINVAL"]),
    row(Start, "fcntl(F_OFD_SETLK)", Fails, 1, &["ENOLCK", "EAGAIN", "EBADF"]),
    row(Start, "fchmod", Fails, 1, &["EPERM", "EROFS", "EIO"]),
    row(Start, "linkat", Fails, 2, &["EEXIST", "EPERM", "ENOSPC", "EROFS", "EIO"]),
    // The next start clears it.
    row(Start, "unlinkat", MayLeaveBehind, 1, &["EIO", "EACCES", "EROFS"]),
    row(Start, "renameat2", FailsOrHarmless, 1, &["EINVAL", "EIO"]),
    row(Start, "setsid", Fails, 1, &["EPERM"]),
    row(Start, "dup2", Harmless, 1, &["EBADF", "EBUSY", "EMFILE"]),
    row(Start, "fcntl(F_DUPFD_CLOEXEC)", Fails, 1, &["EMFILE"]),
    row(Start, "readlink", Fails, 1, &["ENOENT", "EACCES", "ENOMEM"]),
    row(Start, "pipe2", Fails, 1, &["EMFILE", "ENFILE"]),
    row(Start, "clone3", FailsOrHarmless, 2, &["EAGAIN", "ENOMEM", "ENOSYS"]),
    row(Start, "read", FailsOrHarmless, 2, &["EIO", "EINTR"]),
    // Output. With stdout as its way to say that it is ready, the background process fails.
    row(Start, "write", FailsOrHarmless, 2, &["EPIPE", "ENOSPC", "EAGAIN", "EINTR", "EIO",
        "EBADF", "EDQUOT"]),
    row(Start, "close", FailsOrHarmless, 1, &["EIO", "EINTR", "ENOSPC", "EDQUOT"]),

    // Serving: waiting.
    row(Serve, "poll", LosesNobody, 2, &["EINTR", "ENOMEM", "EINVAL", "EFAULT"]),
    row(Serve, "epoll_wait", LosesNobody, 1, &["EINTR"]),
    row(Serve, "epoll_wait", Ends, 1, &["EINVAL", "EBADF", "EFAULT"]),
    // A client comes.
    row(Serve, "accept4", LosesNobody, 5, &["EAGAIN", "ECONNABORTED", "ENOMEM", "EINTR",
        "ENOBUFS", "EPERM", "EPROTO", "EINVAL", "EOPNOTSUPP", "ENOTSOCK", "EBADF", "EFAULT"]),
    row(Serve, "accept4", MayDropOne, 2, &["EMFILE", "ENFILE"]),
    row(Serve, "eventfd2", MayDropOne, 2, &["EMFILE", "ENFILE", "ENODEV", "ENOMEM", "EINVAL"]),
    // Whether the newcomer has gone again already.
    row(Serve, "recvfrom", MayDropOne, 1, &["ENOMEM", "EINTR", "ECONNRESET", "EINVAL", "EBADF"]),
    row(Serve, "prlimit64", LosesNobody, 1, &["EFAULT", "EINVAL", "EPERM", "ESRCH"]),
    row(Serve, "getsockopt", MayDropOne, 1, &["EBADF", "EFAULT", "EINVAL", "ENOPROTOOPT", "ENOTSOCK"]),
    row(Serve, "setsockopt", MayDropOne, 1, &["EBADF", "EFAULT", "EINVAL", "ENOPROTOOPT", "ENOTSOCK",
        "ENOMEM"]),
    row(Serve, "epoll_ctl", MayDropOne, 2, &["ENOMEM", "ENOSPC", "EPERM", "EEXIST", "ENOENT",
        "EINVAL", "EBADF", "ELOOP"]),
    // Clients are told.
    row(Serve, "sendmmsg", LosesNobody, 5, &["EAGAIN", "EINTR", "ETOOMANYREFS", "ENOBUFS",
        "ENOMEM"]),
    row(Serve, "sendmmsg", MayDropOne, 2, &["EPIPE", "ECONNRESET", "EACCES", "EBADF",
        "EDESTADDRREQ", "EFAULT", "EINVAL", "EISCONN", "EMSGSIZE", "ENOTCONN", "ENOTSOCK",
        "EOPNOTSUPP", "EPERM"]),
    row(Serve, "sendmsg", LosesNobody, 5, &["EAGAIN", "EINTR", "ETOOMANYREFS", "ENOBUFS",
        "ENOMEM"]),
    row(Serve, "sendmsg", MayDropOne, 2, &["EPIPE", "ECONNRESET", "EACCES", "EBADF",
        "EDESTADDRREQ", "EFAULT", "EINVAL", "EISCONN", "EMSGSIZE", "ENOTCONN", "ENOTSOCK",
        "EOPNOTSUPP", "EPERM"]),
    // The retry timer: it runs only after something else failed.
    Row { after: Some("sendmmsg:error=ETOOMANYREFS:when=1+3"), ..row(Serve, "timerfd_settime",
        LosesNobody, 1, &["EINVAL", "EBADF", "EFAULT", "ECANCELED"]) },
    Row { after: Some("accept4:error=ENOMEM:when=1"), ..row(Serve, "timerfd_settime",
        LosesNobody, 1, &["EINVAL", "EBADF", "EFAULT", "ECANCELED"]) },
    Row { after: Some("accept4:error=ENOMEM:when=1"), ..row(Serve, "read",
        LosesNobody, 2, &["EAGAIN", "EINTR", "EIO", "ECANCELED", "EINVAL", "EBADF"]) },
    // The door is not watched for a while, and watched again.
    Row { after: Some("accept4:error=ENOMEM:when=1"), ..row(Serve, "epoll_ctl",
        MayDropOne, 1, &["ENOMEM", "ENOENT", "EINVAL", "EBADF"]) },
    // The spare descriptor is spent, and taken back.
    Row { after: Some("accept4:error=EMFILE:when=1"), ..row(Serve, "eventfd2",
        MayDropOne, 1, &["EMFILE", "ENFILE", "ENOMEM"]) },
    // A client goes.
    row(Serve, "shutdown", LosesNobody, 1, &["ENOTCONN", "EINVAL", "EBADF", "ENOTSOCK"]),
    row(Serve, "close", LosesNobody, 1, &["EIO", "EINTR", "EBADF", "ENOSPC", "EDQUOT"]),
    // Somebody has closed the other end of stdout, or its file system is full.
    row(Serve, "write", LosesNobody, 2, &["EPIPE", "ENOSPC", "EAGAIN", "EINTR", "EIO", "EBADF",
        "EDQUOT", "EFBIG"]),

    // Stopping.
    row(Stop, "epoll_wait", Harmless, 1, &["EINTR"]),
    row(Stop, "write", Harmless, 1, &["EPIPE", "ENOSPC", "EAGAIN", "EINTR", "EIO"]),
    row(Stop, "poll", Harmless, 1, &["EINTR", "ENOMEM"]),
    row(Stop, "shutdown", Harmless, 1, &["ENOTCONN", "EBADF"]),
    row(Stop, "accept4", Harmless, 1, &["EINVAL", "ECONNABORTED", "EMFILE", "ENOMEM", "EPERM"]),
    row(Stop, "close", Harmless, 1, &["EIO", "EINTR", "EBADF"]),
    row(Stop, "newfstatat", MayLeaveBehind, 1, &["EACCES", "ENOMEM", "EIO", "ENOENT"]),
    row(Stop, "unlinkat", MayLeaveBehind, 1, &["EACCES", "EROFS", "EBUSY", "EIO", "ENOENT"]),
    row(Stop, "flock", Harmless, 1, &["EBADF", "ENOLCK", "EINTR"]),
];

/// Calls that are not made to fail, and why.
pub(crate) const EXEMPT: &[(&str, &str)] = &[
    ("brk", "the allocator's: a Rust program ends when it has no memory"),
    ("mmap", "the allocator's: a Rust program ends when it has no memory"),
    ("mremap", "the allocator's: a Rust program ends when it has no memory"),
    ("munmap", "the allocator's: nothing depends on it"),
    ("madvise", "the allocator's: nothing depends on it"),
    ("getrandom", "the C library's, for its allocator"),
    ("sigaltstack", "the Rust runtime's"),
    ("rt_sigaction", "the Rust runtime's"),
    ("mprotect", "the Rust runtime's"),
    ("rt_sigreturn", "it returns from a signal"),
    ("restart_syscall", "a wait that the tracer interrupted goes on"),
    ("exit_group", "it does not return"),
    ("geteuid", "it cannot fail"),
    ("getpid", "it does not fail"),
    ("fcntl(F_GETFD)", "std looks at what it closes, in debug builds only"),
];

/// Whether a C program makes this call by itself: its loop waits, and its stdout is its own.
pub(crate) fn is_callers(target: Target, call: &str) -> bool {
    target == Target::SelectLoop && ["pselect6", "rt_sigprocmask", "write"].contains(&call)
}

/// The rows for a call in a phase.
pub(crate) fn rows(phase: Phase, call: &str) -> Vec<&'static Row> {
    MATRIX.iter().filter(|row| row.phase == phase && row.call == call).collect()
}

/// Whether the whole table is to be tried, every call at every place.
pub(crate) fn is_full() -> bool {
    std::env::var_os("IVSHMEM_FULL").is_some_and(|value| value != "0")
}

impl Row {
    /// The errnos to be tried in this run.
    pub(crate) fn errnos(&self) -> &'static [&'static str] {
        if is_full() { self.errnos } else { &self.errnos[..self.short] }
    }
}
