// SPDX-License-Identifier: GPL-2.0-or-later
//! The units that `make install` installs, below a real systemd.
//!
//! Everything is installed below /run, which is systemd's own here, with the user of sysusers.d. /var/lib is an empty file
//! system of its own too.

// Only common::peer has unsafe code: for descriptors and bytes that were received. Every other module forbids it.
#![deny(unsafe_code)]

mod common;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use common::daemon::program;
use common::peer::{Connection, Peer};
use common::program::{Ended, memory_of, run, size_of};
use common::systemd::Systemd;
use common::{PATIENCE, text_of, wait_for};

/// Where everything is installed.
const PREFIX: &str = "/run/installed";
const SERVICE: &str = "ivshmem-server@red.service";
const SOCKET_UNIT: &str = "ivshmem-server@red.socket";
const SOCKET: &str = "/var/lib/libvirt/shmem-red-sock";

/// `$1` is the installed tree. The accounts are made by sysusers.d, in copies of the files of this machine.
const PREPARE: &str = r#"
cp -r "$1" /run/installed
accounts=/run/accounts
mkdir -p $accounts/etc $accounts/usr/lib/sysusers.d
cp /etc/passwd /etc/group $accounts/etc
cp /run/installed/lib/sysusers.d/*.conf $accounts/usr/lib/sysusers.d
systemd-sysusers --root=$accounts
mount --bind $accounts/etc/passwd /etc/passwd
mount --bind $accounts/etc/group /etc/group
mount -t tmpfs none /var/lib
mount -t tmpfs none /var/log
systemctl restart systemd-journald
"#;

/// A systemd with the units.
struct Machine {
    systemd: Systemd,
    _dir: TempDir,
}

impl Machine {
    /// `None` if the test is skipped.
    fn boot() -> Option<Self> {
        let dir = Systemd::directory();
        let root = dir.path().join("root");
        let mut make = Command::new("make");
        make.args(["-C", env!("CARGO_MANIFEST_DIR"), "install-units"]);
        make.arg(format!("PREFIX={PREFIX}")).arg(format!("SYSCONFDIR={PREFIX}/etc"));
        make.arg(format!("UNITDIR={PREFIX}/units")).arg(format!("DESTDIR={}", root.display()));
        make.env_remove("MAKEFLAGS").env_remove("MAKELEVEL");
        let ended = run(&mut make);
        assert!(ended.status.success(), "{ended:?}");
        let tree = root.join(&PREFIX[1..]);
        for unit in fs::read_dir(tree.join("units")).expect("it was installed") {
            let unit = unit.expect("an entry");
            fs::copy(unit.path(), dir.path().join(unit.file_name())).expect("it is ours");
        }
        fs::create_dir(tree.join("bin")).expect("it is ours");
        for file in [program(), env!("CARGO_BIN_EXE_ivshmem-client").into()] {
            let name = file.file_name().expect("a file").to_owned();
            fs::copy(&file, tree.join("bin").join(name)).expect("it was built");
        }
        let systemd = Systemd::boot(dir.path())?;
        let machine = Self { systemd, _dir: dir };
        let tree = tree.display().to_string();
        let ended = machine.systemd.run(&["sh", "-euc", PREPARE, "prepare", &tree]);
        assert!(ended.status.success(), "{ended:?}");
        Some(machine)
    }

    /// A path, as processes outside of systemd's namespaces see it.
    fn path(&self, path: &str) -> PathBuf {
        self.systemd.root().join(path.trim_start_matches('/'))
    }

    fn socket(&self) -> PathBuf {
        self.path(SOCKET)
    }

    /// The number of the group kvm.
    fn kvm(&self) -> u32 {
        let text = text_of(&self.path("/etc/group"));
        let line = text.lines().find_map(|line| line.strip_prefix("kvm:x:")).expect("the group");
        line.split(':').next().and_then(|number| number.parse().ok()).expect("its number")
    }

    fn configure(&self, text: &str) {
        let file = self.path(&format!("{PREFIX}/etc/ivshmem-server/red.conf"));
        fs::write(file, text).expect("it was installed");
    }

    fn property(&self, name: &str) -> String {
        self.systemd.property(SERVICE, name)
    }

    /// The process of the server, which is the child of the unit's main process. In systemd's pid namespace.
    fn server(&self) -> Option<String> {
        let main = self.property("MainPID");
        let children = text_of(&self.path(&format!("/proc/{main}/task/{main}/children")));
        children.split_whitespace().next().map(str::to_owned)
    }

    /// Waits until the server has sent everything.
    fn wait_until_idle(&self) {
        wait_for("the server waits for events", || {
            let server = self.server()?;
            text_of(&self.path(&format!("/proc/{server}/stat"))).contains(") S ").then_some(())
        });
    }

    /// Connects as a user of the host, whose only group is `group`.
    fn look_as(&self, user: &str, group: &str) -> Ended {
        let client = format!("{PREFIX}/bin/ivshmem-client");
        let (user, group) = (format!("--reuid={user}"), format!("--regid={group}"));
        let dump = [&client, "-S", SOCKET, "-e", "dump"];
        self.systemd.run(&[&["setpriv", &user, &group, "--clear-groups"], &dump[..]].concat())
    }

    /// The lines in the journal of the run with this id: priority and text.
    fn journal(&self, invocation: &str) -> Vec<(String, String)> {
        let unit = format!("_SYSTEMD_INVOCATION_ID={invocation}");
        let ended = self.systemd.run(&["journalctl", "--output=json", "--no-pager", &unit]);
        let lines = ended.stdout.lines().map(|line| {
            let line: serde_json::Value = serde_json::from_str(line).expect("JSON");
            let field = |name: &str| line[name].as_str().unwrap_or_default().to_owned();
            (field("PRIORITY"), field("MESSAGE"))
        });
        lines.collect()
    }

    /// Waits for a line in the journal that contains `text`, and returns its priority.
    #[track_caller]
    fn priority_of(&self, invocation: &str, text: &str) -> String {
        wait_for(&format!("{text:?} in the journal"), || {
            let mut lines = self.journal(invocation).into_iter();
            lines.find(|(_, message)| message.contains(text)).map(|(priority, _)| priority)
        })
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
fn a_region_is_served_where_libvirt_expects_it_over_restarts_until_it_is_stopped() {
    let Some(machine) = Machine::boot() else { return };
    machine.systemd.must(&["start", SERVICE]);
    let socket = machine.socket();
    let found = socket.metadata().expect("it is there");
    assert_eq!(found.gid(), machine.kvm());
    assert_eq!((found.uid(), found.mode() & 0o777), (0, 0o660));

    let mut peers = vec![Peer::join(&socket, 1)];
    let ended = machine.look_as("70001", "kvm");
    assert!(ended.status.success(), "QEMU is in this group: {ended:?}");
    let other = ["setpriv", "--reuid=70001", "--regid=70001", "--clear-groups"];
    let ended = machine.systemd.run(&[&other[..], &["test", "-w", SOCKET]].concat());
    assert_eq!(ended.status.code(), Some(1), "another group may not write: {ended:?}");

    let server = machine.server().expect("it runs");
    let status = text_of(&machine.path(&format!("/proc/{server}/status")));
    let passwd = text_of(&machine.path("/etc/passwd"));
    let user = passwd.lines().find_map(|line| line.strip_prefix("ivshmem:x:")).expect("the user");
    let user = user.split(':').next().expect("its number");
    assert!(status.contains(&format!("Uid:\t{user}\t{user}\t")), "{status}");
    assert!(status.contains("CapEff:\t0000000000000000\n"), "{status}");

    for words in [
        &["systemctl", "restart", SERVICE][..],
        &["systemctl", "reload", SERVICE],
        // Only the server, not the supervisor.
        &["sh", "-c", "kill -KILL $0", "SERVER"],
        &["systemctl", "kill", "--signal=KILL", SERVICE],
        &["systemctl", "kill", "--signal=ABRT", "--kill-who=main", SERVICE],
        &["systemctl", "restart", SERVICE],
    ] {
        machine.wait_until_idle();
        let before = socket.metadata().expect("it is there");
        let server = machine.server().expect("it runs");
        let words: Vec<&str> =
            words.iter().map(|&word| if word == "SERVER" { &server } else { word }).collect();
        let ended = machine.systemd.run(&words);
        assert!(ended.status.success(), "{words:?}: {ended:?}");
        wait_for("another server that is ready", || {
            let is_new = machine.server().is_some_and(|new| new != server);
            (is_new && machine.property("ActiveState") == "active").then_some(())
        });
        let new = Peer::join(&socket, 1);
        for peer in &mut peers {
            peer.wait_for_peer(new.id());
        }
        peers.push(new);
        let (first, last) = (&peers[0], &peers[peers.len() - 1]);
        first.ring(last.id(), 0);
        wait_for("the ring", || last.take_rung().contains(&0).then_some(()));
        let now = socket.metadata().expect("it is there");
        if words[1] != "kill" {
            assert_eq!((now.dev(), now.ino()), (before.dev(), before.ino()), "{words:?}");
        }
    }

    let mut client = peers.swap_remove(0).into_connection();
    machine.systemd.must(&["stop", SERVICE]);
    assert_eq!(machine.property("NFileDescriptorStore"), "0");
    wait_for("the end of the stream", || {
        client.receive(PATIENCE).expect("whole messages").is_none().then_some(())
    });
    assert!(!socket.exists());
    assert_eq!(machine.systemd.property(SOCKET_UNIT, "ActiveState"), "inactive");
    assert_eq!(machine.property("ActiveState"), "inactive");
    // The next start begins anew.
    machine.systemd.must(&["start", SERVICE]);
    assert!(Peer::join(&socket, 1).others().is_empty());
}

#[test]
fn a_client_starts_the_service_by_its_socket_and_the_journal_has_a_line_for_each_step() {
    let Some(machine) = Machine::boot() else { return };
    machine.systemd.must(&["start", SOCKET_UNIT]);
    assert_eq!(machine.property("ActiveState"), "inactive");
    let peer = Peer::join(&machine.socket(), 1);
    wait_for("the service runs", || (machine.property("SubState") == "running").then_some(()));
    let first = machine.property("InvocationID");
    drop(peer);
    let ended = machine.look_as("70001", "kvm");
    assert!(ended.status.success(), "{ended:?}");
    let line = "info: peer 1 joined: pid ";
    assert_eq!(machine.priority_of(&first, line), "6");
    let described = |(_, text): &(_, String)| {
        text.contains(line) && text.contains("uid 70001") && text.contains("\"ivshmem-client\"")
    };
    assert!(machine.journal(&first).iter().any(described));
    for (text, priority) in [
        ("ivshmem-server: info: version ", "6"),
        ("starts: socket of the service manager, sealed anonymous memory, default size", "6"),
        ("info: ready: listens at a socket of the service manager; 4194304 bytes", "6"),
        ("info: peer 0 joined: pid ", "6"),
        ("info: peer 0 left: it hung up", "6"),
    ] {
        assert_eq!(machine.priority_of(&first, text), priority, "{text}");
    }

    machine.configure("max-clients 1\nlog-level warn\n");
    machine.systemd.must(&["reload", SERVICE]);
    machine.wait_until_idle();
    assert!(machine.journal(&first).iter().any(|(_, text)| text.contains("hands over 0 clients")));
    let _peer = Peer::join(&machine.socket(), 1);
    let refused = Connection::open(&machine.socket()).receive(PATIENCE).expect("no error");
    assert_eq!(refused.map(|message| message.value), Some(1));
    assert_eq!(machine.priority_of(&first, "warn: client refused: as many"), "4");
    machine.wait_until_idle();
}

#[test]
fn a_service_without_its_socket_unit_does_not_start() {
    let Some(machine) = Machine::boot() else { return };
    let ended = machine.systemd.run(&["mkdir", "-m", "711", "/var/lib/libvirt"]);
    assert!(ended.status.success(), "{ended:?}");
    machine.systemd.must(&["mask", "--runtime", SOCKET_UNIT]);
    let ended = machine.systemd.systemctl(&["start", SERVICE]);
    assert!(!ended.status.success(), "{ended:?}");
    let text = wait_for("the error in the journal", || {
        let ended = machine.systemd.run(&["journalctl", "--no-pager", "-u", SERVICE]);
        ended.stdout.contains("cannot bind socket").then_some(ended.stdout)
    });
    assert!(text.contains(SOCKET), "{text}");
}

#[test]
fn the_file_in_etc_sets_the_options_and_a_wrong_line_is_named() {
    let Some(machine) = Machine::boot() else { return };
    machine.configure("# red\nsize 1M\nvectors 2\nmax-clients 1\n");
    machine.systemd.must(&["start", SERVICE]);
    let peer = Peer::join(&machine.socket(), 2);
    assert_eq!(size_of(&peer), 1 << 20);
    // Another region has nothing of this one.
    machine.systemd.must(&["start", "ivshmem-server@blue-2"]);
    let other = Peer::join(&machine.path("/var/lib/libvirt/shmem-blue-2-sock"), 1);
    assert_eq!((other.id(), size_of(&other)), (0, 4 << 20));
    let inode = |peer: &Peer| memory_of(peer).metadata().expect("it is open").ino();
    assert_ne!(inode(&other), inode(&peer));
    drop((peer, other));
    machine.systemd.must(&["stop", SERVICE]);

    // The defaults of the units are replaced.
    let name = format!("ivshmem-units-{}", std::process::id());
    machine.configure(&format!("shm-name {name}\n"));
    machine.systemd.must(&["start", SERVICE]);
    let memory = Path::new("/dev/shm").join(&name);
    assert!(memory.exists());
    machine.systemd.must(&["stop", SERVICE]);
    fs::remove_file(memory).expect("a stop leaves it");
    let _ = fs::remove_file(format!("/dev/shm/.ivshmem-lock.{name}"));

    machine.configure("size 1M\nvectors two\n");
    let ended = machine.systemd.systemctl(&["start", SERVICE]);
    assert!(!ended.status.success(), "{ended:?}");
    let wrong = format!("{PREFIX}/etc/ivshmem-server/red.conf:2: invalid value 'two'");
    let line = wait_for("the error in the journal", || {
        let unit = ["journalctl", "--output=json", "--no-pager", "-u", SERVICE];
        let text = machine.systemd.run(&unit).stdout;
        text.lines().find(|line| line.contains(&wrong)).map(str::to_owned)
    });
    assert!(line.contains(r#""PRIORITY":"3""#), "{line}");
}

#[test]
fn an_option_that_needs_more_than_the_unit_allows_works_with_the_lines_of_the_documentation() {
    let Some(machine) = Machine::boot() else { return };
    let name = format!("ivshmem-units-group-{}", std::process::id());
    machine.configure(&format!("shm-name {name}\nshm-group kvm\nshm-mode 660\n"));
    assert!(!machine.systemd.systemctl(&["start", SERVICE]).status.success());
    wait_for("the error in the journal", || {
        let ended = machine.systemd.run(&["journalctl", "--no-pager", "-u", SERVICE]);
        ended.stdout.contains("cannot give shared memory").then_some(())
    });
    machine.systemd.must(&["stop", SERVICE]);
    let dir = machine.path(&format!("/etc/systemd/system/{SERVICE}.d"));
    fs::create_dir(&dir).expect("it is ours");
    let lines = ["SupplementaryGroups=kvm", "SystemCallFilter=@chown", "ReadWritePaths=/var/log"];
    let documented = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/operate.md"));
    let documented = documented.expect("a page");
    for line in lines {
        let name = line.split('=').next().expect("a name");
        assert!(documented.contains(&format!("`{name}=")), "{line}");
    }
    let text = format!("[Service]\n{}\n", lines.join("\n"));
    fs::write(dir.join("more.conf"), text).expect("it is ours");
    machine.systemd.must(&["daemon-reload"]);
    machine.systemd.must(&["start", SERVICE]);
    let memory = Path::new("/dev/shm").join(&name);
    let found = memory.metadata().expect("it is there");
    assert_eq!((found.gid(), found.mode() & 0o777), (machine.kvm(), 0o660));
    machine.systemd.must(&["stop", SERVICE]);
    fs::remove_file(memory).expect("a stop leaves it");
    let _ = fs::remove_file(format!("/dev/shm/.ivshmem-lock.{name}"));

    let ended = machine.systemd.run(&["chown", "ivshmem", "/var/log"]);
    assert!(ended.status.success(), "{ended:?}");
    machine.configure("shm-dir /var/log\n");
    machine.systemd.must(&["start", SERVICE]);
    drop(Peer::join(&machine.socket(), 1));
}

#[test]
fn systemd_rates_the_exposure_of_the_service_below_2() {
    let Some(machine) = Machine::boot() else { return };
    let ended = machine.systemd.run(&["systemd-analyze", "security", "--no-pager", SERVICE]);
    let begin = format!("Overall exposure level for {SERVICE}: ");
    let score = ended.stdout.split(&begin).nth(1).unwrap_or_else(|| panic!("{ended:?}"));
    let score: f32 =
        score.split_whitespace().next().and_then(|text| text.parse().ok()).expect("a score");
    println!("{score}");
    assert!(score < 2.0, "{}", ended.stdout);
    for unit in [SERVICE, SOCKET_UNIT] {
        let file = Path::new("/etc/systemd/system").join(unit.replace("@red", "@"));
        let file = file.display().to_string().replace("@.", "@red.");
        let copy = ["cp", &file.replace("@red.", "@."), &file];
        assert!(machine.systemd.run(&copy).status.success());
        let ended = machine.systemd.run(&["systemd-analyze", "verify", &file]);
        assert!(!format!("{}{}", ended.stdout, ended.stderr).contains("ivshmem"), "{ended:?}");
    }
}
