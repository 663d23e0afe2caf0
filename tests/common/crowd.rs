// SPDX-License-Identifier: GPL-2.0-or-later
//! Thousands of clients in one epoll loop.
//!
//! The [`View`] of each client is checked as its messages come in. The clients never accept descriptors: the
//! receiver gives no space for control data, so the kernel drops them, and `MSG_CTRUNC` still shows that there
//! was one. So a client needs one descriptor, and one system call reads many messages; the server, not the test,
//! is the busy process. Tests with a [`Peer`](super::peer::Peer) check that the descriptors are the right ones.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::io::IoSliceMut;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{MsgFlags, MultiHeaders, recvmmsg};

use super::daemon::Daemon;
use super::user::as_user;
use super::view::{Ids, View};

/// The most messages that one call reads.
const RUN: usize = 64;

/// Raises the limit of this process to `wanted` descriptors. Returns whether the system allows it.
#[must_use]
pub(crate) fn allow_descriptors(wanted: u64) -> bool {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("getrlimit works");
    soft >= wanted || setrlimit(Resource::RLIMIT_NOFILE, wanted, hard.max(wanted)).is_ok()
}

/// Raises the soft limit of descriptors of this process to the hard limit.
#[must_use]
pub(crate) fn allow_most_descriptors() -> bool {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("getrlimit works");
    allow_descriptors(hard)
}

struct Client {
    stream: UnixStream,
    view: View,
    reads: bool,
    /// The server has closed it.
    ended: bool,
}

/// Many clients of one server. Each client must receive all connected clients of this crowd and no others. So a crowd
/// needs its own server, or [`add_outside_client`](Self::add_outside_client) must name the other clients.
pub(crate) struct Crowd {
    socket: PathBuf,
    vectors: u32,
    /// The user that its clients belong to; none is the user of this process.
    user: Option<u32>,
    epoll: Epoll,
    clients: Vec<Option<Client>>,
    /// The numbers of the clients that may still have messages to read.
    waiting: BTreeSet<usize>,
    headers: MultiHeaders<()>,
    others: Ids,
}

