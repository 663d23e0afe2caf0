// SPDX-License-Identifier: GPL-2.0-or-later
//! No exhaustion ends the server: out of descriptors, of descriptors in flight, of ids, of memory, or of patience.

mod common;

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use common::crowd::{Crowd, allow_descriptors};
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
    without_descriptors_it_turns_newcomers_away_idles_and_serves_again,
    clients_that_never_read_do_not_use_up_the_descriptors_in_flight,
    with_too_many_descriptors_in_flight_it_waits_idly_and_loses_nothing,
    with_all_ids_remembered_it_turns_newcomers_away_and_then_starts_over,
    a_burst_of_2000_connections_at_once_is_served,
    who_hangs_up_at_the_last_moment_makes_room_for_the_next,
}

/// What an idle server may use in a second: a few wakes by the timer on a slow machine, far from a spin.
const IDLE: Duration = Duration::from_millis(100);

/// Lines of its output that hold this text.
fn lines_with(server: &Daemon, text: &str) -> usize {
    server.output().lines().filter(|line| line.contains(text)).count()
}

/// One server that is out of descriptors, and those that it turned away.
struct Exhausted {
    limit: u64,
    server: Daemon,
    crowd: Crowd,
}

/// Connects until two in a row are turned away.
fn exhaust(target: Target, limit: u64, vectors: u16) -> Exhausted {
    let server = target.builder().vectors(vectors).descriptors(limit).start();
    let mut crowd = Crowd::new(server.socket_path(), vectors);
    let mut refused = 0;
    while refused < 2 {
        let number = crowd.connect(true);
        crowd.read_until("a greeting or the end", |crowd| {
            crowd.view(number).is_welcomed() || crowd.is_ended(number)
        });
        if crowd.is_ended(number) {
            assert!(
                crowd.view(number).is_refused() && crowd.view(number).messages() == 1,
                "limit {limit}: its end was not a refusal"
            );
            crowd.leave(number);
            refused += 1;
        } else {
            assert_eq!(refused, 0, "limit {limit}: there was no room, and then there was");
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

fn without_descriptors_it_turns_newcomers_away_idles_and_serves_again(target: Target) {
    if !allow_descriptors(2000) && !is_root("raise the limit of open files") {
        return;
    }
    // The steps of 1 make accept the first to find no room, and each of the eventfds.
    let limits = (17..=40).chain([64, 128]);
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
            let mut turned_away = UnixStream::connect(server.socket_path()).expect("it listens");
            turned_away.set_read_timeout(Some(PATIENCE)).expect("a socket has time limits");
            let mut refusal = Vec::new();
            std::io::Read::read_to_end(&mut turned_away, &mut refusal).expect("the end");
            assert_eq!(refusal, 1i64.to_le_bytes(), "limit {limit}: a refusal, and the end");
        }
        let lines = lines_with(server, "warn: client refused: no descriptor is left");
        assert!(
            !target.logs() || (1..=30).contains(&lines),
            "limit {limit}: {lines} lines for 202 refused"
        );
        // Room for one, and it is served.
        let leaver = *crowd.numbers().last().expect("there is one at any limit");
        let full = server.open_fds();
        crowd.leave(leaver);
        wait_for("it lets one go", || (server.open_fds() < full).then_some(()));
        crowd.connect(true);
        crowd.settle();
    }
    for Exhausted { limit, server, crowd } in servers {
        drop(crowd);
        // A line at most each second, on stdout (they are verbose) and stderr together.
        let lines = server.stop().matches("client refused: no descriptor is left").count();
        assert!((1..=30).contains(&lines), "limit {limit}: {lines} lines for 202 refused");
    }
}

#[test]
fn with_too_few_descriptors_to_start_it_says_so() {
    for limit in 4..16 {
        let place = Place::new();
        let mut command = Command::new("prlimit");
        command.arg(format!("--nofile={limit}:{limit}")).arg(common::daemon::program());
        command.args(place.args()).arg("-F");
        let mut server = Process::spawn(&mut command);
        wait_for("it serves or ends", || {
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
        // Neither its socket nor its memory.
        place.assert_holds_only(&[]);
    }
}

#[test]
fn without_a_descriptor_left_it_still_removes_its_socket_and_its_memory() {
    let place = Place::new();
    let server = place.serve(&[]);
    for limit in [3, 0] {
        let limit = format!("--nofile={limit}:{limit}");
        let pid = server.pid().to_string();
        let lowered = Command::new("prlimit").args([&limit, "--pid", &pid]).status();
        assert!(lowered.expect("prlimit is there").success());
    }
    server.stop();
    place.assert_holds_only(&[]);
}

fn clients_that_never_read_do_not_use_up_the_descriptors_in_flight(target: Target) {
    if !is_root("start a server as another user") {
        return;
    }
    // With sockets of the usual size 4 clients would do; see src/server/flight.rs for the figures.
    for (vectors, stalled, readers) in [(1, 40, 300), (4, 40, 100), (16, 40, 15)] {
        let server = target.builder().vectors(vectors).descriptors(1024).unprivileged().start();
        let mut crowd = Crowd::new(server.socket_path(), vectors);
        for _ in 0..stalled {
            crowd.connect(false);
        }
        let mut observers = Crowd::new(server.socket_path(), vectors);
        for id in 0..stalled {
            observers.also(id);
        }
        // Those who come and go are told of to the stalled as well, until their sockets are full.
        for _ in 0..300 / readers + 1 {
            observers.connect_many(readers);
            observers.settle();
            for number in observers.numbers().split_off(1) {
                observers.leave(number);
            }
            observers.settle();
        }
        // Ids that were not told to the stalled may have been given twice: one view is enough here.
        crowd.also(observers.everybody().iter().last().expect("one reader is left"));
        crowd.settle();
        server.stop();
    }
}

fn with_too_many_descriptors_in_flight_it_waits_idly_and_loses_nothing(target: Target) {
    if !is_root("start a server as another user") {
        return;
    }
    let server = target.builder().descriptors(256).unprivileged().start();
    let mut crowd = Crowd::new(server.socket_path(), 1);
    // 6 each is the least that the kernel lets a socket hold: 600 in all.
    for _ in 0..100 {
        crowd.connect(false);
    }
    // This one reads, and has to wait as well.
    let reader = crowd.connect(true);
    crowd.read_until("it has read all there is", |crowd| {
        let waits = !target.logs() || lines_with(&server, "have to wait") > 0;
        waits && server.open_fds() > 2 * 101 && !crowd.read(Duration::from_millis(20))
    });
    assert!(!crowd.view(reader).is_welcomed(), "there was room for it");
    let before = server.run_time();
    thread::sleep(Duration::from_secs(1));
    let used = server.run_time() - before;
    assert!(used < IDLE, "{used:?} of processor time in a second of waiting");
    eprintln!("too many in flight: {used:?} of processor time in a second of waiting");
    assert!(lines_with(&server, "have to wait") < 20, "{}", server.output());
    crowd.settle();
    server.stop();
}

fn with_all_ids_remembered_it_turns_newcomers_away_and_then_starts_over(target: Target) {
    let server = target.builder().start();
    let mut witness = Crowd::new(server.socket_path(), 1);
    let number = witness.connect(true);
    witness.welcome();
    // Others take, and leave, all the ids that there are; the witness hears of each.
    let mut used = 1;
    while used < 65_536 {
        let many = 15.min(65_536 - used);
        let mut crowd = Crowd::new(server.socket_path(), 1);
        crowd.connect_many(many);
        crowd.welcome();
        used += many;
        witness.read_until("it hears of them", |witness| {
            witness.view(number).known().len() + witness.view(number).gone().len() == used
        });
    }
    witness.read_until("it hears of all goodbyes", |witness| {
        witness.view(number).gone().len() == 65_535
    });
    for _ in 0..20 {
        let mut refused = Connection::open(server.socket_path());
        let refusal = refused.receive(PATIENCE).expect("a message").expect("before the end");
        assert_eq!(refusal.value, 1, "a version that no client knows");
        let end = refused.receive(PATIENCE).expect("an end of the stream");
        assert!(end.is_none(), "no id is left, but here is {end:?}");
    }
    let lines = lines_with(&server, "warn: client refused: no id is left");
    assert!(!target.logs() || (1..=5).contains(&lines), "{lines} lines for 20 refused");
    assert!(!witness.is_ended(number), "the witness was hung up on");
    // It leaves, and so nobody remembers.
    witness.leave(number);
    wait_for("ids are given again", || {
        let mut newcomer = Connection::open(server.socket_path());
        let first = newcomer.receive(PATIENCE).expect("a message or the end");
        first.is_some().then_some(())
    });
    let newcomer = Peer::join(server.socket_path(), 1);
    assert_eq!(newcomer.others(), [], "it is alone");
    let lines = server.stop().matches("client refused: no id is left").count();
    assert!((1..=5).contains(&lines), "{lines} lines for some 20 refused");
}

fn a_burst_of_2000_connections_at_once_is_served(target: Target) {
    let backlog = fs::read_to_string("/proc/sys/net/core/somaxconn").expect("Linux with /proc");
    if backlog.trim().parse::<u32>().expect("a number") < 2000 {
        common::skip::skip("net.core.somaxconn must be at least 2000");
        return;
    }
    let Some((_, limit)) = room_for("a burst", 2000, 2000, 1) else { return };
    let server = target.builder().descriptors(limit).start();
    // It is stopped meanwhile, so that all of them are there before it looks at the first.
    server.signal(Signal::SIGSTOP);
    let mut crowd = Crowd::new(server.socket_path(), 1);
    crowd.connect_many(2000);
    server.signal(Signal::SIGCONT);
    crowd.settle();
    server.stop();
}

#[test]
fn a_limit_of_file_sizes_is_named_at_the_start() {
    let directory = tempfile::tempdir().expect("a directory");
    for memory in [["-m", "/dev/shm"], ["-M", "ivshmem-test-of-a-limit-of-file-sizes"]] {
        let ended = Command::new("prlimit")
            .arg("--fsize=2000000")
            .arg(common::daemon::program())
            .args(["-F", "-l", "2M", "-S", "socket"])
            .args(memory)
            .current_dir(&directory)
            .output()
            .expect("prlimit is there");
        let text = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(1), "{ended:?}");
        assert!(text.contains("2097152") && text.contains("2000000"), "{text}");
        assert!(!directory.path().join("socket").exists(), "left its socket behind");
        assert!(
            !std::path::Path::new("/dev/shm").join(memory[1]).is_file(),
            "left its memory behind"
        );
    }
}

/// A file system that is full, or a limit of file sizes, is met by every line that is printed.
#[test]
fn full_output_does_not_end_it() {
    for under in
        [&["sh", "-c", "exec \"$0\" \"$@\" >/dev/full 2>&1"][..], &["prlimit", "--fsize=1100000"]]
    {
        // Above the memory's 1 MiB. With -v a client has three lines, of some 45 bytes in all.
        let server = Daemon::builder().under(under).size("1M").start();
        for _ in 0..if under[0] == "sh" { 10 } else { 30_000 } {
            let mut connection = Connection::open(server.socket_path());
            drop(connection.expect("the version"));
        }
        let newcomer = Peer::join(server.socket_path(), 1);
        assert!(newcomer.others().len() < 300);
        server.stop();
    }
}

/// What has been written there, and not been read. The end of a terminal that has gone is an error.
fn unread(reader: &mut File) -> String {
    let mut bytes = Vec::new();
    let _ = reader.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A server whose stdout and stderr go where nobody reads: to `path`, which `reader` reads without waiting.
fn nobody_reads(path: &Path, mut reader: File) {
    let script = format!("exec \"$0\" \"$@\" >{0} 2>{0}", path.display());
    let server = Daemon::builder().under(&["sh", "-c", &script]).start();
    let mut crowd = Crowd::new(server.socket_path(), 1);
    // Three lines for each, of some 45 bytes in all: twice what a pipe takes.
    for _ in 0..3000 {
        let number = crowd.connect(true);
        crowd.welcome();
        crowd.leave(number);
    }
    let mut text = unread(&mut reader);
    crowd.connect(true);
    crowd.settle();
    server.stop();
    // A terminal hands on what it was given a moment later.
    wait_for("its last line", || {
        text += &unread(&mut reader);
        text.trim_end().ends_with("free peer 3000").then_some(())
    });
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines.contains(&"new peer id = 200"), "{text}");
    assert!(!lines.contains(&"new peer id = 2900"), "it has been read: {text}");
    assert!(text.contains("lines left out, as nobody took them"), "{text}");
}

#[test]
fn a_pipe_that_nobody_reads_holds_up_nobody() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("pipe");
    mkfifo(&path, Mode::S_IRWXU).expect("a pipe");
    let reader = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&path);
    nobody_reads(&path, reader.expect("it can be opened"));
}

