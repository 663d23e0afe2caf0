// SPDX-License-Identifier: GPL-2.0-or-later
//! The program `ivshmem-ctl`: its output, its exit status, and how it finds servers.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::caller::wait_for_status;
use crate::common::daemon::Daemon;
use crate::common::peer::Peer;
use crate::common::program::{Ended, Place, Process};

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ivshmem-ctl"));
    command.args(args).stdin(Stdio::null());
    command
}

#[track_caller]
fn ctl(args: &[&str]) -> Ended {
    Process::spawn(&mut command(args)).end()
}

#[track_caller]
fn success(args: &[&str]) -> String {
    let ended = ctl(args);
    assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(0), ""), "{ended:?}");
    ended.stdout
}

#[test]
fn the_status_is_a_table_or_json() {
    let daemon = Daemon::builder().vectors(2).start();
    let socket = daemon.socket_path().to_str().expect("ours");
    let _peer = Peer::join(daemon.socket_path(), 2);
    let table = success(&["status", "-S", socket]);
    for part in [
        &*format!("{socket}: ivshmem-server {}, pid {}", env!("CARGO_PKG_VERSION"), daemon.pid()),
        "1 MiB; vectors: 2",
        "65535 free, 1 used, 0 remembered",
        "1 joined, 0 left, 0 refused",
        "ID  ",
        &std::process::id().to_string(),
    ] {
        assert!(table.contains(part), "no {part:?} in\n{table}");
    }
    assert!(!table.contains('\x1b'), "no colours, as this is no terminal");
    let text = success(&["status", "--json", "--socket", socket]);
    let status: Value = serde_json::from_str(&text).expect("one object");
    assert_eq!(text.lines().count(), 1);
    assert_eq!(status["peers"].as_array().map(Vec::len), Some(1));
    daemon.stop();
}

#[test]
fn colours_are_for_terminals_and_can_be_switched_off() {
    let daemon = Daemon::builder().start();
    let line = format!(
        "{} status -S {}",
        env!("CARGO_BIN_EXE_ivshmem-ctl"),
        daemon.socket_path().display()
    );
    let on_terminal = |no_color: &str| {
        let mut command = Command::new("script");
        command.args(["-qec", &line, "/dev/null"]).env("TERM", "xterm");
        let ended = Process::spawn(command.env("NO_COLOR", no_color)).end();
        assert_eq!(ended.status.code(), Some(0), "{ended:?}");
        ended.stdout
    };
    assert!(on_terminal("").contains("\x1b[1m"));
    assert!(!on_terminal("1").contains('\x1b'));
    daemon.stop();
}

#[test]
fn all_servers_of_a_directory_are_shown_and_one_that_does_not_answer_is_an_error() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().to_str().expect("ours");
    let ended = ctl(&["status", "-d", path]);
    assert_eq!(ended.status.code(), Some(1));
    assert!(ended.stderr.contains("has no control socket"), "{ended:?}");
    let daemons = ["a", "b"].map(|name| {
        let control = directory.path().join(format!("{name}.control"));
        Daemon::builder().arg(format!("--control={}", control.display())).start()
    });
    let text = success(&["status", "--json", "-d", path]);
    let listed: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("an object")["socket"].take())
        .collect();
    assert_eq!(listed, daemons.each_ref().map(|daemon| json!(daemon.socket_path())));
    drop(std::os::unix::net::UnixListener::bind(directory.path().join("0.control")).expect("new"));
    let ended = ctl(&["status", "-d", path]);
    assert_eq!(ended.status.code(), Some(1));
    assert!(ended.stderr.contains("0.control") && ended.stderr.contains("killed"), "{ended:?}");
    assert_eq!(ended.stdout.matches("ivshmem-server").count(), 2, "{ended:?}");
    for daemon in daemons {
        daemon.stop();
    }
}

#[test]
fn disconnect_ends_a_client_or_says_that_there_is_none() {
    let daemon = Daemon::builder().start();
    let socket = daemon.socket_path().to_str().expect("ours");
    let _peer = Peer::join(daemon.socket_path(), 1);
    assert_eq!(success(&["disconnect", "0", "-S", socket]), "peer 0 is disconnected\n");
    wait_for_status(daemon.socket_path(), "it left", |status| status["left"] == 1);
    let ended = ctl(&["disconnect", "0", "-S", socket]);
    assert_eq!(ended.status.code(), Some(1));
    assert!(ended.stderr.contains("no peer with the id 0"), "{ended:?}");
    daemon.stop();
}

#[test]
fn watch_prints_events_until_the_server_ends() {
    let daemon = Daemon::builder().start();
    let socket = daemon.socket_path().to_str().expect("ours");
    let mut watches =
        [&["watch", "-S", socket][..], &["watch", "--json", "-S", socket]].map(|args| {
            command(args)
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .expect("it was built")
        });
    let mut outputs =
        watches.each_mut().map(|watch| BufReader::new(watch.stdout.take().expect("it is piped")));
    let mut next = |number: usize| {
        let mut line = String::new();
        outputs[number].read_line(&mut line).expect("it can be read");
        line
    };
    assert!(next(0).contains("watching; peers: 0"));
    let ready: Value = serde_json::from_str(&next(1)).expect("an object");
    assert_eq!(
        (&ready["kind"], &ready["control"]),
        (&json!("ready"), &json!(format!("{socket}.control")))
    );
    drop(Peer::join(daemon.socket_path(), 1));
    let line = next(0);
    assert!(line.contains(&format!("joined id 0, pid {}", std::process::id())), "{line}");
    assert!(next(0).contains("left id 0: it hung up; peers: 0"));
    for kind in ["joined", "left"] {
        let event: Value = serde_json::from_str(&next(1)).expect("an object");
        assert_eq!(event["kind"], kind);
    }
    daemon.stop();
    for watch in watches {
        let ended = watch.wait_with_output().expect("it runs");
        assert_eq!(ended.status.code(), Some(1));
        let text = String::from_utf8_lossy(&ended.stderr);
        assert!(text.contains("has ended"), "{text}");
    }
}

#[test]
fn the_exit_status_tells_a_wrong_command_line_from_a_server_that_cannot_be_reached() {
    let place = Place::new();
    let socket = place.socket();
    let ended = ctl(&["status", "-S", socket.to_str().expect("ours")]);
    assert_eq!(ended.status.code(), Some(1));
    assert!(
        ended.stderr.contains("socket.control") && ended.stderr.contains("is the server running"),
        "{ended:?}"
    );
    for args in [&["stat"][..], &[], &["status", "--sock"], &["disconnect", "-1"]] {
        assert_eq!(ctl(args).status.code(), Some(2), "{args:?}");
    }
    for (args, part) in
        [(&["--help"][..], "Exit status"), (&["--version"], env!("CARGO_PKG_VERSION"))]
    {
        assert!(success(args).contains(part), "{args:?}");
    }
    let answer = {
        let mut command =
            command(&["metrics", "--http", "-d", place.dir().to_str().expect("ours")]);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it was built");
        use std::io::Write;
        let mut input = child.stdin.take().expect("it is piped");
        input.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").expect("it reads");
        child.wait_with_output().expect("it runs").stdout
    };
    assert!(String::from_utf8_lossy(&answer).starts_with("HTTP/1.1 503 "), "{answer:?}");
}
