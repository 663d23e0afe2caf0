// SPDX-License-Identifier: GPL-2.0-or-later
//! The supervisor as the main process of a unit of a real systemd.

#![forbid(unsafe_code)]

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::Path;

use tempfile::TempDir;

use crate::common::daemon::program;
use crate::common::systemd::Systemd;
use crate::common::{PATIENCE, text_of, wait_for, wait_up_to};
use crate::supervisor::{CHILD, FakeChild, next_child};

const UNIT: &str = "supervised";

/// A systemd with one unit, whose server is `child.py`.
struct Unit {
    dir: TempDir,
    control: UnixListener,
    systemd: Systemd,
}

impl Unit {
    /// `None` if the test is skipped.
    fn start() -> Option<(Self, FakeChild)> {
        let dir = Systemd::directory();
        let path = dir.path().display();
        let unit = format!(
            "[Service]\nType=notify\nNotifyAccess=main\nExecStart={path}/ivshmem-server -F \
             --supervise --memfd -S {path}/socket\nExecReload=kill -HUP $MAINPID\nKillMode=mixed\n\
             FileDescriptorStoreMax=2000\nRestart=always\nRestartSec=10ms\nLimitNOFILE=10000\n\
             Environment=RUST_LOG=info\nStandardError=append:{path}/log\n"
        );
        fs::write(dir.path().join("supervised.service"), unit).expect("the directory is ours");
        symlink(program(), dir.path().join("ivshmem-server")).expect("the directory is ours");
        let control =
            UnixListener::bind(dir.path().join("control")).expect("the directory is ours");
        control.set_nonblocking(true).expect("fcntl works");
        let systemd = Systemd::boot(dir.path())?;
        let unit = Self { dir, control, systemd };
        unit.systemd.must(&["start", UNIT]);
        let child = unit.reload_to_child();
        Some((unit, child))
    }

    fn set_program(&self, file: &Path) {
        let new = self.dir.path().join("new");
        symlink(file, &new).expect("no other upgrade runs");
        fs::rename(new, self.dir.path().join("ivshmem-server")).expect("rename works");
    }

    fn reload_to_child(&self) -> FakeChild {
        self.set_program(Path::new(CHILD));
        // Without --no-block it waits until the new server is ready.
        self.systemd.must(&["reload", "--no-block", UNIT]);
        let mut child = next_child(&self.control);
        child.ask("ready");
        self.wait_until_running();
        child
    }

    fn wait_until_running(&self) {
        let runs = wait_up_to(PATIENCE, || {
            (self.systemd.property(UNIT, "SubState") == "running").then_some(())
        });
        assert!(runs.is_some(), "the unit does not run: {}", self.log());
    }

    /// Lets systemctl start the supervisor anew in some way, and returns the child that replaces its server.
    fn anew(&self, words: &[&str]) -> FakeChild {
        self.set_program(&program());
        let main = self.systemd.property(UNIT, "MainPID");
        self.systemd.must(words);
        wait_for("a new main process", || {
            let new = self.systemd.property(UNIT, "MainPID");
            (new != main && new != "0").then_some(())
        });
        self.wait_until_running();
        self.reload_to_child()
    }

    fn log(&self) -> String {
        text_of(&self.dir.path().join("log"))
    }
}

#[test]
fn a_unit_keeps_what_its_server_stored_over_a_restart_and_a_kill_but_not_a_stop() {
    let Some((unit, mut child)) = Unit::start() else { return };
    assert_eq!(unit.systemd.property(UNIT, "StatusText"), "ready for the test");
    child.ask("store 20 3");
    child.ask("remove 5");
    let mut child = unit.anew(&["kill", "--signal=KILL", UNIT]);
    assert_eq!((child.stored, child.checked.as_str()), (57, "57"), "{}", unit.log());
    child.ask("remove 6");
    let mut child = unit.anew(&["restart", UNIT]);
    assert_eq!((child.stored, child.checked.as_str()), (54, "54"), "{}", unit.log());
    unit.systemd.must(&["stop", UNIT]);
    assert_eq!(child.next_line().as_deref(), Some("signal 15"), "systemd has what it handed over");
    let child = unit.anew(&["start", UNIT]);
    assert_eq!(child.stored, 0, "{}", unit.log());
}

#[test]
fn what_systemd_does_not_get_is_logged_and_survives_a_death_of_the_server() {
    let Some((unit, mut child)) = Unit::start() else { return };
    // 900 of them are 1,800; all of them are 2,200.
    child.ask("store 1100 2");
    child.tell("exit 1");
    let mut child = next_child(&unit.control);
    assert_eq!((child.stored, child.checked.as_str()), (2_200, "2200"));
    child.ask("ready");
    let said = "the service manager holds 2000 descriptors and gets no more (limit 2000)";
    assert_eq!(unit.log().matches(said).count(), 1, "{}", unit.log());
    // The last that were left out are removed, and one that was passed on: another one takes its place.
    child.ask("remove 0");
    wait_for("systemd holds 2000", || {
        (unit.systemd.property(UNIT, "NFileDescriptorStore") == "2000").then_some(())
    });
    let child = unit.anew(&["kill", "--signal=KILL", UNIT]);
    assert_eq!((child.stored, child.checked.as_str()), (2_000, "2000"));
}
