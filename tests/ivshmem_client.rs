// SPDX-License-Identifier: GPL-2.0-or-later
//! The client program as scripts and people use it: a real process, a real server, pipes and a terminal.

// One function in common::peer takes over received descriptors; every other module forbids unsafe code.
#![deny(unsafe_code)]

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use common::daemon::Daemon;
use common::peer::Peer;
use common::{PATIENCE, find_in_path, wait_for, wait_for_exit};

fn program() -> PathBuf {
    let built = option_env!("CARGO_BIN_EXE_ivshmem-client");
    built.expect("no ivshmem-client was built (feature `programs`)").into()
}

fn client(socket: &Path) -> Command {
    let mut command = Command::new(program());
    command.arg("-S").arg(socket);
    command
}

/// A running client whose output can be looked at while it runs. Dropped, it is killed.
struct Running {
    child: Child,
    output: Arc<Mutex<String>>,
    errors: Arc<Mutex<String>>,
}

impl Running {
    #[track_caller]
    fn start(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("it starts");
        let output = follow(child.stdout.take().expect("a pipe"));
        let errors = follow(child.stderr.take().expect("a pipe"));
        Self { child, output, errors }
    }

    fn output(&self) -> String {
        self.output.lock().expect("no panic").clone()
    }

    fn errors(&self) -> String {
        self.errors.lock().expect("no panic").clone()
    }

    #[track_caller]
    fn say(&mut self, text: &str) {
        self.child.stdin.as_mut().expect("a pipe").write_all(text.as_bytes()).expect("it reads");
    }

    /// Waits until its output has `text` in it.
    #[track_caller]
    fn says(&self, text: &str) {
        wait_for(&format!("{text:?} in the output"), || self.output().contains(text).then_some(()));
    }

    /// Waits for its end by itself; its exit status.
    #[track_caller]
    fn end(&mut self) -> i32 {
        drop(self.child.stdin.take());
        wait_for_exit(&mut self.child, "the client").code().expect("no signal ended it")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("--- output ---\n{}\n--- errors ---\n{}", self.output(), self.errors());
        }
    }
}

/// Collects what comes out of a pipe.
fn follow(mut pipe: impl Read + Send + 'static) -> Arc<Mutex<String>> {
    let text = Arc::new(Mutex::new(String::new()));
    let collected = Arc::clone(&text);
    thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = pipe.read(&mut bytes) {
            let part = String::from_utf8_lossy(&bytes[..count]);
            collected.lock().expect("no panic").push_str(&part);
        }
    });
    text
}

/// Runs a client to its end with this on its stdin.
#[track_caller]
fn run(command: &mut Command, input: &str) -> (i32, String, String) {
    let mut running = Running::start(command);
    running.say(input);
    let status = running.end();
    // What it wrote last may still be in the pipe.
    wait_for("the end of its output", || {
        (Arc::strong_count(&running.output) == 1 && Arc::strong_count(&running.errors) == 1)
            .then_some(())
    });
    (status, running.output(), running.errors())
}

/// The lines that are objects.
fn objects(output: &str) -> Vec<Value> {
    output.lines().map(|line| serde_json::from_str(line).expect("JSON on each line")).collect()
}

/// What the reference says first.
const BANNER: &str = "dump: dump peers (including us)\n\
    int <peer> <vector>: notify one vector on a peer\n\
    int <peer> all: notify all vectors of a peer\n\
    int all: notify all vectors of all peers (excepting us)\n";

#[test]
fn a_pipe_of_commands_is_carried_out_and_ends() {
    let daemon = Daemon::builder().vectors(2).start();
    let (status, output, errors) = run(&mut client(daemon.socket_path()), "dump\nint 0 1\n");
    assert_eq!((status, errors.as_str()), (0, ""), "{output}");
    assert!(output.starts_with(BANNER), "{output}");
    let lines: Vec<_> = output.lines().skip(BANNER.lines().count()).collect();
    for wanted in [
        "cmd> listen on server socket ",
        "our_id = 0",
        "  vector 0 is enabled (fd=",
        "  vector 1 is enabled (fd=",
        "receive notification from peer_id=0 vector=1",
    ] {
        assert!(lines.iter().any(|line| line.starts_with(wanted)), "no {wanted:?} in {output}");
    }
    assert!(output.ends_with("cmd> "), "{output}");
}

