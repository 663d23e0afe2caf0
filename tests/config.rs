// SPDX-License-Identifier: GPL-2.0-or-later
//! `--config`: options from files, which of them win, errors with file and line, and what SIGHUP does with a changed file.

// Only common::peer has unsafe code: for descriptors and bytes that were received. Every other module forbids it.
#![deny(unsafe_code)]

mod common;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};

use common::peer::{Connection, Peer};
use common::program::{Background, Place, Process, run, size_of};
use common::{PATIENCE, text_of, wait_for};

fn write(place: &Place, name: &str, text: &str) -> PathBuf {
    let file = place.path(name);
    fs::write(&file, text).expect("the place is ours");
    file
}

/// `--config=FILE`.
fn config(file: &Path) -> String {
    format!("--config={}", file.display())
}

/// Whether a client is refused.
fn is_refused(socket: &Path) -> bool {
    let first = Connection::open(socket).receive(PATIENCE).expect("no error");
    first.map(|message| message.value) == Some(1)
}

#[test]
fn a_server_has_the_options_of_its_file_and_those_of_the_command_line_win() {
    let place = Place::new();
    let file =
        write(&place, "file", "# A comment\n\n  vectors=3\r\nsize 128K\nmemfd\nforeground\n");
    let mut command = place.command(&[&config(&file), "-n", "2", "--memfd"]);
    let mut server = Process::spawn(&mut command);
    server.wait_until_listening(&place.socket());
    let peer = Peer::join(&place.socket(), 2);
    // `args` of a place has -l 64K.
    assert_eq!(size_of(&peer), 64 << 10);
    server.stop();

    let mut command = std::process::Command::new(common::daemon::program());
    command.arg("--config").arg(&file).arg("-S").arg(place.socket());
    let mut server = Process::spawn(&mut command);
    server.wait_until_listening(&place.socket());
    assert_eq!(size_of(&Peer::join(&place.socket(), 3)), 128 << 10);
    server.stop();
}

#[test]
fn a_later_file_and_the_command_line_replace_a_list_as_a_whole() {
    let own = format!("allow-uid {}\n", geteuid());
    for (first, second, words, admits) in [
        ("allow-uid 4242\n", own.as_str(), &[][..], true),
        (own.as_str(), "allow-uid 4242\n", &[], false),
        (own.as_str(), "allow-uid 4242\nallow-uid 4243\n", &["--allow-uid=4242"], false),
        ("allow-uid 4242\n", "allow-uid 4243\nmax-clients 4\n", &["--allow-uid=0", "-F"], true),
    ] {
        if words.contains(&"--allow-uid=0") && !geteuid().is_root() {
            continue;
        }
        let place = Place::new();
        let files = [config(&write(&place, "a", first)), config(&write(&place, "b", second))];
        let server = place.serve(&[&[&*files[0], &files[1], "--memfd"], words].concat());
        assert_eq!(!is_refused(&place.socket()), admits, "{first:?}, {second:?}, {words:?}");
        server.stop();
    }
}

#[test]
fn the_last_kind_of_memory_wins_over_files_too() {
    let place = Place::new();
    let first = config(&write(&place, "a", "memfd\n"));
    let second = config(&write(&place, "b", &format!("shm-name {}\n", place.name)));
    let mut command = std::process::Command::new(common::daemon::program());
    command.args(["-F", &first, &second, "-S"]).arg(place.socket());
    let mut server = Process::spawn(&mut command);
    server.wait_until_listening(&place.socket());
    assert!(place.shm().exists());
    server.stop();
}

#[test]
fn a_wrong_line_is_refused_with_file_and_line() {
    for (text, line, parts) in [
        ("memfd\nsizes 16M\n", 2, ["no option \"sizes\"", "did you mean \"size\"?"]),
        ("\n# x\n--memfd\n", 3, ["without dashes", "\"memfd\""]),
        ("size 5Q", 1, ["'5Q'", "suffix B, K, M"]),
        ("memfd\nvectors\n", 2, ["value is required", "--vectors"]),
        ("config /etc/x\n", 1, ["\"config\"", "command line only"]),
        // Wrong only together with the other options.
        ("memfd\nverbose\n", 2, ["cannot use verbose", "-F"]),
        ("memfd\nshm-group 0\n", 2, ["--shm-mode", "required"]),
    ] {
        let place = Place::new();
        let file = write(&place, "red.conf", text);
        let ended = run(&mut place.command(&[&config(&file)]));
        let at = format!("error: {}:{line}: ", file.display());
        ended.assert_refused(&[&at, parts[0], parts[1]]);
        assert_eq!(ended.stderr.lines().count(), 1, "{ended:?}");
    }
}

#[test]
fn a_file_that_cannot_be_read_is_refused_unless_it_may_be_missing() {
    let place = Place::new();
    let missing = place.path("missing");
    let name = missing.display().to_string();
    run(&mut place.command(&[&config(&missing)])).assert_refused(&[&name, "No such file"]);
    run(&mut place.command(&[&config(place.dir())])).assert_refused(&["Is a directory"]);
    run(&mut place.command(&["--config=-"])).assert_refused(&["it has no name"]);
    let large = write(&place, "large", &"# comment\n".repeat(200_000));
    run(&mut place.command(&[&config(&large)])).assert_refused(&["more than 1048576 bytes"]);
    let optional = format!("--config=-{}", large.display());
    run(&mut place.command(&[&optional])).assert_refused(&["more than 1048576 bytes"]);
    fs::remove_file(large).expect("it is there");

    let server = place.serve(&[&format!("--config=-{name}")]);
    drop(Peer::join(&place.socket(), 1));
    server.stop();
    place.assert_holds_only(&[]);
}