impl Crowd {
    pub(crate) fn new(socket: &Path, vectors: u16) -> Self {
        Self {
            socket: socket.to_owned(),
            vectors: u32::from(vectors),
            user: None,
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).expect("an epoll instance"),
            clients: Vec::new(),
            waiting: BTreeSet::new(),
            headers: MultiHeaders::preallocate(RUN, None),
            others: Ids::default(),
        }
    }

    /// Lets its clients belong to another user. The test must be root.
    pub(crate) fn of_user(mut self, uid: u32) -> Self {
        self.user = Some(uid);
        self
    }

    /// Names a client outside of this crowd that all clients of the crowd must know.
    pub(crate) fn add_outside_client(&mut self, id: u16) {
        self.others.insert(id);
    }

    /// Removes a client that `add_outside_client` named.
    pub(crate) fn remove_outside_client(&mut self, id: u16) {
        assert!(self.others.remove(id), "{id} was not named");
    }

    /// Connects one more client and returns its number. With `reads` it reads whenever the crowd reads;
    /// without, it reads nothing.
    #[track_caller]
    pub(crate) fn connect(&mut self, reads: bool) -> usize {
        // If the backlog is full, this blocking connect waits, as QEMU's does.
        let connect = || UnixStream::connect(&self.socket);
        let stream = match self.user {
            Some(uid) => as_user(uid, connect),
            None => connect(),
        };
        let stream = stream.unwrap_or_else(|error| {
            panic!("client {} cannot connect: {error}", self.clients.len())
        });
        let number = self.clients.len();
        self.clients.push(Some(Client { stream, view: View::default(), reads, ended: false }));
        let flags = if reads { EpollFlags::EPOLLIN } else { EpollFlags::empty() };
        let client = self.client(number);
        self.epoll
            .add(&client.stream, EpollEvent::new(flags, number as u64))
            .expect("epoll takes a socket");
        self.waiting.insert(number);
        number
    }

    /// Connects `count` clients that read.
    #[track_caller]
    pub(crate) fn connect_many(&mut self, count: usize) {
        for _ in 0..count {
            self.connect(true);
        }
    }

    /// A client that has not left.
    #[track_caller]
    fn client(&self, number: usize) -> &Client {
        self.clients[number].as_ref().expect("the client has not left")
    }

    pub(crate) fn view(&self, number: usize) -> &View {
        &self.client(number).view
    }

    pub(crate) fn stream(&self, number: usize) -> &UnixStream {
        &self.client(number).stream
    }

    /// Whether the server has closed this client's connection.
    pub(crate) fn is_ended(&self, number: usize) -> bool {
        self.client(number).ended
    }

    /// The numbers of all clients that have not left.
    pub(crate) fn numbers(&self) -> Vec<usize> {
        (0..self.clients.len()).filter(|&number| self.clients[number].is_some()).collect()
    }

    /// The number of messages that the clients that have not left have received.
    pub(crate) fn messages(&self) -> u64 {
        self.clients.iter().flatten().map(|client| client.view.messages()).sum()
    }

    /// Sets whether this client reads from now on.
    pub(crate) fn set_reading(&mut self, number: usize, reads: bool) {
        let flags = if reads { EpollFlags::EPOLLIN } else { EpollFlags::empty() };
        let client = self.clients[number].as_mut().expect("the client has not left");
        client.reads = reads;
        self.epoll
            .modify(&client.stream, &mut EpollEvent::new(flags, number as u64))
            .expect("epoll knows the socket");
    }

    pub(crate) fn set_all_reading(&mut self, reads: bool) {
        for number in self.numbers() {
            self.set_reading(number, reads);
        }
    }

    /// Closes the client's connection.
    #[track_caller]
    pub(crate) fn leave(&mut self, number: usize) {
        assert!(self.clients[number].take().is_some(), "client {number} has left already");
        self.waiting.remove(&number);
    }

    /// Waits up to `limit` for messages and reads them. Returns whether any came.
    pub(crate) fn read(&mut self, limit: Duration) -> bool {
        let mut ready = [EpollEvent::empty(); 256];
        let timeout = EpollTimeout::try_from(limit).unwrap_or(EpollTimeout::MAX);
        let count = match self.epoll.wait(&mut ready, timeout) {
            Err(Errno::EINTR) => 0,
            count => count.expect("epoll_wait works"),
        };
        for event in &ready[..count] {
            let number = event.data() as usize;
            let Some(client) = &mut self.clients[number] else { continue };
            if client.reads {
                read_some(client, &mut self.headers, self.vectors).unwrap_or_else(|wrong| {
                    panic!("client {number}, {:?}: {wrong}", client.view.id())
                });
                self.waiting.insert(number);
            }
            if client.ended || !client.reads {
                // Otherwise epoll would report the closed connection again and again.
                client.ended = true;
                self.epoll.delete(&client.stream).expect("epoll knows the socket");
            }
        }
        count > 0
    }

    /// Reads until `done` returns true. Panics if nothing comes for a long time.
    #[track_caller]
    pub(crate) fn read_until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        /// Longer than a busy machine delays either process.
        const SILENCE: Duration = Duration::from_secs(20);
        let mut last = Instant::now();
        while !done(self) {
            if self.read(Duration::from_millis(100)) {
                last = Instant::now();
            }
            assert!(
                last.elapsed() < SILENCE,
                "nothing came for {SILENCE:?}: {what}; {}",
                self.report()
            );
        }
    }

    /// The ids of all connected clients, of this crowd and outside. Each greeting must be complete.
    #[track_caller]
    pub(crate) fn present_ids(&self) -> Ids {
        let mut ids = self.others.clone();
        for number in self.numbers() {
            let id = self.view(number).id().unwrap_or_else(|| panic!("client {number} has no id"));
            assert!(ids.insert(id), "two connected clients have the id {id}");
        }
        ids
    }

    /// Reads until the greeting of each reading client is complete.
    #[track_caller]
    pub(crate) fn read_greetings(&mut self) {
        self.read_until("the greetings", |crowd| {
            let Crowd { waiting, clients, .. } = crowd;
            waiting.retain(|&number| {
                clients[number].as_ref().is_some_and(|c| c.reads && !c.view.is_greeting_complete())
            });
            waiting.is_empty()
        });
    }

    /// Makes all clients read, until each client knows exactly the connected clients.
    #[track_caller]
    pub(crate) fn settle(&mut self) {
        self.set_all_reading(true);
        self.waiting = self.numbers().into_iter().collect();
        self.read_greetings();
        let present = self.present_ids();
        self.waiting = self.numbers().into_iter().collect();
        self.read_until("each client knows all clients", |crowd| {
            let Crowd { waiting, clients, .. } = crowd;
            // A client that is done may receive a wrong message later; `read` then puts it back into `waiting`.
            waiting.retain(|&number| {
                let client = clients[number].as_ref().expect("the client has not left");
                assert!(!client.ended, "the server closed client {number}");
                !client.view.knows_exactly(&present)
            });
            waiting.is_empty()
        });
    }

    /// The state of the crowd, for the message of a failed test.
    fn report(&self) -> String {
        let clients = self.clients.iter().flatten();
        let (mut here, mut complete, mut ended) = (0, 0, 0);
        let (mut least, mut most) = (usize::MAX, 0);
        for client in clients {
            here += 1;
            complete += usize::from(client.view.is_greeting_complete());
            ended += usize::from(client.ended);
            least = least.min(client.view.known().len());
            most = most.max(client.view.known().len());
        }
        format!(
            "{here} clients, {complete} with a complete greeting, {ended} closed by the server; they know {least} to {most} peers"
        )
    }
}

