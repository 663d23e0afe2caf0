// SPDX-License-Identifier: GPL-2.0-or-later
//! A host with systemd, libvirt, and this project as `make install` installs it, in namespaces of its own.
//!
//! libvirt's configuration, state and user are private, and so is its network: nothing of it reaches the machine.
//! `prepare.sh` says how.

#![forbid(unsafe_code)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

use crate::common::daemon::program;
use crate::common::program::run;
use crate::common::skip::skip;
use crate::common::systemd::Systemd;
use crate::common::vm::Vm;
use crate::common::{find_in_path, text_of};

/// Where the programs are installed.
const PREFIX: &str = "/run/installed";
/// The sockets through which the test drives the domains, as libvirt's QEMU sees them.
const QTEST: &str = "/run/qtest";
const QEMU: &str = "qemu-system-x86_64";
const FILES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/libvirt");

/// A started domain. libvirt owns its QEMU.
pub(crate) struct Domain {
    pub(crate) name: &'static str,
    pub(crate) vm: Vm,
}

pub(crate) struct Host {
    systemd: Systemd,
    _dir: TempDir,
}

impl Host {
    /// `None` if the test is skipped.
    pub(crate) fn boot() -> Option<Self> {
        for (program, package) in [
            ("libvirtd", "libvirt-daemon"),
            ("virtlogd", "libvirt-daemon"),
            ("virsh", "libvirt-clients"),
            (QEMU, "qemu-system-x86"),
        ] {
            if find_in_path(program).is_none() {
                skip(&format!("{program} is not installed (Debian package {package})"));
                return None;
            }
        }
        let dir = Systemd::directory();
        let root = dir.path().join("root");
        install(&root);
        for units in [&root.join("run/installed/units"), &Path::new(FILES).join("units")] {
            for unit in fs::read_dir(units).expect("it has the units") {
                let unit = unit.expect("an entry");
                fs::copy(unit.path(), dir.path().join(unit.file_name())).expect("it is ours");
            }
        }
        let host = Self { systemd: Systemd::boot(dir.path())?, _dir: dir };
        host.must(&[&format!("{FILES}/prepare.sh"), &root.display().to_string()]);
        fs::create_dir(host.path(QTEST)).expect("/run is private");
        Some(host)
    }

