// SPDX-License-Identifier: GPL-2.0-or-later
//! Events, reasons and counters that a server reports.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::RawFd;

use super::applicant::Credentials;

/// Something that happened in [`Server::dispatch`](super::Server::dispatch).
///
/// ```
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("socket");
/// # let mut server = ivshmem::Server::builder().socket_path(&path).start()?;
/// # let socket = std::os::unix::net::UnixStream::connect(&path)?;
/// use ivshmem::Event;
///
/// for event in server.wait(None)? {
///     match event {
///         Event::Joined { id, .. } => println!("peer {id} joined"),
///         Event::Left { id, reason, .. } => println!("peer {id} left: {reason}"),
///         Event::Refused { reason, .. } => println!("a client was refused: {reason}"),
///         _ => {}
///     }
/// }
/// # assert_eq!(server.peers().len(), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// A client was admitted.
    #[non_exhaustive]
    Joined {
        /// Its id, 0 to 65,535.
        id: u16,
        /// The number of its socket, for log lines. The socket may already be closed.
        socket: RawFd,
    },
    /// A client was removed.
    #[non_exhaustive]
    Left {
        /// Its id.
        id: u16,
        /// Why it was removed.
        reason: LeaveReason,
    },
    /// A client was refused: its connection ends, and no other client was told of it.
    #[non_exhaustive]
    Refused {
        /// Why it was refused.
        reason: Refusal,
        /// Its process. None if the kernel did not tell.
        credentials: Option<Credentials>,
    },
    /// A [`Stopper`](super::Stopper) was used.
    Stopped,
    /// A descriptor that was passed to [`Server::wake_on`](super::Server::wake_on) is readable.
    #[non_exhaustive]
    Woken {
        /// The token that was passed with it.
        token: u64,
    },
}

/// Why a client was removed.
///
/// ```
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("socket");
/// # let mut server = ivshmem::Server::builder().socket_path(&path).start()?;
/// # let socket = std::os::unix::net::UnixStream::connect(&path)?;
/// # server.wait(None)?;
/// use ivshmem::{Event, LeaveReason};
///
/// drop(socket); // the only client ends
/// let events = server.wait(None)?;
/// assert!(matches!(events[..], [Event::Left { id: 0, reason: LeaveReason::HungUp, .. }]));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LeaveReason {
    /// It closed its connection.
    #[error("it hung up")]
    HungUp,
    /// It sent data. The protocol has no message from a client to a server.
    #[error("it sent something, which the protocol forbids")]
    SentData,
    /// [`Server::disconnect`](super::Server::disconnect) was called.
    #[error("it was disconnected")]
    Disconnected,
    /// Its connection failed.
    #[error("its connection failed")]
    Broken(#[source] io::Error),
}

impl LeaveReason {
    /// A short name for statistics and other programs, such as `hung_up`. It does not change with
    /// later versions.
    pub fn name(&self) -> &'static str {
        match self {
            Self::HungUp => "hung_up",
            Self::SentData => "sent_data",
            Self::Disconnected => "disconnected",
            Self::Broken(_) => "broken",
        }
    }
}

