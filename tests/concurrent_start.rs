// SPDX-License-Identifier: GPL-2.0-or-later
//! Several servers that want the same socket or memory, at once or one after the other: one gets it.
//!
//! A server that is refused leaves nothing behind, and the server that serves does not notice.

// Only common::peer has unsafe code: for descriptors and bytes that were received. Every other module forbids it.
#![deny(unsafe_code)]

mod common;

use std::fs::{self, File, Permissions};
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::process::Command;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use common::daemon::program;
use common::peer::Peer;
use common::program::{Background, Ended, Place, Process, adopt_orphans, memory_of, run, size_of};
use common::target::Target;
use common::{is_asleep, text_of, wait_for, wait_up_to};

/// What is not to change in a server that others try to replace.
fn state_of(place: &Place) -> [(u64, u64, u64); 2] {
    [place.socket(), place.shm()].map(|path| {
        let meta = fs::symlink_metadata(path).expect("it is there");
        (meta.dev(), meta.ino(), meta.len())
    })
}

#[test]
fn a_second_server_on_the_same_socket_or_memory_or_both_is_refused_and_hurts_nobody() {
    let first = Place::new();
    let server = first.serve(&["-l", "128K"]);
    let mut resident = Peer::join(&first.socket(), 1);
    memory_of(&resident).write_all_at(b"precious", 100_000).expect("it is there");
    let before = state_of(&first);

    let socket = first.socket();
    let socket = socket.to_str().expect("ours");
    for (args, named) in [
        (&["-S", socket][..], socket),
        (&["-M", &first.name], &*first.name),
        (&["-S", socket, "-M", &first.name], &*first.name),
    ] {
        // Smaller, as large, larger; in the foreground and in the background.
        for size in ["4K", "128K", "1M"] {
            for foreground in [&["-F"][..], &[]] {
                let second = Place::new();
                let ended = run(second.command(&["-l", size]).args(args).args(foreground));
                ended.assert_refused(&["in use", named]);
                second.assert_holds_only(&[]);
                assert_eq!(state_of(&first), before, "{args:?} -l {size}");
            }
        }
    }

    // Had a starter connected it would have been client 1.
    let newcomer = Peer::join(&first.socket(), 1);
    assert_eq!(newcomer.id(), 1);
    resident.wait_for_peer(1);
    let mut bytes = [0; 8];
    memory_of(&newcomer).read_exact_at(&mut bytes, 100_000).expect("all of it is there");
    assert_eq!(&bytes, b"precious");
    server.stop();
    first.assert_holds_only(&[]);
}

on_each_server! {
    of_fifty_starters_on_one_socket_and_one_memory_exactly_one_wins,
    of_fifty_starters_on_one_socket_exactly_one_wins_and_no_memory_is_left,
    of_fifty_starters_on_one_memory_exactly_one_wins_and_no_socket_is_left,
    of_fifty_starters_over_what_a_killed_server_left_exactly_one_wins,
    no_client_of_a_killed_server_keeps_it_from_being_started_again,
}

/// Fifty programs that were let go at the same moment.
const STARTERS: usize = 50;

/// Starts them; each waits in a shell until the gate is opened, which is when all are there.
fn start_at_once(
    target: Target,
    place: &Place,
    args: impl Fn(usize) -> Vec<String>,
) -> Vec<Process> {
    let gate = place.path("gate");
    mkfifo(&gate, Mode::S_IRWXU).expect("a FIFO");
    let script = "gate=$1; shift; : < \"$gate\"; exec \"$0\" \"$@\"";
    let (program, common) = (target.program(), place.args_of(target));
    let starters: Vec<Process> = (0..STARTERS)
        .map(|number| {
            let mut command = Command::new("sh");
            command.args(["-ec", script]).arg(&program).arg(&gate);
            Process::spawn(command.args(&common).args(args(number)))
        })
        .collect();
    // Opening it without a reader would not fail, but whoever came later would start later.
    for starter in &starters {
        wait_for("a starter sleeps at the gate", || is_asleep(starter.pid()).then_some(()));
    }
    let open = File::options().read(true).write(true).open(&gate).expect("the gate");
    // It has to stay open while somebody may still be on the way through it.
    for starter in &starters {
        let through = || {
            let name = fs::read_to_string(format!("/proc/{}/comm", starter.pid())).ok();
            name.is_none_or(|name| name != "sh\n").then_some(())
        };
        wait_for("a starter is through the gate", through);
    }
    drop(open);
    fs::remove_file(&gate).expect("it is ours");
    starters
}

