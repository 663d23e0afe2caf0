// SPDX-License-Identifier: GPL-2.0-or-later
//! The Debian packages of `make deb`, made from the programs of this test run: what is in them, and their installation,
//! upgrade and purge below a real systemd.
//!
//! dpkg writes to /usr, /etc and /var. There systemd's namespaces have overlays here, so nothing of the machine changes, and
//! the upper layers show what the packages left.

// Only common::peer has unsafe code: for descriptors and bytes that were received. Every other module forbids it.
#![deny(unsafe_code)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use common::peer::Peer;
use common::program::size_of;
use common::skip::skip;
use common::systemd::Systemd;
use common::target::c::{expect_success, need, project, shared_library, static_library};
use common::{PATIENCE, text_of, wait_for};

const SERVICE: &str = "ivshmem-server@red.service";
const SOCKET_UNIT: &str = "ivshmem-server@red.socket";
const SOCKET: &str = "var/lib/libvirt/shmem-red-sock";
const PACKAGES: [&str; 3] = ["ivshmem-server", "libivshmem-server1", "libivshmem-server-dev"];

/// The programs and libraries of this test run, in a directory as `make deb` has it.
fn built() -> TempDir {
    let built = Systemd::directory();
    let programs = [
        env!("CARGO_BIN_EXE_ivshmem-server"),
        env!("CARGO_BIN_EXE_ivshmem-client"),
        env!("CARGO_BIN_EXE_ivshmem-ctl"),
        env!("CARGO_BIN_EXE_ivshmem-bench"),
    ];
    let files = programs.map(PathBuf::from).into_iter().chain([static_library(), shared_library()]);
    for file in files {
        let copy = built.path().join(file.file_name().expect("a file"));
        fs::copy(&file, copy).expect("it was built");
    }
    built
}

/// Makes the packages, and returns the file of each.
fn packages(built: &Path, output: &Path, revision: &str) -> [PathBuf; 3] {
    need("dpkg-deb", "dpkg");
    need("dpkg-shlibdeps", "dpkg-dev");
    need("strip", "binutils");
    let mut script = Command::new(project("scripts/deb"));
    script.arg(built).arg(output).arg(revision).env_remove("MAKEFLAGS").env_remove("MAKELEVEL");
    script.env("DEBEMAIL", "maintainers@ivshmem-server.org");
    // The default takes a quarter of a minute.
    script.env("DPKG_DEB_COMPRESSOR_TYPE", "gzip").env("DPKG_DEB_COMPRESSOR_LEVEL", "1");
    let made = String::from_utf8(expect_success(&mut script).stdout).expect("text");
    let files: Vec<PathBuf> = made.lines().map(PathBuf::from).collect();
    files.try_into().expect("three packages")
}

fn dpkg_deb(option: &str, package: &Path, more: &[&str]) -> String {
    let mut command = Command::new("dpkg-deb");
    String::from_utf8(expect_success(command.arg(option).arg(package).args(more)).stdout)
        .expect("text")
}

