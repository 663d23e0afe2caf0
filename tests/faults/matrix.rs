// SPDX-License-Identifier: GPL-2.0-or-later
//! The table of faults: which calls fail, with which errnos, and the expected result.
//!
//! One row is a system call with errnos that it can return, in one phase of the server. The tests
//! compare the table with the calls that the server really makes, and fail if a call is in no row.

#![forbid(unsafe_code)]

use crate::common::target::Target;

/// The phase in which the call is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// From the program's first own call until it waits for clients.
    Start,
    /// While clients join, stall and leave.
    Serve,
    /// From SIGTERM to the end of the process.
    Stop,
}

/// The expected result of the fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Then {
    /// Start: a clear error, exit code 1, nothing left behind.
    Fails,
    /// Start and stop: the fault has no effect.
    Harmless,
    /// Start: one of the two above, depending on the purpose of the call.
    FailsOrHarmless,
    /// Serve: all clients are served, and none is dropped.
    DropsNone,
    /// Serve: only the client of the failed call may be dropped.
    MayDropOne,
    /// Serve: the server cannot wait for events any more. It gives a clear error and exit code 1,
    /// and leaves nothing behind.
    Ends,
    /// Start: fails, or is harmless. Stop: exit code 0. The file that could not be removed may remain.
    MayLeaveBehind,
}

pub(crate) struct Row {
    pub(crate) phase: Phase,
    pub(crate) call: &'static str,
    /// The first `short` of them are tried in each `make check`.
    pub(crate) errnos: &'static [&'static str],
    pub(crate) short: usize,
    pub(crate) then: Then,
    /// Another fault that is needed before the server makes this call.
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
use Then::{DropsNone, Ends, Fails, FailsOrHarmless, Harmless, MayDropOne, MayLeaveBehind};