#[test]
fn the_last_command_of_a_pipe_needs_no_newline_and_semicolons_separate() {
    let daemon = Daemon::builder().vectors(2).start();
    let (status, output, _) = run(&mut client(daemon.socket_path()), "dump;;int 0 all\r;dump");
    assert_eq!(status, 0);
    assert_eq!(output.matches("our_id = 0").count(), 2, "{output}");
    for vector in 0..2 {
        let line = format!("receive notification from peer_id=0 vector={vector}\n");
        assert_eq!(output.matches(&line).count(), 1, "{output}");
    }
}

#[test]
fn no_input_at_all_is_an_end_too() {
    let daemon = Daemon::builder().start();
    let (status, output, errors) = run(&mut client(daemon.socket_path()), "");
    assert_eq!((status, errors.as_str()), (0, ""));
    assert!(output.starts_with(BANNER), "{output}");

    let nobody = tempfile::tempdir().expect("a temporary directory");
    let (status, _, errors) = run(&mut client(&nobody.path().join("socket")), "");
    assert_eq!(status, 1, "there was no server: {errors}");
}

#[test]
fn commands_say_what_the_reference_says() {
    let daemon = Daemon::builder().vectors(2).start();
    let mut peer = Peer::join(daemon.socket_path(), 2);
    let mut running = Running::start(client(daemon.socket_path()).arg("-v"));
    running.says("listen on server socket ");
    running.says("our_id=1\n");
    running.says("new peer id = 0\n  new vector 0 (fd=");
    peer.wait_for_peer(1);
    running.say("int 0 1\n");
    running.says("notify peer 0 on vector 1, fd ");
    wait_for("vector 1", || peer.take_rung().contains(&1).then_some(()));
    running.say("int 0 all;int all\n");
    wait_for("both", || (peer.take_rung() == [0, 1].into()).then_some(()));
    peer.ring(1, 0);
    running.says("receive notification from peer_id=1 vector=0\n");
    running.say("int 9 0;int 9 all\n");
    running.says("cannot find peer_id = 9\ncannot find peer_id = 9\n");
    running.say("int 0 5\n");
    running.says("invalid vector 5 on peer 0\n");
    running.say("int\nfoo;?\n");
    running.says("invalid command, type help");
    drop(peer);
    running.says("delete peer id = 0\n");
    assert_eq!(running.end(), 0, "the reference's commands fail without a trace in the status");
}

#[test]
fn without_verbose_peers_come_and_go_in_silence_unless_watched() {
    let daemon = Daemon::builder().start();
    let mut running = Running::start(&mut client(daemon.socket_path()));
    running.says("listen on server socket ");
    let peer = Peer::join(daemon.socket_path(), 1);
    drop(peer);
    running.say("dump\n");
    running.says("our_id = 0");
    assert!(!running.output().contains("peer id"), "{}", running.output());
    running.say("watch 100\n");
    // The command has no answer of its own, so let peers come until one is told of.
    wait_for("a peer that is told of", || {
        let peer = Peer::join(daemon.socket_path(), 1);
        let line = format!("new peer id = {}\n", peer.id());
        common::wait_up_to(PATIENCE / 20, || running.output().contains(&line).then_some(()))
    });
    running.says("delete peer id = ");
}

#[test]
fn exec_carries_out_commands_in_order_without_a_prompt() {
    let daemon = Daemon::builder().start();
    let mut command = client(daemon.socket_path());
    command.args(["--exec", "write 16 \"hi; there\\n\"", "-e", "read 16 10 text;read 16 3 hex"]);
    command.args(["-e", "read 14 20"]);
    let (status, output, errors) = run(&mut command, "");
    assert_eq!((status, errors.as_str()), (0, ""));
    let lines: Vec<_> = output.lines().skip(1).collect();
    assert_eq!(
        lines,
        [
            "hi; there\\n",
            "68693b",
            "0000000e  00 00 68 69 3b 20 74 68 65 72 65 0a 00 00 00 00  |..hi; there.....|",
            "0000001e  00 00 00 00                                      |....|",
        ]
    );
    // The memory is the server's, not the client's.
    let mut bytes = [0; 10];
    let memory = File::open(daemon.shm_path()).expect("the object");
    std::os::unix::fs::FileExt::read_exact_at(&memory, &mut bytes, 16).expect("it is there");
    assert_eq!(&bytes, b"hi; there\n");
}

