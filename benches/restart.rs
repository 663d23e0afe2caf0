// SPDX-License-Identifier: GPL-2.0-or-later
//! What a keeper costs: the server's CPU time with `--supervise` beside the same run without it, the time from a
//! SIGKILL of the server to the next client complete, and the memory of the state file and of the supervisor.
//!
//! Run it by `cargo bench --bench restart`; numbers after `--` are the numbers of clients of the restarts. It asserts
//! nothing timed. `cargo test` runs it with small sizes.

#![deny(unsafe_code)]

#[path = "scale/sys.rs"]
#[allow(dead_code, unsafe_code)]
mod sys;

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sys::{Wait, receive};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(30);

/// A server with its clients, with or without a supervisor.
struct Service {
    child: Child,
    keeper: bool,
    path: PathBuf,
    vectors: usize,
    clients: Vec<UnixStream>,
    _temp: TempDir,
}

impl Service {
    fn start(keeper: bool, vectors: usize) -> Self {
        let temp = tempfile::tempdir().expect("a temporary directory");
        let path = temp.path().join("socket");
        let mut command = Command::new(env!("CARGO_BIN_EXE_ivshmem-server"));
        command.args(["-F", "--memfd", "-n", &vectors.to_string(), "-S"]).arg(&path);
        if keeper {
            command.arg("--supervise");
        }
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let child = child.expect("the server starts");
        Self { child, keeper, path, vectors, clients: Vec::new(), _temp: temp }
    }

    /// The server's pid: the child of the supervisor, if there is one.
    fn server(&self) -> u32 {
        let pid = self.child.id();
        if !self.keeper {
            return pid;
        }
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        let children = children.expect("the supervisor runs");
        let first = children.split_ascii_whitespace().next().expect("the server runs");
        first.parse().expect("a pid")
    }

    /// The CPU time of the server in nanoseconds, after it has become idle.
    fn cpu(&self) -> u64 {
        let (start, mut before) = (Instant::now(), None);
        loop {
            let tasks = fs::read_dir(format!("/proc/{}/task", self.server())).expect("it runs");
            let cpu = tasks
                .filter_map(|task| fs::read_to_string(task.ok()?.path().join("schedstat")).ok())
                .filter_map(|text| text.split_ascii_whitespace().next()?.parse::<u64>().ok())
                .sum();
            if before == Some(cpu) || start.elapsed() > PATIENCE {
                return cpu;
            }
            before = Some(cpu);
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Connects a client and reads until it is complete. Only the first one waits for the listener.
    fn newcomer(&self) -> UnixStream {
        let start = Instant::now();
        let client = loop {
            match UnixStream::connect(&self.path) {
                Ok(client) => break client,
                Err(error) => assert!(start.elapsed() < PATIENCE, "cannot connect: {error}"),
            }
            thread::sleep(Duration::from_millis(1));
        };
        client.set_read_timeout(Some(PATIENCE)).expect("a socket");
        read(&client, 3 + (self.clients.len() + 1) * self.vectors);
        client
    }

    /// The clients that are there read this number of messages each.
    fn settle(&self, messages: usize) {
        for client in &self.clients {
            read(client, messages);
        }
    }

    fn join(&mut self, count: usize) {
        for _ in 0..count {
            let client = self.newcomer();
            self.settle(self.vectors);
            self.clients.push(client);
        }
    }

    /// The time from a SIGKILL of the server until a new client is complete. That client leaves again.
    fn restart(&self) -> Duration {
        // A server that is killed in the middle of a send ends that client.
        self.cpu();
        let pid = Pid::from_raw(self.server().try_into().expect("a pid"));
        let start = Instant::now();
        kill(pid, Signal::SIGKILL).expect("the server runs");
        let client = self.newcomer();
        let took = start.elapsed();
        drop(client);
        self.settle(self.vectors + 1);
        took
    }

    /// Bytes allocated for the state file.
    fn state(&self) -> u64 {
        let fds = fs::read_dir(format!("/proc/{}/fd", self.server())).expect("the server runs");
        fds.filter_map(|fd| Some(fd.ok()?.path()))
            .filter(|fd| {
                fs::read_link(fd).is_ok_and(|to| {
                    let to = to.to_string_lossy();
                    to.contains("memfd:") && to.contains("state")
                })
            })
            .filter_map(|fd| Some(fs::metadata(fd).ok()?.blocks() * 512))
            .max()
            .expect("a server with a keeper has a state file")
    }

    /// KiB of the first process that are resident.
    fn resident(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()));
        let status = status.expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
        line.split_ascii_whitespace().next().expect("a number").parse().expect("a number")
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // A supervisor that is killed could not end its server.
        let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM);
        let _ = self.child.wait();
    }
}

