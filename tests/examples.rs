// SPDX-License-Identifier: GPL-2.0-or-later
//! Runs the examples, and checks that the library does not depend on what only the programs need.

// Only common::peer has unsafe code: for descriptors and bytes that were received. Every other module forbids it.
#![deny(unsafe_code)]

mod common;

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ivshmem::client::Client;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tempfile::TempDir;

use common::daemon::Daemon;
use common::peer::Peer;
use common::{text_of, wait_for, wait_for_exit};

/// A running example. Dropped, it is killed.
struct Example {
    child: Child,
    dir: TempDir,
}

impl Example {
    #[track_caller]
    fn start(name: &str, socket: impl FnOnce(&Path) -> PathBuf) -> (Self, PathBuf) {
        let test = std::env::current_exe().expect("this program has a path");
        let target = test.ancestors().nth(2).expect("target/PROFILE/deps/TEST");
        let program = target.join("examples").join(name);
        assert!(
            program.exists(),
            "{} is not there; build it: cargo build --workspace --examples --all-features",
            program.display()
        );
        let dir = tempfile::tempdir().expect("a temporary directory");
        let socket = socket(dir.path());
        let output = File::create(dir.path().join("output")).expect("a file");
        let child = Command::new(program)
            .arg(&socket)
            .stdin(Stdio::piped())
            .stdout(output.try_clone().expect("dup"))
            .stderr(output)
            .spawn()
            .expect("it starts");
        (Self { child, dir }, socket)
    }

    fn output(&self) -> String {
        text_of(&self.dir.path().join("output"))
    }

    #[track_caller]
    fn says(&self, text: &str) {
        wait_for(&format!("{text:?} from the example"), || {
            self.output().contains(text).then_some(())
        });
    }
}

impl Drop for Example {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- output of the example ---\n{}", self.output());
        }
    }
}

/// Checks that a server example serves peers that join and leave, and 200 clients that join at once.
#[track_caller]
fn serves(name: &str) -> (Example, PathBuf) {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("up to the hard limit");
    let (example, socket) = Example::start(name, |dir| dir.join("socket"));
    example.says("listening at ");
    let mut one = Peer::join(&socket, 2);
    let two = Peer::join(&socket, 2);
    one.wait_for_peer(1);
    one.ring(1, 1);
    assert_eq!(two.take_rung(), [1].into());
    drop(two);
    one.wait_for_departure(1);
    // These are more messages than a socket holds, and the first client does not read meanwhile.
    let crowd: Vec<_> =
        (0..200).map(|_| UnixStream::connect(&socket).expect("it listens")).collect();
    one.wait_for_peer(201);
    drop(crowd);
    (2..=201).for_each(|id| one.wait_for_departure(id));
    (example, socket)
}

#[test]
fn a_server_in_fifteen_lines_serves() {
    serves("server");
    let source = include_str!("../ivshmem/examples/server.rs");
    let lines = source.lines().filter(|line| !line.starts_with("//") && !line.is_empty());
    assert!(lines.count() <= 15);
}

#[test]
fn a_server_in_tokios_loop_serves_until_the_loop_ends() {
    ends_with_its_input("tokio_server");
}

#[test]
fn a_server_in_mios_loop_serves_until_the_loop_ends() {
    ends_with_its_input("mio_server");
}

#[test]
fn a_timer_in_tokios_loop_keeps_time_while_clients_connect_and_close_without_end() {
    keeps_time("tokio_server");
}

#[test]
fn a_timer_in_mios_loop_keeps_time_while_clients_connect_and_close_without_end() {
    keeps_time("mio_server");
}

/// The server's timer of one second goes on, and the end of its input still ends it.
#[track_caller]
fn keeps_time(name: &str) {
    let (mut example, socket) = Example::start(name, |dir| dir.join("socket"));
    example.says("listening at ");
    let stop = Arc::new(AtomicBool::new(false));
    let churn = [(); 8].map(|()| {
        let (stop, socket) = (Arc::clone(&stop), socket.clone());
        thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                drop(UnixStream::connect(&socket));
            }
        })
    });
    let start = Instant::now();
    thread::sleep(Duration::from_secs(3));
    let ticks = example.output().matches("tick: ").count();
    let end = Instant::now();
    drop(example.child.stdin.take());
    let status = wait_for_exit(&mut example.child, name);
    let late = end.elapsed();
    stop.store(true, Ordering::Relaxed);
    churn.into_iter().for_each(|thread| thread.join().expect("no panic"));
    assert!(ticks >= 2, "{ticks} ticks within {:?}", end - start);
    assert!(status.success(), "{status}");
    assert!(late < Duration::from_secs(5), "it ended {late:?} after its input");
}

#[track_caller]
fn ends_with_its_input(name: &str) {
    let (mut example, socket) = serves(name);
    drop(example.child.stdin.take());
    let status = wait_for_exit(&mut example.child, name);
    assert!(status.success(), "{status}");
    assert!(!socket.exists(), "a server that is dropped removes its socket");
}

#[test]
fn a_client_counts_its_interrupts_in_the_memory() {
    counts_interrupts("client");
}

#[test]
fn a_client_in_tokios_loop_counts_its_interrupts_in_the_memory() {
    counts_interrupts("tokio_client");
}

#[track_caller]
fn counts_interrupts(name: &str) {
    let daemon = Daemon::builder().vectors(2).start();
    let mut guest = Client::connect(daemon.socket_path()).expect("a server");
    let (mut example, _) = Example::start(name, |_| daemon.socket_path().to_owned());
    example.says("peer 1, 1048576 bytes");
    wait_for("it joins", || {
        guest.dispatch().expect("it works");
        guest.peer(1)
    });
    for number in 1..=3 {
        guest.ring(1, 0).expect("it is here");
        let mut rung = guest.vector(1).expect("it has two");
        assert!(rung.wait(Some(common::PATIENCE)).expect("it can wait"), "no answer");
        assert_eq!(guest.memory().load_u32(0).expect("aligned"), number);
        guest.dispatch().expect("it works");
    }
    daemon.stop();
    let status = wait_for_exit(&mut example.child, "the client");
    assert!(status.success(), "{status}");
}

#[test]
fn the_library_alone_depends_on_nothing_that_only_the_programs_need() {
    let tree = |arguments: &[&str]| -> BTreeSet<String> {
        let output = Command::new(env!("CARGO"))
            .args(["tree", "--offline", "-e", "normal", "--prefix", "none", "--format", "{p}"])
            .args(["--manifest-path", concat!(env!("CARGO_MANIFEST_DIR"), "/ivshmem/Cargo.toml")])
            .args(arguments)
            .output()
            .expect("cargo runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8_lossy(&output.stdout);
        let names = text.lines().filter_map(|line| line.split_whitespace().next());
        names.map(str::to_owned).collect()
    };
    let direct = tree(&["--depth", "1"]);
    assert_eq!(direct, ["ivshmem", "libc", "log", "nix", "thiserror"].map(str::to_owned).into());
    let with_tokio = tree(&["--depth", "1", "--features", "tokio"]);
    assert_eq!(with_tokio.difference(&direct).collect::<Vec<_>>(), ["tokio"]);
    let whole = tree(&[]);
    let theirs = [
        "bitflags",
        "cfg-if",
        "memoffset",
        "proc-macro2",
        "quote",
        "syn",
        "thiserror-impl",
        "unicode-ident",
    ];
    for name in &whole {
        assert!(direct.contains(name) || theirs.contains(&name.as_str()), "{name} in {whole:?}");
    }
}
