// SPDX-License-Identifier: GPL-2.0-or-later
//! The log of the server program: the severity of each line in the system log and in the journal, and SIGHUP.

// Only common::peer has unsafe code: for descriptors and bytes that were received. Every other module forbids it.
#![deny(unsafe_code)]

mod common;

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::signal::Signal;
use nix::sys::stat::fstat;

use common::daemon::program;
use common::peer::{Connection, Peer};
use common::program::{Background, Place, in_own_mounts};
use common::skip::skip;
use common::{PATIENCE, text_of, wait_for};

/// Joins a server that has room for one client of 200 vectors, and is refused by it. Both are logged.
fn join_and_be_refused(socket: &Path) {
    let peer = Peer::join(socket, 200);
    let refused = Connection::open(socket).receive(PATIENCE).expect("no error");
    assert_eq!(refused.map(|message| message.value), Some(1), "a refusal");
    drop(peer);
}

#[test]
fn the_system_log_gets_the_severity_of_each_line() {
    let place = Place::new();
    let log = UnixDatagram::bind(place.path("log")).expect("a socket");
    log.set_read_timeout(Some(PATIENCE)).expect("a socket has time limits");
    // /dev/log belongs to the whole host, so the daemon gets its own /dev.
    let script = "mkdir $DIR/dev; mount --rbind /dev $DIR/dev; mount -t tmpfs none /dev
        touch /dev/null; mount --bind $DIR/dev/null /dev/null; ln -s $DIR/log /dev/log
        exec prlimit --nofile=300:300 \"$0\" \"$@\"";
    let args = ["-n", "200", "--memfd", "-l", "64K"].map(str::to_owned);
    let Some(mut command) = in_own_mounts(script, &args) else {
        return skip("mount namespaces are not available (unshare -rm)");
    };
    command.arg("-S").arg(place.socket()).arg("-p").arg(place.pid_file());
    command.env("DIR", place.dir()).env_remove("RUST_LOG");
    let (mut daemon, started) = Background::start(&mut command, &place.pid_file());
    assert_eq!(started.stderr, "", "by default, the caller gets warnings and errors only");
    join_and_be_refused(&place.socket());
    let next = || {
        let mut bytes = [0; 1024];
        let count = log.recv(&mut bytes).expect("a log line");
        String::from_utf8_lossy(&bytes[..count]).into_owned()
    };
    let pid = daemon.pid();
    // 3 * 8 + 6 is 30, and 3 * 8 + 4 is 28.
    let expect = |severity: u8, text: &str| {
        let line = next();
        let expected = format!("<{severity}>ivshmem-server[{pid}]: {text}");
        assert!(line.starts_with(&expected), "{expected}: {line}");
    };
    expect(30, concat!("info: version ", env!("CARGO_PKG_VERSION"), " starts: socket \"/"));
    expect(30, "info: ready: listens at ");
    expect(30, "info: peer 0 joined: pid ");
    expect(28, "warn: client refused: no descriptor is left");
    expect(30, "info: peer 0 left: it hung up");
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait(), 0);
    expect(30, "info: ends for good, with 0 clients");
}

/// Whether a line is one of the start: not of a client.
fn is_of_server(line: &str) -> bool {
    line.contains("info: version ") || line.contains("info: ready: ")
}

/// A server in the foreground, whose stderr is the file "stderr" in `place`. JOURNAL_STREAM names that file, or another
/// one.
fn serve_into_file(place: &Place, is_journal: bool, args: &[&str]) -> Command {
    let stderr = File::create(place.path("stderr")).expect("a file");
    let stat = stderr.metadata().expect("it is open");
    let inode = stat.ino() + u64::from(!is_journal);
    let mut command = Command::new("prlimit");
    command.arg("--nofile=300:300").arg(program()).args(place.args()).arg("-F").args(args);
    command.env("JOURNAL_STREAM", format!("{}:{inode}", stat.dev())).env("RUST_LOG", "info");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
    command
}

#[test]
fn lines_have_a_severity_prefix_if_stderr_is_the_journal_and_only_then() {
    for is_journal in [true, false] {
        let place = Place::new();
        let mut command = serve_into_file(&place, is_journal, &["-n", "200"]);
        let mut server = command.spawn().expect("prlimit starts");
        wait_for("the server listens", || {
            common::daemon::is_listening(&place.socket()).then_some(())
        });
        join_and_be_refused(&place.socket());
        let text = wait_for("two lines", || {
            let text = text_of(&place.path("stderr"));
            text.contains("refused").then_some(text)
        });
        let lines: Vec<&str> = text.lines().filter(|line| !is_of_server(line)).collect();
        let prefix = |severity| if is_journal { severity } else { "" };
        let joined = format!("{}ivshmem-server: info: peer 0 joined: pid ", prefix("<6>"));
        assert!(lines[0].starts_with(&joined), "{text}");
        let refused = format!("{}ivshmem-server: warn: client refused: ", prefix("<4>"));
        assert!(lines.iter().any(|line| line.starts_with(&refused)), "{text}");
        let pid = nix::unistd::Pid::from_raw(server.id().try_into().expect("a pid is an int"));
        nix::sys::signal::kill(pid, Signal::SIGTERM).expect("it is our child");
        assert!(server.wait().expect("waitpid works").success());

        let mut command = serve_into_file(&place, is_journal, &["-m", "/nowhere"]);
        assert_eq!(command.status().expect("prlimit starts").code(), Some(1));
        let text = text_of(&place.path("stderr"));
        let expected = format!("{}ivshmem-server: ", prefix("<3>"));
        let last = text.lines().last().expect("a line");
        assert!(last.starts_with(&expected) && last.contains("/nowhere"), "{text}");
        fs::remove_file(place.path("stderr")).expect("it is there");
        place.assert_holds_only(&[]);
    }
}