#[test]
fn each_package_has_its_files_and_what_it_needs_and_is_made_the_same_twice() {
    let (built, output, again) = (built(), Systemd::directory(), Systemd::directory());
    let files = packages(built.path(), output.path(), "1");
    let second = packages(built.path(), again.path(), "1");
    for (file, second) in files.iter().zip(&second) {
        assert_eq!(file.file_name(), second.file_name());
        let same = fs::read(file).expect("a file") == fs::read(second).expect("a file");
        assert!(same, "{file:?} differs from {second:?}");
    }
    let version = format!("{}-1", env!("CARGO_PKG_VERSION"));
    let multiarch = text_from("dpkg-architecture", &["-qDEB_HOST_MULTIARCH"]);
    let library = format!("./usr/lib/{multiarch}/libivshmem_server");
    for (index, (expected, needs)) in [
        (
            [
                "./usr/bin/ivshmem-server",
                "./usr/bin/ivshmem-client",
                "./usr/bin/ivshmem-ctl",
                "./usr/bin/ivshmem-bench",
                "./usr/share/man/man1/ivshmem-server.1.gz",
                "./usr/lib/systemd/system/ivshmem-server@.service",
                "./usr/lib/systemd/system/ivshmem-server@.socket",
                "./usr/lib/systemd/system/ivshmem-metrics.socket",
                "./usr/lib/systemd/system/ivshmem-metrics@.service",
                "./usr/lib/sysusers.d/ivshmem-server.conf",
                "./usr/share/ivshmem-server/unit.conf",
                "./usr/share/bash-completion/completions/ivshmem-server",
                "./usr/share/zsh/vendor-completions/_ivshmem-server",
                "./usr/share/fish/vendor_completions.d/ivshmem-server.fish",
                "./etc/ivshmem-server/",
                "./usr/share/doc/ivshmem-server/docs/operate.md",
            ]
            .map(str::to_owned)
            .to_vec(),
            vec!["libc6 (>= ".to_owned(), "libgcc-s1 (>= ".to_owned(), "systemd | ".to_owned()],
        ),
        (vec![format!("{library}.so.1")], vec!["libc6 (>= ".to_owned()]),
        (
            vec![
                format!("{library}.a"),
                format!("{library}.so -> libivshmem_server.so.1"),
                format!("./usr/lib/{multiarch}/pkgconfig/ivshmem-server.pc"),
                "./usr/include/ivshmem-server.h".to_owned(),
                "./usr/share/doc/libivshmem-server-dev/examples/epoll.c".to_owned(),
            ],
            vec![format!("libivshmem-server1 (= {version})")],
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let (name, file) = (PACKAGES[index], &files[index]);
        let list = dpkg_deb("--contents", file, &[]);
        let documents = ["copyright", "changelog.Debian.gz"];
        let documents = documents.map(|document| format!("./usr/share/doc/{name}/{document}"));
        for path in expected.iter().chain(&documents) {
            let is_there = list.lines().any(|line| line.ends_with(&format!(" {path}")));
            assert!(is_there, "{name}: no {path} in\n{list}");
        }
        assert!(list.lines().all(|line| line.contains(" root/root ")), "{list}");
        let writable = |line: &&str| !line.starts_with('l') && line.as_bytes()[8] == b'w';
        assert_eq!(list.lines().find(writable), None, "others may write");
        assert_eq!(dpkg_deb("--field", file, &["Version"]).trim(), version);
        let depends = dpkg_deb("--field", file, &["Depends"]);
        for need in &needs {
            assert!(depends.contains(need.as_str()), "{name}: no {need:?} in {depends}");
        }
    }
    need("lintian", "lintian");
    let mut lintian = Command::new("lintian");
    // Nobody has asked Debian for a package, and the tools for units know no instances of a template.
    lintian.args(["--allow-root", "--fail-on=error,warning", "--suppress-tags"]);
    lintian.arg("initial-upload-closes-no-bugs,maintainer-script-calls-systemctl");
    // It reads the static library of a test run for half a minute.
    expect_success(lintian.args(&files[..2]));
}

fn text_from(program: &str, arguments: &[&str]) -> String {
    let said = expect_success(Command::new(program).args(arguments)).stdout;
    String::from_utf8(said).expect("text").trim().to_owned()
}

/// Mounts an overlay over each directory that dpkg writes to. What is mounted below stays visible only in /etc/systemd/system.
const OVERLAYS: &str = r#"
exec 7</etc/systemd/system
for directory in usr etc var; do
    mkdir -p "/run/layers/$directory" "/run/layers/.work/$directory"
    mount -t overlay overlay \
        -o "lowerdir=/$directory,upperdir=/run/layers/$directory,workdir=/run/layers/.work/$directory" "/$directory"
done
mount --no-canonicalize --bind /proc/self/fd/7 /etc/systemd/system
"#;

/// The files and the directories that the upper layers have and the machine has not. `.wh` files do not exist there: a removed
/// file is a character device.
const LEFT: &str = r#"
cd /run/layers
find usr etc var ! -type c ! -type d
# A directory of a lower layer is copied up with the first file in it.
mkdir -p /run/lower
mount --bind / /run/lower
find usr etc var -type d | while read -r directory; do
    [ -d "/run/lower/$directory" ] || echo "$directory/"
done
umount /run/lower
"#;

/// Begins of the paths that stay after a purge: dpkg's own data, the accounts, and caches.
const ALLOWED: [&str; 11] = [
    "etc/.pwd.lock",
    "etc/group",
    "etc/gshadow",
    "etc/ld.so.cache",
    "etc/passwd",
    "etc/shadow",
    "var/cache/ldconfig/",
    "var/cache/man/",
    "var/lib/dpkg/",
    "var/lib/systemd/",
    "var/log/",
];

struct Machine {
    systemd: Systemd,
}

impl Machine {
    /// `None` if the test is skipped.
    fn boot(units: &Path) -> Option<Self> {
        let machine = Self { systemd: Systemd::boot(units)? };
        let ended = machine.systemd.run(&["sh", "-euc", OVERLAYS]);
        if !ended.status.success() {
            skip(&format!("overlays cannot be mounted here: {}", ended.stderr));
            return None;
        }
        Some(machine)
    }

    #[track_caller]
    fn must(&self, command: &[&str]) -> String {
        let said = expect_success(&mut self.systemd.command(command)).stdout;
        String::from_utf8(said).expect("text")
    }

    #[track_caller]
    fn dpkg(&self, action: &str, what: &[&str]) {
        let dpkg = ["env", "DEBIAN_FRONTEND=noninteractive", "dpkg", "--force-unsafe-io", action];
        self.must(&[&dpkg, what].concat());
    }

    #[track_caller]
    fn install(&self, files: &[PathBuf; 3]) {
        let files = files.each_ref().map(|file| file.to_str().expect("text"));
        self.dpkg("--install", &files);
    }

    fn path(&self, path: &str) -> PathBuf {
        self.systemd.root().join(path)
    }

    /// The process of the server, the child of the unit's main process.
    fn server(&self) -> Option<String> {
        let main = self.systemd.property(SERVICE, "MainPID");
        let children = text_of(&self.path(&format!("proc/{main}/task/{main}/children")));
        children.split_whitespace().next().map(str::to_owned)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let ended = self.systemd.run(&["journalctl", "--no-pager", "-u", "ivshmem-server@*"]);
            eprintln!("--- the journal ---\n{}{}--- end ---", ended.stdout, ended.stderr);
        }
    }
}

