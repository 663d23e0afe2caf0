// SPDX-License-Identifier: GPL-2.0-or-later
//! The client program as users and scripts run it: a real process with a real server, pipes and a terminal.

// Only common::peer has unsafe code: for descriptors and bytes that were received. Every other module forbids it.
#![deny(unsafe_code)]

#[path = "../common/mod.rs"]
mod common;
mod running;

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use common::daemon::Daemon;
use common::peer::Peer;
use common::{PATIENCE, find_in_path, wait_for, wait_for_exit};
use running::{Running, client, program, run};

/// Parses each line as a JSON value.
fn objects(output: &str) -> Vec<Value> {
    output.lines().map(|line| serde_json::from_str(line).expect("JSON on each line")).collect()
}

/// The first lines that the reference client prints.
const BANNER: &str = "dump: dump peers (including us)\n\
    int <peer> <vector>: notify one vector on a peer\n\
    int <peer> all: notify all vectors of a peer\n\
    int all: notify all vectors of all peers (excepting us)\n";

#[test]
fn commands_from_a_pipe_run_and_the_client_ends_with_the_input() {
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
fn the_last_command_needs_no_newline_and_semicolons_separate_commands() {
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
fn empty_input_ends_the_client() {
    let daemon = Daemon::builder().start();
    let (status, output, errors) = run(&mut client(daemon.socket_path()), "");
    assert_eq!((status, errors.as_str()), (0, ""));
    assert!(output.starts_with(BANNER), "{output}");

    let dir = tempfile::tempdir().expect("a temporary directory");
    let (status, _, errors) = run(&mut client(&dir.path().join("socket")), "");
    assert_eq!(status, 1, "there was no server, so the status is 1: {errors}");
}

#[test]
fn commands_print_the_same_text_as_the_reference() {
    let daemon = Daemon::builder().vectors(2).start();
    let mut peer = Peer::join(daemon.socket_path(), 2);
    let mut running = Running::start(client(daemon.socket_path()).arg("-v"));
    running.wait_for_output("listen on server socket ");
    running.wait_for_output("our_id=1\n");
    running.wait_for_output("new peer id = 0\n  new vector 0 (fd=");
    peer.wait_for_peer(1);
    running.write_input("int 0 1\n");
    running.wait_for_output("notify peer 0 on vector 1, fd ");
    wait_for("vector 1", || peer.take_rung().contains(&1).then_some(()));
    running.write_input("int 0 all;int all\n");
    wait_for("both vectors", || (peer.take_rung() == [0, 1].into()).then_some(()));
    peer.ring(1, 0);
    running.wait_for_output("receive notification from peer_id=1 vector=0\n");
    running.write_input("int 9 0;int 9 all\n");
    running.wait_for_output("cannot find peer_id = 9\ncannot find peer_id = 9\n");
    running.write_input("int 0 5\n");
    running.wait_for_output("invalid vector 5 on peer 0\n");
    running.write_input("int\nfoo;?\n");
    running.wait_for_output("invalid command, type help");
    drop(peer);
    running.wait_for_output("delete peer id = 0\n");
    assert_eq!(
        running.end(),
        0,
        "as in the reference, a failed command does not change the exit status"
    );
}

#[test]
fn without_verbose_joins_and_leaves_are_printed_only_during_watch() {
    let daemon = Daemon::builder().start();
    let mut running = Running::start(&mut client(daemon.socket_path()));
    running.wait_for_output("listen on server socket ");
    let peer = Peer::join(daemon.socket_path(), 1);
    drop(peer);
    running.write_input("dump\n");
    running.wait_for_output("our_id = 0");
    assert!(!running.output().contains("peer id"), "{}", running.output());
    running.write_input("watch 100\n");
    // The command prints no answer, so peers join until one is printed.
    wait_for("a peer that is printed", || {
        let peer = Peer::join(daemon.socket_path(), 1);
        let line = format!("new peer id = {}\n", peer.id());
        common::wait_up_to(PATIENCE / 20, || running.output().contains(&line).then_some(()))
    });
    running.wait_for_output("delete peer id = ");
}

#[test]
fn exec_runs_commands_in_order_without_a_prompt() {
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
    // The bytes are in the server's memory, not in a copy of the client.
    let mut bytes = [0; 10];
    let memory = File::open(daemon.shm_path()).expect("the object");
    std::os::unix::fs::FileExt::read_exact_at(&memory, &mut bytes, 16)
        .expect("the range is in the memory");
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
        ("read 0 0x7fffffffffffffff", "more than one read can print"),
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
fn wait_ends_with_the_interrupt_and_exit_status_0() {
    let daemon = Daemon::builder().vectors(2).start();
    let mut peer = Peer::join(daemon.socket_path(), 2);
    let mut command = client(daemon.socket_path());
    let mut running = Running::start(command.args(["-e", "wait 1 60", "-e", "dump"]));
    peer.wait_for_peer(1);
    peer.ring(1, 0);
    running.wait_for_output("receive notification from peer_id=1 vector=0\n");
    assert!(!running.output().contains("our_id"), "the notification was for another vector");
    peer.ring(1, 1);
    assert_eq!(running.end(), 0);
    running.wait_for_output("our_id = 1");
}

#[test]
fn wait_returns_at_once_for_an_earlier_interrupt_and_only_once() {
    let daemon = Daemon::builder().start();
    let mut command = client(daemon.socket_path());
    let (status, output, _) = run(command.args(["-e", "int 0 0", "-e", "wait 0 60"]), "");
    assert_eq!(status, 0, "{output}");
    let (status, output, _) =
        run(&mut client(daemon.socket_path()), "int 1 0\ndump\nwait 0 60\nwait 0 0.01\ndump\n");
    assert_eq!(status, 2, "{output}");
    assert!(output.contains("no notification on vector 0 in time"), "{output}");
    assert_eq!(
        output.matches("our_id = 1").count(),
        2,
        "commands from a pipe continue after a failed one: {output}"
    );
}

#[test]
fn a_wait_that_times_out_gives_exit_status_2() {
    let daemon = Daemon::builder().start();
    let start = Instant::now();
    let (status, _, _) = run(client(daemon.socket_path()).args(["-e", "wait 0 0.3"]), "");
    assert_eq!(status, 2);
    assert!(start.elapsed() >= Duration::from_millis(300));
}

#[test]
fn json_output_is_one_object_per_line_and_nothing_else() {
    let daemon = Daemon::builder().vectors(2).start();
    let peer = Peer::join(daemon.socket_path(), 2);
    let mut running = Running::start(client(daemon.socket_path()).arg("--json"));
    running.write_input(
        "dump\nint 0 1\nint 1 0\nwait 0 60\nwrite 0 \"a\\xffb\"\nread 0 4\nread 0 1 text\n",
    );
    running.write_input("int 9 0\nwait 1 0.01\n");
    running.wait_for_output("in time");
    drop(peer);
    running.wait_for_output("\"left\"");
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
fn the_client_waits_for_a_server_and_reconnects_to_a_new_one() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("socket");
    let mut running = Running::start(&mut client(&path));
    wait_for("the connection error", || {
        running.errors().contains("cannot connect to server, retry in 1 second").then_some(())
    });
    // A command that is entered before the server runs waits for the server.
    running.write_input("dump\n");
    let mut server = serve(&path);
    running.wait_for_output("our_id = 0");
    server.kill().expect("the process runs");
    server.wait().expect("it was killed");
    running.wait_for_output("disconnected from server\n");
    // More than one attempt fails now, but only the first error is printed.
    thread::sleep(Duration::from_millis(2500));
    let errors = running.errors().matches("cannot connect to server").count();
    assert_eq!(errors, 2, "once before the server and once after: {}", running.errors());
    let mut server = serve(&path);
    running.write_input("dump;dump\n");
    wait_for("the answers with the new server", || {
        (running.output().matches("our_id = 0").count() == 3).then_some(())
    });
    assert_eq!(running.end(), 0);
    server.kill().expect("the process runs");
    server.wait().expect("it was killed");
}

/// Starts a server at this path. Its memory is sealed and has no name, so killing the server leaves no memory behind.
fn serve(path: &Path) -> Child {
    Command::new(common::daemon::program())
        .args(["-F", "--memfd", "-l", "64K", "-S"])
        .arg(path)
        .stdout(Stdio::null())
        .spawn()
        .expect("a server")
}

#[test]
fn without_a_server_give_up_ends_the_client_with_status_1() {
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
fn a_full_disk_for_stderr_does_not_end_the_client() {
    let full = || std::fs::File::options().write(true).open("/dev/full").expect("it is there");
    let dir = tempfile::tempdir().expect("a temporary directory");
    let socket = dir.path().join("socket");
    let mut command = client(&socket);
    command.args(["--give-up", "0.2", "-e", "dump"]).stdin(Stdio::null()).stderr(full());
    assert_eq!(command.status().expect("the program starts").code(), Some(1));

    let mut command = client(&socket);
    command.args(["-e", "dump"]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(full());
    let early = command.spawn().expect("the program starts");
    thread::sleep(Duration::from_millis(200));
    let mut server = serve(&socket);
    let output = early.wait_with_output().expect("waitpid works");
    let _ = server.kill();
    let _ = server.wait();
    assert_eq!(output.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&output.stdout).contains("our_id = 0"));
}

#[test]
fn the_client_ends_when_the_reader_of_its_output_closes() {
    let daemon = Daemon::builder().start();
    let mut running = client(daemon.socket_path())
        .args(["-e", "watch"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the program starts");
    drop(running.stdout.take());
    let ended = common::wait_up_to(PATIENCE, || {
        // The client notices the closed pipe when it next prints something.
        drop(Peer::join(daemon.socket_path(), 1));
        running.try_wait().expect("waitpid works")
    });
    let _ = running.kill();
    let _ = running.wait();
    assert!(ended.is_some(), "the client continued after its output was closed");
}

#[test]
fn help_is_exit_0_and_a_wrong_option_is_exit_1() {
    let run = |option: &str| -> Output {
        Command::new(program()).arg(option).stdin(Stdio::null()).output().expect("the process runs")
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
    let manual = include_str!("../../docs/client.md");
    let help = Command::new(program()).arg("-h").output().expect("the process runs").stdout;
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
    terminal.wait_for_output("cmd> ");
    terminal.wait_for_output("listen on server socket ");
    // A typing mistake that is corrected: cursor left twice, then the missing letter.
    terminal.write_input("dmp\x1b[D\x1b[Du\r");
    terminal.wait_for_output("our_id = 0");
    // The up key shows the last line again.
    terminal.write_input("\x1b[A\r");
    wait_for("the command from history", || {
        (terminal.output().matches("our_id = 0").count() == 2).then_some(())
    });
    // A notification is printed while a line is being typed.
    terminal.write_input("int 0 0\r");
    terminal.wait_for_output("receive notification from peer_id=0 vector=0");
    // It does not damage the typed line.
    terminal.write_input("int 0");
    wait_for("the incomplete line", || terminal.output().ends_with("int 0").then_some(()));
    drop(Peer::join(daemon.socket_path(), 1));
    let other = Peer::join(daemon.socket_path(), 1);
    other.ring(0, 0);
    wait_for("the incomplete line, printed again", || {
        let output = terminal.output();
        let (_, after) = output.rsplit_once("receive notification")?;
        after.contains("cmd> int 0").then_some(())
    });
    terminal.write_input(" all;int 2 0\r");
    wait_for("vector 0", || other.take_rung().contains(&0).then_some(()));
    // An empty line is ignored, and the next line is executed.
    terminal.write_input("\r");
    terminal.write_input("bogus\r");
    terminal.wait_for_output("invalid command, type help");
    // Ctrl-D, the end of the input.
    terminal.write_input("\x04");
    let status = wait_for_exit(&mut terminal.child, "the client on a terminal");
    assert_eq!(status.code(), Some(0));
}

#[test]
fn sigterm_ends_the_client_and_the_server_removes_it() {
    let daemon = Daemon::builder().start();
    let mut peer = Peer::join(daemon.socket_path(), 1);
    let running = Running::start(&mut client(daemon.socket_path()));
    running.wait_for_output("listen on server socket ");
    peer.wait_for_peer(1);
    let pid = i32::try_from(running.child.id()).expect("a pid is an int");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGTERM)
        .expect("the process runs");
    peer.wait_for_departure(1);
}
