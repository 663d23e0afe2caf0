// SPDX-License-Identifier: GPL-2.0-or-later
//! One server and all who use it, well or badly.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit};

use crate::common::daemon::Daemon;
use crate::common::member::Member;
use crate::common::target::Target;
use crate::common::{find_in_path, wait_for, wait_up_to};
use crate::{CHILD, Random, Sum};

/// The server's hard limit of open files, which it has from this process.
fn hard_limit() -> u64 {
    getrlimit(Resource::RLIMIT_NOFILE).expect("getrlimit works").1
}

/// Clients of each kind at a time.
const MEMBERS: u64 = 12;
const CHILDREN: usize = 3;
const MUTES: usize = 4;

/// How long everybody may take to hear everything, on a machine that does much else.
const PATIENCE: Duration = Duration::from_secs(60);

/// How a client reads.
#[derive(Clone, Copy, Debug)]
enum Pace {
    All,
    Bytes(usize),
    Nothing,
}

pub(crate) struct World {
    daemon: Daemon,
    vectors: u16,
    members: Vec<(Member, Pace)>,
    children: Vec<Killed>,
    /// Connected, and never reads.
    mutes: Vec<UnixStream>,
    /// Descriptors were scarce since the last checkpoint.
    squeezed: bool,
}

/// A client in a process of its own, which does not outlive this.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl World {
    pub(crate) fn new(target: Target, vectors: u16) -> Self {
        let daemon = target.builder().vectors(vectors).start();
        let (members, children, mutes) = Default::default();
        Self { daemon, vectors, members, children, mutes, squeezed: false }
    }

    fn connect(&self) -> UnixStream {
        UnixStream::connect(self.daemon.socket_path()).expect("the server listens")
    }

    /// One thing happens.
    pub(crate) fn act(&mut self, random: &mut Random, sum: &mut Sum) {
        let who = random.below(self.members.len().max(1) as u64) as usize;
        match random.below(20) {
            0..=4 if (self.members.len() as u64) < MEMBERS => {
                let member = Member::new(self.connect(), self.vectors.into(), false);
                self.members.push((member, pace(random)));
                sum.joins += 1;
            }
            5..=7 if who < self.members.len() => {
                let (member, _) = self.members.swap_remove(who);
                sum.messages += member.view().messages();
                match random.below(5) {
                    0 => drop(member.stream().write_all(b"hello?")),
                    1 => drop(member.stream().shutdown(Shutdown::Write)),
                    2 => drop(member.stream().shutdown(Shutdown::Both)),
                    _ => {}
                }
                sum.leaves += 1;
            }
            8 | 9 if who < self.members.len() => self.members[who].1 = pace(random),
            10 if self.children.len() < CHILDREN => {
                self.children.push(self.spawn());
                sum.joins += 1;
            }
            11 if !self.children.is_empty() => {
                let who = random.below(self.children.len() as u64) as usize;
                let mut child = self.children.swap_remove(who);
                let status = child.0.try_wait().expect("waitpid works");
                assert!(status.is_none(), "a child client ended by itself: {status:?}");
                sum.kills += 1;
            }
            12 if self.mutes.len() < MUTES => self.mutes.push(self.connect()),
            13 => drop(self.mutes.pop()),
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
                self.squeezed = true;
                sum.squeezes += 1;
            }
            16 => self.limit(hard_limit()),
            _ => self.read(sum),
        }
    }

    /// The soft limit of the server's descriptors becomes `most`.
    fn limit(&self, most: u64) {
        let program = find_in_path("prlimit").expect("prlimit: Debian package util-linux");
        let status = Command::new(program)
            .args([format!("--nofile={most}:"), format!("--pid={}", self.daemon.pid())])
            .status()
            .expect("prlimit starts");
        assert!(status.success(), "prlimit of the server to {most}: {status}");
    }

    /// This program once more, as a client that can be killed.
    fn spawn(&self) -> Killed {
        let child = Command::new(std::env::current_exe().expect("this program has a path"))
            .args(["--exact", "as_a_child_be_a_client", "--ignored", "--nocapture"])
            .env(CHILD, format!("{}:{}", self.vectors, self.daemon.socket_path().display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn();
        Killed(child.expect("this program starts"))
    }

    /// Each client reads as it is used to.
    fn read(&mut self, sum: &mut Sum) {
        for (member, pace) in &mut self.members {
            let read = match *pace {
                Pace::All => member.drain().map(drop),
                Pace::Bytes(limit) => member.hear(limit).map(drop),
                Pace::Nothing => Ok(()),
            };
            if let Err(error) = read {
                panic!("client {:?}: {error}\n{:?}", member.view().id(), member.view());
            }
        }
        let before = self.members.len();
        self.members.retain(|(member, _)| {
            let refused = member.has_ended() && member.view().is_refused();
            assert!(
                !member.has_ended() || refused,
                "client {:?} was dropped after {} messages",
                member.view().id(),
                member.view().messages(),
            );
            !refused
        });
        let refused = before - self.members.len();
        assert!(refused == 0 || self.squeezed, "{refused} refused with descriptors left");
        sum.refused += refused as u64;
    }

    /// Everybody reads all, and then knows exactly everybody, a newcomer included.
    pub(crate) fn check(&mut self, sum: &mut Sum) {
        self.daemon.assert_running();
        self.limit(hard_limit());
        if self.squeezed {
            // Whoever was refused has seen the end by now or will, and takes no part; how many
            // of those that never read are among them nobody can tell.
            self.mutes.clear();
            self.children.clear();
        }
        for (_, pace) in &mut self.members {
            *pace = Pace::All;
        }
        // Whatever has been, the next one is served.
        let next = Member::new(self.connect(), self.vectors.into(), false);
        self.members.push((next, Pace::All));
        sum.joins += 1;
        let mut last = String::new();
        let settled = wait_up_to(PATIENCE, || {
            self.read(sum);
            last = self.difference()?;
            last.is_empty().then_some(())
        });
        assert!(settled.is_some(), "views differ: {last}\n{}", self.daemon.output());
        self.squeezed = false;
        sum.compared += self.members.len() as u64;
    }

    /// What is wrong with the views as they are now; empty if nothing is.
    fn difference(&self) -> Option<String> {
        let ids: BTreeSet<_> =
            self.members.iter().filter_map(|(member, _)| member.view().id()).collect();
        let count = self.members.len() + self.children.len() + self.mutes.len();
        let Some((first, _)) = self.members.first() else {
            return Some(String::new());
        };
        let roster: BTreeSet<u16> = first.view().known().iter().collect();
        if roster.len() != count || !ids.is_subset(&roster) || ids.len() != self.members.len() {
            return Some(format!("{count} clients, {ids:?} among them, but {roster:?} are known"));
        }
        let other = self.members.iter().find(|(member, _)| !member.knows_exactly(&roster));
        Some(match other {
            Some((member, _)) => format!("{:?}, but {roster:?} elsewhere", member.view()),
            None => String::new(),
        })
    }

    /// The server is killed; every client sees the end, and nothing else.
    pub(crate) fn kill(self, sum: &mut Sum) {
        let Self { daemon, mut members, .. } = self;
        drop(daemon);
        wait_for("every client sees the end of its server", || {
            for (member, _) in &mut members {
                if let Err(error) = member.drain() {
                    panic!("client {:?}: {error}", member.view().id());
                }
            }
            members.iter().all(|(member, _)| member.has_ended()).then_some(())
        });
        sum.messages += members.iter().map(|(member, _)| member.view().messages()).sum::<u64>();
        sum.servers += 1;
    }

    /// Everybody leaves; the server has nothing left of them, and stops cleanly.
    pub(crate) fn end(mut self, sum: &mut Sum) {
        self.check(sum);
        sum.messages +=
            (self.members.iter()).map(|(member, _)| member.view().messages()).sum::<u64>();
        self.members.clear();
        self.children.clear();
        self.mutes.clear();
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
