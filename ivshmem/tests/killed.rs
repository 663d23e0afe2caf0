// SPDX-License-Identifier: GPL-2.0-or-later
//! A server that is killed at any moment is resumed by another process, and each client's messages
//! go on where they stopped.

use std::collections::BTreeSet;
use std::io::{self, IoSlice, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ivshmem::{Keeper, Server};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

#[path = "../../tests/common/checked_client.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod checked_client;
mod holder;
#[path = "../../tests/common/view.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod view;

use checked_client::CheckedClient;
use holder::{Holder, PATIENCE, receive};

/// Set in a process that is a server: the directory of the test.
const SERVER: &str = "IVSHMEM_TEST_RESUME";

/// Logs to standard error.
struct Log;

impl log::Log for Log {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Warn
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            let _ = writeln!(io::stderr(), "{}", record.args());
        }
    }

    fn flush(&self) {}
}

/// Not a test of its own: the server of the tests below.
#[test]
fn server_process() {
    let Some(directory) = std::env::var_os(SERVER).map(PathBuf::from) else { return };
    log::set_logger(&Log).expect("it is the first");
    log::set_max_level(log::LevelFilter::Warn);
    let give = UnixStream::connect(directory.join("give")).expect("the test listens");
    let mut returned = Vec::new();
    while let Some((_, fds)) = receive(give.as_raw_fd()) {
        returned.extend(fds);
    }
    let keeper = Keeper::new(directory.join("notify"), 10_000, returned).expect("the test listens");
    let server = Server::builder()
        .socket_path(directory.join("socket"))
        .vectors(VECTORS)
        .size(4096)
        .keeper(keeper)
        .start();
    match server {
        Ok(mut server) => server.run().expect("it runs until it is killed"),
        Err(error) => {
            eprintln!("FAILED {}", error.chain());
            std::process::exit(1);
        }
    }
}

const VECTORS: u32 = 4;

/// Starts the server's process, and gives it what the holder has.
fn spawn(directory: &Path, give: &UnixListener, holder: &Holder) -> Child {
    let log = std::fs::File::options().append(true).create(true).open(directory.join("log"));
    let child = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "server_process", "--nocapture"])
        .env(SERVER, directory)
        .stdout(Stdio::null())
        .stderr(log.expect("a log file"))
        .spawn()
        .expect("this program starts");
    let (socket, _) = give.accept().expect("the server connects");
    let copies = holder.copies();
    for fds in copies.chunks(200) {
        let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let byte = [IoSlice::new(b"x")];
        let flags = MsgFlags::empty();
        sendmsg::<()>(socket.as_raw_fd(), &byte, &rights, flags, None).expect("it reads");
    }
    child
}

/// A random number below `limit`.
fn below(state: &mut u64, limit: u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) % limit
}

/// Clients of a server that is killed.
struct Crowd {
    clients: Vec<CheckedClient>,
    /// Ids of clients that the server ended.
    ended: Vec<Option<u16>>,
}

impl Crowd {
    /// Reads what has come to the client at `index`. Returns false if it was ended.
    fn read(&mut self, index: usize, limit: usize) -> bool {
        let client = &mut self.clients[index];
        match client.receive(limit) {
            Ok(_) if !client.has_ended() => return true,
            Ok(_) => {}
            // Of a client that was ended when it was not known what of the greeting it has.
            Err(error) if error.starts_with("-2,") => {}
            // Killed in a partial write.
            Err(error) if error.starts_with("the stream ended") => {}
            Err(error) => panic!("client {:?}: {error}", client.view().id()),
        }
        let client = self.clients.swap_remove(index);
        // A client that was sent nothing was never admitted.
        if client.view().messages() > 0 {
            self.ended.push(client.view().id());
        }
        false
    }
}

