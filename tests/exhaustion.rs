// SPDX-License-Identifier: GPL-2.0-or-later
//! The server survives when a resource runs out: descriptors, descriptors in flight, ids, file size, or a reader of
//! its output.

mod common;

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use common::crowd::{Crowd, allow_descriptors, use_all_ids};
use common::daemon::Daemon;
use common::peer::{Connection, Peer};
use common::program::{Place, Process};
use common::target::{Target, is_root, room_for};
use common::{PATIENCE, wait_for};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::{mkfifo, ttyname};

on_each_server! {
    without_free_descriptors_new_clients_are_refused_until_a_client_leaves,
    clients_that_never_read_do_not_use_up_the_descriptors_in_flight,
    with_too_many_descriptors_in_flight_the_server_waits_without_spinning_and_loses_nothing,
    with_all_ids_remembered_new_clients_are_refused_until_the_clients_leave,
    a_burst_of_2000_connections_at_once_is_served,
    a_client_that_leaves_during_accept_frees_its_descriptors_for_the_new_client,
}

/// The processor time that an idle server may use in a second. It allows some timer wake-ups on a slow machine, but no
/// busy loop.
const IDLE: Duration = Duration::from_millis(100);

/// The number of lines in the server's output that contain this text.
fn lines_with(server: &Daemon, text: &str) -> usize {
    server.output().lines().filter(|line| line.contains(text)).count()
}

/// A server that has no free descriptor, and its connected clients.
struct Exhausted {
    limit: u64,
    server: Daemon,
    crowd: Crowd,
}

/// Connects clients until the server refuses two in a row.
fn exhaust(target: Target, limit: u64, vectors: u16) -> Exhausted {
    let server = target.builder().vectors(vectors).descriptors(limit).start();
    let mut crowd = Crowd::new(server.socket_path(), vectors);
    let mut refused = 0;
    while refused < 2 {
        let number = crowd.connect(true);
        crowd.read_until("a greeting or the end of the stream", |crowd| {
            crowd.view(number).is_greeting_complete() || crowd.is_ended(number)
        });
        if crowd.is_ended(number) {
            assert!(
                crowd.view(number).is_refused() && crowd.view(number).messages() == 1,
                "limit {limit}: closed without a refusal message"
            );
            crowd.leave(number);
            refused += 1;
        } else {
            assert_eq!(
                refused, 0,
                "limit {limit}: a client was admitted after another one was refused"
            );
        }
        let most = limit / (u64::from(vectors) + 1);
        assert!(
            crowd.numbers().len() as u64 <= most,
            "limit {limit}: more clients than descriptors"
        );
    }
    crowd.settle();
    Exhausted { limit, server, crowd }
}

fn without_free_descriptors_new_clients_are_refused_until_a_client_leaves(target: Target) {
    if !allow_descriptors(2000) && !is_root("raise the limit of open files") {
        return;
    }
    // With steps of 1, each call that needs a descriptor is in turn the first to fail: accept and each eventfd.
    let limits = (17..=40).chain([64, 128]);
    let limits = limits.map(|limit| limit + target.control_fds());
    let servers = limits.flat_map(|limit| [(limit, 1), (limit, 4)]);
    let mut servers: Vec<_> =
        servers.map(|(limit, vectors)| exhaust(target, limit, vectors)).collect();

    let before: Vec<_> = servers.iter().map(|one| one.server.run_time()).collect();
    thread::sleep(Duration::from_secs(1));
    let mut most = Duration::ZERO;
    for (one, before) in servers.iter().zip(before) {
        let used = one.server.run_time() - before;
        most = most.max(used);
        assert!(used < IDLE, "limit {}: {used:?} of processor time in an idle second", one.limit);
    }
    eprintln!("out of descriptors: at most {most:?} of processor time in an idle second");
    for Exhausted { limit, server, crowd } in &mut servers {
        for _ in 0..200 {
            let mut refused_stream =
                UnixStream::connect(server.socket_path()).expect("the server listens");
            refused_stream.set_read_timeout(Some(PATIENCE)).expect("a socket has time limits");
            let mut refusal = Vec::new();
            std::io::Read::read_to_end(&mut refused_stream, &mut refusal)
                .expect("the end of the stream");
            assert_eq!(refusal, 1i64.to_le_bytes(), "limit {limit}: a refusal and then the end");
        }
        let lines = lines_with(server, "warn: client refused: no descriptor is left");
        assert!(
            !target.logs() || (1..=30).contains(&lines),
            "limit {limit}: {lines} lines for 202 refused"
        );
        // One client leaves, and a new one is served.
        let leaver = *crowd.numbers().last().expect("each limit allows one client");
        let full = server.open_fds();
        crowd.leave(leaver);
        wait_for("the server removes the client", || (server.open_fds() < full).then_some(()));
        crowd.connect(true);
        crowd.settle();
    }
    for Exhausted { limit, server, crowd } in servers {
        drop(crowd);
        // The server prints at most one line each second, on stdout (the server is verbose) and stderr together.
        let lines = server.stop().matches("client refused: no descriptor is left").count();
        assert!((1..=30).contains(&lines), "limit {limit}: {lines} lines for 202 refused");
    }
}

