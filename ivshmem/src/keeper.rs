// SPDX-License-Identifier: GPL-2.0-or-later
//! The process that keeps a server's descriptors while there is no server: a service manager, or
//! a supervisor. It is spoken to in the protocol of sd_notify(3), and gives back what it keeps as
//! sd_listen_fds(3) says.
//!
//! It knows names and descriptors. It must not know which descriptor is what: the server does.

#![forbid(unsafe_code)]

use std::env;
use std::ffi::OsStr;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, getsockopt,
    sendmsg, socket, sockopt,
};

use crate::{Error, sys};

/// The descriptors that one message can carry, at most (`SCM_MAX_FD`).
pub(crate) const MOST_IN_MESSAGE: usize = sys::RECEIVE_FDS;

/// The descriptors that a service manager is given, at most: systemd compares each one with each
/// other, and 2,000 take it a second and a half.
const MOST_FOR_MANAGER: u64 = 2000;

/// The name of the listening socket that a server stores.
pub(crate) const OWN_LISTENER: &str = "sock";

/// How long the keeper may take nothing before it is not waited for any more.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// Where a server's descriptors and its state are kept while there is no server, so that it can
/// be killed, restarted or upgraded, and no client notices.
///
/// Give it to [`Builder::keeper`](crate::Builder::keeper). It keeps what one server has.
///
/// ```
/// use ivshmem::Keeper;
///
/// // Under systemd with FileDescriptorStoreMax=, or below `ivshmem-server --supervise`.
/// if let Some(keeper) = Keeper::from_environment()? {
///     println!("{} descriptors were kept", keeper.returned());
/// }
/// # Ok::<(), ivshmem::Error>(())
/// ```
#[derive(Debug)]
pub struct Keeper {
    socket: OwnedFd,
    returned: Vec<Returned>,
    /// The number of descriptors that may be stored.
    capacity: u64,
    stored: u64,
}

/// A descriptor that came back, and its name if there is one.
#[derive(Debug)]
pub(crate) struct Returned {
    pub(crate) fd: OwnedFd,
    pub(crate) name: Option<String>,
}

/// Takes the descriptors that this process was started with (sd_listen_fds(3)), once in a process.
fn inherited() -> Vec<Returned> {
    let number = |name| env::var(name).ok()?.parse::<u64>().ok();
    let is_own = number("LISTEN_PID") == Some(u64::from(std::process::id()));
    let count = number("LISTEN_FDS").filter(|_| is_own).unwrap_or(0);
    let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':').map(str::to_owned);
    sys::take_inherited(usize::try_from(count).unwrap_or(0))
        .into_iter()
        .map(|fd| (fd, names.next()))
        .filter_map(|(fd, name)| Some(Returned { fd: fd?, name }))
        .collect()
}

/// Takes the listening socket that this process was started with, if there is no keeper: socket
/// activation (`LISTEN_FDS`, `LISTEN_PID`). With a keeper use [`Keeper::take_listener`].
///
/// All other descriptors that it was started with are closed. A second call returns None.
///
/// ```
/// match ivshmem::inherited_listener() {
///     Some(listener) => println!("activated: {listener:?}"),
///     None => println!("the server makes its own socket"),
/// }
/// ```
pub fn inherited_listener() -> Option<UnixListener> {
    let mut returned = inherited().into_iter();
    returned.find(|returned| is_stream_listener(&returned.fd)).map(|found| found.fd.into())
}

fn is_stream_listener(fd: &OwnedFd) -> bool {
    getsockopt(fd, sockopt::AcceptConn) == Ok(true)
        && getsockopt(fd, sockopt::SockType) == Ok(SockType::Stream)
}

fn failed(action: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::System { action, source }
}

impl Keeper {
    /// The keeper that the environment names: `NOTIFY_SOCKET`, with `FDSTORE` for the number of
    /// descriptors that it keeps (2,000 without it: systemd before 254 does not tell). None if
    /// there is no such keeper. Takes the descriptors that it
    /// gave back (`LISTEN_FDS`, `LISTEN_PID`, `LISTEN_FDNAMES`), once in a process.
    ///
    /// A process that is not the child of the one in `IVSHMEM_SUPERVISOR` stores 2,000 descriptors
    /// at most: systemd compares each one with each other.
    ///
    /// # Errors
    /// [`Error::System`] if the socket cannot be used.
    pub fn from_environment() -> Result<Option<Self>, Error> {
        let number = |name| env::var(name).ok()?.parse::<u64>().ok();
        let Some(address) = env::var_os("NOTIFY_SOCKET") else { return Ok(None) };
        let capacity = number("FDSTORE").unwrap_or(MOST_FOR_MANAGER);
        if address.is_empty() || capacity == 0 {
            return Ok(None);
        }
        let parent = u64::from(std::os::unix::process::parent_id());
        let is_supervised = number("IVSHMEM_SUPERVISOR") == Some(parent);
        let limit = if is_supervised { u64::MAX } else { MOST_FOR_MANAGER };
        let returned = inherited();
        let socket = open(&address).map_err(failed("use the socket in NOTIFY_SOCKET"))?;
        Ok(Some(Self { socket, returned, capacity: capacity.min(limit), stored: 0 }))
    }

