// SPDX-License-Identifier: GPL-2.0-or-later
//! A client cannot make the server sleep in close(2): not by a TCP socket with SO_LINGER that it sends, from a
//! connection that was admitted, was ended, or still waits to be accepted.
//!
//! Since Linux 6.16 the kernel refuses such a message. strace makes the server believe that its kernel is older.

mod common;

use std::fs;
use std::io::IoSlice;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg, setsockopt, sockopt};
use tempfile::TempDir;

use common::crowd::Crowd;
use common::daemon::Daemon;
use common::lingering::Lingering;
use common::target::Target;
use common::{find_in_path, text_of};

on_each_server! {
    the_kernel_refuses_descriptors_that_are_sent_to_the_server,
    on_an_older_kernel_lingering_sockets_of_clients_delay_no_join,
    on_an_older_kernel_lingering_sockets_in_the_backlog_delay_no_join,
    on_an_older_kernel_lingering_sockets_do_not_delay_the_end,
    on_an_older_kernel_more_of_them_than_threads_delay_nothing,
}

/// How long close(2) would sleep.
const LINGER: Duration = Duration::from_secs(60);

/// The time limit for a join, and for the end. 100 ms on an idle machine.
const AT_ONCE: Duration = Duration::from_secs(10);

/// Sends one byte with a descriptor.
fn send(stream: &UnixStream, fd: &impl AsFd) -> nix::Result<usize> {
    send_with(stream, fd, MsgFlags::empty())
}

fn send_with(stream: &UnixStream, fd: &impl AsFd, flags: MsgFlags) -> nix::Result<usize> {
    let fds = [fd.as_fd().as_raw_fd()];
    let control = [ControlMessage::ScmRights(&fds)];
    let flags = flags | MsgFlags::MSG_NOSIGNAL;
    sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(b"!")], &control, flags, None)
}

/// Connects clients that each send a lingering socket and keep no copy of it. The other end of each socket must be kept.
/// Each second one sends it with urgent data, which a plain recv(2) does not show.
fn attack(server: &Daemon, clients: usize) -> (Vec<UnixStream>, Vec<impl Sized>) {
    let attack = |number| {
        let stream = UnixStream::connect(server.socket_path()).expect("the server listens");
        let Lingering { socket, peer } = Lingering::new(LINGER);
        let urgent = if number % 2 == 1 { MsgFlags::MSG_OOB } else { MsgFlags::empty() };
        assert_eq!(send_with(&stream, &socket, urgent), Ok(1));
        (stream, peer)
    };
    (0..clients).map(attack).unzip()
}

/// A server whose kernel does not have `SO_PASSRIGHTS`, so it seems.
struct Old {
    server: Daemon,
    log: PathBuf,
    _dir: TempDir,
}

impl Old {
    fn start(target: Target) -> Self {
        let strace = find_in_path("strace").expect("strace: Debian package strace");
        let dir = tempfile::tempdir().expect("a temporary directory");
        let log = dir.path().join("log");
        let (strace, path) = (strace.to_string_lossy(), log.to_string_lossy());
        let fault = "inject=setsockopt:error=ENOPROTOOPT:when=1";
        let command = [&strace, "-D", "-o", &path, "-e", "trace=setsockopt", "-e", fault];
        let server = target.builder().under(&command).start();
        assert!(text_of(&log).contains("(INJECTED)"), "{}", text_of(&log));
        Self { server, log, _dir: dir }
    }

    /// Stops the server, which must not take long.
    fn stop(self) {
        self.server.stop_within(AT_ONCE);
        // Only the first call failed.
        assert_eq!(text_of(&self.log).matches("(INJECTED)").count(), 1);
    }
}

/// Connects a client, and waits until it and the others know each other.
#[track_caller]
fn join(crowd: &mut Crowd) {
    let started = Instant::now();
    crowd.connect(true);
    crowd.settle();
    let took = started.elapsed();
    println!("a join took {took:?}");
    assert!(took < AT_ONCE, "{took:?}");
}

fn the_kernel_refuses_descriptors_that_are_sent_to_the_server(target: Target) {
    let release = text_of("/proc/sys/kernel/osrelease".as_ref());
    let mut numbers = release.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    let (major, minor) = (numbers.next(), numbers.next());
    let refuses = (major, minor) >= (Some(6), Some(16));

    let server = target.builder().start();
    let mut crowd = Crowd::new(server.socket_path(), 1);
    join(&mut crowd);
    let lingering = Lingering::new(LINGER);
    let attacker = UnixStream::connect(server.socket_path()).expect("the server listens");
    match send(&attacker, &lingering.socket) {
        Err(Errno::EPERM) => {
            // Else this process would sleep.
            let off = libc::linger { l_onoff: 0, l_linger: 0 };
            setsockopt(&lingering.socket, sockopt::Linger, &off).expect("it is a socket");
        }
        Ok(_) if !refuses => {}
        result => panic!("Linux {release}: {result:?}"),
    }
    drop(attacker);
    join(&mut crowd);
    server.stop_within(AT_ONCE);
}