#[test]
fn with_too_few_descriptors_the_start_fails_with_a_clear_error() {
    for limit in 4..16 {
        let place = Place::new();
        let mut command = Command::new("prlimit");
        command.arg(format!("--nofile={limit}:{limit}")).arg(common::daemon::program());
        command.args(place.args()).arg("-F");
        let mut server = Process::spawn(&mut command);
        wait_for("the server serves or ends", || {
            let serves = UnixStream::connect(place.socket()).is_ok();
            (serves || !server.is_running()).then_some(())
        });
        if server.is_running() {
            server.stop();
        } else {
            let ended = server.end();
            assert!(ended.status.code().is_some_and(|code| code != 0), "limit {limit}: {ended:?}");
            assert!(
                ended.stderr.contains("open files") || ended.stderr.contains("shared lib"),
                "limit {limit}: {ended:?}"
            );
        }
        // The server left neither its socket nor its memory.
        place.assert_holds_only(&[]);
    }
}

#[test]
fn without_a_free_descriptor_the_server_still_removes_its_socket_and_memory() {
    let place = Place::new();
    let server = place.serve(&[]);
    for limit in [3, 0] {
        let limit = format!("--nofile={limit}:{limit}");
        let pid = server.pid().to_string();
        let lowered = Command::new("prlimit").args([&limit, "--pid", &pid]).status();
        assert!(lowered.expect("prlimit is installed").success());
    }
    server.stop();
    place.assert_holds_only(&[]);
}

fn clients_that_never_read_do_not_use_up_the_descriptors_in_flight(target: Target) {
    if !is_root("start a server as another user") {
        return;
    }
    // With sockets of the usual size, 4 clients would be enough to use up all descriptors in flight.
    for (vectors, stalled, readers) in [(1, 40, 300), (4, 40, 100), (16, 40, 15)] {
        let server = target.builder().vectors(vectors).descriptors(1024).unprivileged().start();
        let mut crowd = Crowd::new(server.socket_path(), vectors);
        for _ in 0..stalled {
            crowd.connect(false);
        }
        let mut observers = Crowd::new(server.socket_path(), vectors);
        for id in 0..stalled {
            observers.add_outside_client(id);
        }
        // The server sends these joins and leaves to the stalled clients too, until their sockets are full.
        for _ in 0..300 / readers + 1 {
            observers.connect_many(readers);
            observers.settle();
            for number in observers.numbers().split_off(1) {
                observers.leave(number);
            }
            observers.settle();
        }
        // Ids that the stalled clients did not receive may have been used twice, so only one reader is checked here.
        crowd
            .add_outside_client(observers.present_ids().iter().last().expect("one reader remains"));
        crowd.settle();
        server.stop();
    }
}

