// SPDX-License-Identifier: GPL-2.0-or-later
//! The `ivshmem-bench` program: it measures, says what, and leaves nothing behind.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use ivshmem::{Client, Server};
use serde_json::Value;

mod common;

fn bench(temp: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ivshmem-bench"))
        .args(arguments)
        .env("TMPDIR", temp)
        .stdin(Stdio::null())
        .output()
        .expect("it starts")
}

/// Runs it small, and returns its JSON.
fn figures(temp: &Path, arguments: &[&str]) -> Value {
    let small = ["--json", "--rounds", "2", "--trips", "20", "--joins", "3"];
    let output = bench(temp, &[&small, arguments].concat());
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {errors}", output.status);
    assert!(!errors.contains('%'), "a progress bar on what is no terminal: {errors}");
    serde_json::from_slice(&output.stdout).expect("stdout is one JSON value")
}

/// A number that must be there and more than nothing.
#[track_caller]
fn positive(value: &Value) {
    assert!(value.as_f64().is_some_and(|number| number > 0.0), "{value}");
}

fn server(socket: &Path) -> (ivshmem::Stopper, impl FnOnce()) {
    let mut server = Server::builder().socket_path(socket).vectors(3).start().expect("it starts");
    let stopper = server.stopper().expect("an eventfd");
    let thread = std::thread::spawn(move || server.run());
    (stopper, move || thread.join().expect("no panic").expect("it serves to its end"))
}

#[test]
fn it_measures_everything_at_a_server_of_its_own_and_leaves_nothing_behind() {
    let temp = tempfile::tempdir().expect("a temporary directory");
    let figures = figures(temp.path(), &["-n", "2"]);
    let doorbell = figures["doorbell"].as_array().expect("a list");
    assert_eq!(doorbell[0]["receiver"], "blocking");
    for kind in doorbell {
        for who in ["library_seconds", "eventfd_seconds"] {
            for part in ["median", "p99", "p99_9"] {
                positive(&kind[who][part]);
            }
        }
        positive(&kind["ratio"]);
    }
    let memory = figures["memory"].as_array().expect("a list");
    let ways: Vec<_> = memory.iter().filter_map(|kind| kind["way"].as_str()).collect();
    assert_eq!(ways, ["write", "write", "write", "read", "read", "read"]);
    memory.iter().for_each(|kind| positive(&kind["ratio"]));
    assert_eq!(figures["join"]["vectors"], 2);
    positive(&figures["join"]["seconds"]["median"]);
    assert_eq!(temp.path().read_dir().expect("it is there").count(), 0, "something is left");
}

#[test]
fn at_a_server_of_others_it_writes_to_the_memory_only_if_told_to() {
    let temp = tempfile::tempdir().expect("a temporary directory");
    let socket = temp.path().join("socket");
    let (stopper, served) = server(&socket);
    let client = Client::connect(&socket).expect("it serves");
    client.memory().write(0, b"precious").expect("room for it");
    let content = || {
        let mut bytes = [0; 8];
        client.memory().read(0, &mut bytes).expect("it is there");
        bytes
    };
    let path = socket.to_str().expect("a plain name");

    let figures = figures(temp.path(), &["-S", path]);
    assert_eq!(figures["join"]["vectors"], 3, "the server says how many");
    let memory = figures["memory"].as_array().expect("a list");
    assert!(memory.iter().all(|kind| kind["way"] == "read"), "{memory:?}");
    assert_eq!(&content(), b"precious");

    self::figures(temp.path(), &["-S", path, "--only", "memory", "--overwrite"]);
    assert_ne!(&content(), b"precious");
    drop(client);
    stopper.stop();
    served();
}

#[test]
fn all_its_peers_leave_when_it_is_done() {
    let temp = tempfile::tempdir().expect("a temporary directory");
    let socket = temp.path().join("socket");
    let (stopper, served) = server(&socket);
    let mut client = Client::connect(&socket).expect("it serves");
    figures(temp.path(), &["-S", socket.to_str().expect("a plain name"), "--only", "doorbell"]);
    common::wait_for("all peers to have left", || {
        client.wait(Some(Duration::from_millis(10))).expect("waiting works");
        (client.peers().len() == 0).then_some(())
    });
    stopper.stop();
    served();
}

#[test]
fn the_table_has_what_was_asked_for_and_no_more() {
    let temp = tempfile::tempdir().expect("a temporary directory");
    let output = bench(temp.path(), &["--only", "join", "--joins", "2"]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("time to join"), "{output:?}");
    assert!(!text.contains("doorbell") && !text.contains("memory"), "{text}");
}

#[test]
fn bad_input_is_an_error_that_says_which() {
    let temp = tempfile::tempdir().expect("a temporary directory");
    for (arguments, named) in [
        (&["-S", "/nowhere/at/all"][..], "/nowhere/at/all"),
        (&["--rounds", "0"], "--rounds"),
        (&["--trips", "1"], "--trips"),
        (&["--vectors", "2049"], "--vectors"),
        (&["--only", "nonsense"], "nonsense"),
        (&["--overwrite"], "--socket"),
        (&["-S", "/tmp/x", "-n", "2"], "--vectors"),
        (&["--nonsense"], "--nonsense"),
        (&["--echo", "nonsense"], "for this program itself"),
    ] {
        let output = bench(temp.path(), arguments);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {errors}");
        assert!(errors.contains(named), "{arguments:?}: {errors}");
        assert!(output.stdout.is_empty(), "{arguments:?}");
    }
    let help = bench(temp.path(), &["--help"]);
    assert!(help.status.success() && String::from_utf8_lossy(&help.stdout).contains("--overwrite"));
}