#[rustfmt::skip]
pub(crate) const MATRIX: &[Row] = &[
    // Signals and events.
    row(Start, "rt_sigprocmask", Fails, 1, &["EINVAL", "EFAULT"]),
    row(Start, "signalfd4", Fails, 1, &["EMFILE", "ENFILE", "ENODEV", "ENOMEM", "EINVAL"]),
    // The limit of open files may stay unknown. The limit of file sizes must be known.
    row(Start, "prlimit64", FailsOrHarmless, 1, &["EPERM", "EINVAL", "EFAULT"]),
    // A stream whose kind cannot be found is written to like a file.
    row(Start, "ioctl", Harmless, 1, &["ENOTTY", "EIO", "EBADF"]),
    // Called before a line is printed.
    row(Start, "poll", Harmless, 1, &["EINTR", "ENOMEM", "EINVAL", "EFAULT"]),
    row(Start, "epoll_create1", Fails, 1, &["EMFILE", "ENFILE", "ENOMEM", "EINVAL"]),
    row(Start, "timerfd_create", Fails, 1, &["EMFILE", "ENFILE", "ENODEV", "ENOMEM", "EPERM"]),
    row(Start, "eventfd2", Fails, 1, &["EMFILE", "ENFILE", "ENODEV", "ENOMEM", "EINVAL"]),
    row(Start, "epoll_ctl", Fails, 1, &["ENOMEM", "ENOSPC", "EPERM", "EINVAL"]),
    // The shared memory, a directory, a lock file, or the socket that was bound.
    row(Start, "openat", FailsOrHarmless, 3, &["EMFILE", "EACCES", "EOPNOTSUPP", "EINTR",
        "EINVAL", "EISDIR", "ELOOP", "ENAMETOOLONG", "ENFILE", "ENOMEM", "ENOSPC",
        "ENOTDIR", "ENXIO", "EPERM", "EROFS", "ETXTBSY", "EBUSY", "EDQUOT", "EEXIST", "EIO"]),
    // If the socket seems to be missing right after bind, it is not removed: another server's may be there.
    row(Start, "openat", MayLeaveBehind, 1, &["ENOENT"]),
    // EAGAIN is not tried: it means that another server holds the memory, and then the memory must stay.
    // A failed unlock is harmless: the lock ends with the process.
    row(Start, "flock", FailsOrHarmless, 2, &["ENOLCK", "EINTR", "EINVAL", "EBADF"]),
    row(Start, "statx", FailsOrHarmless, 2, &["EACCES", "ENOMEM", "EBADF", "EIO", "ELOOP",
        "ENOTDIR"]),
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
    // Older kernels cannot refuse descriptors from clients.
    row(Start, "setsockopt", Harmless, 1, &["ENOPROTOOPT", "EBADF", "ENOTSOCK", "EFAULT", "EPERM"]),
    row(Start, "listen", Fails, 1, &["EADDRINUSE", "EBADF", "ENOTSOCK", "EOPNOTSUPP", "EINVAL"]),
    row(Start, "chmod", Fails, 1, &["EPERM", "EROFS", "ENOENT", "EIO", "ENOMEM"]),
    row(Start, "chown", Fails, 1, &["EPERM", "EROFS", "ENOENT", "EIO", "ENOMEM"]),
    row(Start, "fchown", Fails, 1, &["EPERM", "EROFS", "EIO"]),
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
    // Output. The background process reports on stdout that it is ready, so it fails.
    row(Start, "write", FailsOrHarmless, 2, &["EPIPE", "ENOSPC", "EAGAIN", "EINTR", "EIO",
        "EBADF", "EDQUOT"]),
    row(Start, "close", FailsOrHarmless, 1, &["EIO", "EINTR", "ENOSPC", "EDQUOT"]),

    // Serving: waiting.
    row(Serve, "poll", DropsNone, 2, &["EINTR", "ENOMEM", "EINVAL", "EFAULT"]),
    row(Serve, "epoll_wait", DropsNone, 1, &["EINTR"]),
    row(Serve, "epoll_wait", Ends, 1, &["EINVAL", "EBADF", "EFAULT"]),
    // A client joins.
    row(Serve, "accept4", DropsNone, 5, &["EAGAIN", "ECONNABORTED", "ENOMEM", "EINTR",
        "ENOBUFS", "EPERM", "EPROTO", "EINVAL", "EOPNOTSUPP", "ENOTSOCK", "EBADF", "EFAULT"]),
    row(Serve, "accept4", MayDropOne, 2, &["EMFILE", "ENFILE"]),
    row(Serve, "eventfd2", MayDropOne, 2, &["EMFILE", "ENFILE", "ENODEV", "ENOMEM", "EINVAL"]),
    // Called to check whether the new client has already left.
    row(Serve, "recvfrom", MayDropOne, 1, &["ENOMEM", "EINTR", "ECONNRESET", "EINVAL", "EBADF"]),
    row(Serve, "prlimit64", DropsNone, 1, &["EFAULT", "EINVAL", "EPERM", "ESRCH"]),
    row(Serve, "getsockopt", MayDropOne, 1, &["EBADF", "EFAULT", "EINVAL", "ENOPROTOOPT", "ENOTSOCK"]),
    row(Serve, "setsockopt", MayDropOne, 1, &["EBADF", "EFAULT", "EINVAL", "ENOPROTOOPT", "ENOTSOCK",
        "ENOMEM"]),
    row(Serve, "epoll_ctl", MayDropOne, 2, &["ENOMEM", "ENOSPC", "EPERM", "EEXIST", "ENOENT",
        "EINVAL", "EBADF", "ELOOP"]),
    // The server looks in /proc for its own descriptors and privileges, and for the names of clients' programs.
    row(Serve, "openat", DropsNone, 2, &["EMFILE", "ENFILE", "ENOENT", "EACCES", "ENOMEM", "EINTR"]),
    row(Serve, "statx", DropsNone, 1, &["EACCES", "ENOMEM", "EBADF", "EIO", "ESRCH"]),
    row(Serve, "read", DropsNone, 2, &["EIO", "EINTR", "ESRCH"]),
    // Sending to clients.
    // How many messages a client has not read. If the kernel does not tell, the server assumes the most.
    row(Serve, "ioctl", DropsNone, 2, &["EFAULT", "EINVAL", "ENOTTY", "EBADF"]),
    row(Serve, "sendmmsg", DropsNone, 5, &["EAGAIN", "EINTR", "ETOOMANYREFS", "ENOBUFS",
        "ENOMEM"]),
    row(Serve, "sendmmsg", MayDropOne, 2, &["EPIPE", "ECONNRESET", "EACCES", "EBADF",
        "EDESTADDRREQ", "EFAULT", "EINVAL", "EISCONN", "EMSGSIZE", "ENOTCONN", "ENOTSOCK",
        "EOPNOTSUPP", "EPERM"]),
    row(Serve, "sendmsg", DropsNone, 5, &["EAGAIN", "EINTR", "ETOOMANYREFS", "ENOBUFS",
        "ENOMEM"]),
    row(Serve, "sendmsg", MayDropOne, 2, &["EPIPE", "ECONNRESET", "EACCES", "EBADF",
        "EDESTADDRREQ", "EFAULT", "EINVAL", "EISCONN", "EMSGSIZE", "ENOTCONN", "ENOTSOCK",
        "EOPNOTSUPP", "EPERM"]),
    // The retry timer runs only after another failure.
    Row { after: Some("sendmmsg:error=ETOOMANYREFS:when=1+3"), ..row(Serve, "timerfd_settime",
        DropsNone, 1, &["EINVAL", "EBADF", "EFAULT", "ECANCELED"]) },
    Row { after: Some("accept4:error=ENOMEM:when=1"), ..row(Serve, "timerfd_settime",
        DropsNone, 1, &["EINVAL", "EBADF", "EFAULT", "ECANCELED"]) },
    Row { after: Some("accept4:error=ENOMEM:when=1"), ..row(Serve, "read",
        DropsNone, 2, &["EAGAIN", "EINTR", "EIO", "ECANCELED", "EINVAL", "EBADF"]) },
    // The listener is removed from epoll for a while and added again.
    Row { after: Some("accept4:error=ENOMEM:when=1"), ..row(Serve, "epoll_ctl",
        MayDropOne, 1, &["ENOMEM", "ENOENT", "EINVAL", "EBADF"]) },
    // The spare descriptor is used and opened again.
    Row { after: Some("accept4:error=EMFILE:when=1"), ..row(Serve, "eventfd2",
        MayDropOne, 1, &["EMFILE", "ENFILE", "ENOMEM"]) },
    // A client leaves.
    row(Serve, "shutdown", DropsNone, 1, &["ENOTCONN", "EINVAL", "EBADF", "ENOTSOCK"]),
    row(Serve, "close", DropsNone, 1, &["EIO", "EINTR", "EBADF", "ENOSPC", "EDQUOT"]),
    // The reader of stdout has closed it, or its file system is full.
    row(Serve, "write", DropsNone, 2, &["EPIPE", "ENOSPC", "EAGAIN", "EINTR", "EIO", "EBADF",
        "EDQUOT", "EFBIG"]),

    // Stopping.
    row(Stop, "epoll_wait", Harmless, 1, &["EINTR"]),
    // The signal is read again, or the server ends without knowing which signal came.
    row(Stop, "read", Harmless, 3, &["EINTR", "EAGAIN", "EIO", "EINVAL", "EBADF"]),
    row(Stop, "write", Harmless, 1, &["EPIPE", "ENOSPC", "EAGAIN", "EINTR", "EIO"]),
    row(Stop, "poll", Harmless, 1, &["EINTR", "ENOMEM"]),
    row(Stop, "shutdown", Harmless, 1, &["ENOTCONN", "EBADF"]),
    row(Stop, "accept4", Harmless, 1, &["EINVAL", "ECONNABORTED", "EMFILE", "ENOMEM", "EPERM"]),
    row(Stop, "close", Harmless, 1, &["EIO", "EINTR", "EBADF"]),
    row(Stop, "newfstatat", MayLeaveBehind, 1, &["EACCES", "ENOMEM", "EIO", "ENOENT"]),
    row(Stop, "unlinkat", MayLeaveBehind, 1, &["EACCES", "EROFS", "EBUSY", "EIO", "ENOENT"]),
    row(Stop, "flock", Harmless, 1, &["EBADF", "ENOLCK", "EINTR"]),
];

