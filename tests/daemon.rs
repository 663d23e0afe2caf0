// SPDX-License-Identifier: GPL-2.0-or-later
//! The daemon as its user sees it: options, exit codes, output, background, signals, descriptors.
//!
//! Other files test the sizes of the memory (memory.rs), the pid file (pid_file.rs), several servers that start at once
//! (concurrent_start.rs), the log (logging.rs) and terminals (terminals.rs).

// Only common::peer has unsafe code: for descriptors and bytes that were received. Every other module forbids it.
#![deny(unsafe_code)]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::pty::openpty;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getsid, ttyname};

use common::daemon::{Daemon, program};
use common::peer::{Connection, Peer};
use common::program::{Background, Place, Process, adopt_orphans, in_own_mounts, run, size_of};
use common::skip::skip;
use common::{PATIENCE, text_of, wait_for};

#[test]
fn every_option_works_in_its_short_and_its_long_form() {
    for long in [false, true] {
        let place = Place::new();
        let dir = place.path("memory");
        fs::create_dir(&dir).expect("a directory");
        let option = |short, full| if long { full } else { short };
        let (socket, pid_file) = (place.socket(), place.pid_file());
        let size = option("-l", "--size");
        let vectors = option("-n", "--vectors");

        let mut command = Command::new(program());
        command.args([option("-F", "--foreground"), option("-v", "--verbose")]);
        command.arg(option("-S", "--socket")).arg(&socket);
        command.args([option("-M", "--shm-name"), &place.name, size, "2M", vectors, "0x3"]);
        let mut process = Process::spawn(&mut command);
        process.wait_until_listening(&socket);
        assert!(place.shm().exists(), "the memory has its name");
        let peer = Peer::join(&socket, 3);
        assert_eq!((peer.id(), size_of(&peer)), (0, 2 << 20));
        let ended = process.stop();
        assert!(ended.stdout.contains("new peer id = 0\n"), "verbose: {ended:?}");

        let mut command = Command::new(program());
        command.arg(option("-S", "--socket")).arg(&socket);
        command.arg(option("-p", "--pid-file")).arg(&pid_file);
        command.arg(option("-m", "--shm-dir")).arg(&dir);
        let (mut daemon, _) = Background::start(&mut command, &pid_file);
        // The defaults: 4 MiB and 1 vector.
        assert_eq!(size_of(&Peer::join(&socket, 1)), 4 << 20);
        daemon.signal(Signal::SIGTERM);
        assert_eq!(daemon.wait(), 0);
        assert_eq!(fs::read_dir(&dir).expect("it is there").count(), 0, "left in the directory");
        place.assert_holds_only(&["memory"]);
    }
}

#[test]
fn defaults_are_those_of_the_reference() {
    // The default paths belong to the whole host, so the daemon gets its own mounts.
    let script = "mount -t tmpfs none /var/run; cp \"$0\" /var/run/ivshmem-server
        mount -t tmpfs none /tmp; mount -t tmpfs none /dev/shm
        /var/run/ivshmem-server; cat /var/run/ivshmem-server.pid";
    let Some(mut command) = in_own_mounts(script, &[]) else {
        return skip("mount namespaces are not available (unshare -rm)");
    };
    adopt_orphans();
    let ended = run(&mut command);
    assert!(ended.status.success(), "{ended:?}");
    let mut daemon = Background::adopted(&ended.stdout);
    let root = format!("/proc/{}/root", daemon.pid());
    let there = |path: &str| Path::new(&format!("{root}{path}")).to_owned();
    let peer = Peer::join(&there("/tmp/ivshmem_socket"), 1);
    assert_eq!(size_of(&peer), 4 << 20);
    let memory = fs::metadata(there("/dev/shm/ivshmem")).expect("the memory has its name");
    assert_eq!((memory.len(), memory.permissions().mode() & 0o7777), (4 << 20, 0o700));
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait(), 0);
}

#[test]
fn the_last_of_the_memory_options_wins() {
    let place = Place::new();
    let dir = place.path("memory");
    fs::create_dir(&dir).expect("a directory");
    for (args, named) in [
        (["-M", &place.name, "-m", dir.to_str().expect("ours")], false),
        (["-m", dir.to_str().expect("ours"), "-M", &place.name], true),
    ] {
        let mut daemon = place.daemonize(&args);
        assert_eq!(place.shm().exists(), named, "{args:?}");
        drop(Peer::join(&place.socket(), 1));
        daemon.signal(Signal::SIGTERM);
        assert_eq!(daemon.wait(), 0);
        place.assert_holds_only(&["memory"]);
    }
}

