// SPDX-License-Identifier: GPL-2.0-or-later
//! A real systemd as process 1 of its own namespaces, for tests of units.
//!
//! Its /run, /tmp, /var/tmp and /etc/systemd/system are empty file systems of its own, mounted before it starts: it
//! would empty the machine's /tmp. Of these only the package and its target directory are visible; see
//! [`Systemd::directory`].

#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::unistd::{Pid, geteuid};
use tempfile::TempDir;

use super::program::{Ended, Process, run};
use super::skip::skip;
use super::{PATIENCE, wait_for, wait_up_to};

/// `$1` is a directory with the unit files; `$2` is the name of a control group of its own, because two systemds in one
/// group would end each other's services. `$3` and `$4` are directories that stay visible, also below /tmp.
const SCRIPT: &str = r#"
set -eu
mount --make-rprivate /
umount -R /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
exec 8<"$3" 9<"$4"
for directory in /run /tmp /var/tmp /etc/systemd/system; do mount -t tmpfs none "$directory"; done
mkdir -p "$3" && mount --no-canonicalize --bind /proc/self/fd/8 "$3"
mkdir -p "$4" && mount --no-canonicalize --bind /proc/self/fd/9 "$4"
exec 8<&- 9<&-
for unit in systemd-udevd.service systemd-udev-trigger.service systemd-udevd-control.socket systemd-udevd-kernel.socket \
    systemd-tmpfiles-setup.service systemd-tmpfiles-setup-dev.service systemd-tmpfiles-clean.service \
    systemd-tmpfiles-clean.timer systemd-timesyncd.service systemd-modules-load.service systemd-sysctl.service \
    dev-hugepages.mount dev-mqueue.mount sys-kernel-debug.mount sys-kernel-tracing.mount \
    proc-sys-fs-binfmt_misc.automount proc-sys-fs-binfmt_misc.mount; do
    ln -s /dev/null "/etc/systemd/system/$unit"
done
for unit in "$1"/*.service "$1"/*.socket; do
    if [ -e "$unit" ]; then cp "$unit" /etc/systemd/system/; fi
done
mkdir "/sys/fs/cgroup/$2"
echo 0 >"/sys/fs/cgroup/$2/cgroup.procs"
umount /sys/fs/cgroup
exec unshare --cgroup sh -euc '
    mount -t cgroup2 none /sys/fs/cgroup
    container=test exec /lib/systemd/systemd --system --unit=basic.target'
"#;

/// Removes the control groups below and including `$1`.
const REMOVE_GROUP: &str = r#"
mount --make-rprivate /
umount -R /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
find "/sys/fs/cgroup/$1" -depth -type d -exec rmdir {} +
"#;

/// A running systemd. All of its processes are killed when this value is dropped.
pub(crate) struct Systemd {
    process: Option<Process>,
    init: Pid,
    group: String,
}

impl Systemd {
    /// A directory that the units can see.
    pub(crate) fn directory() -> TempDir {
        tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a temporary directory")
    }

    /// Boots it with the unit files of a directory. `None` where that is not possible: the test is skipped.
    pub(crate) fn boot(units: &Path) -> Option<Self> {
        if !geteuid().is_root() {
            skip("systemd in namespaces needs root");
            return None;
        }
        if !Path::new("/lib/systemd/systemd").exists() || !Path::new("/sys/fs/cgroup").exists() {
            skip("systemd is not installed, or there are no control groups");
            return None;
        }
        let mut command = Command::new("unshare");
        let name = units.file_name().expect("it has a name").to_string_lossy();
        let group = format!("ivshmem-test{name}");
        command.args(["--fork", "--kill-child", "--pid", "--mount", "--uts", "--ipc"]);
        command.args(["--mount-proc", "sh", "-c", SCRIPT, "systemd"]).arg(units).arg(&group);
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("it is in target");
        command.arg(env!("CARGO_MANIFEST_DIR")).arg(target);
        let mut process = Process::spawn(&mut command);
        let outer = process.pid();
        let init = wait_for("process 1", || {
            if !process.is_running() {
                return Some(None);
            }
            let children =
                fs::read_to_string(format!("/proc/{outer}/task/{outer}/children")).ok()?;
            let pid = children.trim().parse().ok()?;
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
            (name == "systemd\n").then_some(Some(Pid::from_raw(pid)))
        });
        let Some(init) = init else {
            let ended = process.end();
            skip(&format!("systemd does not start in namespaces: {}", ended.stderr));
            return None;
        };
        let systemd = Self { process: Some(process), init, group };
        wait_for("systemd has booted", || {
            let state = systemd.systemctl(&["is-system-running"]).stdout;
            ["running\n", "degraded\n"].contains(&state.as_str()).then_some(())
        });
        Some(systemd)
    }

    /// Runs a command in its namespaces.
    pub(crate) fn run(&self, command: &[&str]) -> Ended {
        run(&mut self.command(command))
    }

    /// A command in its namespaces, to be started by the caller.
    pub(crate) fn command(&self, command: &[&str]) -> Command {
        let mut inside = Command::new("nsenter");
        inside.args(["-t", &self.init.to_string(), "-p", "-m", "-u", "-i", "-C", "--"]);
        inside.args(command);
        inside
    }

    /// Its root directory, as processes outside of its namespaces see it.
    pub(crate) fn root(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root", self.init))
    }

    pub(crate) fn systemctl(&self, words: &[&str]) -> Ended {
        self.run(&[&["systemctl"], words].concat())
    }

    /// Like `systemctl`, for what must succeed.
    #[track_caller]
    pub(crate) fn must(&self, words: &[&str]) {
        let ended = self.systemctl(words);
        if !ended.status.success() {
            let journal = self.run(&["journalctl", "--no-pager", "-n", "30"]).stdout;
            panic!("systemctl {words:?}: {ended:?}\n{journal}");
        }
    }

    /// A property of a unit.
    pub(crate) fn property(&self, unit: &str, name: &str) -> String {
        let shown = self.systemctl(&["show", "--value", "--property", name, unit]);
        shown.stdout.trim().to_owned()
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        drop(self.process.take());
        // The last processes of the groups may be ending still.
        let removed = wait_up_to(PATIENCE, || {
            let mut command = Command::new("unshare");
            command.args(["--mount", "sh", "-euc", REMOVE_GROUP, "remove", &self.group]);
            command.output().is_ok_and(|output| output.status.success()).then_some(())
        });
        if removed.is_none() {
            eprintln!("cannot remove the control group {}", self.group);
        }
    }
}
