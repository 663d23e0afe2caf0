// SPDX-License-Identifier: GPL-2.0-or-later
//! What the supervisor needs from the kernel and no safe interface gives: descriptors that come as numbers, and a child
//! that starts with them at 3 and up. The only unsafe code of the program.
//!
//! `std::process::Command` cannot do the second: it does not know the child's pid before the child runs, which LISTEN_PID
//! must name, and its own pipe would be at one of the numbers. A crate that maps descriptors needs each number twice,
//! and the limit of open files has no room for that. So the supervisor forks; it has one thread, and no library starts
//! another, so the child may do what any process may.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, signal, sigprocmask};
use nix::unistd::{ForkResult, Pid, fork, getpid, pipe2, read};

/// The first number that a service gets from its service manager (`SD_LISTEN_FDS_START`).
pub(super) const FIRST: RawFd = 3;

/// The most descriptors in one message (`SCM_MAX_FD`).
pub(super) const MESSAGE_FDS: usize = 253;

/// What one `recvmsg` brought.
#[derive(Debug)]
pub(super) struct Received {
    pub(super) bytes: usize,
    /// All close-on-exec.
    pub(super) fds: Vec<OwnedFd>,
    /// Process and real user that sent it, from the kernel.
    pub(super) sender: Option<(Pid, u32)>,
    /// Text or descriptors did not fit.
    pub(super) truncated: bool,
}

/// Receives a datagram without waiting. The socket has SO_PASSCRED.
pub(super) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Received> {
    // Aligned for a header.
    let mut room = [0_u64; 160];
    // SAFETY: msghdr is integers and raw pointers; all zeroes is a value of it.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    let mut iovec = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    header.msg_iov = &raw mut iovec;
    header.msg_iovlen = 1;
    header.msg_control = (&raw mut room).cast();
    header.msg_controllen = size_of_val(&room);
    let flags = libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT;
    // SAFETY: the header names one iovec over `buffer`, and `room`; both are ours until the call returns.
    let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) };
    let bytes = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
    let truncated = header.msg_flags & (libc::MSG_CTRUNC | libc::MSG_TRUNC) != 0;
    let mut received = Received { bytes, fds: Vec::new(), sender: None, truncated };
    // SAFETY: the kernel has set msg_controllen to what it wrote to `room`.
    let mut control = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
    while !control.is_null() {
        // SAFETY: the two macros give only headers that are whole and inside `room`, and CMSG_DATA what follows one.
        let (kind, length, data) =
            unsafe { ((*control).cmsg_type, (*control).cmsg_len, libc::CMSG_DATA(control)) };
        // SAFETY: arithmetic only.
        let length = length.saturating_sub(unsafe { libc::CMSG_LEN(0) } as usize);
        match kind {
            libc::SCM_RIGHTS => {
                for i in 0..length / size_of::<RawFd>() {
                    // SAFETY: `length` bytes at `data` are numbers of descriptors that the kernel has just made for us.
                    received.fds.push(unsafe {
                        OwnedFd::from_raw_fd(data.cast::<RawFd>().add(i).read_unaligned())
                    });
                }
            }
            libc::SCM_CREDENTIALS if length >= size_of::<libc::ucred>() => {
                // SAFETY: the length says that a ucred is there.
                let sender = unsafe { data.cast::<libc::ucred>().read_unaligned() };
                received.sender = Some((Pid::from_raw(sender.pid), sender.uid));
            }
            _ => {}
        }
        // SAFETY: `control` is a header inside the room that `header` names.
        control = unsafe { libc::CMSG_NXTHDR(&raw const header, control) };
    }
    Ok(received)
}

/// Takes over the descriptors that a service manager gave this process, and makes them close-on-exec. The caller calls
/// it once, and only where LISTEN_PID names this process. `None` stands for a number that is not open.
pub(super) fn adopt(count: usize) -> Vec<Option<OwnedFd>> {
    let last = RawFd::try_from(count).unwrap_or(0).saturating_add(FIRST);
    (FIRST..last).map(take_descriptor).collect()
}

