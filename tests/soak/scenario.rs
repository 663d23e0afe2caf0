// SPDX-License-Identifier: GPL-2.0-or-later
//! One server with well-behaved and hostile clients.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit};

use crate::common::checked_client::CheckedClient;
use crate::common::daemon::Daemon;
use crate::common::target::Target;
use crate::common::{find_in_path, wait_for, wait_up_to};
use crate::{CHILD, Random, Sum};

/// The server's hard limit of open files, inherited from this process.
fn hard_limit() -> u64 {
    getrlimit(Resource::RLIMIT_NOFILE).expect("getrlimit works").1
}

/// The most clients of each kind at a time.
const CLIENTS: u64 = 12;
const CHILDREN: usize = 3;
const NON_READERS: usize = 4;
const ENDED: usize = 60;

/// The time limit until all clients have received everything on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// How a client reads.
#[derive(Clone, Copy, Debug)]
enum Pace {
    All,
    Bytes(usize),
    Nothing,
}

pub(crate) struct Scenario {
    daemon: Daemon,
    vectors: u16,
    clients: Vec<(CheckedClient, Pace)>,
    children: Vec<Killed>,
    /// Connected clients that never read.
    non_readers: Vec<UnixStream>,
    /// Clients that the server has removed. They keep their sockets and read nothing.
    ended: Vec<UnixStream>,
    /// Whether the server's descriptors were limited since the last checkpoint.
    was_limited: bool,
}

