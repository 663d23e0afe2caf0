// SPDX-License-Identifier: GPL-2.0-or-later
//! `--sandbox`: what a server can do after its start. gdb makes the calls in the running server. The other tests of the
//! daemon run in the sandbox too: see `tests/common/daemon.rs`.

// One function in common::peer takes over received descriptors; every other module forbids unsafe code.
#![deny(unsafe_code)]

mod common;

use std::process::Command;

use common::daemon::program;
use common::find_in_path;
use common::peer::Peer;
use common::program::{Place, Process, run};

const PASSWORDS: &str = "((int(*)(const char*,int))open)(\"/etc/passwd\",0)";
const NEW_FILE: &str = "((int(*)(const char*,int,int))open)(\"/tmp/ivshmem-sandbox\",66,0600)";
const PROGRAM: &str = "((int(*)(const char*,void*,void*))execve)(\"/bin/true\",(void*)0,(void*)0)";
const INTERNET: &str = "((int(*)(int,int,int))socket)(2,1,0)";
const EXECUTABLE: &str = "((int(*)(void*,long,int))mprotect)((void*)((long)$sp&~4095),4096,7)";
/// Allowed in each mode.
const OWN_STATUS: &str = "((int(*)(const char*,int))open)(\"/proc/self/status\",0)";

/// The results of calls in a server with these options, which goes on.
fn results(options: &[&str], calls: &[&str]) -> Vec<i64> {
    let place = Place::new();
    let mut command = Command::new(program());
    command.args(["-F", "--memfd", "-S"]).arg(place.socket()).args(options);
    let mut server = Process::spawn(&mut command);
    server.wait_until_listening(&place.socket());
    // It serves, so it has entered the sandbox.
    let first = Peer::join(&place.socket(), 1);
    let mut gdb =
        Command::new(find_in_path("gdb").expect("gdb is not installed: Debian package gdb"));
    gdb.args(["--batch", "--nx", "-p", &server.pid().to_string()]);
    for call in calls {
        gdb.args(["-ex", &format!("print {call}")]);
    }
    let said = run(&mut gdb);
    let result = |line: &str| line.strip_prefix('$')?.split(" = ").nth(1)?.parse().ok();
    let results: Vec<i64> = said.stdout.lines().filter_map(result).collect();
    assert_eq!(results.len(), calls.len(), "{said:?}");
    let mut second = Peer::join(&place.socket(), 1);
    second.wait_for_peer(first.id());
    let ended = server.stop();
    assert!(ended.status.success() && !place.socket().exists(), "{ended:?}");
    results
}

#[test]
fn in_the_sandbox_no_program_starts_and_no_file_of_the_host_opens() {
    let calls = [PASSWORDS, NEW_FILE, PROGRAM, INTERNET, EXECUTABLE, OWN_STATUS];
    let results = results(&["--sandbox", "on"], &calls);
    assert_eq!(results[..5], [-1; 5]);
    assert!(results[5] >= 0, "{results:?}");
}

#[test]
fn without_the_sandbox_and_with_its_log_all_that_is_possible() {
    for options in [&[][..], &["--sandbox", "off"], &["--sandbox", "log"]] {
        let results = results(options, &[PASSWORDS, INTERNET, EXECUTABLE, OWN_STATUS]);
        assert!(results.iter().all(|&result| result >= 0), "{options:?}: {results:?}");
    }
}

#[test]
fn another_mode_is_refused_with_those_that_exist() {
    let place = Place::new();
    let mut command = Command::new(program());
    command.args(["-F", "--memfd", "-S"]).arg(place.socket()).args(["--sandbox", "yes"]);
    run(&mut command).assert_refused(&["yes", "--sandbox", "off, on, log"]);
    place.assert_holds_only(&[]);
}