#[test]
fn exec_stops_at_the_first_command_that_fails() {
    let daemon = Daemon::builder().start();
    let _peer_0 = Peer::join(daemon.socket_path(), 1);
    for (failing, text) in [
        ("int 7 0", "cannot find peer_id = 7"),
        ("int 0 7", "invalid vector 7 on peer 0"),
        ("dumb", "invalid command, type help"),
        ("read 0x100000 1", "1 bytes at offset 1048576 do not lie in the shared memory"),
        ("write 0xfffff \"no\"", "2 bytes at offset 1048575 do not lie in the shared memory"),
        ("read 0 0x7fffffffffffffff", "more than one read can show"),
        ("wait 1 0", "invalid vector 1"),
    ] {
        let mut command = client(daemon.socket_path());
        let (status, output, _) = run(command.args(["-e", failing, "-e", "dump"]), "");
        assert_eq!(status, 1, "{failing}: {output}");
        assert!(output.contains(text), "{failing}: {output}");
        assert!(!output.contains("our_id ="), "{failing}: {output}");
    }
}

#[test]
fn wait_ends_with_an_interrupt_and_its_status_says_so() {
    let daemon = Daemon::builder().vectors(2).start();
    let mut peer = Peer::join(daemon.socket_path(), 2);
    let mut command = client(daemon.socket_path());
    let mut running = Running::start(command.args(["-e", "wait 1 60", "-e", "dump"]));
    peer.wait_for_peer(1);
    peer.ring(1, 0);
    running.says("receive notification from peer_id=1 vector=0\n");
    assert!(!running.output().contains("our_id"), "it was another vector");
    peer.ring(1, 1);
    assert_eq!(running.end(), 0);
    running.says("our_id = 1");
}

#[test]
fn wait_takes_an_interrupt_that_came_before_it_once() {
    let daemon = Daemon::builder().start();
    let mut command = client(daemon.socket_path());
    let (status, output, _) = run(command.args(["-e", "int 0 0", "-e", "wait 0 60"]), "");
    assert_eq!(status, 0, "{output}");
    let (status, output, _) =
        run(&mut client(daemon.socket_path()), "int 1 0\ndump\nwait 0 60\nwait 0 0.01\ndump\n");
    assert_eq!(status, 2, "{output}");
    assert!(output.contains("no notification on vector 0 in time"), "{output}");
    assert_eq!(output.matches("our_id = 1").count(), 2, "a pipe goes on: {output}");
}

#[test]
fn a_wait_in_vain_is_exit_status_2_in_time() {
    let daemon = Daemon::builder().start();
    let start = Instant::now();
    let (status, _, _) = run(client(daemon.socket_path()).args(["-e", "wait 0 0.3"]), "");
    assert_eq!(status, 2);
    assert!(start.elapsed() >= Duration::from_millis(300));
}

#[test]
fn json_is_one_object_a_line_and_nothing_else() {
    let daemon = Daemon::builder().vectors(2).start();
    let peer = Peer::join(daemon.socket_path(), 2);
    let mut running = Running::start(client(daemon.socket_path()).arg("--json"));
    running
        .say("dump\nint 0 1\nint 1 0\nwait 0 60\nwrite 0 \"a\\xffb\"\nread 0 4\nread 0 1 text\n");
    running.say("int 9 0\nwait 1 0.01\n");
    running.says("in time");
    drop(peer);
    running.says("\"left\"");
    assert_eq!(running.end(), 2);
    let all = objects(&running.output());
    let size = 1 << 20;
    let peers = json!([{"id": 0, "vectors": 2}]);
    for wanted in [
        json!({"event": "connected", "id": 1, "vectors": 2, "memory": size, "peers": peers}),
        json!({"command": "dump", "ok": true, "id": 1, "vectors": 2, "memory": size, "peers": peers}),
        json!({"command": "int 0 1", "ok": true}),
        json!({"event": "rung", "vector": 0, "count": 1}),
        json!({"command": "wait 0 60", "ok": true, "vector": 0, "count": 1}),
        json!({"command": "write 0 \"a\\xffb\"", "ok": true, "length": 3}),
        json!({"command": "read 0 4", "ok": true, "offset": 0, "hex": "61ff6200"}),
        json!({"command": "read 0 1 text", "ok": true, "offset": 0, "text": "a"}),
        json!({"command": "int 9 0", "ok": false, "error": "cannot find peer_id = 9"}),
        json!({"command": "wait 1 0.01", "ok": false,
            "error": "no notification on vector 1 in time"}),
        json!({"event": "left", "peer": 0}),
    ] {
        assert_eq!(
            all.iter().filter(|&object| *object == wanted).count(),
            1,
            "{wanted} in {all:?}"
        );
    }
}

