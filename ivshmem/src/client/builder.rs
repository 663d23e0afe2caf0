// SPDX-License-Identifier: GPL-2.0-or-later
//! How a client connects, and when its greeting is complete.
//!
//! # When is the greeting complete?
//! The protocol has no message for that, and none for the number of vectors. QEMU's device gets
//! the number from its user; it goes on when it has the memory, and connects vectors as they come.
//! A program wants its vectors at once. So if the caller did not say how many there are, they are
//! complete when the first of these is true:
//!
//! - there are as many as another peer has;
//! - the server goes on to tell of another peer, since it tells of one peer at a time;
//! - at least one has come, and then nothing more for the quiet time.
//!
//! Only the first client of a server has to wait for the third. If it comes too early, nothing is
//! lost: vectors that come later are added, and reported as events.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, setsockopt, socket, sockopt};
use nix::sys::time::TimeVal;

use super::peers::{Change, PeerTable};
use super::{Client, Connection, Error};
use crate::sys::milliseconds;

/// How a client connects. Made by [`Client::builder`].
///
/// ```
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("socket");
/// # let mut server = ivshmem::Server::builder().socket_path(&path).vectors(2).start()?;
/// # let stopper = server.stopper()?;
/// # let serving = std::thread::spawn(move || server.run());
/// use std::time::Duration;
/// use ivshmem::Client;
///
/// let client = Client::builder()
///     .vectors(2)
///     .memory_size(4 << 20)
///     .connect_timeout(Duration::from_secs(5))
///     .connect(&path)?;
/// assert_eq!(client.vectors(), 2);
///
/// // Without the number of vectors, the end of the greeting is recognised by a pause.
/// let client = Client::builder().quiet_time(Duration::from_millis(50)).connect(&path)?;
/// assert_eq!(client.vectors(), 2);
/// # stopper.stop();
/// # serving.join().unwrap()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Builder {
    vectors: Option<u32>,
    memory_size: Option<u64>,
    limit: Duration,
    quiet: Duration,
}

impl Default for Builder {
    fn default() -> Self {
        Self {
            vectors: None,
            memory_size: None,
            limit: Duration::from_secs(10),
            quiet: Duration::from_millis(100),
        }
    }
}

impl Builder {
    /// The number of vectors that the server gives to each peer. The greeting is complete when the
    /// client has so many. This saves the [quiet time](Self::quiet_time). If the server gives more,
    /// they are used as well.
    ///
    /// With 0, the greeting is complete when the client has the memory. All else is reported as
    /// events, also the peers that joined before.
    ///
    /// By default, the client [finds out](super#when-the-greeting-is-complete) how many there are.
    pub fn vectors(mut self, vectors: u32) -> Self {
        self.vectors = Some(vectors);
        self
    }

    /// The size that the shared memory must have, in bytes. By default, every size is accepted.
    pub fn memory_size(mut self, bytes: u64) -> Self {
        self.memory_size = Some(bytes);
        self
    }

    /// The time limit for the connection and the greeting together. Defaults to 10 s.
    pub fn connect_timeout(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// The vectors are complete if nothing comes for this long after a vector. Defaults to 100 ms.
    /// It has no effect if [`vectors`](Self::vectors) is set.
    pub fn quiet_time(mut self, time: Duration) -> Self {
        self.quiet = time;
        self
    }

    /// Connects to the server at this path.
    ///
    /// # Errors
    /// What is wrong with the path, the server, its greeting or its memory: each [`Error`] that is
    /// not about the use of a connected client.
    pub fn connect(&self, path: impl AsRef<Path>) -> Result<Client, Error> {
        let deadline = Instant::now().checked_add(self.limit);
        let socket = connect(path.as_ref(), self.limit, deadline)?;
        self.greet(Connection::new(socket.into()), deadline)
    }

    /// Takes a stream socket that is connected to a server, and of which nothing has been read.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub fn adopt(&self, socket: impl Into<OwnedFd>) -> Result<Client, Error> {
        let deadline = Instant::now().checked_add(self.limit);
        let connection = Connection::new(socket.into());
        self.greet(connection, deadline)
    }

