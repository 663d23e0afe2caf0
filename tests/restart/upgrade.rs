// SPDX-License-Identifier: GPL-2.0-or-later
//! An upgrade to a program that reads another format of the state file, and back.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::Command;

use nix::sys::signal::Signal;

use crate::common::daemon::program;
use crate::common::vm::Vm;
use crate::common::{text_of, wait_for};
use crate::supervisor::{Supervisor, replace_program};
use crate::vms::{check_after, check_before};

/// Builds the program with another format number, and returns its file.
fn program_of_other_format() -> PathBuf {
    let target = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("other-format");
    let output = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--offline", "--bin", "ivshmem-server", "--target-dir"])
        .arg(&target)
        .env("RUSTFLAGS", "--cfg ivshmem_other_format")
        .env("CARGO_PROFILE_DEV_OPT_LEVEL", "0")
        .env("CARGO_PROFILE_DEV_DEBUG", "0")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    target.join("debug/ivshmem-server")
}

/// Upgrades from one program to another that cannot read its state.
fn check_refused(old: PathBuf, new: PathBuf, formats: [u32; 2]) {
    let mut supervisor = Supervisor::start_program(&old, |command| {
        command.args(["-n", "2"]);
    });
    let server = supervisor.server_other_than(None);
    let socket = supervisor.place.socket();
    let mut vms = [Vm::start(&socket, 2), Vm::start(&socket, 2)];
    let ids = check_before(&mut vms);
    replace_program(&supervisor.place, &new);
    supervisor.signal(Signal::SIGHUP);
    wait_for("the new program refuses and the old one serves", || {
        let log = text_of(&supervisor.log());
        log.contains("starting the one that ran before").then_some(())
    });
    let server = supervisor.wait_until_serving(Some(server));
    check_after(&socket, &mut vms, &ids);
    // The old program is upgraded to itself.
    replace_program(&supervisor.place, &old);
    supervisor.signal(Signal::SIGHUP);
    supervisor.wait_until_serving(Some(server));
    check_after(&socket, &mut vms, &ids);
    supervisor.signal(Signal::SIGTERM);
    let ended = supervisor.end();
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    let [has, knows] = formats;
    let reason = format!("its format is {has}; this program knows format {knows} only");
    assert!(text_of(&supervisor.log()).contains(&reason), "{reason}: {}", ended.stderr);
}

#[test]
fn a_program_that_cannot_read_the_state_leaves_it_to_the_one_before() {
    let (usual, other) = (program(), program_of_other_format());
    check_refused(usual.clone(), other.clone(), [1, 2]);
    check_refused(other, usual, [2, 1]);
}