#[test]
fn a_wrong_command_line_is_refused_with_exit_code_1_and_leaves_nothing() {
    let place = Place::new();
    for (args, parts) in [
        (&["-v"][..], &["-v", "-F", "Usage"][..]),
        (&["-F", "-n", "0"], &["--vectors", "'0'", "1 to 2048"]),
        (&["-F", "-n", "2049"], &["--vectors", "'2049'", "1 to 2048"]),
        (&["-F", "-n", "many"], &["--vectors", "'many'"]),
        (&["-F", "-z"], &["'-z'", "Usage"]),
        (&["-F", "--no-such-thing"], &["'--no-such-thing'", "Usage"]),
        (&["-F", "stray"], &["'stray'", "Usage"]),
        (&["-F", "-l"], &["--size"]),
        (&["-F", "-l", "5Q"], &["--size", "'5Q'", "suffix"]),
        (&["-F", "-l", "-1"], &["-1"]),
        (&["-F", "-l", "0"], &["size 0", "1 to"]),
        // (Not a unit test: to look up a user opens files, and other tests count descriptors.)
        (&["-F", "--allow-uid", "nobody-at-all"], &["--allow-uid", "'nobody-at-all'", "no user"]),
        (&["-F", "-M", ""], &["name \"\"", "1 to 254"]),
        (&["-F", "-M", "a/b"], &["name \"a/b\"", "'/'"]),
        // In the background the error has to reach the caller too.
        (&["-n", "0"], &["--vectors"]),
        (&["-l", "0"], &["size 0"]),
    ] {
        let ended = run(&mut place.command(args));
        ended.assert_refused(parts);
        assert_eq!(ended.stdout, "", "{args:?}");
        place.assert_holds_only(&[]);
    }
}

#[test]
fn help_names_every_option_on_stdout_and_exits_with_0() {
    for option in ["-h", "--help"] {
        let ended = run(Command::new(program()).arg(option));
        assert_eq!((ended.status.code(), &*ended.stderr), (Some(0), ""), "{ended:?}");
        for name in [
            "-h, --help",
            "-v, --verbose",
            "-F, --foreground",
            "-p, --pid-file",
            "-S, --socket",
            "-M, --shm-name",
            "-m, --shm-dir",
            "-l, --size",
            "-n, --vectors",
        ] {
            assert!(ended.stdout.contains(name), "no {name} in {}", ended.stdout);
        }
    }
}

/// The long options in a text.
fn long_options(text: &str) -> impl Iterator<Item = String> + '_ {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '-');
    let is_option = |word: &&str| word.starts_with("--") && !word.starts_with("---");
    words.filter(is_option).map(str::to_owned)
}

#[test]
fn the_readme_has_a_row_for_each_option_of_the_help_and_no_other() {
    let help = run(Command::new(program()).arg("--help")).stdout;
    // The other lines of a description are indented further.
    let lines = help.lines().filter(|line| line.find('-').is_some_and(|indent| indent <= 6));
    let of_help: BTreeSet<String> = lines.filter_map(|line| long_options(line).next()).collect();
    let readme = include_str!("../README.md");
    let (_, table) = readme.split_once("## Options of ivshmem-server").expect("the section");
    let rows = table.lines().take_while(|line| !line.starts_with("The defaults"));
    // The first column.
    let of_readme: BTreeSet<String> =
        rows.filter_map(|row| row.split('|').nth(1)).flat_map(long_options).collect();
    assert!(of_help.len() >= 14, "{of_help:?}");
    assert_eq!(of_readme, of_help);
}