/// Waits until all starters but so many have ended; those that still run, by number, and the others' ends.
fn sort_out(starters: Vec<Process>, winners: usize) -> (Vec<(usize, Process)>, Vec<Ended>) {
    let mut running: Vec<(usize, Process)> = starters.into_iter().enumerate().collect();
    let mut ended = Vec::new();
    // A loser may wait some seconds for another that is at the left-over socket.
    let sorted = wait_up_to(Duration::from_secs(60), || {
        for at in (0..running.len()).rev() {
            if !running[at].1.is_running() {
                ended.push(running.remove(at).1.end());
            }
        }
        (running.len() <= winners).then_some(())
    });
    assert!(sorted.is_some(), "{} of the starters still run: {ended:?}", running.len());
    (running, ended)
}

/// What all starters want, so that one alone can have it. Of the rest each has its own.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Socket,
    Memory,
    Both,
}

/// Of fifty starters exactly one is to win, and to serve; the others are to leave nothing. Each asks for a size of its own.
fn exactly_one_wins(target: Target, place: &Place, wanted: Wanted) {
    let size = |number: usize| (64 << 10) << (number % 4);
    let socket_of = |number: usize| match wanted {
        Wanted::Memory => place.path(&format!("socket-{number}")),
        Wanted::Socket | Wanted::Both => place.socket(),
    };
    let memory_name_of = |number: usize| match wanted {
        Wanted::Socket => format!("{}-{number}", place.name),
        Wanted::Memory | Wanted::Both => place.name.clone(),
    };
    let (named, errnos) = match wanted {
        Wanted::Socket => ("socket", &[Errno::EADDRINUSE][..]),
        Wanted::Memory => (&*place.name, &[Errno::EBUSY][..]),
        Wanted::Both => (&*place.name, &[Errno::EADDRINUSE, Errno::EBUSY][..]),
    };
    let starters = start_at_once(target, place, |number| {
        let socket = socket_of(number).into_os_string().into_string().expect("it is ours");
        let (memory, size) = (memory_name_of(number), size(number).to_string());
        ["-F", "-S", &socket, "-M", &memory, "-l", &size].map(str::to_owned).to_vec()
    });
    let (mut winners, losers) = sort_out(starters, 1);
    let (winner, mut server) = winners.pop().unwrap_or_else(|| panic!("nobody won: {losers:?}"));
    let socket = socket_of(winner);
    server.wait_until_listening(&socket);
    for loser in &losers {
        assert_eq!(loser.stdout, "");
        loser.assert_refused_by(target, &["in use", named], errnos);
    }
    let peers = [0, 1].map(|id| {
        let peer = Peer::join(&socket, 1);
        assert_eq!(peer.id(), id, "no loser was a client");
        assert_eq!(size_of(&peer), size(winner));
        peer
    });
    memory_of(&peers[0]).write_all_at(b"shared", 60_000).expect("it is there");
    let mut bytes = [0; 6];
    memory_of(&peers[1]).read_exact_at(&mut bytes, 60_000).expect("it is there");
    assert_eq!(&bytes, b"shared");
    let socket_name = socket.file_name().expect("a name").to_string_lossy();
    assert_eq!(place.names(), target.names_of(&socket_name), "of all fifty");
    server.stop();
}

fn of_fifty_starters_on_one_socket_and_one_memory_exactly_one_wins(target: Target) {
    let place = Place::new();
    exactly_one_wins(target, &place, Wanted::Both);
    place.assert_holds_only(&[]);
}

fn of_fifty_starters_on_one_socket_exactly_one_wins_and_no_memory_is_left(target: Target) {
    let place = Place::new();
    exactly_one_wins(target, &place, Wanted::Socket);
    place.assert_holds_only(&[]);
}

fn of_fifty_starters_on_one_memory_exactly_one_wins_and_no_socket_is_left(target: Target) {
    let place = Place::new();
    exactly_one_wins(target, &place, Wanted::Memory);
    place.assert_holds_only(&[]);
}

fn of_fifty_starters_over_what_a_killed_server_left_exactly_one_wins(target: Target) {
    let place = Place::new();
    drop(place.serve_by(target));
    assert!(place.socket().exists() && place.shm().exists(), "it was killed");
    exactly_one_wins(target, &place, Wanted::Both);
    place.assert_holds_only(&[]);

    // And where it is only the socket that they have in common.
    drop(place.serve_by(target));
    fs::remove_file(place.shm()).expect("it was killed");
    fs::remove_file(place.shm_lock()).expect("it was killed");
    exactly_one_wins(target, &place, Wanted::Socket);
    place.assert_holds_only(&[]);
}