#[test]
fn the_packages_are_installed_started_upgraded_with_a_client_and_purged() {
    let directory = Systemd::directory();
    let (built, units) = (built(), Systemd::directory());
    let Some(machine) = Machine::boot(units.path()) else { return };
    let first = packages(built.path(), directory.path(), "1");
    let second = packages(built.path(), directory.path(), "2");

    machine.install(&first);
    machine.must(&["getent", "passwd", "ivshmem"]);
    let units = machine.systemd.systemctl(&["list-units", "--all", "--plain", "ivshmem-server@*"]);
    assert!(!units.stdout.contains("ivshmem-server@"), "nothing is started: {units:?}");
    machine.must(&["sh", "-c", "echo size 1M >/etc/ivshmem-server/red.conf"]);
    machine.systemd.must(&["enable", SERVICE]);
    machine.systemd.must(&["start", SERVICE]);
    let mut peer = Peer::join(&machine.path(SOCKET), 1);
    assert_eq!(size_of(&peer), 1 << 20);

    let server = machine.server().expect("it runs");
    machine.install(&second);
    wait_for("the new program runs", || {
        let new = machine.server().filter(|new| *new != server)?;
        let program =
            machine.systemd.run(&["stat", "-L", "-c", "%d:%i", &format!("/proc/{new}/exe")]);
        let file = machine.must(&["stat", "-c", "%d:%i", "/usr/bin/ivshmem-server"]);
        (program.stdout == file).then_some(())
    });
    let version = machine.must(&["dpkg-query", "-W", "-f", "${Version}", "ivshmem-server"]);
    assert_eq!(version, format!("{}-2", env!("CARGO_PKG_VERSION")));
    let mut other = Peer::join(&machine.path(SOCKET), 1);
    peer.wait_for_peer(other.id());
    peer.ring(other.id(), 0);
    wait_for("the ring", || other.take_rung().contains(&0).then_some(()));
    other.ring(peer.id(), 0);
    wait_for("the ring", || peer.take_rung().contains(&0).then_some(()));
    other.wait_for_peer(peer.id());

    // A C program finds the library, and the loader finds it too.
    let flags = machine.must(&["pkg-config", "--cflags", "--libs", "ivshmem-server"]);
    let example = "/usr/share/doc/libivshmem-server-dev/examples/event_loop.c";
    let flags: Vec<&str> = flags.split_whitespace().collect();
    machine.must(&[&["cc", example, "-o", "/run/example"], &flags[..]].concat());
    let libraries = machine.must(&["ldd", "/run/example"]);
    assert!(libraries.contains("libivshmem_server.so.1 => /"), "{libraries}");
    machine.must(&["ivshmem-client", "--version"]);
    let page = machine.must(&["man", "-w", "ivshmem-server"]);
    assert_eq!(page, "/usr/share/man/man1/ivshmem-server.1.gz\n");

    machine.dpkg("--remove", &["ivshmem-server"]);
    drop(other);
    let mut connection = peer.into_connection();
    wait_for("the end of the stream", || {
        connection.receive(PATIENCE).expect("whole messages").is_none().then_some(())
    });
    for unit in [SERVICE, SOCKET_UNIT] {
        assert_ne!(machine.systemd.property(unit, "ActiveState"), "active");
    }
    assert!(!machine.path(SOCKET).exists());
    machine.must(&["test", "-e", "/etc/ivshmem-server/red.conf"]);
    machine.dpkg("--purge", &["libivshmem-server-dev", "libivshmem-server1", "ivshmem-server"]);
    let left = machine.must(&["sh", "-euc", LEFT]);
    let is_allowed = |path: &&str| ALLOWED.iter().any(|allowed| path.starts_with(allowed));
    let left: Vec<&str> = left.lines().filter(|path| !is_allowed(path)).collect();
    assert_eq!(left, Vec::<&str>::new());
    let links = machine.must(&["find", "/etc/systemd/system", "-name", "ivshmem*"]);
    assert_eq!(links, "");
    let known = machine.systemd.run(&["dpkg-query", "-W", "-f", "${Status}", "ivshmem-server"]);
    assert!(!known.status.success(), "{known:?}");
}
