// SPDX-License-Identifier: GPL-2.0-or-later
//! The server as a service of a real systemd, which keeps its descriptors: without a supervisor and with one.

#![forbid(unsafe_code)]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::common::daemon::program;
use crate::common::peer::Peer;
use crate::common::systemd::Systemd;
use crate::common::vm::Vm;
use crate::common::{PATIENCE, text_of, wait_for};
use crate::crowd::{Crowd, below};
use crate::vms::{check_after, check_before};

const UNIT: &str = "ivshmem";

/// A systemd with one unit, whose socket is in its runtime directory.
struct Service {
    dir: TempDir,
    systemd: Systemd,
}

impl Service {
    /// `None` if the test is skipped.
    fn start(options: &str) -> Option<Self> {
        let dir = Systemd::directory();
        let path = dir.path().display();
        let unit = format!(
            "[Unit]\nStartLimitIntervalSec=0\n[Service]\nType=notify\nNotifyAccess=main\nExecStart={path}/ivshmem-server -F {options} --memfd -n 2 \
             -S /run/ivshmem/socket\nExecReload=kill -HUP $MAINPID\nKillMode=mixed\nFileDescriptorStoreMax=2000\n\
             RuntimeDirectory=ivshmem\nRuntimeDirectoryPreserve=restart\nRestart=always\nRestartSec=10ms\n\
             LimitNOFILE=10000\nLimitCORE=0\nEnvironment=RUST_LOG=info\n\
             StandardError=append:{path}/log\n"
        );
        fs::write(dir.path().join("ivshmem.service"), unit).expect("the directory is ours");
        symlink(program(), dir.path().join("ivshmem-server")).expect("the directory is ours");
        let systemd = Systemd::boot(dir.path())?;
        let service = Self { dir, systemd };
        service.systemd.must(&["start", UNIT]);
        Some(service)
    }

    /// The socket, as processes outside of systemd's namespaces see it.
    fn socket(&self) -> PathBuf {
        self.systemd.root().join("run/ivshmem/socket")
    }

    fn log(&self) -> String {
        text_of(&self.dir.path().join("log"))
    }

    /// Waits until the server, the main process or its child, has sent everything.
    fn wait_until_idle(&self) {
        let main = self.systemd.property(UNIT, "MainPID");
        let processes = self.systemd.root().join("proc");
        let children = text_of(&processes.join(format!("{main}/task/{main}/children")));
        let server = children.split_whitespace().next().unwrap_or(&main).to_owned();
        wait_for("the server waits for events", || {
            text_of(&processes.join(server.as_str()).join("stat")).contains(") S ").then_some(())
        });
    }

    /// Runs systemctl, and waits until the unit has another main process and is active.
    #[track_caller]
    fn anew(&self, words: &[&str]) {
        let before = self.systemd.property(UNIT, "MainPID");
        self.wait_until_idle();
        self.systemd.must(words);
        wait_for("a new main process that is ready", || {
            let now = self.systemd.property(UNIT, "MainPID");
            let is_new = now != before && now != "0";
            (is_new && self.systemd.property(UNIT, "ActiveState") == "active").then_some(())
        });
    }
}

#[track_caller]
fn check_service(options: &str) {
    let Some(service) = Service::start(options) else { return };
    let socket = service.socket();
    let mut vms = [Vm::start(&socket, 2), Vm::start(&socket, 2)];
    let ids = check_before(&mut vms);
    for words in [
        &["restart", UNIT][..],
        &["kill", "--signal=KILL", UNIT],
        &["kill", "--signal=ABRT", "--kill-who=main", UNIT],
        &["restart", UNIT],
    ] {
        service.anew(words);
        check_after(&socket, &mut vms, &ids);
    }
    wait_for("the status tells the number of clients", || {
        (service.systemd.property(UNIT, "StatusText") == "2 clients").then_some(())
    });
    let mut client = Peer::join(&socket, 2).into_connection();
    service.systemd.must(&["stop", UNIT]);
    assert_eq!(service.systemd.property(UNIT, "NFileDescriptorStore"), "0");
    let end = client.receive(PATIENCE).expect("the stream ends with a whole message");
    assert!(end.is_none(), "{end:?}");
    assert!(!socket.exists(), "systemd removes the runtime directory: {}", service.log());
    // The next start begins anew.
    service.systemd.must(&["start", UNIT]);
    let peer = Peer::join(&socket, 2);
    assert!(peer.others().is_empty(), "{:?}: {}", peer.others(), service.log());
}

/// Kills the service again and again, while clients join, stall and leave.
#[track_caller]
fn check_kills(options: &str) {
    const VECTORS: u32 = 2;
    let Some(service) = Service::start(options) else { return };
    let mut crowd = Crowd::new(service.socket(), VECTORS);
    let mut random = u64::from(std::process::id());
    println!("seed {random}");
    for _ in 0..30 {
        let end = Instant::now() + Duration::from_millis(20 + below(&mut random, 200));
        while Instant::now() < end {
            crowd.step(&mut random);
        }
        let before = service.systemd.property(UNIT, "MainPID");
        service.systemd.must(&["kill", "--signal=KILL", UNIT]);
        wait_for("a new main process", || {
            crowd.step(&mut random);
            let now = service.systemd.property(UNIT, "MainPID");
            (now != before && now != "0").then_some(())
        });
    }
    crowd.settle();
    let log = service.log();
    for id in crowd.ended.iter().flatten() {
        assert!(log.contains(&format!("peer {id} is ended at the restart")), "{id}: {log}");
    }
    println!("{} of the clients were ended", crowd.ended.len());
    assert!(log.matches("resumed with").count() >= 30, "{log}");
}

#[test]
fn clients_of_a_service_that_is_killed_thirty_times_see_no_gap_and_no_message_twice() {
    check_kills("");
}

#[test]
fn clients_of_a_service_with_a_supervisor_that_is_killed_thirty_times_see_no_gap() {
    check_kills("--supervise");
}

#[test]
fn vms_do_not_notice_a_restart_or_death_of_a_service() {
    check_service("");
}

#[test]
fn vms_do_not_notice_a_restart_or_death_of_a_service_with_a_supervisor() {
    check_service("--supervise");
}