#[test]
fn the_parent_returns_when_the_pid_file_is_complete_and_the_socket_listens() {
    let place = Place::new();
    let (mut daemon, ended) =
        Background::start(&mut place.command(&["-n", "2"]), &place.pid_file());
    // Without waiting: the daemon must serve at once. `run` has already seen the end of both pipes.
    let peer = Peer::join(&place.socket(), 2);
    assert_eq!((peer.id(), ended.stdout, ended.stderr), (0, String::new(), String::new()));
    assert_eq!(fs::read_to_string(place.pid_file()).unwrap(), format!("{}\n", daemon.pid()));
    assert_eq!(place.names(), ["pid", "socket", "socket.control"]);
    assert_eq!(getsid(Some(daemon.pid())), Ok(daemon.pid()), "it leads a session of its own");
    for number in 0..=2 {
        let open = fs::read_link(format!("/proc/{}/fd/{number}", daemon.pid())).unwrap();
        assert_eq!(open, Path::new("/dev/null"), "descriptor {number}");
    }
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait(), 0);
    place.assert_holds_only(&[]);
}

#[test]
fn a_daemon_closes_the_terminal_that_it_was_started_from() {
    let pair = openpty(None, None).expect("a terminal");
    let terminal = ttyname(&pair.slave).expect("it has a name");
    for end in [&pair.master, &pair.slave] {
        fcntl(end, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).expect("a descriptor has flags");
    }
    let place = Place::new();
    let on_terminal = format!("exec \"$0\" \"$@\" 2>{}", terminal.display());
    let mut command = Command::new("sh");
    command.args(["-c", &on_terminal]).arg(program()).args(place.args());
    let (mut daemon, _) = Background::start(&mut command, &place.pid_file());
    let fds = fs::read_dir(format!("/proc/{}/fd", daemon.pid())).expect("it runs");
    let open: Vec<_> = fds.flatten().filter_map(|fd| fs::read_link(fd.path()).ok()).collect();
    assert!(open.contains(&PathBuf::from("/dev/null")), "{open:?}");
    assert!(!open.contains(&terminal), "{open:?}");
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait(), 0);
}

/// Runs the commands of the client program in a hint, as they are printed.
fn run_client_commands(hint: &str, socket: &Path) {
    let mut peer = Peer::join(socket, 3);
    let commands: Vec<&str> = hint.lines().filter(|line| line.contains("ivshmem-client")).collect();
    let outputs: Vec<String> = commands
        .iter()
        .map(|command| {
            let ended = run(Command::new("sh").args(["-c", command.trim()]));
            assert!(ended.status.success(), "{command}: {ended:?}");
            ended.stdout
        })
        .collect();
    assert_eq!(outputs.len(), 2, "{hint}");
    assert!(outputs[0].contains(&format!("peer_id = {}\n", peer.id())), "{outputs:?}");
    peer.wait_for_departure(peer.id() + 2);
    assert_eq!(peer.take_rung(), [0, 1, 2].into(), "'int all' rings all vectors");
}

#[test]
fn the_commands_of_the_hint_work_as_they_are_printed() {
    let place = Place::new();
    // Characters with a meaning in QEMU's option syntax or in the shell are allowed in a path.
    let socket = place.path("a+b,c$d");
    let args = ["--hint", "-n", "3", "-l", "2M", "-S", socket.to_str().expect("the path is UTF-8")];
    let check = |text: &str| {
        let name = format!("path={}/a+b,,c$d'", place.dir().display());
        for part in [&name, "2097152 bytes", "vectors: 3", "vectors=3", "qemu-system-x86_64"] {
            assert!(text.contains(part), "no {part} in {text}");
        }
        assert!(text.ends_with("\n"), "{text:?}");
        run_client_commands(text, &socket);
    };
    let (mut daemon, ended) = Background::start(&mut place.command(&args), &place.pid_file());
    check(&ended.stdout);
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait(), 0);

    // Its output goes to a file, which can be read while it runs.
    let mut command = Command::new("sh");
    let script = format!("exec \"$0\" \"$@\" >{}", place.path("out").display());
    command.args(["-c", &script]).arg(program()).args(place.args()).args(args).arg("-F");
    let mut server = Process::spawn(&mut command);
    server.wait_until_listening(&socket);
    check(&wait_for("the hint", || {
        let text = text_of(&place.path("out"));
        text.ends_with("int all'\n\n").then_some(text)
    }));
    server.stop();
    place.assert_holds_only(&["out"]);
}