/// Why a client was refused.
///
/// ```
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("socket");
/// use std::os::unix::net::UnixStream;
/// use ivshmem::{Event, Refusal, Server};
///
/// let mut server = Server::builder().socket_path(&path).max_clients(1).start()?;
/// let (_one, _two) = (UnixStream::connect(&path)?, UnixStream::connect(&path)?);
/// let events = server.wait(None)?;
/// let Event::Refused { reason, .. } = &events[1] else { panic!("{events:?}") };
/// assert!(matches!(reason, Refusal::TooManyClients { limit: 1, .. }));
/// println!("{reason}"); // as many clients are connected as the limit allows: 1
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// No id is left: each is in use, or a connected client was told of its last owner.
    #[error(
        "no id is left: each is in use, or was told to a client that is still connected; \
         disconnect the oldest clients"
    )]
    NoIds,
    /// No descriptor is left for its socket or one of its vectors.
    #[error("no descriptor is left; raise the limit of open files (RLIMIT_NOFILE)")]
    NoDescriptors(#[source] io::Error),
    /// The rule of [`Builder::admit`](super::Builder::admit) does not permit it. The text is the
    /// rule's reason.
    #[error("it is not permitted: {0}")]
    NotPermitted(String),
    /// [`Builder::max_clients`](super::Builder::max_clients) are connected.
    #[error("as many clients are connected as the limit allows: {limit}")]
    #[non_exhaustive]
    TooManyClients {
        /// The limit.
        limit: u32,
    },
    /// Its user holds as much as
    /// [`Builder::max_clients_per_uid`](super::Builder::max_clients_per_uid) allows.
    #[error(
        "uid {uid} holds {held} connections, ended connections with unread messages, and \
         remembered ids; the limit for each user is {limit}"
    )]
    #[non_exhaustive]
    TooManyOfUser {
        /// The user.
        uid: u32,
        /// What the user holds.
        held: u32,
        /// The limit.
        limit: u32,
    },
    /// Its user holds many, and the last descriptors or ids are reserved for other users.
    #[error("uid {uid} holds {held} already, and the last {what} are reserved for other users")]
    #[non_exhaustive]
    Reserved {
        /// The user.
        uid: u32,
        /// What the user holds: connections, ended ones, and remembered ids.
        held: u32,
        /// What is reserved: "descriptors" or "ids".
        what: &'static str,
    },
    /// Clients of its user come and go so fast that too many connections of the user wait.
    #[error("too many connections of uid {uid} wait, because its clients come and go too fast")]
    #[non_exhaustive]
    Busy {
        /// The user.
        uid: u32,
    },
    /// It had hung up, or sent data, before it was admitted.
    #[error("it hung up, or sent something, before it was admitted")]
    Ended,
    /// A system call for it failed.
    #[error("a system call for the new client failed")]
    System(#[source] io::Error),
}

impl Refusal {
    /// A short name for statistics and other programs, such as `no_ids`. It does not change with
    /// later versions.
    pub fn name(&self) -> &'static str {
        match self {
            Self::NoIds => "no_ids",
            Self::NoDescriptors(_) => "no_descriptors",
            Self::NotPermitted(_) => "not_permitted",
            Self::TooManyClients { .. } => "too_many_clients",
            Self::TooManyOfUser { .. } => "too_many_of_user",
            Self::Reserved { .. } => "reserved",
            Self::Busy { .. } => "busy",
            Self::Ended => "ended",
            Self::System(_) => "system",
        }
    }

    /// Whether something is used up, so that the user that holds most is of interest.
    pub(super) fn is_shortage(&self) -> bool {
        match self {
            Self::NoIds
            | Self::NoDescriptors(_)
            | Self::TooManyClients { .. }
            | Self::Reserved { .. } => true,
            Self::TooManyOfUser { .. }
            | Self::Busy { .. }
            | Self::NotPermitted(_)
            | Self::Ended
            | Self::System(_) => false,
        }
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EMFILE | libc::ENFILE) => Self::NoDescriptors(error),
            _ => Self::System(error),
        }
    }
}

/// Counters of a server since its start, and the ids that are left. Made by
/// [`Server::stats`](super::Server::stats).
///
/// ```
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("socket");
/// # let server = ivshmem::Server::builder().socket_path(&path).start()?;
/// let stats = server.stats();
/// println!("{} clients, {} ids left", stats.peers, stats.ids_free);
/// # assert_eq!((stats.peers, stats.ids_free), (0, 65_536));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Clients that are connected.
    pub peers: usize,
    /// Clients that were admitted.
    pub joined: u64,
    /// Clients that were removed.
    pub left: u64,
    /// Clients that were refused because no id was left.
    pub refused_no_ids: u64,
    /// Clients that were refused because no descriptor was left.
    pub refused_no_descriptors: u64,
    /// Clients that were refused because they had hung up or sent data.
    pub refused_ended: u64,
    /// Clients that were refused because a system call failed.
    pub refused_system: u64,
    /// Clients that were refused by the rule of [`Builder::admit`](super::Builder::admit).
    pub refused_not_permitted: u64,
    /// Clients that were refused because of a limit, or because the rest is reserved: the sum of
    /// the three counters that follow.
    pub refused_limit: u64,
    /// Clients that were refused because of
    /// [`Builder::max_clients`](super::Builder::max_clients).
    pub refused_too_many_clients: u64,
    /// Clients that were refused because of
    /// [`Builder::max_clients_per_uid`](super::Builder::max_clients_per_uid).
    pub refused_too_many_of_user: u64,
    /// Clients that were refused because the last ids or descriptors are reserved for other users.
    pub refused_reserved: u64,
    /// Clients that were refused because too many connections of their user waited.
    pub refused_busy: u64,
    /// Connections that have ended, but not in the kernel: the client has not read its messages.
    pub lingering: u32,
    /// Messages that were sent.
    pub messages: u64,
    /// Ids that can be given now. The server does not check first which remembered ids have become
    /// free.
    pub ids_free: u32,
    /// Ids of connected clients.
    pub ids_used: u32,
    /// Ids of departed clients that may not be given again yet.
    pub ids_remembered: u32,
    /// How often a server before was followed by the next one, since its clients were first
    /// served: 0 without a [`Keeper`](crate::Keeper).
    pub restarts: u64,
}

