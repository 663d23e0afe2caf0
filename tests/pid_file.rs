// SPDX-License-Identifier: GPL-2.0-or-later
//! The pid file: when it exists, which files it replaces, and that no other user can misuse it.
//!
//! Several daemons that start at once with one pid file are in concurrent_start.rs.

// Only common::peer has unsafe code: for descriptors and bytes that were received. Every other module forbids it.
#![deny(unsafe_code)]

mod common;

use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{AT_FDCWD, FcntlArg, RenameFlags, fcntl, renameat2};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use common::daemon::program;
use common::peer::Peer;
use common::program::{Background, Place, run};
use common::target::is_root;
use common::{text_of, wait_for};

/// A user without any privilege.
const NOBODY: u32 = 65534;

#[test]
fn a_second_daemon_with_the_same_pid_file_is_refused_and_the_first_goes_on() {
    let place = Place::new();
    let mut first = place.daemonize(&[]);
    let other = Place::new();
    let pid_file = place.pid_file();
    let second = run(&mut other.command(&["-p", pid_file.to_str().expect("ours")]));
    second.assert_refused(&["pid file", pid_file.to_str().unwrap(), &first.pid().to_string()]);
    other.assert_holds_only(&[]);
    assert_eq!(
        text_of(&pid_file),
        format!("{}\n", first.pid()),
        "the pid file of the first daemon"
    );
    assert_eq!(Peer::join(&place.socket(), 1).id(), 0, "the first daemon serves");
    first.signal(Signal::SIGTERM);
    assert_eq!(first.wait(), 0);
    place.assert_holds_only(&[]);
}

#[test]
fn a_pid_file_left_by_a_killed_daemon_is_taken_over() {
    let place = Place::new();
    let first = place.daemonize(&[]);
    drop(first);
    let left = ["pid", "socket", "socket.control"];
    assert_eq!(place.names(), left, "left by the killed daemon");
    // Longer than the new content.
    fs::write(place.pid_file(), "123456789012345678901234567890\n").expect("it is ours");
    let mut second = place.daemonize(&[]);
    second.signal(Signal::SIGTERM);
    assert_eq!(second.wait(), 0);
    place.assert_holds_only(&[]);
}

#[test]
fn in_the_foreground_no_pid_file_is_written() {
    let place = Place::new();
    let process = place.serve(&[]);
    assert_eq!(place.names(), ["socket", "socket.control"]);
    process.stop();
    place.assert_holds_only(&[]);
}

#[test]
fn its_mode_is_644_with_every_umask() {
    for umask in ["000", "022", "077", "177"] {
        let place = Place::new();
        let mut command = Command::new("sh");
        command.args(["-c", "umask $1; shift; exec \"$0\" \"$@\""]).arg(program()).arg(umask);
        let (mut daemon, _) = Background::start(command.args(place.args()), &place.pid_file());
        let mode = fs::metadata(place.pid_file()).expect("it is there").permissions().mode();
        assert_eq!(mode & 0o7777, 0o644, "umask {umask}");
        daemon.signal(Signal::SIGTERM);
        assert_eq!(daemon.wait(), 0);
        place.assert_holds_only(&[]);
    }
}

#[test]
fn an_empty_file_or_one_with_a_number_is_replaced() {
    for content in ["", "1\n", "1234567890\n"] {
        let place = Place::new();
        fs::write(place.pid_file(), content).expect("the place is new");
        let mut daemon = place.daemonize(&[]);
        assert_eq!(text_of(&place.pid_file()), format!("{}\n", daemon.pid()));
        daemon.signal(Signal::SIGTERM);
        assert_eq!(daemon.wait(), 0);
        place.assert_holds_only(&[]);
    }
}