fn with_too_many_descriptors_in_flight_the_server_waits_without_spinning_and_loses_nothing(
    target: Target,
) {
    if !is_root("start a server as another user") {
        return;
    }
    let server = target.builder().descriptors(256).unprivileged().start();
    let mut crowd = Crowd::new(server.socket_path(), 1);
    // The kernel lets each socket hold at least 6 messages: 600 in all.
    for _ in 0..100 {
        crowd.connect(false);
    }
    // This client reads, but it must wait too.
    let reader = crowd.connect(true);
    crowd.read_until("the reader has read all available messages", |crowd| {
        let waits = !target.logs() || lines_with(&server, "have to wait") > 0;
        waits && server.open_fds() > 2 * 101 && !crowd.read(Duration::from_millis(20))
    });
    assert!(!crowd.view(reader).is_greeting_complete(), "the reader received its whole greeting");
    let before = server.run_time();
    thread::sleep(Duration::from_secs(1));
    let used = server.run_time() - before;
    assert!(used < IDLE, "{used:?} of processor time in a second of waiting");
    eprintln!("too many in flight: {used:?} of processor time in a second of waiting");
    assert!(lines_with(&server, "have to wait") < 20, "{}", server.output());
    crowd.settle();
    server.stop();
}

fn with_all_ids_remembered_new_clients_are_refused_until_the_clients_leave(target: Target) {
    if !is_root("connect as other users") {
        return;
    }
    let server = target.builder().for_all_users().start();
    let (mut witness, number, users) = use_all_ids(&server);
    assert_eq!(users[..2], [65_536 - 1024 - 1, 256], "{users:?}");
    for _ in 0..20 {
        let mut refused = Connection::open(server.socket_path());
        let refusal =
            refused.receive(PATIENCE).expect("a message").expect("a message before the end");
        assert_eq!(refusal.value, 1, "an unknown version refuses the client");
        let end = refused.receive(PATIENCE).expect("an end of the stream");
        assert!(end.is_none(), "no id is free, but the server sent {end:?}");
    }
    assert!(!witness.is_ended(number), "the server closed the witness");
    // The witness leaves, so no connected client remembers the ids.
    witness.leave(number);
    wait_for("ids are assigned again", || {
        let mut client = Connection::open(server.socket_path());
        let first = client.receive(PATIENCE).expect("a message or the end")?;
        (first.value == 0).then_some(())
    });
    let client = Peer::join(server.socket_path(), 1);
    assert_eq!(client.others(), [], "no other client is connected");
    let output = server.stop();
    let lines = output.matches("client refused: no id is left").count();
    assert!((1..=5).contains(&lines), "{lines} lines for some 20 refused");
    assert!(output.contains("reserved for other users"), "{output}");
    if target.logs() {
        assert!(output.contains("uid 1000001 holds most: 0 clients"), "{output}");
    }
}

fn a_burst_of_2000_connections_at_once_is_served(target: Target) {
    let backlog = fs::read_to_string("/proc/sys/net/core/somaxconn").expect("Linux with /proc");
    if backlog.trim().parse::<u32>().expect("a number") < 2000 {
        common::skip::skip("net.core.somaxconn must be at least 2000");
        return;
    }
    let Some((_, limit)) = room_for("a burst", 2000, 2000, 1) else { return };
    let server = target.builder().descriptors(limit).start();
    // The server is stopped, so all clients connect before it accepts the first one.
    server.pause();
    let mut crowd = Crowd::new(server.socket_path(), 1);
    crowd.connect_many(2000);
    server.signal(Signal::SIGCONT);
    crowd.settle();
    server.stop();
}

#[test]
fn a_file_size_limit_below_the_memory_size_gives_an_error_that_names_both() {
    let directory = tempfile::tempdir().expect("a directory");
    for memory in [["-m", "/dev/shm"], ["-M", "ivshmem-test-of-a-limit-of-file-sizes"]] {
        let ended = Command::new("prlimit")
            .arg("--fsize=2000000")
            .arg(common::daemon::program())
            .args(["-F", "-l", "2M", "-S", "socket"])
            .args(memory)
            .current_dir(&directory)
            .output()
            .expect("prlimit is installed");
        let text = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(1), "{ended:?}");
        assert!(text.contains("2097152") && text.contains("2000000"), "{text}");
        assert!(!directory.path().join("socket").exists(), "the socket was left behind");
        assert!(
            !std::path::Path::new("/dev/shm").join(memory[1]).is_file(),
            "the memory was left behind"
        );
    }
}

