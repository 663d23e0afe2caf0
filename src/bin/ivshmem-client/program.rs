// SPDX-License-Identifier: GPL-2.0-or-later
//! The program's one loop: connect, and connect again; take commands as they come, carry them
//! out one after another, and say what happens meanwhile.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use ivshmem::Chain;
use ivshmem::client::Client;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::json;

use crate::args::Args;
use crate::command::{self, Command};
use crate::input::Input;
use crate::output::Output;
use crate::session::{Done, Session, done, fail};

/// Between two attempts to connect.
const RETRY: Duration = Duration::from_secs(1);

/// After the last command of a pipe, what was set off by it may take so long to come back...
const LINGER: Duration = Duration::from_millis(100);
/// ...each time, and all of it so long.
const LINGER_ALL: Duration = Duration::from_secs(1);

/// A command that takes time.
enum Busy {
    Wait { line: String, vector: u32, until: Option<Instant> },
    Watch { line: String, until: Option<Instant> },
}

impl Busy {
    fn until(&self) -> Option<Instant> {
        match self {
            Self::Wait { until, .. } | Self::Watch { until, .. } => *until,
        }
    }
}

pub(crate) struct Program<'a> {
    args: &'a Args,
    out: Output,
    input: Input,
    session: Option<Session>,
    /// There has been a session.
    met: bool,
    /// When to connect next, and since when there has been no server.
    attempt: Instant,
    outage: Instant,
    /// What kept us from connecting has been said.
    told: bool,
    /// A command that waits to be carried out: for the server, or its turn.
    next: Option<String>,
    busy: Option<Busy>,
    watching: bool,
    quit: bool,
    status: u8,
    /// Since when there is nothing more to do, and since something last happened then.
    idle: Option<(Instant, Instant)>,
}

impl<'a> Program<'a> {
    pub(crate) fn new(args: &'a Args, out: Output, input: Input) -> Self {
        let now = Instant::now();
        Self {
            args,
            out,
            input,
            session: None,
            met: false,
            attempt: now,
            outage: now,
            told: false,
            next: None,
            busy: None,
            watching: args.json,
            quit: false,
            status: 0,
            idle: None,
        }
    }

    /// Runs to the end; the exit status.
    pub(crate) fn run(mut self) -> Result<u8, Box<dyn std::error::Error>> {
        if !self.input.is_given() {
            self.out.say(command::HELP);
            self.out.prompt();
        }
        loop {
            let now = Instant::now();
            if self.session.is_none() && now >= self.attempt {
                self.connect();
            }
            self.carry_out()?;
            if self.out.closed || self.is_over() {
                return Ok(self.status);
            }
            self.poll()?;
        }
    }

    fn connect(&mut self) {
        let path = &self.args.socket;
        self.out.detail(|| format!("connect to client {}", path.display()));
        let mut builder = Client::builder();
        if let Some(vectors) = self.args.vectors {
            builder = builder.vectors(vectors);
        }
        match builder.connect(path) {
            Ok(client) => {
                self.session = Some(Session::begin(client, &mut self.out));
                self.met = true;
                self.told = false;
            }
            Err(error) => {
                // Once for each time that the server is away: the rest is patience.
                if !std::mem::replace(&mut self.told, true) || self.args.verbose {
                    self.out.warn("cannot connect to server, retry in 1 second");
                    self.out.warn(&format!("ivshmem-client: {}", Chain(&error)));
                }
                self.attempt = Instant::now() + RETRY;
            }
        }
    }

    /// Says what happened, and carries out whatever can be now.
    fn carry_out(&mut self) -> Result<(), Box<dyn std::error::Error>> {
        loop {
            let ended = match &mut self.session {
                Some(session) => !session.news(self.watching, &mut self.out)?,
                None => false,
            };
            if ended {
                self.session = None;
                self.outage = Instant::now();
                self.attempt = self.outage;
                self.told = false;
            }
            if self.busy.is_some() && !self.end_busy() {
                return Ok(());
            }
            if self.quit {
                return Ok(());
            }
            let Some(line) = self.next.take().or_else(|| self.input.next()) else {
                if self.input.done() && !self.input.ended {
                    self.out.prompt();
                }
                return Ok(());
            };
            self.begin(line);
            if self.next.is_some() {
                return Ok(());
            }
        }
    }

