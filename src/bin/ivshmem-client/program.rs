// SPDX-License-Identifier: GPL-2.0-or-later
//! The main loop of the program. It connects, and connects again when the server has ended. It
//! runs the commands one after another, and prints the events.

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

/// The time between two attempts to connect.
const RETRY: Duration = Duration::from_secs(1);

/// After the last command from a pipe, the program exits when no event came for this time, so that
/// it prints the interrupts that the commands cause.
const LINGER: Duration = Duration::from_millis(100);
/// The longest time for which events delay the exit.
const LINGER_ALL: Duration = Duration::from_secs(1);

/// A command that is running: `wait` or `watch`.
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
    /// The program was connected at least once.
    was_connected: bool,
    /// The time of the next attempt to connect.
    attempt: Instant,
    /// The time since which there is no server.
    outage: Instant,
    /// The error of the current outage was printed.
    error_printed: bool,
    /// A command that waits for the connection.
    next: Option<String>,
    busy: Option<Busy>,
    watching: bool,
    quit: bool,
    status: u8,
    /// After the last command: the time of its end, and the time of the last event.
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
            was_connected: false,
            attempt: now,
            outage: now,
            error_printed: false,
            next: None,
            busy: None,
            watching: args.json,
            quit: false,
            status: 0,
            idle: None,
        }
    }

    /// Runs to the end. Returns the exit status.
    pub(crate) fn run(mut self) -> Result<u8, Box<dyn std::error::Error>> {
        if !self.input.is_given() {
            self.out.print(command::HELP);
            self.out.prompt();
        }
        loop {
            let now = Instant::now();
            if self.session.is_none() && now >= self.attempt {
                self.connect();
            }
            self.run_commands()?;
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
                self.was_connected = true;
                self.error_printed = false;
            }
            Err(error) => {
                // Once per outage. With -v, each failed attempt is printed.
                if !std::mem::replace(&mut self.error_printed, true) || self.args.verbose {
                    self.out.warn("cannot connect to server, retry in 1 second");
                    self.out.warn(&format!("ivshmem-client: {}", Chain(&error)));
                }
                self.attempt = Instant::now() + RETRY;
            }
        }
    }

    /// Prints the events, and runs all commands that can run now.
    fn run_commands(&mut self) -> Result<(), Box<dyn std::error::Error>> {
        loop {
            let ended = match &mut self.session {
                Some(session) => !session.print_events(self.watching, &mut self.out)?,
                None => false,
            };
            if ended {
                self.session = None;
                self.outage = Instant::now();
                self.attempt = self.outage;
                self.error_printed = false;
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

    /// Starts a command. Most commands end at once.
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
                Command::Help => self.out.print(command::HELP),
                _ if self.input.is_interactive() => fail(&line, "not connected", &mut self.out),
                _ => self.next = Some(line),
            }
            return;
        };
        match session.run(&line, &command, &mut self.out) {
            Done::Failed { sets_status } => {
                return self.failed(sets_status || self.input.is_given(), 1);
            }
            Done::Ok => return,
            Done::ByCaller => {}
        }
        let until = |time: Option<Duration>| time.map(|time| Instant::now() + time);
        match command {
            Command::Wait { vector, time } => {
                self.busy = Some(Busy::Wait { line, vector, until: until(time) });
            }
            Command::Watch { time } => {
                self.watching = true;
                // On a terminal, the user can type further commands meanwhile.
                if time.is_some() || !self.input.is_interactive() {
                    self.busy = Some(Busy::Watch { line, until: until(time) });
                } else {
                    self.out.object(|| done(&line, Ok(json!({}))));
                }
            }
            Command::Quit => self.quit = true,
            _ => {}
        }
    }

    /// Ends the running command if it is complete or its time is over. Returns whether no command is
    /// running any more.
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

    /// Records that a command failed.
    fn failed(&mut self, sets_status: bool, status: u8) {
        if sets_status {
            self.status = self.status.max(status);
        }
        // Commands of --exec depend on those before them.
        self.quit |= self.input.is_given();
    }

    /// Whether the program has to exit.
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
        if self.input.is_given() || self.input.is_interactive() || self.session.is_none() {
            if !self.was_connected {
                self.status = 1;
            }
            return true;
        }
        let (since, last) = *self.idle.get_or_insert((now, now));
        now >= last + LINGER || now >= since + LINGER_ALL
    }

    /// Waits for an event, input, or the next time limit.
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
        // Further input is read only when no command waits or runs. Without a server it is read
        // all the same, because the end of the input starts the time of --give-up.
        let idle = self.busy.is_none() && self.next.is_none();
        let reads_input = idle || (self.session.is_none() && self.input.has_room());
        let input = self.input.descriptor(&stdin).filter(|_| reads_input);
        let session = self.session.as_ref().map(|session| session.client.as_fd());
        let mut fds: Vec<_> =
            session.iter().chain(&input).map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
        match poll(&mut fds, timeout) {
            Err(Errno::EINTR) => return Ok(()),
            result => result?,
        };
        let ready = |fd: Option<&PollFd<'_>>| fd.is_some_and(|fd| fd.any().unwrap_or(true));
        let (has_session, has_input) = (session.is_some(), input.is_some());
        let event_ready = has_session && ready(fds.first());
        let input_ready = has_input && ready(fds.last());
        match &mut self.idle {
            Some((_, last)) if event_ready => *last = Instant::now(),
            _ => {}
        }
        if input_ready {
            self.input.receive()?;
        }
        Ok(())
    }
}