    /// Reads the greeting. Without a deadline, there is no time limit.
    fn greet(
        &self,
        mut connection: Connection,
        deadline: Option<Instant>,
    ) -> Result<Client, Error> {
        let mut table = PeerTable::default();
        // Whether the server went on to tell of another peer after the client's own vectors.
        let mut passed = false;
        // The quiet time counts from here, also when a signal interrupts the wait.
        let mut last_message = Instant::now();
        while !self.is_complete(&table, passed) {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                let missing = table.missing(self.vectors);
                return Err(Error::Timeout { limit: self.limit, missing });
            }
            if let Some(message) = connection.next()? {
                last_message = Instant::now();
                match table.apply(message)? {
                    Change::Peer(_) => passed = !table.own.is_empty(),
                    Change::Own => passed = false,
                    Change::Greeting => self.check_memory(&table)?,
                    Change::Left(..) => {}
                }
                continue;
            }
            let guessing =
                self.vectors.is_none() && !table.own.is_empty() && table.memory.is_some();
            let quiet = guessing.then(|| self.quiet.saturating_sub(last_message.elapsed()));
            if quiet.is_some_and(|quiet| quiet.is_zero()) && self.quiet > Duration::ZERO {
                break;
            }
            let time = left.into_iter().chain(quiet).min();
            let mut fds = [PollFd::new(connection.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, milliseconds(time)) {
                Ok(0) if guessing && quiet == time => break,
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => {
                    return Err(Error::System {
                        action: "wait for the server",
                        source: errno.into(),
                    });
                }
            }
        }
        for entry in table.peers.values_mut() {
            // A peer that is not complete yet is reported when it is.
            entry.announced = entry.vectors.len() >= table.own.len();
        }
        Client::new(connection, table)
    }

    fn check_memory(&self, table: &PeerTable) -> Result<(), Error> {
        let size = table.memory.as_ref().map(|memory| memory.len() as u64);
        match (size, self.memory_size) {
            (Some(size), Some(wanted)) if size != wanted => Err(Error::MemorySize { size, wanted }),
            _ => Ok(()),
        }
    }

    fn is_complete(&self, table: &PeerTable, passed: bool) -> bool {
        let own = table.own.len();
        table.memory.is_some()
            && match self.vectors {
                Some(vectors) => own >= vectors as usize,
                None => {
                    let others = table.most_vectors();
                    own > 0 && (passed || others.is_some_and(|others| own >= others))
                }
            }
    }
}

/// A connected, non-blocking, close-on-exec socket.
fn connect(path: &Path, limit: Duration, deadline: Option<Instant>) -> Result<UnixStream, Error> {
    let failed = |errno: Errno| Error::Connect { path: path.to_owned(), source: errno.into() };
    let long = || Error::SocketPathLength { path: path.to_owned() };
    if path.as_os_str().is_empty() {
        return Err(long());
    }
    // A zero byte would end the path, or make it an abstract name.
    if path.as_os_str().as_encoded_bytes().contains(&0) {
        return Err(failed(Errno::EINVAL));
    }
    let address = UnixAddr::new(path).map_err(|errno| match errno {
        Errno::ENAMETOOLONG => long(),
        errno => failed(errno),
    })?;
    let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
        .map_err(failed)?;
    loop {
        // connect(2) blocks while the server's queue of connections is full. This option limits
        // the time; 0 would be no limit. After a signal the whole time counts again, so it is
        // set to the rest before each attempt.
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let micros = left.unwrap_or(limit).as_micros().clamp(1, 1_000_000_000_000_000);
        let time = TimeVal::new((micros / 1_000_000) as i64, (micros % 1_000_000) as i64);
        setsockopt(&socket, sockopt::SendTimeout, &time).map_err(failed)?;
        match nix::sys::socket::connect(socket.as_raw_fd(), &address) {
            Ok(()) => break,
            Err(Errno::EINTR) if left.is_none_or(|left| !left.is_zero()) => {}
            Err(Errno::EAGAIN | Errno::EINTR) => {
                let missing = "the acceptance of the connection".into();
                return Err(Error::Timeout { limit, missing });
            }
            Err(errno) => return Err(failed(errno)),
        }
    }
    let socket = UnixStream::from(socket);
    let nonblocking = |source: io::Error| Error::Connect { path: path.to_owned(), source };
    socket.set_nonblocking(true).map_err(nonblocking)?;
    Ok(socket)
}
