// SPDX-License-Identifier: GPL-2.0-or-later
//! One connection of a control client: its buffers, and how far its present call is.
//!
//! A client that does not read, or that sends without end, costs a bounded amount of memory: no
//! call is read while a reply is not sent, a call has [`MAX_CALL`] bytes at most, the reply of
//! `Status` is made some peers at a time, and a client that watches may have [`MAX_EVENTS`] bytes
//! of events unsent.

#![forbid(unsafe_code)]

use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use ivshmem::Server;
use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;
use nix::sys::socket::{MsgFlags, send};
use serde_json::{Value, json};

use super::interface::{Answer, answer};
use super::programs::{self, Program, Programs};
use super::status::{self, Facts};
use super::varlink::{Call, reply};

/// The bytes of a call, at most.
const MAX_CALL: usize = 16 << 10;

/// The bytes of events that a client may leave unread, besides those in its socket.
const MAX_EVENTS: usize = 256 << 10;

/// The peers of a `Status` that are made at a time.
const PEERS_AT_ONCE: usize = 64;

/// The steps of one connection before others have their turn.
const STEPS: usize = 4;

/// Whether the connection goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    GoesOn,
    Ended,
}

/// What the connection does.
#[derive(Debug)]
enum Work {
    /// It waits for a call.
    Idle,
    Status(Status),
    /// It sends each event.
    Watch,
}

/// A reply of `Status` that is not complete yet.
#[derive(Debug)]
struct Status {
    /// The peers when the call came, and the number of those that were handled.
    ids: Vec<u16>,
    done: usize,
    /// One was written.
    has_peer: bool,
    /// The number of the question about the programs of the next peers, and when it is too late for
    /// an answer.
    question: Option<(u64, Instant)>,
}

#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    caller: String,
    input: Vec<u8>,
    output: Vec<u8>,
    /// Bytes of `output` that were sent.
    sent: usize,
    work: Work,
    /// What epoll reports.
    pub(super) interest: EpollFlags,
    /// When it last did something.
    active: Instant,
}

impl Connection {
    /// `caller` is the process at the other end, for the log.
    pub(super) fn new(stream: UnixStream, caller: String) -> Self {
        Self {
            stream,
            caller,
            input: Vec::new(),
            output: Vec::new(),
            sent: 0,
            work: Work::Idle,
            interest: EpollFlags::EPOLLIN,
            active: Instant::now(),
        }
    }

    pub(super) fn is_watching(&self) -> bool {
        matches!(self.work, Work::Watch)
    }

    /// How long it has done nothing. A client that watches and has nothing to read is not idle.
    pub(super) fn idle(&self) -> Duration {
        if self.is_watching() && self.is_sent() {
            return Duration::ZERO;
        }
        self.active.elapsed()
    }

    /// When it goes on without an answer about programs.
    pub(super) fn due(&self) -> Option<Instant> {
        match &self.work {
            Work::Status(status) => status.question.map(|(_, until)| until),
            _ => None,
        }
    }

    /// The number of the question whose answer it waits for.
    pub(super) fn question(&self) -> Option<u64> {
        match &self.work {
            Work::Status(status) => status.question.map(|(question, _)| question),
            _ => None,
        }
    }

    /// What epoll has to report for it to go on.
    pub(super) fn wants(&self) -> EpollFlags {
        match &self.work {
            _ if !self.is_sent() => EpollFlags::EPOLLOUT,
            Work::Status(status) if status.question.is_some() => EpollFlags::empty(),
            // epoll reports a hang-up whatever it is asked for.
            Work::Watch => EpollFlags::empty(),
            Work::Idle if !self.input.contains(&0) => EpollFlags::EPOLLIN,
            // It was interrupted after some steps.
            Work::Idle | Work::Status(_) => EpollFlags::EPOLLOUT,
        }
    }

    /// Does what can be done now. `hung_up` says that nobody reads any more.
    pub(super) fn advance(
        &mut self,
        server: &mut Server,
        facts: &Facts,
        programs: &mut Option<Programs>,
        hung_up: bool,
    ) -> Verdict {
        // A call that was sent before the hang-up counts.
        if hung_up && !matches!(self.work, Work::Idle) {
            return Verdict::Ended;
        }
        for _ in 0..STEPS {
            if self.flush().is_err() {
                return Verdict::Ended;
            }
            if !self.is_sent() {
                return Verdict::GoesOn;
            }
            let step = match &mut self.work {
                Work::Watch => return Verdict::GoesOn,
                Work::Status(status) if status.question.is_some() => return Verdict::GoesOn,
                Work::Status(status) => {
                    self.active = Instant::now();
                    if status.done == status.ids.len() {
                        self.finish_status();
                    } else {
                        self.ask(server, programs);
                    }
                    Ok(true)
                }
                Work::Idle => self.step(server, facts),
            };
            match step {
                Ok(true) => {}
                Ok(false) => return Verdict::GoesOn,
                Err(()) => return Verdict::Ended,
            }
        }
        Verdict::GoesOn
    }

