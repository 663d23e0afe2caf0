// SPDX-License-Identifier: GPL-2.0-or-later
//! Thousands of clients in one epoll loop.
//!
//! Each has its whole [`View`] checked as its messages come in. Received descriptors are never taken: a receiver that
//! gives no room for control data has the kernel drop them, and `MSG_CTRUNC` still tells that there was one. So a
//! client costs one descriptor, and a message a share of one system call, and the server, not the test, is what is busy.
//! That the descriptors are the right ones is for tests with a [`Peer`](super::peer::Peer) to say.

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

use super::view::{Ids, View};

/// Messages taken with one call.
const RUN: usize = 64;

/// Lets this process have `wanted` descriptors; whether the system allows it.
#[must_use]
pub(crate) fn allow_descriptors(wanted: u64) -> bool {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("getrlimit works");
    soft >= wanted || setrlimit(Resource::RLIMIT_NOFILE, wanted, hard.max(wanted)).is_ok()
}

/// Lets this process have all that it may have by itself.
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

/// Many clients of one server. What each is to be told is everybody of this crowd who is there, so a crowd needs a
/// server of its own, or [`also`](Self::also) to name the others.
pub(crate) struct Crowd {
    socket: PathBuf,
    vectors: u32,
    epoll: Epoll,
    clients: Vec<Option<Client>>,
    /// Those of `clients` who may still have something to hear.
    waiting: BTreeSet<usize>,
    headers: MultiHeaders<()>,
    others: Ids,
}

impl Crowd {
    pub(crate) fn new(socket: &Path, vectors: u16) -> Self {
        Self {
            socket: socket.to_owned(),
            vectors: u32::from(vectors),
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).expect("an epoll instance"),
            clients: Vec::new(),
            waiting: BTreeSet::new(),
            headers: MultiHeaders::preallocate(RUN, None),
            others: Ids::default(),
        }
    }

    /// Names a client outside of this crowd whom everybody is to know.
    pub(crate) fn also(&mut self, id: u16) {
        self.others.insert(id);
    }

    /// The named client is no longer there.
    pub(crate) fn no_longer(&mut self, id: u16) {
        assert!(self.others.remove(id), "{id} was not named");
    }

    /// Connects one more, who reads whenever the crowd does, or, stopped, not at all; returns its number.
    #[track_caller]
    pub(crate) fn connect(&mut self, reads: bool) -> usize {
        // A full backlog makes a blocking connect wait, as QEMU's does.
        let stream = UnixStream::connect(&self.socket).unwrap_or_else(|error| {
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

    /// Connects that many who read.
    #[track_caller]
    pub(crate) fn connect_many(&mut self, count: usize) {
        for _ in 0..count {
            self.connect(true);
        }
    }

    /// One client, who is still in the crowd.
    #[track_caller]
    fn client(&self, number: usize) -> &Client {
        self.clients[number].as_ref().expect("it has not left")
    }

    pub(crate) fn view(&self, number: usize) -> &View {
        &self.client(number).view
    }

    pub(crate) fn stream(&self, number: usize) -> &UnixStream {
        &self.client(number).stream
    }

    /// Whether the server has closed this one.
    pub(crate) fn is_ended(&self, number: usize) -> bool {
        self.client(number).ended
    }

    /// The numbers of all who have not left.
    pub(crate) fn numbers(&self) -> Vec<usize> {
        (0..self.clients.len()).filter(|&number| self.clients[number].is_some()).collect()
    }

    /// Messages received by those who have not left.
    pub(crate) fn messages(&self) -> u64 {
        self.clients.iter().flatten().map(|client| client.view.messages()).sum()
    }

    /// From now on this client reads, or does not.
    pub(crate) fn set_reading(&mut self, number: usize, reads: bool) {
        let flags = if reads { EpollFlags::EPOLLIN } else { EpollFlags::empty() };
        let client = self.clients[number].as_mut().expect("it has not left");
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

    /// Hangs up.
    #[track_caller]
    pub(crate) fn leave(&mut self, number: usize) {
        assert!(self.clients[number].take().is_some(), "client {number} has left already");
        self.waiting.remove(&number);
    }

    /// Reads what there is, waiting for it up to `limit`; whether anything came.
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
                // Otherwise its hanging up would be told again and again.
                client.ended = true;
                self.epoll.delete(&client.stream).expect("epoll knows the socket");
            }
        }
        count > 0
    }

    /// Reads until `done`, and panics if nothing comes for long before that.
    #[track_caller]
    pub(crate) fn read_until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        /// Longer than a busy machine holds up either process.
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

    /// Who is here, of this crowd and others. All must have been welcomed.
    #[track_caller]
    pub(crate) fn everybody(&self) -> Ids {
        let mut ids = self.others.clone();
        for number in self.numbers() {
            let id = self.view(number).id().unwrap_or_else(|| panic!("client {number} has no id"));
            assert!(ids.insert(id), "id {id} was given to two who are here");
        }
        ids
    }

    /// Reads until each one who reads has its own vectors.
    #[track_caller]
    pub(crate) fn welcome(&mut self) {
        self.read_until("the greetings", |crowd| {
            let Crowd { waiting, clients, .. } = crowd;
            waiting.retain(|&number| {
                clients[number].as_ref().is_some_and(|c| c.reads && !c.view.is_welcomed())
            });
            waiting.is_empty()
        });
    }

    /// Reads until everybody knows exactly everybody who is here, all of them reading.
    #[track_caller]
    pub(crate) fn settle(&mut self) {
        self.set_all_reading(true);
        self.waiting = self.numbers().into_iter().collect();
        self.welcome();
        let everybody = self.everybody();
        self.waiting = self.numbers().into_iter().collect();
        self.read_until("everybody knows everybody", |crowd| {
            let Crowd { waiting, clients, .. } = crowd;
            // Whoever does know may be told something wrong later: then it waits again.
            waiting.retain(|&number| {
                let client = clients[number].as_ref().expect("it has not left");
                assert!(!client.ended, "the server closed client {number}");
                !client.view.knows_exactly(&everybody)
            });
            waiting.is_empty()
        });
    }

    /// For a failed test's message.
    fn report(&self) -> String {
        let clients = self.clients.iter().flatten();
        let (mut here, mut welcomed, mut ended) = (0, 0, 0);
        let (mut least, mut most) = (usize::MAX, 0);
        for client in clients {
            here += 1;
            welcomed += usize::from(client.view.is_welcomed());
            ended += usize::from(client.ended);
            least = least.min(client.view.known().len());
            most = most.max(client.view.known().len());
        }
        format!(
            "{here} are here, {welcomed} welcomed, {ended} closed by the server; they know {least} to {most}"
        )
    }
}

/// Takes up to a run of messages.
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
            // It was closed with something unread.
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
            8 => client.view.note(i64::from_le_bytes(value), has_fd, vectors)?,
            0 => {
                client.ended = true;
                break;
            }
            bytes => return Err(format!("{bytes} bytes where a message has 8")),
        }
    }
    Ok(())
}
