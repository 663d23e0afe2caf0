// SPDX-License-Identifier: GPL-2.0-or-later
//! How a client connects, and when its greeting is complete.
//!
//! # When is it complete?
//! The protocol has no word for "that was all", and none for how many vectors a peer has.
//! QEMU's device is told by its user how many it has, goes on when the memory has come, and
//! connects its vectors as they come; the reference's client does the like. A program that
//! wants to use its vectors has to know more than that. So, where the caller has not said how
//! many there are, they are taken to be complete when the first of these comes true:
//!
//! - there are as many as another peer has, whom the server told of before;
//! - the server goes on to tell of another peer: a server tells of one peer at a time;
//! - at least one has come, and then nothing more for the quiet time.
//!
//! Only the first client of all has to wait for the third. If it was a mistake nothing is
//! lost: vectors that come later are added, and are an event.

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

/// What a client is to be. Made by [`Client::builder`].
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
    /// The client is connected once it has this many vectors of its own. It saves waiting for
    /// the [quiet time](Self::quiet_time). If the server gives more they are used as well.
    ///
    /// 0 is a client that is connected when it has the memory, and hears of all else,
    /// the peers that were there before included, as events.
    ///
    /// If it is not said, it is found out: see the [module](super#when-the-greeting-is-complete).
    pub fn vectors(mut self, vectors: u32) -> Self {
        self.vectors = Some(vectors);
        self
    }

    /// The shared memory must be of this size, in bytes. Any will do if it is not said.
    pub fn memory_size(mut self, bytes: u64) -> Self {
        self.memory_size = Some(bytes);
        self
    }

    /// Connecting and the greeting together may take this long; 10 s if it is not said.
    pub fn connect_timeout(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Nothing for this long after a vector of its own means that there are no more; 100 ms if
    /// it is not said. It counts only where [`vectors`](Self::vectors) is not said.
    pub fn quiet_time(mut self, time: Duration) -> Self {
        self.quiet = time;
        self
    }

    /// Connects to the server at this path.
    ///
    /// # Errors
    /// What is wrong with the path, the server, its greeting or its memory: every [`Error`]
    /// but those of a client that is connected.
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

    /// Without a deadline it waits for as long as it takes.
    fn greet(
        &self,
        mut connection: Connection,
        deadline: Option<Instant>,
    ) -> Result<Client, Error> {
        let mut table = PeerTable::default();
        // The server went on to tell of another peer after our own vectors.
        let mut passed = false;
        // A signal must not start the quiet time anew.
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
            // Of the others, who are still being told of, the caller hears when they are whole.
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
    // It would end the path, or at its start make it no path at all.
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
        // connect(2) blocks while the server's queue of connections is full, for as long as this
        // option says, and a signal starts that time anew. So what is left is set each time. 0
        // would mean no limit.
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
