// SPDX-License-Identifier: GPL-2.0-or-later
//! The `ivshmem-bench` program: what it measures, what it prints, and that it leaves no files.

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
        .expect("the program starts")
}

/// Runs the program with few rounds and returns its JSON output.
fn figures(temp: &Path, arguments: &[&str]) -> Value {
    let small = ["--json", "--rounds", "2", "--trips", "20", "--joins", "3"];
    let output = bench(temp, &[&small, arguments].concat());
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {errors}", output.status);
    assert!(!errors.contains('%'), "a progress bar, although stderr is not a terminal: {errors}");
    serde_json::from_slice(&output.stdout).expect("stdout is one JSON value")
}

/// Checks that the value is a number greater than zero.
#[track_caller]
fn positive(value: &Value) {
    assert!(value.as_f64().is_some_and(|number| number > 0.0), "{value}");
}

fn server(socket: &Path) -> (ivshmem::Stopper, impl FnOnce()) {
    let mut server =
        Server::builder().socket_path(socket).vectors(3).start().expect("the server starts");
    let stopper = server.stopper().expect("an eventfd");
    let thread = std::thread::spawn(move || server.run());
    (stopper, move || thread.join().expect("no panic").expect("the server runs without an error"))
}

#[test]
fn without_a_socket_it_measures_everything_on_its_own_server_and_leaves_no_files() {
    let temp = tempfile::tempdir().expect("a temporary directory");
    let figures = figures(temp.path(), &["-n", "2"]);
    let doorbell = figures["doorbell"].as_array().expect("a list");
    assert_eq!(doorbell[0]["receiver"], "blocking");
    for kind in doorbell {
        for kind_of_time in ["library_seconds", "eventfd_seconds"] {
            for part in ["median", "p99", "p99_9"] {
                positive(&kind[kind_of_time][part]);
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
    assert_eq!(
        temp.path().read_dir().expect("the directory exists").count(),
        0,
        "files were left behind"
    );
}

#[test]
fn on_an_existing_server_it_writes_to_the_memory_only_with_overwrite() {
    let temp = tempfile::tempdir().expect("a temporary directory");
    let socket = temp.path().join("socket");
    let (stopper, served) = server(&socket);
    let client = Client::connect(&socket).expect("the server accepts clients");
    client.memory().write(0, b"precious").expect("it fits into the memory");
    let content = || {
        let mut bytes = [0; 8];
        client.memory().read(0, &mut bytes).expect("the range is inside the memory");
        bytes
    };
    let path = socket.to_str().expect("the path is UTF-8");

    let figures = figures(temp.path(), &["-S", path]);
    assert_eq!(figures["join"]["vectors"], 3, "the server determines the number of vectors");
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
fn all_its_peers_leave_when_it_ends() {
    let temp = tempfile::tempdir().expect("a temporary directory");
    let socket = temp.path().join("socket");
    let (stopper, served) = server(&socket);
    let mut client = Client::connect(&socket).expect("the server accepts clients");
    figures(
        temp.path(),
        &["-S", socket.to_str().expect("the path is UTF-8"), "--only", "doorbell"],
    );
    common::wait_for("all peers to have left", || {
        client.wait(Some(Duration::from_millis(10))).expect("waiting works");
        (client.peers().len() == 0).then_some(())
    });
    stopper.stop();
    served();
}

#[test]
fn the_table_has_only_the_requested_measurement() {
    let temp = tempfile::tempdir().expect("a temporary directory");
    let output = bench(temp.path(), &["--only", "join", "--joins", "2"]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("time to join"), "{output:?}");
    assert!(!text.contains("doorbell") && !text.contains("memory"), "{text}");
}

#[test]
fn bad_input_gives_an_error_that_names_it() {
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