/// A client in its own process. It is killed when this value is dropped.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Scenario {
    pub(crate) fn new(target: Target, vectors: u16) -> Self {
        let daemon = target.builder().vectors(vectors).start();
        let (clients, children, non_readers, ended) = Default::default();
        Self { daemon, vectors, clients, children, non_readers, ended, was_limited: false }
    }

    fn connect(&self) -> UnixStream {
        UnixStream::connect(self.daemon.socket_path()).expect("the server listens")
    }

    /// Connects, and waits until the server admits this client. None if it does not.
    fn connect_admitted(&self) -> Option<UnixStream> {
        let mut stream = self.connect();
        stream.set_read_timeout(Some(Duration::from_secs(1))).expect("it is a socket");
        let mut version = [0; 8];
        stream.read_exact(&mut version).ok()?;
        (version == [0; 8]).then_some(stream)
    }

    /// Does one pseudo-random action.
    pub(crate) fn act(&mut self, random: &mut Random, sum: &mut Sum) {
        let index = random.below(self.clients.len().max(1) as u64) as usize;
        match random.below(22) {
            0..=4 if (self.clients.len() as u64) < CLIENTS => {
                let client = CheckedClient::new(self.connect(), self.vectors.into(), false);
                self.clients.push((client, pace(random)));
                sum.joins += 1;
            }
            5..=7 if index < self.clients.len() => {
                let (client, _) = self.clients.swap_remove(index);
                sum.messages += client.view().messages();
                match random.below(5) {
                    0 => drop(client.stream().write_all(b"hello?")),
                    1 => drop(client.stream().shutdown(Shutdown::Write)),
                    2 => drop(client.stream().shutdown(Shutdown::Both)),
                    _ => {}
                }
                sum.leaves += 1;
            }
            8 | 9 if index < self.clients.len() => self.clients[index].1 = pace(random),
            10 if self.children.len() < CHILDREN => {
                self.children.push(self.spawn());
                sum.joins += 1;
            }
            11 if !self.children.is_empty() => {
                let index = random.below(self.children.len() as u64) as usize;
                let mut child = self.children.swap_remove(index);
                let status = child.0.try_wait().expect("waitpid works");
                assert!(status.is_none(), "a child client ended by itself: {status:?}");
                sum.kills += 1;
            }
            12 if self.non_readers.len() < NON_READERS => self.non_readers.push(self.connect()),
            13 => drop(self.non_readers.pop()),
            14 => {
                for _ in 0..random.below(20) {
                    let stream = self.connect();
                    if random.below(2) == 0 {
                        let _ = (&stream).write(b"GET / HTTP/1.1\r\n\r\n");
                    }
                    sum.hostile += 1;
                }
            }
            15 if random.below(4) == 0 => {
                let left = random.below(3 * u64::from(self.vectors) + 3);
                self.limit(self.daemon.open_fds() as u64 + left);
                self.was_limited = true;
                sum.limits += 1;
            }
            16 => self.limit(hard_limit()),
            17 if self.ended.len() < ENDED => {
                for _ in 0..=random.below(10) {
                    let Some(mut stream) = self.connect_admitted() else { continue };
                    let _ = stream.write_all(b"!");
                    self.ended.push(stream);
                    sum.ended += 1;
                }
            }
            18 => {
                let index = random.below(self.ended.len() as u64 + 1) as usize;
                self.ended.truncate(index);
            }
            19 => {
                // Knocks: connects and closes as fast as it can. A quarter waits to be admitted.
                for number in 0..random.below(60) {
                    match number % 4 {
                        0 => drop(self.connect_admitted()),
                        _ => drop(self.connect()),
                    }
                    sum.knocks += 1;
                }
            }
            _ => self.read(sum),
        }
    }

    /// Sets the soft limit of the server's descriptors to `most`.
    fn limit(&self, most: u64) {
        let program = find_in_path("prlimit").expect("prlimit: Debian package util-linux");
        let status = Command::new(program)
            .args([format!("--nofile={most}:"), format!("--pid={}", self.daemon.pid())])
            .status()
            .expect("prlimit starts");
        assert!(status.success(), "prlimit of the server to {most}: {status}");
    }

    /// Starts this program again as a client process that can be killed.
    fn spawn(&self) -> Killed {
        let child = Command::new(std::env::current_exe().expect("this program has a path"))
            .args(["--exact", "client_in_a_child_process", "--ignored", "--nocapture"])
            .env(CHILD, format!("{}:{}", self.vectors, self.daemon.socket_path().display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn();
        Killed(child.expect("this program starts"))
    }

    /// Each client reads at its own pace.
    fn read(&mut self, sum: &mut Sum) {
        for (client, pace) in &mut self.clients {
            let read = match *pace {
                Pace::All => client.drain().map(drop),
                Pace::Bytes(limit) => client.receive(limit).map(drop),
                Pace::Nothing => Ok(()),
            };
            if let Err(error) = read {
                panic!("client {:?}: {error}\n{:?}", client.view().id(), client.view());
            }
        }
        let before = self.clients.len();
        self.clients.retain(|(client, _)| {
            let refused = client.has_ended() && client.view().is_refused();
            assert!(
                !client.has_ended() || refused,
                "client {:?} was dropped after {} messages",
                client.view().id(),
                client.view().messages(),
            );
            !refused
        });
        let refused = before - self.clients.len();
        assert!(
            refused == 0 || self.was_limited,
            "{refused} refused, although descriptors were free"
        );
        sum.refused += refused as u64;
    }

    /// All clients read all messages. Checks that each then knows exactly all clients, including a new one.
    pub(crate) fn check(&mut self, sum: &mut Sum) {
        self.daemon.assert_running();
        self.limit(hard_limit());
        if self.was_limited {
            // The server may have refused some of these clients. Since they do not report it, their
            // number is unknown, so all of them leave.
            self.non_readers.clear();
            self.children.clear();
        }
        for (_, pace) in &mut self.clients {
            *pace = Pace::All;
        }
        // A new client must be served after all these actions.
        let next = CheckedClient::new(self.connect(), self.vectors.into(), false);
        self.clients.push((next, Pace::All));
        sum.joins += 1;
        let mut last = String::new();
        let settled = wait_up_to(PATIENCE, || {
            self.read(sum);
            last = self.difference()?;
            last.is_empty().then_some(())
        });
        assert!(settled.is_some(), "views differ: {last}\n{}", self.daemon.output());
        self.was_limited = false;
        sum.compared += self.clients.len() as u64;
    }

    /// Describes the first wrong view; empty if all views are right.
    fn difference(&self) -> Option<String> {
        let ids: BTreeSet<_> =
            self.clients.iter().filter_map(|(client, _)| client.view().id()).collect();
        let count = self.clients.len() + self.children.len() + self.non_readers.len();
        let Some((first, _)) = self.clients.first() else {
            return Some(String::new());
        };
        let roster: BTreeSet<u16> = first.view().known().iter().collect();
        if roster.len() != count || !ids.is_subset(&roster) || ids.len() != self.clients.len() {
            return Some(format!("{count} clients, including {ids:?}, but {roster:?} are known"));
        }
        let other = self.clients.iter().find(|(client, _)| !client.knows_exactly(&roster));
        Some(match other {
            Some((client, _)) => {
                format!("{:?}, but another client knows {roster:?}", client.view())
            }
            None => String::new(),
        })
    }

    /// Kills the server. Checks that each client sees the end of its connection and no error.
    pub(crate) fn kill(self, sum: &mut Sum) {
        let Self { daemon, mut clients, .. } = self;
        drop(daemon);
        wait_for("the end of each client's connection", || {
            for (client, _) in &mut clients {
                if let Err(error) = client.drain() {
                    panic!("client {:?}: {error}", client.view().id());
                }
            }
            clients.iter().all(|(client, _)| client.has_ended()).then_some(())
        });
        sum.messages += clients.iter().map(|(client, _)| client.view().messages()).sum::<u64>();
        sum.servers += 1;
    }

    /// All clients leave. Checks that the server closes all their descriptors and stops cleanly.
    pub(crate) fn end(mut self, sum: &mut Sum) {
        self.check(sum);
        sum.messages +=
            (self.clients.iter()).map(|(client, _)| client.view().messages()).sum::<u64>();
        self.clients.clear();
        self.children.clear();
        self.non_readers.clear();
        self.ended.clear();
        let idle = self.daemon.idle_fds();
        let mut open = 0;
        let back = wait_up_to(PATIENCE, || {
            open = self.daemon.open_fds();
            (open == idle).then_some(())
        });
        assert!(back.is_some(), "{open} descriptors with no client, {idle} at the start");
        self.daemon.stop();
        sum.servers += 1;
    }
}

fn pace(random: &mut Random) -> Pace {
    match random.below(4) {
        0 => Pace::Nothing,
        1 => Pace::Bytes(1 + random.below(40) as usize),
        _ => Pace::All,
    }
}