#[test]
fn it_waits_for_a_server_and_comes_back_to_a_new_one() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("socket");
    let mut running = Running::start(&mut client(&path));
    wait_for("its complaint", || {
        running.errors().contains("cannot connect to server, retry in 1 second").then_some(())
    });
    // A command that comes before there is a server waits for it.
    running.say("dump\n");
    let mut server = serve(&path);
    running.says("our_id = 0");
    server.kill().expect("it runs");
    server.wait().expect("it was killed");
    running.says("disconnected from server\n");
    // Let more than one attempt fail, and none but the first be told of.
    thread::sleep(Duration::from_millis(2500));
    let complaints = running.errors().matches("cannot connect to server").count();
    assert_eq!(complaints, 2, "once before the server and once after: {}", running.errors());
    let mut server = serve(&path);
    running.say("dump;dump\n");
    wait_for("the new server's word", || {
        (running.output().matches("our_id = 0").count() == 3).then_some(())
    });
    assert_eq!(running.end(), 0);
    server.kill().expect("it runs");
    server.wait().expect("it was killed");
}

/// A server at this path, with sealed memory, so that it may be killed without a trace.
fn serve(path: &Path) -> Child {
    Command::new(common::daemon::program())
        .args(["-F", "--memfd", "-l", "64K", "-S"])
        .arg(path)
        .stdout(Stdio::null())
        .spawn()
        .expect("a server")
}

#[test]
fn a_pipe_without_a_server_ends_in_time_and_fails() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut command = client(&dir.path().join("socket"));
    let (status, _, errors) = run(command.args(["--give-up", "0.2"]), "dump\n");
    assert_eq!(status, 1);
    for part in
        ["cannot connect to server, retry in 1 second\n", "No such file", "no server within"]
    {
        assert!(errors.contains(part), "{errors}");
    }
    let mut command = client(&dir.path().join("socket"));
    let (status, _, _) = run(command.args(["--give-up", "0.2", "-e", "dump"]), "");
    assert_eq!(status, 1);
}

#[test]
fn a_full_disk_under_its_errors_is_no_reason_to_end() {
    let full = || std::fs::File::options().write(true).open("/dev/full").expect("it is there");
    let dir = tempfile::tempdir().expect("a temporary directory");
    let socket = dir.path().join("socket");
    let mut command = client(&socket);
    command.args(["--give-up", "0.2", "-e", "dump"]).stdin(Stdio::null()).stderr(full());
    assert_eq!(command.status().expect("it starts").code(), Some(1));

    let mut command = client(&socket);
    command.args(["-e", "dump"]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(full());
    let early = command.spawn().expect("it starts");
    thread::sleep(Duration::from_millis(200));
    let mut server = serve(&socket);
    let output = early.wait_with_output().expect("waitpid works");
    let _ = server.kill();
    let _ = server.wait();
    assert_eq!(output.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&output.stdout).contains("our_id = 0"));
}

