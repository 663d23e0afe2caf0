// SPDX-License-Identifier: GPL-2.0-or-later
//! Notifications to the service manager that started this process ($NOTIFY_SOCKET), as sd_notify(3) has them.

#![forbid(unsafe_code)]

use std::ffi::OsStr;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};

/// The connected socket; `None` if no service manager wants notifications.
pub(crate) fn connect() -> io::Result<Option<UnixDatagram>> {
    std::env::var_os("NOTIFY_SOCKET")
        .filter(|name| !name.is_empty())
        .map(|name| to(&name))
        .transpose()
}

fn to(name: &OsStr) -> io::Result<UnixDatagram> {
    let address = match name.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(name)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    Ok(socket)
}

/// Sends one message; on a non-blocking socket it may be `WouldBlock`.
pub(crate) fn send(socket: &UnixDatagram, text: &str, fds: &[OwnedFd]) -> io::Result<()> {
    let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let rights = if fds.is_empty() { &[] } else { &rights[..] };
    let text = [IoSlice::new(text.as_bytes())];
    sendmsg::<UnixAddr>(socket.as_raw_fd(), &text, rights, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}