/// Calls that are not tested, with the reason.
pub(crate) const EXEMPT: &[(&str, &str)] = &[
    ("brk", "the allocator's; a Rust program aborts without memory"),
    ("mmap", "the allocator's; a Rust program aborts without memory"),
    ("mremap", "the allocator's; a Rust program aborts without memory"),
    ("munmap", "the allocator's; nothing depends on it"),
    ("madvise", "the allocator's; nothing depends on it"),
    ("getrandom", "the C library's, for its allocator"),
    ("sigaltstack", "the Rust runtime's"),
    ("rt_sigaction", "the Rust runtime's"),
    ("mprotect", "the Rust runtime's"),
    ("rt_sigreturn", "it returns from a signal"),
    ("restart_syscall", "it continues a wait that the tracer interrupted"),
    ("exit_group", "it does not return"),
    ("geteuid", "it cannot fail"),
    ("getppid", "it cannot fail"),
    ("getpid", "it does not fail"),
    ("fcntl(F_GETFD)", "std checks descriptors before it closes them, in debug builds only"),
];

/// Whether the C program makes this call itself: its loop waits, and it prints to its own stdout.
pub(crate) fn is_callers(target: Target, call: &str) -> bool {
    target == Target::SelectLoop && ["pselect6", "rt_sigprocmask", "write"].contains(&call)
}

/// The rows for a call in a phase.
pub(crate) fn rows(phase: Phase, call: &str) -> Vec<&'static Row> {
    MATRIX.iter().filter(|row| row.phase == phase && row.call == call).collect()
}

/// Whether the whole table is tried, each call at each occurrence.
pub(crate) fn is_full() -> bool {
    std::env::var_os("IVSHMEM_FULL").is_some_and(|value| value != "0")
}

impl Row {
    /// The errnos that this run tries.
    pub(crate) fn errnos(&self) -> &'static [&'static str] {
        if is_full() { self.errnos } else { &self.errnos[..self.short] }
    }
}
