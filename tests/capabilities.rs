// SPDX-License-Identifier: GPL-2.0-or-later
//! `--print-capabilities`: JSON in the shape that QEMU's helper programs print, for the program as it is.

#![deny(unsafe_code)]

mod common;

use std::process::{Command, Stdio};

use serde_json::{Value, json};

use common::program::{Ended, run};

fn server(words: &[&str]) -> Ended {
    run(Command::new(env!("CARGO_BIN_EXE_ivshmem-server")).args(words))
}

fn capabilities(words: &[&str]) -> Value {
    let ended = server(words);
    assert!(ended.status.success() && ended.stderr.is_empty(), "{ended:?}");
    serde_json::from_str(&ended.stdout).expect("one JSON value")
}

fn strings(list: &Value) -> Vec<&str> {
    list.as_array().expect("a list").iter().map(|word| word.as_str().expect("a string")).collect()
}

#[test]
fn the_features_are_the_options_of_the_help_and_what_has_no_option() {
    let found = capabilities(&["--print-capabilities"]);
    assert_eq!(found["type"], "ivshmem-server");
    assert_eq!(found["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(found["protocol-version"], 0);
    let limits = json!({ "vectors": 2048, "ids": 65536, "socket-path-bytes": 107 });
    assert_eq!(found["limits"], limits);
    let help = server(&["--help"]).stdout;
    let mut options: Vec<&str> = help
        .lines()
        // Text is further to the right.
        .filter(|line| line.starts_with("  -") || line.starts_with("      --"))
        .filter_map(|line| line.split([' ', ',']).find_map(|word| word.strip_prefix("--")))
        .filter(|&name| name != "print-capabilities" && name != "version" && name != "help")
        .collect();
    options.extend(["fd-store", "socket-activation", "systemd-notify"]);
    options.sort_unstable();
    assert_eq!(strings(&found["features"]), options);
}

#[test]
fn each_kind_of_memory_is_an_option_and_each_limit_is_the_real_one() {
    let found = capabilities(&["--print-capabilities"]);
    let features = strings(&found["features"]);
    for kind in strings(&found["memory"]) {
        assert!(features.contains(&kind), "{kind}");
    }
    let limits = &found["limits"];
    let number = |name: &str| limits[name].as_u64().expect("a number");
    let place = tempfile::tempdir().expect("a directory");
    let long = place.path().join("x".repeat(200)).display().to_string();
    let refused = |option: &str, value: &str| {
        let ended = server(&["-F", "--memfd", "-S", &long, option, value]);
        assert_eq!(ended.status.code(), Some(1), "{ended:?}");
        ended.stderr
    };
    // A path that is too long is the error only if the value before is accepted.
    for (option, value) in [("-n", number("vectors")), ("--first-id", number("ids") - 1)] {
        let bytes = number("socket-path-bytes").to_string();
        assert!(refused(option, &value.to_string()).contains(&bytes), "{option} {value}");
        let error = refused(option, &(value + 1).to_string());
        assert!(error.contains("invalid value"), "{error}");
    }
}

#[test]
fn other_options_are_ignored_even_wrong_ones() {
    let plain = capabilities(&["--print-capabilities"]);
    for words in [
        &["--print-capabilities", "-v"][..],
        &["--config=/nonexistent", "--print-capabilities"],
        &["--no-such-option", "--print-capabilities", "-n", "x"],
    ] {
        assert_eq!(capabilities(words), plain, "{words:?}");
    }
}

#[test]
fn output_that_cannot_be_written_is_an_error() {
    let full = std::fs::File::options().write(true).open("/dev/full").expect("a device");
    let mut command = Command::new(env!("CARGO_BIN_EXE_ivshmem-server"));
    let ended = command.arg("--print-capabilities").stdout(full).stderr(Stdio::piped()).output();
    let ended = ended.expect("it starts");
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    let error = String::from_utf8_lossy(&ended.stderr);
    assert!(error.contains("cannot print the capabilities: "), "{error}");
}

#[test]
fn a_configuration_file_cannot_have_the_option() {
    let place = tempfile::tempdir().expect("a directory");
    let file = place.path().join("file");
    std::fs::write(&file, "print-capabilities\n").expect("a file");
    let ended = server(&["-F", &format!("--config={}", file.display())]);
    ended.assert_refused(&["\"print-capabilities\"", "command line only"]);
}
