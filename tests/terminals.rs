// SPDX-License-Identifier: GPL-2.0-or-later
//! A terminal that takes no output does not block the server, not even a terminal that the server may not open.

// Only common::peer has unsafe code: for descriptors and bytes that were received. Every other module forbids it.
#![deny(unsafe_code)]

mod common;

use std::fs::{self, File, Permissions};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{FlowArg, tcflow};
use nix::unistd::{Pid, ttyname};

use common::daemon::{is_listening, program};
use common::peer::Peer;
use common::program::Place;
use common::target::is_root;
use common::{wait_for, wait_for_exit};

/// A user that nothing else uses.
const USER: u32 = 1_900_001;

/// How a terminal comes to take no output.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Stop {
    /// The user types ^S.
    Flow,
    /// The terminal program does not read: the terminal is full, or has room for a part of a line.
    Unread,
}

/// Who runs the server. The terminal belongs to somebody else.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Server {
    /// May open the terminal anyway.
    Root,
    /// May not open it.
    User,
}

const CASES: [(Server, Stop); 4] = [
    (Server::Root, Stop::Flow),
    (Server::Root, Stop::Unread),
    (Server::User, Stop::Flow),
    (Server::User, Stop::Unread),
];

struct Terminal {
    master: File,
    slave: OwnedFd,
    stop: Stop,
    text: String,
}

impl Terminal {
    fn new(stop: Stop, server: Server) -> Self {
        let pair = openpty(None, None).expect("a terminal");
        for end in [&pair.master, &pair.slave] {
            fcntl(end, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).expect("a descriptor has flags");
        }
        fcntl(&pair.master, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).expect("a descriptor has flags");
        let path = ttyname(&pair.slave).expect("the terminal has a name");
        let owner = if server == Server::Root { USER } else { 0 };
        chown(&path, Some(owner), Some(owner)).expect("we are root");
        fs::set_permissions(&path, Permissions::from_mode(0o600)).expect("we are root");
        Self { master: pair.master.into(), slave: pair.slave, stop, text: String::new() }
    }

    fn stop(&self) {
        if self.stop == Stop::Flow {
            tcflow(&self.slave, FlowArg::TCOOFF).expect("it is a terminal");
        }
    }

    /// The terminal takes output again. Returns everything so far.
    fn resume(&mut self) -> &str {
        if self.stop == Stop::Flow {
            tcflow(&self.slave, FlowArg::TCOON).expect("it is a terminal");
        }
        let mut bytes = Vec::new();
        // The error is that there is no more to read.
        let _ = self.master.read_to_end(&mut bytes);
        self.text += &String::from_utf8_lossy(&bytes);
        &self.text
    }

    fn stdio(&self) -> Stdio {
        self.slave.try_clone().expect("dup works").into()
    }
}

/// A command that runs the server on the terminal.
fn command(place: &Place, server: Server, terminal: &Terminal) -> Command {
    let mut command = match server {
        Server::Root => Command::new(program()),
        Server::User => {
            chown(place.dir(), Some(USER), Some(USER)).expect("we are root");
            let mut command = Command::new("setpriv");
            command.args([format!("--reuid={USER}"), format!("--regid={USER}")]);
            command.arg("--clear-groups").arg(program());
            command
        }
    };
    command.args(place.args()).env("RUST_LOG", "info").stdin(Stdio::null());
    command.stdout(terminal.stdio()).stderr(terminal.stdio());
    command
}

/// The time between SIGTERM and the end.
fn time_to_end(mut server: Child) -> Duration {
    let start = Instant::now();
    kill(Pid::from_raw(server.id().try_into().expect("a pid is an int")), Signal::SIGTERM)
        .expect("it is our child");
    let status = wait_for_exit(&mut server, "the server");
    assert_eq!(status.code(), Some(0));
    start.elapsed()
}

fn may_test() -> bool {
    is_root("give a terminal to another user")
}

#[test]
fn a_terminal_of_another_user_that_is_stopped_does_not_block_the_server() {
    for (server, stop) in CASES.into_iter().filter(|_| may_test()) {
        let place = Place::new();
        let mut terminal = Terminal::new(stop, server);
        let mut child =
            command(&place, server, &terminal).args(["-F", "-v"]).spawn().expect("it starts");
        wait_for("the server listens", || {
            assert!(child.try_wait().expect("waitpid works").is_none(), "{server:?}, {stop:?}");
            is_listening(&place.socket()).then_some(())
        });
        terminal.stop();
        // Each client causes five lines, about 120 bytes: more than a terminal holds.
        for _ in 0..1000 {
            drop(Peer::join(&place.socket(), 1));
        }
        wait_for("lines after the terminal takes output again", || {
            drop(Peer::join(&place.socket(), 1));
            terminal
                .resume()
                .contains("lines dropped, because the output was not read")
                .then_some(())
        });
        let last = Peer::join(&place.socket(), 1);
        let line = format!("new peer id = {}\r\n", last.id());
        wait_for("the last line", || terminal.resume().contains(&line).then_some(()));
        // No line was cut.
        for line in terminal.text.split("\r\n") {
            let begins = [
                "accept()=",
                "new peer",
                "free peer",
                "ivshmem-server: ",
                "Using ",
                "create & bind ",
            ];
            assert!(
                line.is_empty() || begins.iter().any(|begin| line.starts_with(begin)),
                "{line:?}"
            );
        }

        terminal.stop();
        // At the end there is a line for each of them.
        let _residents: Vec<Peer> = (0..50).map(|_| Peer::join(&place.socket(), 1)).collect();
        let time = time_to_end(child);
        // 0.1 s for the first line. If each line had to wait, it would be more than five seconds.
        assert!(time < Duration::from_secs(3), "{server:?}, {stop:?}: SIGTERM took {time:?}");
        place.assert_holds_only(&[]);
    }
}

#[test]
fn on_a_stopped_terminal_the_server_starts_and_a_start_that_fails_ends() {
    for (server, _) in CASES.into_iter().filter(|&(_, stop)| stop == Stop::Flow && may_test()) {
        let place = Place::new();
        let mut terminal = Terminal::new(Stop::Flow, server);
        terminal.stop();
        let child = command(&place, server, &terminal).args(["-F", "-v", "--hint"]).spawn();
        let child = child.expect("it starts");
        wait_for("the server listens", || is_listening(&place.socket()).then_some(()));
        drop(Peer::join(&place.socket(), 1));
        time_to_end(child);

        for foreground in [&["-F"][..], &[]] {
            let mut command = command(&place, server, &terminal);
            let mut child =
                command.args(["-m", "/nowhere"]).args(foreground).spawn().expect("it starts");
            let status = wait_for_exit(&mut child, "the server that cannot start");
            assert_eq!(status.code(), Some(1));
        }
        terminal.resume();
        let mut child =
            command(&place, server, &terminal).args(["-m", "/nowhere"]).spawn().expect("it starts");
        wait_for_exit(&mut child, "the server that cannot start");
        wait_for("the error", || terminal.resume().contains("/nowhere").then_some(()));
        place.assert_holds_only(&[]);
    }
}