impl Stats {
    pub(super) fn count(&mut self, refusal: &Refusal) {
        let counter = match refusal {
            Refusal::NoIds => &mut self.refused_no_ids,
            Refusal::NoDescriptors(_) => &mut self.refused_no_descriptors,
            Refusal::Ended => &mut self.refused_ended,
            Refusal::System(_) => &mut self.refused_system,
            Refusal::NotPermitted(_) => &mut self.refused_not_permitted,
            Refusal::TooManyClients { .. } => &mut self.refused_too_many_clients,
            Refusal::TooManyOfUser { .. } => &mut self.refused_too_many_of_user,
            Refusal::Reserved { .. } => &mut self.refused_reserved,
            Refusal::Busy { .. } => &mut self.refused_busy,
        };
        *counter += 1;
        self.refused_limit =
            self.refused_too_many_clients + self.refused_too_many_of_user + self.refused_reserved;
    }

    /// The clients that were refused for each reason, by [`Refusal::name`]. Reasons for which no
    /// client was refused are listed too.
    ///
    /// ```
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("socket");
    /// use std::os::unix::net::UnixStream;
    /// use ivshmem::Server;
    ///
    /// let mut server = Server::builder().socket_path(&path).max_clients(1).start()?;
    /// let (_one, _two) = (UnixStream::connect(&path)?, UnixStream::connect(&path)?);
    /// server.wait(None)?;
    /// let refused: Vec<_> =
    ///     server.stats().refusals().filter(|(_, count)| *count > 0).collect();
    /// assert_eq!(refused, [("too_many_clients", 1)]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn refusals(&self) -> impl Iterator<Item = (&'static str, u64)> + use<> {
        [
            ("no_ids", self.refused_no_ids),
            ("no_descriptors", self.refused_no_descriptors),
            ("not_permitted", self.refused_not_permitted),
            ("too_many_clients", self.refused_too_many_clients),
            ("too_many_of_user", self.refused_too_many_of_user),
            ("reserved", self.refused_reserved),
            ("busy", self.refused_busy),
            ("ended", self.refused_ended),
            ("system", self.refused_system),
        ]
        .into_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_refusal_is_counted_under_its_name() {
        let reasons = [
            Refusal::NoIds,
            Refusal::NoDescriptors(io::ErrorKind::Other.into()),
            Refusal::NotPermitted(String::new()),
            Refusal::TooManyClients { limit: 1 },
            Refusal::TooManyOfUser { uid: 1, held: 1, limit: 1 },
            Refusal::Reserved { uid: 1, held: 1, what: "ids" },
            Refusal::Busy { uid: 1 },
            Refusal::Ended,
            Refusal::System(io::ErrorKind::Other.into()),
        ];
        let mut stats = Stats::default();
        for (number, reason) in reasons.iter().enumerate() {
            stats.count(reason);
            let counted: Vec<_> = stats.refusals().filter(|(_, count)| *count > 0).collect();
            assert_eq!(counted.len(), number + 1, "{reason:?}");
            assert!(counted.contains(&(reason.name(), 1)), "{reason:?}: {counted:?}");
        }
        assert_eq!(stats.refused_limit, 3, "the three limits");
    }
}
