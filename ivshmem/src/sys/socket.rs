// SPDX-License-Identifier: GPL-2.0-or-later
//! Questions about a UNIX socket that nix does not ask.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `SO_PASSRIGHTS` of Linux 6.16 and newer, which the libc crate does not name yet.
const SO_PASSRIGHTS: libc::c_int = 83;

/// The bytes of kernel memory that the socket is charged for messages that it sent and that its
/// peer has not read (`SIOCOUTQ` of `unix(7)`).
pub(crate) fn unread_bytes(socket: BorrowedFd<'_>) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the request (SIOCOUTQ has the number of TIOCOUTQ) writes one int to `bytes`.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // While the kernel frees a message it announces room first and counts the last byte of the
    // message as used for a moment longer. A message takes far more than a few bytes.
    const FREED: libc::c_int = 64;
    Ok(if bytes <= FREED { 0 } else { bytes as usize })
}

/// Makes the kernel refuse descriptors that a peer tries to send to this socket, or to a
/// connection that it accepts. Fails with `ENOPROTOOPT` before Linux 6.16.
pub(crate) fn refuse_descriptors(socket: BorrowedFd<'_>) -> io::Result<()> {
    let off: libc::c_int = 0;
    // SAFETY: the option's value is the int `off`, of the length that is passed with it.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PASSRIGHTS,
            (&raw const off).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The supplementary groups of the process at the other end, as they were when it connected
/// (`SO_PEERGROUPS`, Linux 4.13 and newer).
pub(crate) fn peer_groups(socket: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    let mut groups: Vec<libc::gid_t> = vec![0; 32];
    loop {
        let mut length = (groups.len() * size_of::<libc::gid_t>()) as libc::socklen_t;
        // SAFETY: the kernel writes at most `length` bytes, which `groups` has, and the length.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        let count = length as usize / size_of::<libc::gid_t>();
        if result == 0 {
            groups.truncate(count);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        // ERANGE: the length is now the one that is needed.
        if error.raw_os_error() != Some(libc::ERANGE) || count <= groups.len() {
            return Err(error);
        }
        groups.resize(count, 0);
    }
}