fn on_an_older_kernel_lingering_sockets_of_clients_delay_no_join(target: Target) {
    let old = Old::start(target);
    let mut crowd = Crowd::new(old.server.socket_path(), 1);
    join(&mut crowd);
    // One closes its connection, one does not read, one reads nothing more.
    let (mut streams, _peers) = attack(&old.server, 3);
    drop(streams.pop());
    streams[0].shutdown(Shutdown::Read).expect("it is connected");
    join(&mut crowd);
    drop(streams);
    join(&mut crowd);
    old.stop();
}

fn on_an_older_kernel_lingering_sockets_in_the_backlog_delay_no_join(target: Target) {
    let old = Old::start(target);
    let mut crowd = Crowd::new(old.server.socket_path(), 1);
    join(&mut crowd);
    old.server.pause();
    let (streams, _peers) = attack(&old.server, 3);
    drop(streams);
    let (_kept, _others) = attack(&old.server, 3);
    old.server.signal(Signal::SIGCONT);
    join(&mut crowd);
    old.stop();
}

fn on_an_older_kernel_lingering_sockets_do_not_delay_the_end(target: Target) {
    // The server ends before it could look at connections in the backlog.
    let old = Old::start(target);
    old.server.pause();
    let (_streams, _peers) = attack(&old.server, 2);
    old.server.signal(Signal::SIGTERM);
    old.server.signal(Signal::SIGCONT);
    old.stop();

    // Clients that were ended, but have not read what they were sent.
    let old = Old::start(target);
    let (streams, _peers) = attack_when_admitted(&old.server, 2);
    let mut crowd = Crowd::new(old.server.socket_path(), 1);
    join(&mut crowd);
    old.stop();
    drop(streams);

    // Clients that are connected when the server ends.
    let old = Old::start(target);
    let connect = |_| UnixStream::connect(old.server.socket_path()).expect("the server listens");
    let clients: Vec<UnixStream> = (0..2).map(connect).collect();
    let mut crowd = Crowd::new(old.server.socket_path(), 1);
    crowd.add_outside_client(0);
    crowd.add_outside_client(1);
    join(&mut crowd);
    old.server.pause();
    let peers: Vec<_> = clients
        .iter()
        .map(|client| {
            let Lingering { socket, peer } = Lingering::new(LINGER);
            assert_eq!(send(client, &socket), Ok(1));
            peer
        })
        .collect();
    old.server.signal(Signal::SIGTERM);
    old.server.signal(Signal::SIGCONT);
    old.stop();
    drop(peers);
}

/// Like `attack`, with clients that the server has admitted before. They keep their sockets, and read nothing.
fn attack_when_admitted(server: &Daemon, clients: usize) -> (Vec<UnixStream>, Vec<impl Sized>) {
    let connect = |_| UnixStream::connect(server.socket_path()).expect("the server listens");
    let streams: Vec<UnixStream> = (0..clients).map(connect).collect();
    let mut witness = Crowd::new(server.socket_path(), 1);
    let number = witness.connect(true);
    witness.read_until("the witness knows them", |witness| {
        witness.view(number).known().len() == clients + 1
    });
    let send = |stream| {
        let Lingering { socket, peer } = Lingering::new(LINGER);
        assert_eq!(send(stream, &socket), Ok(1));
        peer
    };
    let peers = streams.iter().map(send).collect();
    witness
        .read_until("the server ends them", |witness| witness.view(number).gone().len() == clients);
    (streams, peers)
}

fn on_an_older_kernel_more_of_them_than_threads_delay_nothing(target: Target) {
    let old = Old::start(target);
    let mut crowd = Crowd::new(old.server.socket_path(), 1);
    join(&mut crowd);
    let (streams, _peers) = attack(&old.server, 80);
    drop(streams);
    join(&mut crowd);
    join(&mut crowd);
    let masks = blocked_signals(&old.server);
    assert!(!masks.is_empty() && masks.len() <= 64, "{} threads", masks.len());
    // A signal that the program handles must not be taken by a thread of the library.
    let handled = [Signal::SIGTERM, Signal::SIGUSR1, Signal::SIGALRM, Signal::SIGCHLD];
    for signal in handled {
        let bit = 1 << (signal as u32 - 1);
        assert!(masks.iter().all(|mask| mask & bit != 0), "{signal} is not blocked: {masks:x?}");
    }
    old.stop();
}

/// The blocked signals of each thread that closes connections.
fn blocked_signals(server: &Daemon) -> Vec<u64> {
    let tasks = fs::read_dir(format!("/proc/{}/task", server.pid())).expect("the server runs");
    let status = |task: fs::DirEntry| text_of(&task.path().join("status"));
    let mask = |status: String| {
        let mask = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).map(str::trim);
        u64::from_str_radix(mask.expect("a mask of signals"), 16).expect("a number")
    };
    tasks
        .map(|task| status(task.expect("an entry")))
        .filter(|status| status.starts_with("Name:\tivshmem-close\n"))
        .map(mask)
        .collect()
}