#[test]
fn any_other_file_is_refused_named_and_left_unchanged() {
    type Make = fn(&Place);
    let cases: [(&str, Make); 13] = [
        ("begins with \"precious\\n\"", |place| fs::write(place.pid_file(), "precious\n").unwrap()),
        ("begins with \"123\"", |place| fs::write(place.pid_file(), "123").unwrap()),
        ("begins with \"\\n\"", |place| fs::write(place.pid_file(), "\n").unwrap()),
        ("begins with \"-1\\n\"", |place| fs::write(place.pid_file(), "-1\n").unwrap()),
        ("begins with \"1\\n2\\n\"", |place| fs::write(place.pid_file(), "1\n2\n").unwrap()),
        ("begins with \"1111111", |place| {
            fs::write(place.pid_file(), "1".repeat(70) + "\n").unwrap()
        }),
        ("is a directory", |place| fs::create_dir(place.pid_file()).unwrap()),
        ("is a FIFO", |place| mkfifo(&place.pid_file(), Mode::S_IRWXU).unwrap()),
        ("is a socket", |place| drop(UnixListener::bind(place.pid_file()).unwrap())),
        ("is a symbolic link", |place| symlink("nowhere", place.pid_file()).unwrap()),
        ("is a symbolic link", |place| {
            fs::write(place.path("target"), "123\n").unwrap();
            symlink("target", place.pid_file()).unwrap();
        }),
        ("has 2 names", |place| {
            fs::write(place.path("target"), "123\n").unwrap();
            fs::hard_link(place.path("target"), place.pid_file()).unwrap();
        }),
        // A file that has the name of the private directory.
        ("is not a private directory", |place| fs::write(place.path("pid.lock"), "").unwrap()),
    ];
    for (named, make) in cases {
        let place = Place::new();
        make(&place);
        let before = contents(&place);
        let ended = run(&mut place.command(&[]));
        let after = contents(&place);
        // Removed now: otherwise the end of `place` would read from a FIFO.
        let _ = fs::remove_file(place.pid_file());
        let pid_file = place.pid_file();
        ended.assert_refused(&["pid file", pid_file.to_str().expect("ours"), named]);
        assert_eq!(after, before, "{named}");
        assert!(!place.shm().exists(), "{named}");
    }
    let place = Place::new();
    run(&mut place.command(&["-p", "/dev/null"])).assert_refused(&["/dev/null", "is a device"]);
    run(&mut place.command(&["-p", "/"])).assert_refused(&["\"/\"", "no file name"]);
    place.assert_holds_only(&[]);
}

/// Name, inode, mode and content of each file in the directory.
fn contents(place: &Place) -> Vec<(String, u64, u32, Option<String>)> {
    let look = |name: String| {
        let path = place.path(&name);
        let meta = fs::symlink_metadata(&path).expect("it is there");
        let content = meta.is_file().then(|| text_of(&path));
        (name, meta.ino(), meta.mode(), content)
    };
    place.names().into_iter().map(look).collect()
}

#[test]
fn files_that_a_killed_daemon_left_in_the_private_directory_are_removed() {
    for (left, pid_file) in [
        // Killed before the new file got its name.
        (&["new"][..], None),
        // Killed while an old file was checked: its name is free, or used again.
        (&["old"], None),
        (&["old", "new"], Some("12\n")),
    ] {
        let place = Place::new();
        let room = place.path("pid.lock");
        fs::create_dir(&room).expect("the place is new");
        fs::set_permissions(&room, Permissions::from_mode(0o700)).expect("it is ours");
        for name in left {
            fs::write(room.join(name), "123\n").expect("it is ours");
        }
        if let Some(text) = pid_file {
            fs::write(place.pid_file(), text).expect("the place is new");
        }
        let mut daemon = place.daemonize(&[]);
        assert_eq!(place.names(), ["pid", "socket", "socket.control"], "{left:?}");
        daemon.signal(Signal::SIGTERM);
        assert_eq!(daemon.wait(), 0);
        place.assert_holds_only(&[]);
    }
}

#[test]
fn another_file_that_a_killed_daemon_had_moved_gets_its_name_back() {
    let place = Place::new();
    let room = place.path("pid.lock");
    fs::create_dir(&room).expect("the place is new");
    fs::set_permissions(&room, Permissions::from_mode(0o700)).expect("it is ours");
    fs::write(room.join("old"), "precious").expect("it is ours");
    run(&mut place.command(&[])).assert_refused(&["begins with \"precious\""]);
    place.assert_holds_only(&["pid"]);
    assert_eq!(text_of(&place.pid_file()), "precious");

    // Its name is used again: the file stays in the private directory, and the error names it.
    fs::create_dir(&room).expect("it was removed");
    fs::set_permissions(&room, Permissions::from_mode(0o700)).expect("it is ours");
    fs::rename(place.pid_file(), room.join("old")).expect("both are ours");
    fs::write(place.pid_file(), "123\n").expect("the name is free");
    let kept = room.join("old");
    run(&mut place.command(&[])).assert_refused(&[kept.to_str().expect("ours"), "move it away"]);
    assert_eq!((text_of(&kept), text_of(&place.pid_file())), ("precious".into(), "123\n".into()));
}