#[test]
fn a_terminal_that_nobody_reads_holds_up_nobody() {
    let pair = nix::pty::openpty(None, None).expect("a terminal");
    let path = ttyname(&pair.slave).expect("it has a name");
    fcntl(&pair.master, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).expect("a descriptor has flags");
    nobody_reads(&path, File::from(pair.master));
}

/// Who hangs up while another is let in makes room for it. That it happens in this order is strace's doing: each `accept4`
/// takes two seconds (-D: the server, not strace, is our child).
fn who_hangs_up_at_the_last_moment_makes_room_for_the_next(target: Target) {
    thread::scope(|scope| {
        for limit in [18, 19] {
            scope.spawn(move || make_room(target, limit));
        }
    });
}

fn make_room(target: Target, limit: u64) {
    let delay = "inject=accept4:delay_enter=2000000";
    let trace = ["strace", "-D", "-qq", "-o", "/dev/null", "-e", "trace=accept4", "-e", delay];
    // Room for some four. Of these limits one leaves a descriptor for the socket of the next, and one does not.
    let server = target.builder().under(&trace).descriptors(limit).start();
    let mut crowd = Crowd::new(server.socket_path(), 1);
    let refused = loop {
        let number = crowd.connect(true);
        crowd.read_until("a greeting or the end", |crowd| {
            crowd.view(number).is_welcomed() || crowd.is_ended(number)
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
    assert!(!crowd.is_ended(number), "limit {limit}: refused, though one had left");
    assert_eq!(crowd.numbers().len(), full);
    server.stop();
}