fn read(client: &UnixStream, messages: usize) {
    for _ in 0..messages {
        let message = receive(client.as_fd(), Wait::Yes).expect("each message comes");
        assert_eq!(message.bytes, sys::MESSAGE, "the server closed the connection");
    }
}

fn median(mut of: Vec<f64>) -> f64 {
    of.sort_by(f64::total_cmp);
    of[of.len() / 2]
}

/// The CPU time of a join in µs, when clients join one by one, without and with a keeper: the medians of rounds in
/// turns. A join sends 3 messages, and its vectors twice for each peer and once for itself.
fn joins(count: usize, vectors: usize, rounds: usize) -> [f64; 2] {
    let mut each = [Vec::new(), Vec::new()];
    for round in 0..rounds {
        for turn in 0..2 {
            let keeper = (turn + round) % 2;
            let mut service = Service::start(keeper == 1, vectors);
            service.join(2);
            let before = service.cpu();
            service.join(count);
            each[keeper].push((service.cpu() - before) as f64 / 1000.0 / count as f64);
        }
    }
    each.map(median)
}

/// Prints what a keeper costs at a join, where few messages are sent, and for each message: what remains of `count`
/// joins without that.
fn cpu(count: usize, few: usize, vectors: usize, rounds: usize) {
    let [without, with] = joins(few, vectors, rounds);
    let price = with - without;
    println!("{few} x {vectors}\t{without:.1}\t{with:.1}\t{price:.1}\t\t\t");
    let messages: usize = (2..count + 2).map(|peers| 3 + (2 * peers + 1) * vectors).sum();
    let [without, with] = joins(count, vectors, rounds);
    let message = |join: f64| join * 1000.0 * count as f64 / messages as f64;
    let (plain, kept) = (message(without), message(with - price));
    println!(
        "{count} x {vectors}\t{without:.1}\t{with:.1}\t\t{plain:.0}\t{kept:.0}\t{:.3}",
        kept / plain
    );
}

fn restarts(count: usize, rounds: usize) {
    let mut service = Service::start(true, 1);
    service.join(count);
    let times: Vec<_> = (0..rounds).map(|_| service.restart().as_secs_f64() * 1e3).collect();
    let longest = times.iter().copied().fold(0.0, f64::max);
    println!(
        "{count}\t{:.1}\t{longest:.1}\t{}\t{}",
        median(times),
        service.state() / 1024,
        service.resident()
    );
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let full = words.iter().any(|word| word == "--bench");
    if words.iter().any(|word| word == "--list") {
        return;
    }
    let mut sizes: Vec<usize> = words.iter().filter_map(|word| word.parse().ok()).collect();
    if sizes.is_empty() {
        sizes = if full { vec![2, 1000, 9000] } else { vec![2] };
    }
    println!(
        "clients x vectors\tµs/join without\twith\tprice of a join, µs\tns/msg without\twith\tratio"
    );
    let rounds = if full { 15 } else { 1 };
    cpu(if full { 300 } else { 3 }, 8, 1, rounds);
    cpu(if full { 60 } else { 3 }, 8, 64, rounds);
    println!("clients\tSIGKILL to complete, ms\tlongest\tstate file, KiB\tsupervisor's RSS, KiB");
    for size in sizes {
        restarts(size, if full { 9 } else { 1 });
    }
}