/// On a full file system or above a file size limit, each printed line fails.
#[test]
fn full_output_does_not_stop_the_server() {
    for under in
        [&["sh", "-c", "exec \"$0\" \"$@\" >/dev/full 2>&1"][..], &["prlimit", "--fsize=1100000"]]
    {
        // The limit is above the memory's 1 MiB. With -v each client causes three lines, about 45 bytes in all.
        let server = Daemon::builder().under(under).size("1M").start();
        for _ in 0..if under[0] == "sh" { 10 } else { 30_000 } {
            let mut connection = Connection::open(server.socket_path());
            drop(connection.expect("the version"));
        }
        let client = Peer::join(server.socket_path(), 1);
        assert!(client.others().len() < 300);
        server.stop();
    }
}

/// Returns the bytes that were written and not yet read. A closed terminal gives an error, which is ignored.
fn unread(reader: &mut File) -> String {
    let mut bytes = Vec::new();
    let _ = reader.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Runs a server whose stdout and stderr go to `path`, which nothing reads during the test. At the end `reader` reads
/// it without waiting.
fn check_unread_output(path: &Path, mut reader: File) {
    let script = format!("exec \"$0\" \"$@\" >{0} 2>{0}", path.display());
    let server = Daemon::builder().under(&["sh", "-c", &script]).start();
    let mut crowd = Crowd::new(server.socket_path(), 1);
    // Each client causes three lines, about 45 bytes: in all twice the capacity of a pipe.
    for _ in 0..3000 {
        let number = crowd.connect(true);
        crowd.read_greetings();
        crowd.leave(number);
    }
    let mut text = unread(&mut reader);
    crowd.connect(true);
    crowd.settle();
    server.stop();
    // A terminal passes data on with a short delay.
    wait_for("the server's last line", || {
        text += &unread(&mut reader);
        text.trim_end().ends_with("free peer 3000").then_some(())
    });
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines.contains(&"new peer id = 200"), "{text}");
    assert!(!lines.contains(&"new peer id = 2900"), "the output was read during the test: {text}");
    assert!(text.contains("lines dropped, because the output was not read"), "{text}");
}

#[test]
fn a_pipe_without_a_reader_does_not_block_the_server() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("pipe");
    mkfifo(&path, Mode::S_IRWXU).expect("a pipe");
    let reader = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&path);
    check_unread_output(&path, reader.expect("the pipe can be opened"));
}

#[test]
fn a_terminal_without_a_reader_does_not_block_the_server() {
    let pair = nix::pty::openpty(None, None).expect("a terminal");
    let path = ttyname(&pair.slave).expect("the terminal has a name");
    fcntl(&pair.master, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).expect("a descriptor has flags");
    check_unread_output(&path, File::from(pair.master));
}

/// A client closes its connection while the server accepts another one. strace makes this order certain: it delays each
/// `accept4` by two seconds (-D: the server, not strace, is our child).
fn a_client_that_leaves_during_accept_frees_its_descriptors_for_the_new_client(target: Target) {
    thread::scope(|scope| {
        for limit in [18, 19] {
            scope.spawn(move || leave_during_accept(target, limit + target.control_fds()));
        }
    });
}

fn leave_during_accept(target: Target, limit: u64) {
    let delay = "inject=accept4:delay_enter=2000000";
    let trace = ["strace", "-D", "-qq", "-o", "/dev/null", "-e", "trace=accept4", "-e", delay];
    // There is room for about four clients. With one of the two limits a descriptor is left for the next
    // client's socket, with the other one not.
    let server = target.builder().under(&trace).descriptors(limit).start();
    let mut crowd = Crowd::new(server.socket_path(), 1);
    let refused = loop {
        let number = crowd.connect(true);
        crowd.read_until("a greeting or the end of the stream", |crowd| {
            crowd.view(number).is_greeting_complete() || crowd.is_ended(number)
        });
        if crowd.is_ended(number) {
            break number;
        }
    };
    crowd.leave(refused);
    let full = crowd.numbers().len();
    assert!((2..6).contains(&full), "limit {limit}: {full} clients");

    let number = crowd.connect(true);
    thread::sleep(Duration::from_millis(200));
    crowd.leave(crowd.numbers()[0]);
    crowd.settle();
    assert!(!crowd.is_ended(number), "limit {limit}: refused, although another client had left");
    assert_eq!(crowd.numbers().len(), full);
    server.stop();
}