/// Reads up to [`RUN`] messages of one client.
fn read_some(
    client: &mut Client,
    headers: &mut MultiHeaders<()>,
    vectors: u32,
) -> Result<(), String> {
    let mut values = [[0; 8]; RUN];
    let mut got = [(0, false); RUN];
    let mut count = 0;
    {
        let mut parts = values.each_mut().map(|value| [IoSliceMut::new(value)]);
        let results = match recvmmsg(
            client.stream.as_raw_fd(),
            headers,
            &mut parts,
            MsgFlags::MSG_DONTWAIT,
            None,
        ) {
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(()),
            // The server closed the connection with unread data.
            Err(Errno::ECONNRESET) => {
                client.ended = true;
                return Ok(());
            }
            results => results.map_err(|errno| format!("cannot receive: {errno}"))?,
        };
        for result in results {
            got[count] = (result.bytes, result.flags.contains(MsgFlags::MSG_CTRUNC));
            count += 1;
        }
    }
    for (&(bytes, has_fd), &value) in got[..count].iter().zip(&values) {
        match bytes {
            8 => client.view.record(i64::from_le_bytes(value), has_fd, vectors)?,
            0 => {
                client.ended = true;
                break;
            }
            bytes => return Err(format!("a message of {bytes} bytes instead of 8")),
        }
    }
    Ok(())
}

/// Connects one client that stays, and clients of other users that use all other ids and leave. The one that stays has
/// received their departures, so no id can be assigned again before it leaves. Returns its crowd, its number there, and
/// how many ids each user got. The test must be root, and the server be [`for_all_users`](super::daemon::Builder).
#[track_caller]
pub(crate) fn use_all_ids(server: &Daemon) -> (Crowd, usize, Vec<usize>) {
    let mut witness = Crowd::new(server.socket_path(), 1);
    let number = witness.connect(true);
    witness.read_greetings();
    let mut used = 1;
    let mut users = Vec::new();
    // The last ids are reserved for users that hold few, so it takes several users.
    for user in 1_000_001.. {
        let before = used;
        loop {
            let many = 15.min(65_536 - used);
            let mut crowd = Crowd::new(server.socket_path(), 1).of_user(user);
            crowd.connect_many(many);
            crowd.read_until("each client is admitted or refused", |crowd| {
                let is_known = |&number: &usize| {
                    crowd.view(number).is_greeting_complete() || crowd.is_ended(number)
                };
                crowd.numbers().iter().all(is_known)
            });
            let is_admitted = |&number: &usize| crowd.view(number).is_greeting_complete();
            let admitted = crowd.numbers().into_iter().filter(is_admitted).count();
            used += admitted;
            witness.read_until("the witness receives the joins", |witness| {
                witness.view(number).known().len() + witness.view(number).gone().len() == used
            });
            if admitted < many || used == 65_536 {
                break;
            }
        }
        users.push(used - before);
        if used == 65_536 {
            break;
        }
    }
    witness.read_until("the witness receives all departures", |witness| {
        witness.view(number).gone().len() == 65_535
    });
    (witness, number, users)
}