#[test]
fn an_error_of_the_command_line_is_told_as_without_a_file() {
    let place = Place::new();
    let file = config(&write(&place, "file", "memfd\n"));
    for words in [[&*file, "-z"], ["-z", &file], [&*file, "--size=5Q"]] {
        let ended = run(&mut place.command(&words));
        ended.assert_refused(&["--help"]);
        assert!(!ended.stderr.contains("file:"), "{ended:?}");
    }
}

#[test]
fn a_server_in_the_background_has_the_options_of_its_file() {
    let place = Place::new();
    let file = config(&write(&place, "file", "vectors 3\n"));
    let mut daemon = Background::start(&mut place.command(&[&file]), &place.pid_file()).0;
    drop(Peer::join(&place.socket(), 3));
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait(), 0);
    place.assert_holds_only(&["file"]);
}

/// The child processes of a process.
fn children(pid: Pid) -> Vec<Pid> {
    let text = text_of(Path::new(&format!("/proc/{pid}/task/{pid}/children")));
    text.split_whitespace().map(|pid| Pid::from_raw(pid.parse().expect("a pid"))).collect()
}

/// The only child that is not `old`.
#[track_caller]
fn server_other_than(supervisor: Pid, old: Pid) -> Pid {
    wait_for("another server", || match children(supervisor)[..] {
        [server] if server != old => Some(server),
        _ => None,
    })
}

/// The log of a supervisor below which a test changes the file.
struct Supervised {
    place: Place,
    process: Process,
    server: Pid,
}

impl Supervised {
    fn start(text: &str) -> Self {
        let place = Place::new();
        let file = write(&place, "red.conf", text);
        let log = File::create(place.path("log")).expect("the place is ours");
        let mut command = place.command(&["--memfd", &config(&file)]);
        command.env("RUNTIME_DIRECTORY", place.dir()).env_remove("NOTIFY_SOCKET");
        let mut process = Process::spawn_with_log(&mut command, log);
        process.wait_until_listening(&place.socket());
        let server = server_other_than(process.pid(), process.pid());
        Self { place, process, server }
    }

    fn log(&self) -> String {
        text_of(&self.place.path("log"))
    }

    fn reload_with(&self, text: &str) {
        write(&self.place, "red.conf", text);
        self.process.signal(Signal::SIGHUP);
    }

    /// Waits until a server other than the last one runs.
    #[track_caller]
    fn next_server(&mut self) {
        self.server = server_other_than(self.process.pid(), self.server);
    }

    #[track_caller]
    fn logs(&self, text: &str) {
        wait_for(&format!("{text:?} in the log"), || self.log().contains(text).then_some(()));
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the log ---\n{}--- end ---", self.log());
        }
        // A server whose supervisor was killed goes on.
        for child in children(self.process.pid()) {
            let _ = kill(child, Signal::SIGKILL);
        }
    }
}

const FILE: &str = "supervise\nforeground\n";

#[test]
fn a_supervised_server_gets_the_options_and_reads_them_again_at_sighup() {
    let mut supervised = Supervised::start(&format!("{FILE}vectors 2\nmax-clients 1\n"));
    let socket = supervised.place.socket();
    let mut first = Peer::join(&socket, 2);
    assert!(children(supervised.server).is_empty(), "the server supervises no other one");
    assert!(is_refused(&socket));
    // A death is no reason to read them.
    write(&supervised.place, "red.conf", "nonsense\n");
    kill(supervised.server, Signal::SIGKILL).expect("it runs");
    supervised.next_server();
    assert!(is_refused(&socket));

    supervised.reload_with(&format!("{FILE}vectors 2\nmax-clients 2\n"));
    supervised.next_server();
    let second = Peer::join(&socket, 2);
    first.wait_for_peer(second.id());
    supervised.process.signal(Signal::SIGTERM);
}

#[test]
fn a_wrong_file_at_sighup_changes_nothing() {
    let mut supervised = Supervised::start(&format!("{FILE}vectors 2\n"));
    let socket = supervised.place.socket();
    let mut first = Peer::join(&socket, 2);
    supervised.reload_with(&format!("{FILE}vectors 2\nnonsense\n"));
    supervised.logs("cannot upgrade, and the server goes on: ");
    supervised.logs("red.conf:4: there is no option \"nonsense\"");
    assert_eq!(children(supervised.process.pid()), [supervised.server]);
    // These are valid, but the number of vectors cannot change while clients are there.
    supervised.reload_with(&format!("{FILE}vectors 3\n"));
    supervised.logs("starting it with the options of before");
    supervised.next_server();
    let second = Peer::join(&socket, 2);
    first.wait_for_peer(second.id());
    supervised.process.signal(Signal::SIGTERM);
}