    /// A keeper at the datagram socket `address` (a path, or `@` and an abstract name), which keeps
    /// `capacity` descriptors. `returned` is what it gave back, in any order.
    ///
    /// # Errors
    /// [`Error::System`] if the socket cannot be used.
    pub fn new(
        address: impl AsRef<OsStr>,
        capacity: u64,
        returned: impl IntoIterator<Item = OwnedFd>,
    ) -> Result<Self, Error> {
        let socket = open(address.as_ref()).map_err(failed("use the socket of the keeper"))?;
        let returned = returned.into_iter().map(|fd| Returned { fd, name: None }).collect();
        Ok(Self { socket, returned, capacity, stored: 0 })
    }

    /// The number of descriptors that came back and that no server has taken.
    pub fn returned(&self) -> usize {
        self.returned.len()
    }

    /// Takes the listening socket that the service manager made for a socket unit: one whose name
    /// is not that of a server's own. Give it to
    /// [`Builder::listener`](crate::Builder::listener).
    pub fn take_listener(&mut self) -> Option<UnixListener> {
        let is_unit = |returned: &Returned| {
            returned.name.as_deref().is_some_and(|name| name != OWN_LISTENER)
                && is_stream_listener(&returned.fd)
        };
        let index = self.returned.iter().position(is_unit)?;
        Some(self.returned.swap_remove(index).fd.into())
    }

    /// Tells it that the server serves (`READY=1`).
    ///
    /// # Errors
    /// Those of `sendmsg(2)`; `WouldBlock` if it does not read.
    pub fn ready(&self) -> io::Result<()> {
        self.send("READY=1", &[])
    }

    /// Tells it a line for its own status (`STATUS=`).
    ///
    /// # Errors
    /// As [`ready`](Self::ready).
    pub fn status(&self, line: &str) -> io::Result<()> {
        self.send(&format!("STATUS={}", line.replace('\n', " ")), &[])
    }

    pub(crate) fn take_returned(&mut self) -> Vec<Returned> {
        std::mem::take(&mut self.returned)
    }

    /// Puts back what no server could use.
    pub(crate) fn give_back(&mut self, returned: Vec<Returned>) {
        self.returned.extend(returned);
    }

    /// Counts descriptors that it has, or will have.
    pub(crate) fn count(&mut self, count: u64) {
        self.stored += count;
    }

    /// Whether `count` more descriptors may be stored.
    pub(crate) fn has_room(&self, count: u64) -> bool {
        self.stored.saturating_add(count) <= self.capacity
    }

    pub(crate) fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Stores up to [`MOST_IN_MESSAGE`] descriptors under a name, which may have some already. The
    /// caller [counts](Self::count) them.
    pub(crate) fn store(&self, name: &str, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        self.send(&format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}"), &fds)
    }

    /// Makes it close the `count` descriptors of a name.
    pub(crate) fn remove(&mut self, name: &str, count: u64) -> io::Result<()> {
        self.send(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), &[])?;
        self.stored = self.stored.saturating_sub(count);
        Ok(())
    }

    /// Waits until it has handled everything that was sent, or for [`PATIENCE`] at most.
    pub(crate) fn wait(&self) {
        let Ok((barrier, sent)) = UnixStream::pair() else { return };
        if self.send("BARRIER=1", &[sent.as_raw_fd()]).is_ok() {
            drop(sent);
            // It closes what it got.
            let mut fds = [PollFd::new(barrier.as_fd(), PollFlags::empty())];
            let _ = poll(&mut fds, sys::milliseconds(Some(PATIENCE)));
        }
    }

    /// Sends a message, and never waits.
    fn send(&self, text: &str, fds: &[RawFd]) -> io::Result<()> {
        let rights = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() { &[][..] } else { &rights[..] };
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let text = [IoSlice::new(text.as_bytes())];
        loop {
            match sendmsg::<()>(self.socket.as_raw_fd(), &text, control, flags, None) {
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
                Ok(_) => return Ok(()),
            }
        }
    }
}

impl AsFd for Keeper {
    /// The socket, which is writable when the keeper reads.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A datagram socket that is connected to `address`.
fn open(address: &OsStr) -> io::Result<OwnedFd> {
    let bytes = address.as_bytes();
    let address = match bytes.strip_prefix(b"@") {
        Some(name) => UnixAddr::new_abstract(name)?,
        None if bytes.starts_with(b"/") => UnixAddr::new(bytes)?,
        None => {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("the address {address:?} does not begin with / or @"),
            ));
        }
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Datagram, flags, None)?;
    connect(socket.as_raw_fd(), &address)?;
    Ok(socket)
}