#[test]
fn a_starter_that_waited_for_another_at_a_dead_socket_looks_at_it_again() {
    let place = Place::new();
    drop(UnixListener::bind(place.socket()).expect("the place is new"));
    // This test is the other starter, which is between finding the socket dead and replacing it.
    let lock_path = place.path(".ivshmem-lock.socket");
    let lock = File::create(&lock_path).expect("it is ours");
    fs::set_permissions(&lock_path, Permissions::from_mode(0o600)).expect("it is ours");
    lock.try_lock().expect("nobody else has it");
    let starter = Process::spawn(&mut place.command(&["-F"]));
    wait_for("the starter is about to take the lock", || {
        let fds = fs::read_dir(format!("/proc/{}/fd", starter.pid())).ok()?;
        let open = |fd: fs::DirEntry| fs::read_link(fd.path()).is_ok_and(|to| to == lock_path);
        fds.flatten().any(open).then_some(())
    });
    fs::remove_file(place.socket()).expect("it is left alone while the lock is held");
    let owner = UnixListener::bind(place.socket()).expect("it was removed");
    owner.set_nonblocking(true).expect("it is a socket");
    drop(lock);
    starter.end().assert_refused(&["in use", place.socket().to_str().expect("ours")]);
    assert_eq!(owner.accept().map(drop).unwrap_err().kind(), ErrorKind::WouldBlock);
    place.assert_holds_only(&["socket"]);
}

/// The second finds a socket, which is dead when it asks who holds it, and has given way to a third server's when the
/// second would remove it. strace makes the moments last.
#[test]
fn a_socket_that_is_removed_and_made_anew_meanwhile_is_left_alone() {
    let place = Place::new();
    let log = place.path("log");
    let first = place.serve(&[]);
    let mut strace = Command::new("strace");
    strace.args(["-D", "-qq", "-e", "trace=bind,connect,openat", "-o"]).arg(&log);
    strace.args(["-e", "inject=connect:delay_enter=3000000:delay_exit=5000000"]);
    strace.arg(program()).args(place.args()).args(["-F", "--memfd"]);
    let second = Process::spawn(&mut strace);
    // Only then has it opened the socket that is there; without that it would find the place empty.
    wait_for("it opened the socket that is there", || {
        let text = text_of(&log);
        let (_, after) = text.split_once("EADDRINUSE")?;
        after.lines().any(|line| line.contains("O_PATH") && line.contains(" = ")).then_some(())
    });
    first.stop();
    let third = place.serve(&[]);
    let inode = || fs::metadata(place.socket()).expect("it is served").ino();
    let before = inode();
    second.end().assert_refused(&["in use", place.socket().to_str().expect("ours")]);
    assert_eq!(inode(), before);
    assert_eq!(Peer::join(&place.socket(), 1).id(), 0);
    fs::remove_file(&log).expect("strace wrote it");
    third.stop();
    place.assert_holds_only(&[]);
}

#[test]
fn of_fifty_daemons_with_one_pid_file_exactly_one_wins() {
    let place = Place::new();
    adopt_orphans();
    // Left by a killed one, whose process id must not be told as that of a running one.
    fs::write(place.pid_file(), "1234567890\n").expect("the place is new");
    let (_, ended) = sort_out(start_at_once(Target::Daemon, &place, |_| vec![]), 0);
    let mut server = Background::adopted(&text_of(&place.pid_file()));
    let (winners, losers): (Vec<_>, Vec<_>) =
        ended.iter().partition(|ended| ended.status.success());
    assert_eq!((winners.len(), losers.len()), (1, STARTERS - 1), "{ended:?}");
    for loser in &losers {
        loser.assert_refused(&["pid file", place.pid_file().to_str().expect("ours")]);
        assert!(!loser.stderr.contains("1234567890"), "{loser:?}");
    }
    assert_eq!(Peer::join(&place.socket(), 1).id(), 0);
    server.signal(Signal::SIGTERM);
    assert_eq!(server.wait(), 0);
    place.assert_holds_only(&[]);
}