#[test]
fn the_mode_of_the_socket_is_that_of_the_option_or_of_the_umask() {
    for (umask, args, expected) in [
        ("022", &[][..], 0o755),
        ("077", &[], 0o700),
        ("077", &["--socket-mode", "660"], 0o660),
        ("000", &["--socket-mode", "0600"], 0o600),
    ] {
        let place = Place::new();
        let mut command = Command::new("sh");
        command.args(["-c", "umask $1; shift; exec \"$0\" \"$@\""]).arg(program()).arg(umask);
        let mut server = Process::spawn(command.args(place.args()).arg("-F").args(args));
        server.wait_until_listening(&place.socket());
        let mode = fs::metadata(place.socket()).expect("it is there").permissions().mode();
        assert_eq!(mode & 0o7777, expected, "umask {umask}, {args:?}");
        server.stop();
    }
}

#[test]
fn relative_paths_stay_relative_to_the_callers_directory() {
    let place = Place::new();
    let mut command = Command::new(program());
    command.current_dir(place.dir());
    command.args(["-S", "socket", "-p", "pid", "-M", &place.name]);
    let (mut daemon, _) = Background::start(&mut command, &place.pid_file());
    drop(Peer::join(&place.socket(), 1));
    daemon.signal(Signal::SIGINT);
    assert_eq!(daemon.wait(), 0);
    place.assert_holds_only(&[]);
}

#[test]
fn two_hyphens_may_end_the_options() {
    let place = Place::new();
    let mut server = Process::spawn(&mut place.command(&["-F", "--"]));
    server.wait_until_listening(&place.socket());
    server.stop();
    let mut daemon = place.daemonize(&["--"]);
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait(), 0);
    place.assert_holds_only(&[]);
}

#[test]
fn an_error_in_the_background_reaches_the_callers_stderr_and_exit_code() {
    let place = Place::new();
    let missing = place.path("missing");
    let missing = missing.to_str().expect("ours");
    let nowhere = format!("{missing}/pid");
    for (args, parts) in [
        (["-m", missing], [missing, "No such file or directory"]),
        (["-p", &nowhere], [&nowhere, "No such file or directory"]),
    ] {
        run(&mut place.command(&args)).assert_refused(&parts);
        place.assert_holds_only(&[]);
    }
    fs::create_dir(place.socket()).expect("a directory");
    run(&mut place.command(&[])).assert_refused(&["socket", "a directory"]);
    place.assert_holds_only(&["socket"]);
}

#[test]
fn verbose_lines_come_in_the_references_order_and_at_once() {
    let daemon = Daemon::builder().start();
    let line = |text: String| {
        wait_for(&text.clone(), || daemon.output().contains(&format!("{text}\n")).then_some(()));
    };
    let peers = [0, 1].map(|id| {
        let peer = Peer::join(daemon.socket_path(), 1);
        line(format!("new peer id = {id}"));
        peer
    });
    let [zero, _one] = peers;
    drop(zero);
    line("free peer 0".to_owned());
    let name = daemon.shm_path().file_name().unwrap().to_string_lossy().into_owned();
    let socket = daemon.socket_path().display().to_string();
    let output = daemon.stop();
    // Any descriptor number is correct.
    let lines: Vec<&str> = output
        .lines()
        .map(|line| match line.strip_prefix("accept()=").map(str::parse::<u32>) {
            Some(Ok(_)) => "accept()=FD",
            _ => line,
        })
        .collect();
    assert_eq!(
        lines,
        [
            &format!("Using POSIX shared memory: {name}"),
            &format!("create & bind socket {socket}"),
            "accept()=FD",
            "new peer id = 0",
            "accept()=FD",
            "new peer id = 1",
            "free peer 0",
            "server disconnected",
            "close server",
            "free peer 1",
        ]
    );
}

#[test]
fn verbose_names_the_directory_of_file_backed_memory() {
    let place = Place::new();
    let daemon = Daemon::builder().memory_dir(place.dir()).start();
    let expected = format!("Using file-backed shared memory: {}\n", place.dir().display());
    let output = daemon.stop();
    assert!(output.starts_with(&expected), "{output}");
}

