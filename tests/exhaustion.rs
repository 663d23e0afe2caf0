// SPDX-License-Identifier: GPL-2.0-or-later
//! No exhaustion ends the server: out of descriptors, of descriptors in flight, of ids, of memory, or of patience.

mod common;

use std::fs;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use common::crowd::{Crowd, allow_descriptors};
use common::daemon::Daemon;
use common::peer::{Connection, Peer};
use common::target::{Target, is_root, room_for};
use common::{PATIENCE, wait_for};
use nix::sys::signal::Signal;

on_each_server! {
    without_descriptors_it_turns_newcomers_away_idles_and_serves_again,
    clients_that_never_read_do_not_use_up_the_descriptors_in_flight,
    with_too_many_descriptors_in_flight_it_waits_idly_and_loses_nothing,
    with_all_ids_remembered_it_turns_newcomers_away_and_then_starts_over,
    a_burst_of_2000_connections_at_once_is_served,
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
            assert_eq!(
                crowd.view(number).messages(),
                0,
                "limit {limit}: refused, it was told something"
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
    let limits = (16..=40).chain([64, 128]);
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
            let end = std::io::Read::read(&mut turned_away, &mut [0; 8]);
            assert_eq!(end.expect("the end of the stream"), 0, "limit {limit}: turned away");
        }
        let lines = lines_with(server, "warn: client refused: no descriptors are left");
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
    for one in servers {
        drop(one.crowd);
        one.server.stop();
    }
}

#[test]
fn with_too_few_descriptors_to_start_it_says_so() {
    for limit in 4..16 {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = directory.path().join("socket");
        let output = directory.path().join("output");
        let mut server = Command::new("prlimit")
            .arg(format!("--nofile={limit}:{limit}"))
            .arg(common::daemon::program())
            .args(["-F", "-m", "/dev/shm", "-l", "4K", "-S"])
            .arg(&socket)
            .stdin(Stdio::null())
            .stdout(fs::File::create(&output).expect("a file"))
            .stderr(fs::OpenOptions::new().append(true).open(&output).expect("a file"))
            .spawn()
            .expect("prlimit is there");
        let ended = wait_for("it serves or ends", || match server.try_wait().expect("our child") {
            Some(status) => Some(Some(status)),
            None => UnixStream::connect(&socket).ok().map(|_| None),
        });
        let text = common::text_of(&output);
        match ended {
            None => {
                server.kill().expect("our child");
                server.wait().expect("our child");
            }
            Some(status) => {
                assert!(status.code().is_some_and(|code| code != 0), "limit {limit}: {status}");
                assert!(
                    text.contains("open files") || text.contains("shared lib"),
                    "limit {limit}: {text:?}"
                );
                assert!(!socket.exists(), "limit {limit}: left a socket behind");
            }
        }
    }
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
    server.stop();
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