    /// A path, as processes outside of the namespaces see it.
    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.systemd.root().join(path.trim_start_matches('/'))
    }

    /// Runs a command. libvirt's first look at a QEMU takes seconds, and more on a busy machine.
    pub(crate) fn run(&self, command: &[&str]) -> Output {
        let path = std::env::var("PATH").expect("the search path is UTF-8");
        let path = format!("PATH={PREFIX}/bin:{path}");
        let limited = [&["env", &path, "timeout", "120"], command].concat();
        self.systemd.command(&limited).output().expect("nsenter (Debian package util-linux)")
    }

    /// Like `run`, for what must succeed. Returns the standard output.
    #[track_caller]
    pub(crate) fn must(&self, command: &[&str]) -> String {
        let output = self.run(command);
        assert!(output.status.success(), "{command:?}: {output:?}");
        String::from_utf8(output.stdout).expect("text")
    }

    /// Like `run`, for a command of virsh that must fail. Returns the standard error.
    #[track_caller]
    fn must_fail(&self, command: &[&str]) -> String {
        let output = self.run(command);
        assert_eq!(output.status.code(), Some(1), "{command:?}: {output:?}");
        String::from_utf8(output.stderr).expect("text")
    }

    /// Runs the commands of a recipe, which are for a user with sudo.
    #[track_caller]
    pub(crate) fn follow(&self, commands: &str) {
        self.must(&["sh", "-euc", &commands.replace("sudo ", "")]);
    }

    /// Defines a domain with this `<shmem>`.
    #[track_caller]
    pub(crate) fn define(&self, name: &str, shmem: &str) {
        self.must(&["virsh", "define", "--validate", &self.write(name, shmem)]);
    }

    /// Asserts that libvirt refuses this `<shmem>`. Returns its error.
    #[track_caller]
    pub(crate) fn fail_to_define(&self, name: &str, shmem: &str) -> String {
        self.must_fail(&["virsh", "define", "--validate", &self.write(name, shmem)])
    }

    /// Writes the XML of a domain. Returns the path of the file.
    fn write(&self, name: &str, shmem: &str) -> String {
        let file = format!("/run/{name}.xml");
        fs::write(self.path(&file), domain_xml(name, shmem)).expect("/run is private");
        file
    }

    /// Starts a domain that is defined, and attaches to it. Its processor stays stopped.
    #[track_caller]
    pub(crate) fn start(&self, name: &'static str) -> Domain {
        Domain { name, vm: Vm::attach(self.start_alone(name)) }
    }

    /// Starts a domain whose device may be missing. Returns the socket with its connection.
    #[track_caller]
    pub(crate) fn start_alone(&self, name: &str) -> UnixListener {
        let listener = self.listen(name);
        self.must(&["virsh", "start", "--paused", name]);
        listener
    }

    /// Asserts that a domain does not start. Returns libvirt's error.
    #[track_caller]
    pub(crate) fn fail_to_start(&self, name: &str) -> String {
        let _listener = self.listen(name);
        self.must_fail(&["virsh", "start", "--paused", name])
    }

    fn listen(&self, name: &str) -> UnixListener {
        let path = self.path(&format!("{QTEST}/{name}"));
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path).expect("/run is private");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).expect("it is ours");
        listener
    }

    /// Ends a domain, as `virsh destroy` does.
    #[track_caller]
    pub(crate) fn stop(&self, domain: Domain) {
        self.must(&["virsh", "destroy", domain.name]);
    }

    /// The contents of /proc/PID/status of a domain's QEMU.
    #[track_caller]
    pub(crate) fn status(&self, domain: &Domain) -> String {
        let pid = text_of(&self.path(&format!("/run/libvirt/qemu/{}.pid", domain.name)));
        let status = text_of(&self.path(&format!("/proc/{}/status", pid.trim())));
        assert!(!status.is_empty(), "{} runs as process {pid:?}", domain.name);
        status
    }

    /// The number of a user or group: a line of /etc/passwd or /etc/group.
    #[track_caller]
    pub(crate) fn number_of(&self, file: &str, name: &str) -> u32 {
        let text = text_of(&self.path(file));
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name}:x:")));
        let line = line.unwrap_or_else(|| panic!("{name} in {file}"));
        line.split(':').next().and_then(|number| number.parse().ok()).expect("a number")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for script in ["journalctl --no-pager", "tail -n 30 /var/log/libvirt/qemu/*.log"] {
                let output = self.run(&["sh", "-c", script]);
                eprintln!("--- {script} ---\n{}", String::from_utf8_lossy(&output.stdout));
            }
        }
    }
}

/// The XML of a domain with this `<shmem>`.
pub(crate) fn domain_xml(name: &str, shmem: &str) -> String {
    let qemu = find_in_path(QEMU).unwrap_or_else(|| format!("/usr/bin/{QEMU}").into());
    include_str!("domain.xml")
        .replace("@NAME@", name)
        .replace("@QEMU@", &qemu.display().to_string())
        .replace("@SHMEM@", shmem)
}

/// Installs the units and the programs below `root`, with the paths that prepare.sh expects.
fn install(root: &Path) {
    let mut make = Command::new("make");
    make.args(["-C", env!("CARGO_MANIFEST_DIR"), "install-units", "SYSCONFDIR=/etc"]);
    make.arg(format!("PREFIX={PREFIX}")).arg(format!("UNITDIR={PREFIX}/units"));
    make.arg(format!("DESTDIR={}", root.display()));
    make.env_remove("MAKEFLAGS").env_remove("MAKELEVEL");
    let ended = run(&mut make);
    assert!(ended.status.success(), "{ended:?}");
    let bin = root.join(&PREFIX[1..]).join("bin");
    fs::create_dir(&bin).expect("it is ours");
    fs::copy(program(), bin.join("ivshmem-server")).expect("it was built");
}