/// Every user may read a pid file, and so take read locks on it.
#[test]
fn locks_of_readers_do_not_keep_a_daemon_from_starting_or_ending() {
    let place = Place::new();
    for content in ["", "1234567890\n"] {
        fs::write(place.pid_file(), content).expect("it can be written");
        let reader = File::open(place.pid_file()).expect("it is there");
        reader.try_lock().expect("no other process has a lock");
        let mut lock = libc::flock {
            l_type: libc::F_RDLCK as i16,
            l_whence: libc::SEEK_SET as i16,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        fcntl(&reader, FcntlArg::F_OFD_SETLK(&lock)).expect("a reader may take a read lock");
        let mut daemon = place.daemonize(&[]);
        assert_eq!(text_of(&place.pid_file()), format!("{}\n", daemon.pid()));

        // The same on the file of the running daemon.
        let reader_too = File::open(place.pid_file()).expect("it is there");
        reader_too.try_lock().expect("the daemon has no such lock");
        lock.l_type = libc::F_RDLCK as i16;
        let read_lock = fcntl(&reader_too, FcntlArg::F_OFD_SETLK(&lock));
        assert!(read_lock.is_err(), "the daemon has a write lock");
        run(&mut place.command(&[])).assert_refused(&[&format!("(pid {})", daemon.pid())]);
        daemon.signal(Signal::SIGTERM);
        assert_eq!(daemon.wait(), 0);
        place.assert_holds_only(&[]);
        // Closing the file is not enough: a child that another test has just forked may have a copy of the descriptor.
        for reader in [reader, reader_too] {
            reader.unlock().expect("it was locked");
        }
    }
}

#[test]
fn a_pid_file_of_another_user_is_refused_and_its_owner_named() {
    if !is_root("give a file to another user") {
        return;
    }
    let place = Place::new();
    fs::write(place.pid_file(), "1\n").expect("the place is new");
    chown(place.pid_file(), Some(NOBODY), None).expect("we are root");
    run(&mut place.command(&[])).assert_refused(&["pid file", "belongs to user 65534"]);
    assert_eq!(text_of(&place.pid_file()), "1\n");
    place.assert_holds_only(&["pid"]);
}

/// Exchanges two names in a loop. [`exchange_names`] runs this as a process of the user [`NOBODY`]. It is a test only so
/// that this program contains it.
#[test]
#[ignore = "a process of other tests"]
fn exchanges_two_names() {
    let Some(names) = std::env::var_os("IVSHMEM_TEST_EXCHANGE") else { return };
    let [one, other] = ["pid", "other"].map(|name| Path::new(&names).join(name));
    let mut stdout = std::io::stdout();
    loop {
        // The call fails while one of the names is missing.
        let flags = RenameFlags::RENAME_EXCHANGE;
        if renameat2(AT_FDCWD, &one, AT_FDCWD, &other, flags).is_ok() {
            // Shows that names are exchanged, and ends the process when the test has ended.
            if stdout.write_all(b".").and_then(|()| stdout.flush()).is_err() {
                return;
            }
        }
    }
}

/// A process that is killed when this value is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a process of another user that exchanges the names "pid" and "other" in this directory.
fn exchange_names(dir: &Path, count: &Path) -> Running {
    let mut command = Command::new(std::env::current_exe().expect("a test knows its own file"));
    command.args(["--exact", "--ignored", "--nocapture", "exchanges_two_names"]);
    command.env("IVSHMEM_TEST_EXCHANGE", dir).current_dir("/").uid(NOBODY).gid(NOBODY);
    command.stdout(File::create(count).expect("a file for its output")).stderr(Stdio::null());
    let child = Running(command.spawn().expect("it starts"));
    let size = || fs::metadata(count).expect("it is ours").len();
    wait_for("names are exchanged", || (size() > 1000).then_some(()));
    child
}

/// Starts and stops daemons for some time while another user exchanges the pid file with the file that `plant` makes.
/// Calls `check` after each daemon.
fn under_exchange(plant: impl Fn(&Path), check: impl Fn(&Path)) {
    let place = Place::new();
    fs::set_permissions(place.dir(), Permissions::from_mode(0o755)).expect("it is ours");
    let shared = place.path("shared");
    fs::create_dir(&shared).expect("the place is new");
    fs::set_permissions(&shared, Permissions::from_mode(0o777)).expect("it is ours");
    fs::write(shared.join("pid"), "1234567890\n").expect("it is ours");
    plant(&shared);
    let _other_user = exchange_names(&shared, &place.path("count"));
    let pid_file = shared.join("pid");
    let pid_file = pid_file.to_str().expect("ours");
    let (start, mut served, mut refused) = (Instant::now(), 0, 0);
    while start.elapsed() < Duration::from_secs(10) || served == 0 || refused == 0 {
        assert!(start.elapsed() < Duration::from_secs(60), "{served} served, {refused} refused");
        common::program::adopt_orphans();
        let ended = run(&mut place.command(&["-p", pid_file]));
        match ended.status.code() {
            Some(0) => {
                served += 1;
                let mut daemon = Background::adopted(&running_pid(&place));
                daemon.signal(Signal::SIGTERM);
                assert_eq!(daemon.wait(), 0);
            }
            Some(1) => {
                ended.assert_refused(&["pid file"]);
                refused += 1;
            }
            _ => panic!("{ended:?}"),
        }
        check(&shared);
        // The next daemon finds a pid file, even if this one removed it.
        let names = ["pid", "other"].map(|name| shared.join(name));
        if let Some(free) = names.iter().find(|name| fs::symlink_metadata(name).is_err()) {
            let new = shared.join("next");
            fs::write(&new, "1234567890\n").expect("it is ours");
            let flags = RenameFlags::RENAME_NOREPLACE;
            let _ = renameat2(AT_FDCWD, &new, AT_FDCWD, free, flags);
            let _ = fs::remove_file(&new);
        }
    }
}

/// The id of the daemon of this place. Its pid file may have another name by now.
fn running_pid(place: &Place) -> String {
    let socket = place.socket();
    let processes = fs::read_dir("/proc").expect("Linux with /proc").flatten();
    let ours = processes.filter(|process| {
        let arguments = fs::read(process.path().join("cmdline")).unwrap_or_default();
        let arguments = String::from_utf8_lossy(&arguments).into_owned();
        arguments.contains("--detached") && arguments.contains(socket.to_str().expect("ours"))
    });
    let pids: Vec<String> =
        ours.map(|process| process.file_name().to_string_lossy().into_owned()).collect();
    assert_eq!(pids.len(), 1, "{pids:?}");
    format!("{}\n", pids[0])
}

#[test]
fn a_file_that_another_user_exchanges_with_the_pid_file_is_neither_written_nor_removed() {
    if !is_root("have another user exchange files") {
        return;
    }
    under_exchange(
        |shared| fs::write(shared.join("other"), "precious").expect("it is ours"),
        |shared| {
            // The file may have either name.
            let found = || {
                let names: [PathBuf; 2] = ["pid", "other"].map(|name| shared.join(name));
                names.iter().any(|name| text_of(name) == "precious").then_some(())
            };
            wait_for("the file with that content", found);
        },
    );
}

#[test]
fn a_link_that_another_user_exchanges_with_the_pid_file_is_not_followed() {
    if !is_root("have another user exchange files") {
        return;
    }
    let place = Place::new();
    let target = place.path("target");
    // A content that a pid file may have: only the link protects the file.
    fs::write(&target, "123\n").expect("the place is new");
    let before = fs::metadata(&target).expect("it is ours");
    under_exchange(
        |shared| symlink(&target, shared.join("other")).expect("it is ours"),
        |_| {
            let now = fs::metadata(&target).expect("it stays");
            assert_eq!(text_of(&target), "123\n");
            assert_eq!((now.ino(), now.mode()), (before.ino(), before.mode()));
        },
    );
}