/// What a server of one client logs from its start to its end, by the severities of the lines.
fn levels_of(is_journal: bool, variable: Option<&str>, args: &[&str]) -> Vec<String> {
    let place = Place::new();
    let mut command = serve_into_file(&place, is_journal, args);
    command.env_remove("RUST_LOG").envs(variable.map(|value| ("RUST_LOG", value)));
    let mut server = command.spawn().expect("prlimit starts");
    wait_for("the server listens", || common::daemon::is_listening(&place.socket()).then_some(()));
    let peer = Peer::join(&place.socket(), 1);
    let pid = nix::unistd::Pid::from_raw(server.id().try_into().expect("a pid is an int"));
    nix::sys::signal::kill(pid, Signal::SIGHUP).expect("it is our child");
    let mut other = Peer::join(&place.socket(), 1);
    drop(peer);
    other.wait_for_departure(0);
    nix::sys::signal::kill(pid, Signal::SIGTERM).expect("it is our child");
    assert!(server.wait().expect("waitpid works").success());
    let text = text_of(&place.path("stderr"));
    text.lines().map(|line| line.split(": ").nth(1).expect("a level").to_owned()).collect()
}

#[test]
fn the_journal_gets_each_step_and_another_stderr_gets_warnings_unless_a_level_is_given() {
    // Start, ready, two joins, one departure, end; and SIGHUP.
    let all = (6, 1);
    let warnings = (0, 1);
    for (is_journal, variable, args, expected) in [
        (true, None, &[][..], all),
        (false, None, &[], warnings),
        (false, Some("info"), &[], all),
        (true, Some("warn"), &[], warnings),
        (false, None, &["--log-level", "info"], all),
        (true, None, &["--log-level", "warn"], warnings),
        (true, None, &["--log-level=error"], (0, 0)),
        // The option wins.
        (false, Some("error"), &["--log-level=debug"], all),
        (false, Some("trace"), &["--log-level=warn"], warnings),
    ] {
        let levels = levels_of(is_journal, variable, args);
        let count = |level: &str| levels.iter().filter(|found| *found == level).count();
        assert_eq!((count("info"), count("warn")), expected, "{variable:?} {args:?}: {levels:?}");
    }
}

#[test]
fn sighup_is_logged_and_the_server_goes_on() {
    let place = Place::new();
    let server = place.serve(&[]);
    let mut first = Peer::join(&place.socket(), 1);
    server.signal(Signal::SIGHUP);
    server.signal(Signal::SIGHUP);
    let second = Peer::join(&place.socket(), 1);
    first.wait_for_peer(second.id());
    // Both signals may be read at once.
    server.signal(Signal::SIGHUP);
    server.signal(Signal::SIGINT);
    let ended = server.end();
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    let line = "ivshmem-server: warn: SIGHUP: there is nothing to reload; the server goes on\n";
    assert!(ended.stderr.starts_with(line), "{ended:?}");
    place.assert_holds_only(&[]);

    let mut daemon = place.daemonize(&[]);
    daemon.signal(Signal::SIGHUP);
    drop(Peer::join(&place.socket(), 1));
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait(), 0);
    place.assert_holds_only(&[]);
}

/// systemd connects stderr to the journal by a stream socket. A socket holds some 278 short lines.
#[test]
fn a_journal_that_does_not_read_does_not_block_the_server() {
    let place = Place::new();
    let (mut journal, stderr) = UnixStream::pair().expect("a pair");
    journal.set_nonblocking(true).expect("a socket can be non-blocking");
    let stat = fstat(stderr.as_fd()).expect("it is open");
    let mut command = place.command(&["-F"]);
    command.env("JOURNAL_STREAM", format!("{}:{}", stat.st_dev, stat.st_ino));
    command.env("RUST_LOG", "info").stdin(Stdio::null()).stdout(Stdio::null());
    let mut server = command.stderr(OwnedFd::from(stderr)).spawn().expect("it starts");
    // The command has the other end of the journal.
    drop(command);
    wait_for("the server listens", || common::daemon::is_listening(&place.socket()).then_some(()));
    for _ in 0..1000 {
        drop(Peer::join(&place.socket(), 1));
    }
    let mut bytes = Vec::new();
    let notice = "lines dropped, because the output was not read";
    let text = wait_for("lines after the journal reads again", || {
        drop(Peer::join(&place.socket(), 1));
        // The error is that there is no more to read.
        let _ = journal.read_to_end(&mut bytes);
        let text = String::from_utf8_lossy(&bytes).into_owned();
        text.contains(notice).then_some(text)
    });
    for line in text.lines().filter(|line| !is_of_server(line)) {
        let begin = if line.ends_with(notice) {
            "<4>ivshmem-server: "
        } else {
            "<6>ivshmem-server: info: peer "
        };
        assert!(line.starts_with(begin), "{line}");
    }
    let pid = nix::unistd::Pid::from_raw(server.id().try_into().expect("a pid is an int"));
    nix::sys::signal::kill(pid, Signal::SIGTERM).expect("it is our child");
    assert!(server.wait().expect("waitpid works").success());
    place.assert_holds_only(&[]);
}