    /// Begins a command, and ends it too if it needs no time.
    fn begin(&mut self, line: String) {
        let command = match command::parse(&line) {
            Ok(command) => command,
            Err(error) => {
                fail(&line, &error, &mut self.out);
                self.failed(self.input.is_given(), 1);
                return;
            }
        };
        let Some(session) = &mut self.session else {
            match command {
                Command::Quit => self.quit = true,
                Command::Help => self.out.say(command::HELP),
                _ if self.input.is_person() => fail(&line, "not connected", &mut self.out),
                _ => self.next = Some(line),
            }
            return;
        };
        match session.carry_out(&line, &command, &mut self.out) {
            Done::Failed(tells) => return self.failed(tells || self.input.is_given(), 1),
            Done::Well => return,
            Done::Later => {}
        }
        let until = |time: Option<Duration>| time.map(|time| Instant::now() + time);
        match command {
            Command::Wait { vector, time } => {
                self.busy = Some(Busy::Wait { line, vector, until: until(time) });
            }
            Command::Watch { time } => {
                self.watching = true;
                // A person goes on typing.
                if time.is_some() || !self.input.is_person() {
                    self.busy = Some(Busy::Watch { line, until: until(time) });
                } else {
                    self.out.object(|| done(&line, Ok(json!({}))));
                }
            }
            Command::Quit => self.quit = true,
            _ => {}
        }
    }

    /// Ends a command that takes time, if it is time; whether it did.
    fn end_busy(&mut self) -> bool {
        let Some(busy) = self.busy.take() else { return true };
        let late = busy.until().is_some_and(|until| Instant::now() >= until);
        match &busy {
            Busy::Wait { line, vector, .. } => {
                let rung = self.session.as_mut().and_then(|session| session.rung.remove(vector));
                if let Some(count) = rung {
                    let result = json!({"vector": vector, "count": count});
                    self.out.object(|| done(line, Ok(result)));
                } else if late {
                    let error = format!("no notification on vector {vector} in time");
                    fail(line, &error, &mut self.out);
                    self.failed(true, 2);
                } else {
                    self.busy = Some(busy);
                    return false;
                }
            }
            Busy::Watch { .. } if !late => {
                self.busy = Some(busy);
                return false;
            }
            Busy::Watch { line, .. } => {
                self.watching = self.args.json;
                self.out.object(|| done(line, Ok(json!({}))));
            }
        }
        true
    }

    /// Takes note that a command failed.
    fn failed(&mut self, tells: bool, status: u8) {
        if tells {
            self.status = self.status.max(status);
        }
        // What comes after a command that failed was meant for when it does not.
        self.quit |= self.input.is_given();
    }

    /// Whether there is nothing more to do.
    fn is_over(&mut self) -> bool {
        let now = Instant::now();
        if self.quit {
            return true;
        }
        if !self.input.ended {
            return false;
        }
        if self.next.is_some() || self.busy.is_some() {
            let over = self.session.is_none() && now >= self.outage + self.args.give_up;
            if over {
                let limit = self.args.give_up;
                self.out.warn(&format!("ivshmem-client: no server within {limit:?}"));
                self.status = 1;
            }
            return over;
        }
        if self.input.is_given() || self.input.is_person() || self.session.is_none() {
            if !self.met {
                self.status = 1;
            }
            return true;
        }
        let (since, last) = *self.idle.get_or_insert((now, now));
        now >= last + LINGER || now >= since + LINGER_ALL
    }

    /// Waits until there is something to do.
    fn poll(&mut self) -> Result<(), Box<dyn std::error::Error>> {
        let mut times = Vec::new();
        if self.session.is_none() {
            times.push(self.attempt);
            if self.input.ended {
                times.push(self.outage + self.args.give_up);
            }
        }
        times.extend(self.busy.as_ref().and_then(Busy::until));
        times.extend(self.idle.map(|(_, last)| last + LINGER));
        let timeout = times.into_iter().min().map_or(PollTimeout::NONE, |until| {
            let left = until.saturating_duration_since(Instant::now());
            PollTimeout::try_from(left.as_nanos().div_ceil(1_000_000)).unwrap_or(PollTimeout::MAX)
        });

        let stdin = io::stdin();
        // What is here is carried out before more is taken in; but without a server it is worth
        // knowing whether there is an end.
        let idle = self.busy.is_none() && self.next.is_none();
        let taking = idle || (self.session.is_none() && self.input.has_room());
        let input = self.input.descriptor(&stdin).filter(|_| taking);
        let session = self.session.as_ref().map(|session| session.client.as_fd());
        let mut fds: Vec<_> =
            session.iter().chain(&input).map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
        match poll(&mut fds, timeout) {
            Err(Errno::EINTR) => return Ok(()),
            result => result?,
        };
        let ready = |fd: Option<&PollFd<'_>>| fd.is_some_and(|fd| fd.any().unwrap_or(true));
        let (news, words) = (session.is_some(), input.is_some());
        let news_ready = news && ready(fds.first());
        let words_ready = words && ready(fds.last());
        match &mut self.idle {
            Some((_, last)) if news_ready => *last = Instant::now(),
            _ => {}
        }
        if words_ready {
            self.input.receive()?;
        }
        Ok(())
    }
}