#[test]
fn fifty_starters_on_a_socket_that_is_taken_leave_no_memory() {
    let place = Place::new();
    let owner = UnixListener::bind(place.socket()).expect("the place is new");
    owner.set_nonblocking(true).expect("it is a socket");
    // All on one memory: whoever made it may not be the one who has it in the end.
    let (_, losers) = sort_out(start_at_once(Target::Daemon, &place, |_| vec!["-F".to_owned()]), 0);
    assert_eq!(losers.len(), STARTERS);
    for loser in &losers {
        loser.assert_refused(&["in use"]);
    }
    assert_eq!(owner.accept().map(drop).unwrap_err().kind(), ErrorKind::WouldBlock);
    place.assert_holds_only(&["socket"]);
}

#[test]
fn memory_that_its_maker_lost_to_another_starter_is_not_left_by_that_one() {
    let place = Place::new();
    let _owner = UnixListener::bind(place.socket()).expect("the place is new");
    // Made, but not locked: the moment that the fifty above meet now and then.
    File::create(place.shm()).expect("/dev/shm can be written");
    fs::set_permissions(place.shm(), Permissions::from_mode(0o700)).expect("it is ours");
    run(&mut place.command(&["-F"])).assert_refused(&["in use", "socket"]);
    place.assert_holds_only(&["socket"]);

    // What has a size was served once, and may be wanted.
    fs::write(place.shm(), "content").expect("/dev/shm can be written");
    run(&mut place.command(&["-F"])).assert_refused(&["in use", "socket"]);
    assert_eq!(fs::read(place.shm()).expect("it is there"), b"content");
}

#[test]
fn a_killed_server_is_replaced_while_its_clients_live_and_the_content_stays() {
    let place = Place::new();
    let mut peers = Vec::new();
    let mut inode = None;
    for round in 0..5_u8 {
        // In turn in the foreground and in the background.
        let (foreground, background) = match round % 2 {
            0 => (Some(place.serve(&[])), None),
            _ => (None, Some(place.daemonize(&[]))),
        };
        let peer = Peer::join(&place.socket(), 1);
        let first = 64 * u16::from(round);
        assert_eq!(peer.id(), first, "a new server, and ids that no client has");
        let now = memory_of(&peer).metadata().expect("fstat works").ino();
        assert_eq!(*inode.get_or_insert(now), now, "the same memory");
        let mut bytes = [0; 5];
        memory_of(&peer).read_exact_at(&mut bytes, 0).expect("it is there");
        let expected = [1, 2, 3, 4, 5].map(|number| if number <= round { number } else { 0 });
        assert_eq!(bytes, expected, "what the rounds before wrote");
        memory_of(&peer).write_all_at(&[round + 1], round.into()).expect("it is there");
        peers.push(peer);
        drop((foreground, background));
        assert!(place.socket().exists() && place.shm().exists(), "it was killed");
    }
    place.serve(&[]).stop();
    let _ = fs::remove_file(place.pid_file());
    place.assert_holds_only(&[]);
}

/// Each client has a descriptor of the memory: it can lock it, open it anew, lock that too, and truncate it.
fn no_client_of_a_killed_server_keeps_it_from_being_started_again(target: Target) {
    let place = Place::new();
    let server = place.serve_by(target);
    let peer = Peer::join(&place.socket(), 1);
    let memory = memory_of(&peer);
    memory.write_all_at(b"content", 60_000).expect("it is there");
    let reopened = File::options()
        .read(true)
        .write(true)
        .open(format!("/proc/self/fd/{}", memory.as_raw_fd()))
        .expect("the owner may");
    let directory = File::open(place.dir()).expect("it is there");
    let held = memory.try_clone().expect("dup works");
    let _locks = [held, reopened, directory].map(|file| {
        Flock::lock(file, FlockArg::LockSharedNonblock).expect("nobody else has it locked")
    });
    drop(server);
    for grown in [(64 << 10) + 1, 1 << 20, 1 << 40] {
        memory.set_len(grown).expect("a client can");
        // Another failure in between does not make it forget what was served.
        let taken = Process::spawn(place.command_of(target).args(["-S", "/nowhere/socket"])).end();
        assert_eq!(taken.status.code(), Some(1), "{taken:?}");
        let server = place.serve_by(target);
        let peer = Peer::join(&place.socket(), 1);
        assert_eq!(size_of(&peer), 64 << 10, "cut back from {grown}");
        let mut bytes = [0; 7];
        memory_of(&peer).read_exact_at(&mut bytes, 60_000).expect("it is there");
        assert_eq!(&bytes, b"content");
        drop(server);
    }
    // To ask for less than what was served is still refused.
    run(&mut place.command(&["-F", "-l", "32K"])).assert_refused(&["65536", "32768", "shrink"]);
    place.serve_by(target).stop();
    place.assert_holds_only(&[]);
}