#[test]
fn a_reader_that_goes_is_the_end() {
    let daemon = Daemon::builder().start();
    let mut running = client(daemon.socket_path())
        .args(["-e", "watch"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("it starts");
    drop(running.stdout.take());
    let ended = common::wait_up_to(PATIENCE, || {
        // Whatever it has to say next is what it notices by.
        drop(Peer::join(daemon.socket_path(), 1));
        running.try_wait().expect("waitpid works")
    });
    let _ = running.kill();
    let _ = running.wait();
    assert!(ended.is_some(), "it went on talking to nobody");
}

#[test]
fn help_is_exit_0_and_a_wrong_option_is_exit_1() {
    let run = |option: &str| -> Output {
        Command::new(program()).arg(option).stdin(Stdio::null()).output().expect("it runs")
    };
    let help = run("-h");
    assert_eq!(help.status.code(), Some(0));
    let text = String::from_utf8_lossy(&help.stdout).into_owned();
    for option in ["-h", "-v", "-S", "/tmp/ivshmem_socket", "--exec", "--json"] {
        assert!(text.contains(option), "no {option} in {text}");
    }
    let wrong = run("-x");
    assert_eq!(wrong.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("-x"));
}

#[test]
fn the_manual_names_every_option_and_command() {
    let manual = include_str!("../docs/client.md");
    let help = Command::new(program()).arg("-h").output().expect("it runs").stdout;
    let help = String::from_utf8_lossy(&help).into_owned();
    let options = help.split_whitespace().filter(|word| word.starts_with("--"));
    let options: Vec<_> = options.map(|word| word.trim_end_matches([',', '.'])).collect();
    assert!(options.len() >= 8, "{options:?}");
    for option in options {
        assert!(
            manual.contains(&format!("`{option}")) || manual.contains(&format!("{option} ")),
            "{option} is not in docs/client.md"
        );
    }
    let daemon = Daemon::builder().start();
    let (_, output, _) = run(client(daemon.socket_path()).args(["-e", "help"]), "");
    let commands = output.lines().filter_map(|line| line.split_once(": ")).map(|(form, _)| form);
    let commands: Vec<_> = commands.collect();
    assert!(commands.len() >= 9, "{commands:?}");
    for command in commands {
        assert!(manual.contains(&format!("`{command}`")), "`{command}` is not in docs/client.md");
    }
}

#[test]
fn a_terminal_has_a_prompt_line_editing_and_history() {
    let script = find_in_path("script").expect("script: on Debian, apt-get install bsdutils");
    let daemon = Daemon::builder().start();
    let line = format!("{} -S {}", program().display(), daemon.socket_path().display());
    let mut terminal = Running::start(
        Command::new(script).args(["-qefc", &line, "/dev/null"]).env("TERM", "xterm"),
    );
    terminal.says("cmd> ");
    terminal.says("listen on server socket ");
    // Typed wrong, and mended: to the left, and the missing letter.
    terminal.say("dmp\x1b[D\x1b[Du\r");
    terminal.says("our_id = 0");
    // Up is the last line again.
    terminal.say("\x1b[A\r");
    wait_for("the command from history", || {
        (terminal.output().matches("our_id = 0").count() == 2).then_some(())
    });
    // What happens meanwhile is told while a line is being typed.
    terminal.say("int 0 0\r");
    terminal.says("receive notification from peer_id=0 vector=0");
    // It does not spoil the line.
    terminal.say("int 0");
    wait_for("the half line", || terminal.output().ends_with("int 0").then_some(()));
    drop(Peer::join(daemon.socket_path(), 1));
    let other = Peer::join(daemon.socket_path(), 1);
    other.ring(0, 0);
    wait_for("the line again", || {
        let output = terminal.output();
        let (_, after) = output.rsplit_once("receive notification")?;
        after.contains("cmd> int 0").then_some(())
    });
    terminal.say(" all;int 2 0\r");
    wait_for("vector 0", || other.take_rung().contains(&0).then_some(()));
    // An empty line is nothing, and the next one is taken.
    terminal.say("\r");
    terminal.say("bogus\r");
    terminal.says("invalid command, type help");
    // The end of input, as it is typed.
    terminal.say("\x04");
    let status = wait_for_exit(&mut terminal.child, "the client on a terminal");
    assert_eq!(status.code(), Some(0));
}

#[test]
fn a_signal_ends_it_and_the_server_knows() {
    let daemon = Daemon::builder().start();
    let mut peer = Peer::join(daemon.socket_path(), 1);
    let running = Running::start(&mut client(daemon.socket_path()));
    running.says("listen on server socket ");
    peer.wait_for_peer(1);
    let pid = i32::try_from(running.child.id()).expect("a pid is an int");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGTERM).expect("it runs");
    peer.wait_for_goodbye(1);
}