#[test]
fn a_server_that_is_killed_under_load_goes_on_and_ends_only_clients_that_its_log_names() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mut holder = Holder::new(directory.path());
    let give = UnixListener::bind(directory.path().join("give")).expect("the place is new");
    let socket = directory.path().join("socket");
    let mut random = u64::from(std::process::id());
    let mut crowd = Crowd { clients: Vec::new(), ended: Vec::new() };
    let rounds = std::env::var("RESUME_ROUNDS").ok().and_then(|text| text.parse().ok());
    for _ in 0..rounds.unwrap_or(150) {
        let mut server = spawn(directory.path(), &give, &holder);
        // Up to 40 ms from its first join or message.
        let mut until = Instant::now() + PATIENCE;
        let mut is_up = false;
        while Instant::now() < until {
            holder.update();
            if crowd.clients.len() < 60 && below(&mut random, 3) == 0 {
                if let Ok(stream) = UnixStream::connect(&socket) {
                    crowd.clients.push(CheckedClient::new(stream, VECTORS as usize, false));
                }
            }
            if crowd.clients.len() > 20 && below(&mut random, 20) == 0 {
                let index = below(&mut random, crowd.clients.len() as u64) as usize;
                drop(crowd.clients.swap_remove(index));
            }
            let mut index = 0;
            while index < crowd.clients.len() {
                // Some do not read now, and some read parts of messages.
                let is_here = below(&mut random, 4) == 0 || {
                    let limit = 1 + below(&mut random, 60) as usize;
                    let before = crowd.clients[index].view().messages();
                    let is_here = crowd.read(index, limit);
                    if !is_up && is_here && crowd.clients[index].view().messages() > before {
                        is_up = true;
                        until = Instant::now() + Duration::from_micros(below(&mut random, 40_000));
                    }
                    is_here
                };
                index += usize::from(is_here);
            }
            if let Some(status) = server.try_wait().expect("it is a child") {
                let log = std::fs::read_to_string(directory.path().join("log"));
                panic!("the server has ended: {status}: {}", log.unwrap_or_default());
            }
            let mut fds = [PollFd::new(holder.socket.as_fd(), PollFlags::POLLIN)];
            let _ = poll(&mut fds, 1u16);
        }
        assert!(is_up, "the server has sent nothing in a minute");
        server.kill().expect("it is a child");
        server.wait().expect("it is a child");
        holder.update();
    }

    // At rest, each client that is connected knows exactly the others.
    let mut server = spawn(directory.path(), &give, &holder);
    let until = Instant::now() + PATIENCE;
    loop {
        holder.update();
        let mut index = 0;
        while index < crowd.clients.len() {
            index += usize::from(crowd.read(index, 4096));
        }
        let ids: BTreeSet<u16> =
            crowd.clients.iter().filter_map(|client| client.view().id()).collect();
        if ids.len() == crowd.clients.len()
            && crowd.clients.iter().all(|client| client.knows_exactly(&ids))
        {
            break;
        }
        assert!(Instant::now() < until, "clients are incomplete: {ids:?}");
        let mut fds = [PollFd::new(holder.socket.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut fds, 1u16);
    }
    server.kill().expect("it is a child");
    server.wait().expect("it is a child");
    let log = std::fs::read_to_string(directory.path().join("log")).expect("a log");
    for id in crowd.ended.iter().flatten() {
        assert!(log.contains(&format!("peer {id} is ended at the restart")), "{id}: {log}");
    }
    println!("{} clients were ended:\n{log}", crowd.ended.len());
}

#[test]
fn a_keeper_is_found_in_the_environment() {
    if std::env::var_os("IVSHMEM_TEST_KEEPER").is_some() {
        let keeper = Keeper::from_environment().expect("the socket is there").expect("a keeper");
        assert_eq!(keeper.returned(), 2);
        keeper.ready().expect("it is sent");
        keeper.status("all\nwell").expect("it is sent");
        let again = Keeper::from_environment().expect("the socket is there").expect("a keeper");
        assert_eq!(again.returned(), 0, "they are taken once");
        return;
    }
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("notify");
    let socket = UnixDatagram::bind(&path).expect("the place is new");
    let script = "LISTEN_PID=$$ exec \"$0\" --exact a_keeper_is_found_in_the_environment \
                  3</dev/null 4</dev/zero";
    let status = Command::new("sh")
        .args(["-c", script])
        .arg(std::env::current_exe().expect("this program"))
        .envs([("IVSHMEM_TEST_KEEPER", "1"), ("FDSTORE", "100"), ("LISTEN_FDS", "2")])
        .env("NOTIFY_SOCKET", &path)
        .env("LISTEN_FDNAMES", "state:c1")
        .stdout(Stdio::null())
        .status()
        .expect("a shell");
    assert!(status.success());
    let messages: Vec<_> = (0..2).map(|_| receive(socket.as_raw_fd()).expect("one").0).collect();
    assert_eq!(messages, ["READY=1", "STATUS=all well"]);
}