#[test]
fn sigterm_and_sigint_end_the_server_with_0_and_close_every_connection() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let place = Place::new();
        let process = place.serve(&[]);
        let mut clients = [(); 3].map(|()| Connection::open(&place.socket()));
        // One has read everything, one a part, one nothing.
        for _ in 0..6 {
            clients[0].expect("the greeting");
        }
        clients[1].expect("the version");
        process.signal(signal);
        let ended = process.end();
        assert_eq!(ended.status.code(), Some(0), "{signal}: {ended:?}");
        assert_eq!(ended.stdout, "server disconnected\n", "{signal}");
        assert_eq!(ended.stderr, "", "{signal}");
        place.assert_holds_only(&[]);
        for (number, client) in clients.iter_mut().enumerate() {
            let more = |_: &usize| client.receive(PATIENCE).expect("no error").is_some();
            let last = (0..20).take_while(more).count();
            assert!(last < 20, "{signal}: client {number} sees the end of the stream");
        }
    }
}

#[test]
fn the_soft_descriptor_limit_is_raised_to_the_hard_one() {
    let place = Place::new();
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -Sn 100 && ulimit -Hn 4000 && exec \"$0\" \"$@\""]);
    command.arg(program()).args(place.args()).arg("-F");
    let mut process = Process::spawn(&mut command);
    process.wait_until_listening(&place.socket());
    let limits = fs::read_to_string(format!("/proc/{}/limits", process.pid())).expect("it runs");
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
    let numbers = line.expect("a limit of open files").split_ascii_whitespace().take(2);
    let numbers: Vec<&str> = numbers.collect();
    assert_eq!(numbers, ["4000", "4000"], "soft and hard");
    process.stop();
}

#[test]
fn five_hundred_peers_that_join_and_leave_leak_no_descriptor() {
    let daemon = Daemon::builder().vectors(4).start();
    let mut resident = Peer::join(daemon.socket_path(), 4);
    let before = daemon.open_fds();
    for round in 0..500 {
        // Some leave in the middle of the greeting, and some before it.
        match round % 3 {
            0 => drop(Peer::join(daemon.socket_path(), 4)),
            1 => drop(Connection::open(daemon.socket_path())),
            _ => drop(Connection::open(daemon.socket_path()).expect("the version")),
        }
    }
    // The resident is told of this join after all departures.
    let last = Peer::join(daemon.socket_path(), 4);
    resident.wait_for_peer(last.id());
    drop(last);
    wait_for("as many descriptors as before", || (daemon.open_fds() == before).then_some(()));
    daemon.stop();
}

/// The descriptors of a process that its children inherit.
fn inheritable(pid: Pid) -> BTreeSet<String> {
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).expect("it runs");
    fds.map(|entry| entry.expect("it runs").file_name().to_string_lossy().into_owned())
        .filter(|number| {
            // The flags are octal; O_CLOEXEC is 02000000. A descriptor that was closed meanwhile is not inherited.
            let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}"));
            let flags = info.unwrap_or_default();
            let flags = flags.lines().find_map(|line| line.strip_prefix("flags:"));
            let flags = flags.map(|flags| u32::from_str_radix(flags.trim(), 8).expect("octal"));
            flags.is_some_and(|flags| flags & 0o2_000_000 == 0)
        })
        .collect()
}

#[test]
fn every_descriptor_is_close_on_exec() {
    // The daemon gets the first three, and may inherit more from the process that runs the tests.
    let mut inherited = inheritable(Pid::this());
    inherited.extend(["0", "1", "2"].map(str::to_owned));
    let place = Place::new();
    let background = place.daemonize(&["-n", "3"]);
    let foreground = Daemon::builder().vectors(3).start();
    let dir = Daemon::builder().vectors(3).memory_dir(place.dir()).start();
    for (pid, socket) in [
        (background.pid(), place.socket()),
        (foreground.pid(), foreground.socket_path().to_owned()),
        (dir.pid(), dir.socket_path().to_owned()),
    ] {
        let _peers = [(); 2].map(|()| Peer::join(&socket, 3));
        // At least two sockets, six eventfds, the memory, the listener and the epoll instance.
        let open = fs::read_dir(format!("/proc/{pid}/fd")).expect("it runs").count();
        assert!(open >= inherited.len() + 11, "{open} descriptors seen");
        let extra = &inheritable(pid) - &inherited;
        assert!(extra.is_empty(), "not close-on-exec in {pid}: {extra:?}");
    }
}