/// Takes over a descriptor that the caller of this program has opened for it, and makes it close-on-exec. Called before
/// this process opens descriptors, once for each number. `None` if the number is not open.
pub(crate) fn take_descriptor(number: RawFd) -> Option<OwnedFd> {
    // SAFETY: F_SETFD has an integer argument, and a number that is not open is an error of it.
    let set = unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } == 0;
    let open = set || Errno::last() != Errno::EBADF;
    // SAFETY: it is open, and as nothing here was opened yet, the caller of the program has opened it, and has named its
    // number (LISTEN_FDS with LISTEN_PID, --ready-fd) for the program to own.
    open.then(|| unsafe { OwnedFd::from_raw_fd(number) })
}

/// Copies a descriptor to a number of `lowest` or above.
pub(super) fn copy_above(fd: BorrowedFd<'_>, lowest: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the argument of F_DUPFD_CLOEXEC is an integer.
    let copy = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, lowest) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor, and nothing else has its number.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// Makes ended children wait for `waitpid`, also where this process was started with SIGCHLD ignored.
pub(super) fn keep_ended_children() -> io::Result<()> {
    // SAFETY: no handler of this process is replaced, and SIG_DFL is no function of ours.
    unsafe { signal(Signal::SIGCHLD, SigHandler::SigDfl) }?;
    Ok(())
}

/// Starts `command` with `fds` at 3 and up, LISTEN_PID set, and `mask` as its blocked signals. `fds` must be in rising
/// order. A program that cannot be executed is an exit status of 127, and a log line.
pub(super) fn start(
    command: &mut Command,
    fds: &[BorrowedFd<'_>],
    mask: &SigSet,
) -> io::Result<Pid> {
    // SAFETY: this process has one thread, so no lock is held by a thread that the child would lack.
    if let ForkResult::Parent { child } = unsafe { fork() }? {
        return Ok(child);
    }
    for (number, fd) in (FIRST..).zip(fds) {
        // In rising order no number is needed that was not copied yet: each is at least as large as its new one.
        let same = fd.as_raw_fd() == number;
        // SAFETY: this process only executes a program or exits now, so nothing uses the descriptor that had the
        // number before. The supervisor's own are unchanged.
        unsafe {
            if same {
                libc::fcntl(number, libc::F_SETFD, 0);
            } else {
                libc::dup2(fd.as_raw_fd(), number);
            }
        }
    }
    let above = u32::try_from(fds.len()).map_or(u32::MAX, |count| count + FIRST as u32);
    // SAFETY: it sets a flag of descriptors that nothing but the execution below concerns. An older kernel has an error.
    unsafe { libc::syscall(libc::SYS_close_range, above, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if !fds.is_empty() {
        command.env("LISTEN_PID", getpid().to_string());
    }
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(mask), None);
    let error = command.exec();
    log::error!("cannot execute {:?}: {error}", command.get_program());
    // SAFETY: it never returns, and runs nothing of the parent's that waits for an exit.
    unsafe { libc::_exit(127) }
}

/// Closes `fds`, which it empties, without waiting: a child process is the last one that has them. An error leaves them.
pub(super) fn close_in_child(fds: &mut Vec<OwnedFd>) -> io::Result<Pid> {
    let (wait, go) = pipe2(OFlag::O_CLOEXEC)?;
    fds.sort_unstable_by_key(AsRawFd::as_raw_fd);
    // SAFETY: this process has one thread, so no lock is held by a thread that the child would lack.
    let fork = unsafe { fork() }?;
    if let ForkResult::Parent { child } = fork {
        fds.clear();
        drop(go);
        return Ok(child);
    }
    // The child has no other descriptors: a process that sleeps must not keep connections open.
    drop(go);
    let mut keep: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    keep.push(wait.as_raw_fd());
    keep.sort_unstable();
    let mut from = 0;
    for &number in &keep {
        close_range(from, number - 1);
        from = number + 1;
    }
    close_range(from, RawFd::MAX);
    // The end of the parent's copy of the pipe says that it has closed the descriptors.
    let _ = read(wait, &mut [0]);
    // SAFETY: it never returns, and runs nothing of the parent's that waits for an exit.
    unsafe { libc::_exit(0) }
}

fn close_range(first: RawFd, last: RawFd) {
    if first <= last {
        // SAFETY: only a child calls this, which uses none of these descriptors. An older kernel has an error.
        unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    }
}