    /// Takes the next call, or reads. Returns whether there may be more to do.
    fn step(&mut self, server: &mut Server, facts: &Facts) -> Result<bool, ()> {
        if let Some(end) = self.input.iter().position(|&byte| byte == 0) {
            let call = Call::parse(&self.input[..end]).ok_or(())?;
            self.input.drain(..=end);
            self.active = Instant::now();
            self.call(call, server, facts);
            return Ok(true);
        }
        if self.input.len() > MAX_CALL {
            return Err(());
        }
        let mut part = [0; 4096];
        match self.stream.read(&mut part) {
            // Each call before the end was answered.
            Ok(0) => Err(()),
            Ok(count) => {
                self.input.extend_from_slice(&part[..count]);
                Ok(true)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(error) if error.kind() == ErrorKind::Interrupted => Ok(true),
            Err(_) => Err(()),
        }
    }

    fn call(&mut self, mut call: Call, server: &mut Server, facts: &Facts) {
        let answer = answer(&mut call, server, facts, &self.caller);
        if call.oneway {
            return;
        }
        match answer {
            Ok(Answer::Reply(parameters)) => self.output.extend(reply(&parameters, false)),
            Ok(Answer::Status) => {
                self.output.extend(status::begin(&status::head(server, facts)));
                let ids = server.peers().map(|peer| peer.id()).collect();
                self.work = Work::Status(Status { ids, done: 0, has_peer: false, question: None });
            }
            Ok(Answer::Watch) => {
                self.work = Work::Watch;
                self.add_event(&status::ready(server));
            }
            Err(error) => self.output.extend(error.message()),
        }
    }

    /// Sends an event, if it watches. A client that is too far behind is at its end.
    pub(super) fn event(&mut self, event: &Value) -> Verdict {
        if !self.is_watching() {
            return Verdict::GoesOn;
        }
        self.add_event(event);
        let is_broken = self.flush().is_err();
        if is_broken || self.output.len() - self.sent > MAX_EVENTS {
            return Verdict::Ended;
        }
        Verdict::GoesOn
    }

    fn add_event(&mut self, event: &Value) {
        self.output.extend(reply(&json!({"event": event}), true));
    }

    /// Asks for the programs of the next peers. Without an answer goes on without programs.
    fn ask(&mut self, server: &Server, programs: &mut Option<Programs>) {
        let Work::Status(status) = &mut self.work else { return };
        let ids = &status.ids[status.done..];
        let ids = &ids[..ids.len().min(PEERS_AT_ONCE)];
        let pids: Vec<i32> = ids.iter().map(|&id| status::pid_of(server, id)).collect();
        match programs.as_mut().and_then(|programs| programs.ask(pids)) {
            Some(question) => {
                status.question = Some((question, Instant::now() + programs::PATIENCE));
            }
            None => self.add_peers(server, &[]),
        }
    }

    /// Writes the next peers, with the programs that were found. There is none for those that have
    /// left.
    pub(super) fn add_peers(&mut self, server: &Server, found: &[Program]) {
        let Work::Status(status) = &mut self.work else { return };
        status.question = None;
        let unknown = Program::default();
        let end = status.ids.len().min(status.done + PEERS_AT_ONCE);
        for (number, &id) in status.ids[status.done..end].iter().enumerate() {
            let program = found.get(number).unwrap_or(&unknown);
            if let Some(peer) = status::peer(server, id, program) {
                if std::mem::replace(&mut status.has_peer, true) {
                    self.output.extend(status::SEPARATOR);
                }
                self.output.extend(peer.to_string().into_bytes());
            }
        }
        status.done = end;
    }

    fn finish_status(&mut self) {
        self.output.extend(status::END);
        self.work = Work::Idle;
    }

    fn is_sent(&self) -> bool {
        self.sent == self.output.len()
    }

    /// Sends as much as the socket takes.
    fn flush(&mut self) -> io::Result<()> {
        while !self.is_sent() {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match send(self.stream.as_raw_fd(), &self.output[self.sent..], flags) {
                Ok(count) => {
                    self.sent += count;
                    self.active = Instant::now();
                }
                Err(Errno::EAGAIN) => {
                    // So that a stream of events does not keep what was sent.
                    if self.sent > self.output.len() / 2 {
                        self.output.drain(..self.sent);
                        self.sent = 0;
                    }
                    return Ok(());
                }
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        self.output.clear();
        self.output.shrink_to(64 << 10);
        self.sent = 0;
        Ok(())
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
