// SPDX-License-Identifier: GPL-2.0-or-later
//! The places that a server is given for its socket and files, and what may be there already: sockets and files of other
//! programs, directories that cannot be used, and directories in which another user exchanges names. Only what is
//! dead, or the server's own, is ever removed or changed.

// Only common::peer has unsafe code: for descriptors and bytes that were received. Every other module forbids it.
#![deny(unsafe_code)]

mod common;

use std::fs::{self, Permissions};
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirEntryExt, MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, bind, socket};
use nix::sys::stat::Mode;
use nix::unistd::{geteuid, mkfifo};

use common::daemon::program;
use common::peer::{Connection, Peer};
use common::program::{Ended, Place, Process, in_own_mounts, run};
use common::skip::skip;
use common::target::{Target, full_size, is_root};
use common::{wait_for, wait_up_to};

on_each_server! {
    only_a_dead_socket_is_replaced_and_everything_else_in_its_place_stays,
    a_dead_socket_of_any_kind_is_replaced,
    a_live_server_of_another_kind_is_not_touched_and_sees_no_connection,
    a_live_socket_that_does_not_listen_is_not_touched,
}

/// Any server, in each way in which it can be started: in the background too, where it has that.
fn each_way(target: Target, place: &Place) -> Vec<Command> {
    let mut ways = vec![place.command_of(target)];
    if target == Target::Daemon {
        ways.push(place.command(&[]));
    }
    ways
}

fn only_a_dead_socket_is_replaced_and_everything_else_in_its_place_stays(target: Target) {
    type Make = fn(&Place);
    let cases: [(&str, Make); 7] = [
        ("a regular file", |place| fs::write(place.socket(), "content").unwrap()),
        ("a regular file", |place| fs::write(place.socket(), "").unwrap()),
        ("a directory", |place| fs::create_dir(place.socket()).unwrap()),
        ("a symbolic link", |place| symlink("nowhere", place.socket()).unwrap()),
        ("a symbolic link", |place| {
            fs::write(place.path("target"), "content").unwrap();
            symlink("target", place.socket()).unwrap();
        }),
        ("a symbolic link", |place| {
            // To a dead socket: neither is ours to remove.
            drop(UnixListener::bind(place.path("target")).unwrap());
            symlink("target", place.socket()).unwrap();
        }),
        ("a special file", |place| mkfifo(&place.socket(), Mode::S_IRWXU).unwrap()),
    ];
    for (kind, make) in cases {
        let place = Place::new();
        make(&place);
        let look = || {
            place.names().into_iter().map(|name| {
                let path = place.path(&name);
                let meta = fs::symlink_metadata(&path).expect("it is there");
                let content = meta.is_file().then(|| fs::read(&path).expect("it can be read"));
                (name, meta.ino(), meta.mode(), fs::read_link(&path).ok(), content)
            })
        };
        let before: Vec<_> = look().collect();
        for mut command in each_way(target, &place) {
            let ended = run(&mut command);
            let socket = place.socket();
            let parts = [kind, socket.to_str().expect("ours")];
            ended.assert_refused_by(target, &parts, &[Errno::EEXIST]);
            assert_eq!(look().collect::<Vec<_>>(), before, "{kind}");
            assert!(!place.shm().exists(), "{kind}: memory was left behind");
        }
    }
}

fn a_dead_socket_of_any_kind_is_replaced(target: Target) {
    let place = Place::new();
    let leave: [fn(&Path); 2] = [
        |path| drop(UnixListener::bind(path).unwrap()),
        |path| drop(UnixDatagram::bind(path).unwrap()),
    ];
    for leave in leave {
        leave(&place.socket());
        let server = place.serve_by(target);
        assert_eq!(Peer::join(&place.socket(), 1).id(), 0);
        server.stop();
        place.assert_holds_only(&[]);
    }
}

fn a_live_server_of_another_kind_is_not_touched_and_sees_no_connection(target: Target) {
    let place = Place::new();
    let owner = UnixListener::bind(place.socket()).expect("the place is new");
    owner.set_nonblocking(true).expect("it is a socket");
    let inode = fs::metadata(place.socket()).expect("it is there").ino();
    let path = place.socket();
    for mut command in each_way(target, &place) {
        let ended = run(&mut command);
        let parts = ["in use", path.to_str().expect("ours")];
        ended.assert_refused_by(target, &parts, &[Errno::EADDRINUSE]);
        assert_eq!(owner.accept().map(drop).unwrap_err().kind(), ErrorKind::WouldBlock);
        assert_eq!(fs::metadata(&path).expect("it is there").ino(), inode);
        place.assert_holds_only(&["socket"]);
    }
    let _client = UnixStream::connect(&path).expect("it is reachable still");
    owner.accept().expect("that one it sees");
}

fn a_live_socket_that_does_not_listen_is_not_touched(target: Target) {
    for kind in [SockType::Stream, SockType::Datagram, SockType::SeqPacket] {
        let place = Place::new();
        let path = place.socket();
        let owner = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None).unwrap();
        bind(owner.as_raw_fd(), &UnixAddr::new(&path).unwrap()).expect("the place is new");
        let inode = fs::metadata(&path).expect("it is there").ino();
        let ended = run(&mut place.command_of(target));
        let parts = ["in use", path.to_str().unwrap()];
        ended.assert_refused_by(target, &parts, &[Errno::EADDRINUSE]);
        assert_eq!(fs::metadata(&path).expect("it is there").ino(), inode, "{kind:?}");
        place.assert_holds_only(&["socket"]);
    }
}

#[test]
fn a_socket_path_has_1_to_107_bytes() {
    let place = Place::new();
    let dir = place.dir().to_str().expect("ours");
    let path = |length: usize| format!("{dir}/{}", "s".repeat(length - dir.len() - 1));

    let longest = path(107);
    let mut server = Process::spawn(&mut place.command(&["-F", "-S", &longest]));
    server.wait_until_listening(Path::new(&longest));
    drop(Peer::join(Path::new(&longest), 1));
    server.stop();
    place.assert_holds_only(&[]);

    for foreground in [&["-F"][..], &[]] {
        let too_long = path(108);
        let ended = run(place.command(&["-S", &too_long]).args(foreground));
        ended.assert_refused(&["108 bytes", "107", &too_long]);
        run(place.command(&["-S", ""]).args(foreground)).assert_refused(&["--socket"]);
        place.assert_holds_only(&[]);
    }
}

/// Runs the program as a user whom permissions hold for, where the directory of the place may be read by everybody
/// and written by nobody.
#[track_caller]
fn run_where_nothing_may_be_written(place: &Place, args: &[&str]) -> Ended {
    let permit = |mode| {
        fs::set_permissions(place.dir(), Permissions::from_mode(mode)).expect("it is ours");
    };
    // The directory that the program was built in may be closed to others.
    let copy = place.path("program");
    if !copy.exists() {
        fs::copy(program(), &copy).expect("it can be copied");
        fs::set_permissions(&copy, Permissions::from_mode(0o755)).expect("it is ours");
    }
    let mut command = Command::new("setpriv");
    if geteuid().is_root() {
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    }
    command.arg(copy).args(place.args()).args(args);
    permit(0o555);
    let ended = run(&mut command);
    permit(0o755);
    ended
}

#[test]
fn a_directory_that_may_not_be_written_is_refused_and_nothing_is_left() {
    let place = Place::new();
    let (socket, pid_file) = (place.socket(), place.pid_file());
    let (socket, pid_file) = (socket.to_str().expect("ours"), pid_file.to_str().expect("ours"));
    let dir = place.dir().to_str().expect("ours");
    let denied = "Permission denied";
    // In the background the pid file is first.
    for (args, named) in [(&["-F"][..], socket), (&[], pid_file), (&["-F", "-m", dir], dir)] {
        run_where_nothing_may_be_written(&place, args).assert_refused(&[named, denied]);
        place.assert_holds_only(&["program"]);
    }

    // A dead socket that it may not remove.
    drop(UnixListener::bind(socket).expect("the place is new"));
    run_where_nothing_may_be_written(&place, &["-F"]).assert_refused(&[socket, denied]);
    place.assert_holds_only(&["program", "socket"]);
    fs::remove_file(socket).expect("it is ours");

    // Memory that it may not open.
    fs::write(place.shm(), "content").expect("/dev/shm can be written");
    fs::set_permissions(place.shm(), Permissions::from_mode(0o000)).expect("it is ours");
    let ended = run_where_nothing_may_be_written(&place, &["-F"]);
    let why = if geteuid().is_root() { "belongs to user id 0 and has mode 0000" } else { denied };
    ended.assert_refused(&[&place.name, why]);
    assert_eq!(fs::metadata(place.shm()).expect("it is there").len(), 7);
    assert_eq!(place.names(), ["program"]);
}

#[test]
fn a_file_system_that_is_full_or_read_only_is_refused_and_nothing_is_left() {
    let place = Place::new();
    let dir = place.path("small");
    fs::create_dir(&dir).expect("a directory");
    let in_dir = |name: &str| dir.join(name).to_str().expect("ours").to_owned();
    let (socket, pid_file, here) = (in_dir("socket"), in_dir("pid"), in_dir(""));
    let no_room = "No space left on device";
    let no_inodes = "mount -t tmpfs -o nr_inodes=1 none \"$1\"";
    // There is room for names, but not for content.
    let no_blocks = "mount -t tmpfs -o size=4K none \"$1\"; echo > \"$1/filler\"";
    let read_only = "mount -t tmpfs -o ro none \"$1\"";
    for (mount, args, parts) in [
        (no_inodes, &["-F", "-S", &socket][..], [&*socket, no_room]),
        (no_inodes, &["-p", &pid_file], [&pid_file, no_room]),
        (no_inodes, &["-F", "-m", &here], [&here, no_room]),
        (no_blocks, &["-p", &pid_file], [&pid_file, no_room]),
        (no_blocks, &["-F", "-m", &here], [&here, "does not fit"]),
        (read_only, &["-F", "-S", &socket], [&socket, "Read-only file system"]),
        (read_only, &["-p", &pid_file], [&pid_file, "Read-only file system"]),
        (read_only, &["-F", "-m", &here], [&here, "Read-only file system"]),
    ] {
        // What is left in the mount is seen from inside only.
        let script = format!(
            "{mount}; dir=$1; shift; ls \"$dir\" > {before}
            code=0; \"$0\" \"$@\" || code=$?
            ls \"$dir\" | cmp - {before} >&2; exit $code",
            before = place.path("before").display(),
        );
        let mut all = vec![dir.to_str().expect("ours").to_owned()];
        all.extend(place.args());
        all.extend(args.iter().map(|arg| (*arg).to_owned()));
        let Some(mut command) = in_own_mounts(&script, &all) else {
            return skip("mount namespaces are not to be had (unshare -rm)");
        };
        let ended = run(&mut command);
        ended.assert_refused(&parts);
        assert!(!ended.stderr.contains("differ"), "left behind: {ended:?}");
        place.assert_holds_only(&["before", "small"]);
    }
}

#[test]
fn a_directory_that_has_vanished_is_refused_before_and_survived_after_the_start() {
    let place = Place::new();
    let dir = place.path("vanishes");
    let socket = dir.join("socket");
    let socket_arg = socket.to_str().expect("ours");
    run(&mut place.command(&["-F", "-S", socket_arg]))
        .assert_refused(&[socket_arg, "No such file or directory"]);
    place.assert_holds_only(&[]);

    // The current directory, which has no name any more.
    fs::create_dir(&dir).expect("a directory");
    let mut command = Command::new("sh");
    command.current_dir(&dir).args(["-c", "rmdir \"$PWD\"; exec \"$0\" \"$@\""]).arg(program());
    command.args(place.args()).args(["-F", "-S", "socket"]);
    run(&mut command).assert_refused(&["socket", "No such file or directory"]);
    place.assert_holds_only(&[]);

    fs::create_dir(&dir).expect("a directory");
    let mut server = Process::spawn(&mut place.command(&["-F", "-S", socket_arg]));
    server.wait_until_listening(&socket);
    let mut client = Connection::open(&socket);
    fs::remove_dir_all(&dir).expect("it is ours");
    assert_eq!(client.expect("the version").value, 0, "it serves who is there");
    let ended = server.stop();
    assert_eq!(ended.stderr, "", "nothing to complain about");
    place.assert_holds_only(&[]);
}

#[test]
fn at_the_end_only_its_own_socket_memory_and_pid_file_are_removed() {
    let place = Place::new();
    let mut daemon = place.daemonize(&[]);
    // Somebody has taken all three away, and put others in their place.
    for path in [place.socket(), place.shm(), place.pid_file()] {
        fs::remove_file(&path).expect("it is there");
        fs::write(&path, "somebody else's").expect("it can be written");
    }
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait(), 0);
    for path in [place.socket(), place.shm(), place.pid_file()] {
        assert_eq!(fs::read(&path).ok().as_deref(), Some(&b"somebody else's"[..]), "{path:?}");
    }
}

/// The two names that [`exchange_names`] exchanges without end, and the target of a link that is to be one of them; a tab
/// between each.
const EXCHANGE: &str = "IVSHMEM_TEST_EXCHANGE";

/// No test, but the attacker of the tests below: this program, started anew as another user.
#[test]
#[ignore = "the attacker of other tests, which start it"]
fn exchange_names() {
    let Ok(text) = std::env::var(EXCHANGE) else { return };
    let words: Vec<_> = text.split('\t').collect();
    let (one, other) = (words[0], words[1]);
    loop {
        for _ in 0..16 {
            // One of the two may not be there for a moment.
            let _ = renameat2(AT_FDCWD, one, AT_FDCWD, other, RenameFlags::RENAME_EXCHANGE);
        }
        let is_link = |path| Path::new(path).is_symlink();
        if let Some(target) = words.get(2).filter(|_| !is_link(one) && !is_link(other)) {
            // The server may have removed it, which is no harm.
            let _ = fs::remove_file(other);
            let _ = symlink(target, other);
        }
    }
}

/// Starts a server again and again, in turn ended in order and killed, while an ordinary user exchanges two names.
#[track_caller]
fn start_while_names_are_exchanged(
    place: &Place,
    socket: &Path,
    exchanged: &[&Path],
    check: impl Fn(),
) {
    let attacker = place.path("attacker");
    fs::copy(std::env::current_exe().expect("a test knows its own file"), &attacker).expect("room");
    fs::set_permissions(&attacker, Permissions::from_mode(0o755)).expect("it is ours");
    let words: Vec<_> = exchanged.iter().map(|path| path.to_str().expect("ours")).collect();
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&attacker);
    command.args(["--exact", "exchange_names", "--ignored"]).env(EXCHANGE, words.join("\t"));
    let mut attacker = Process::spawn(&mut command);

    let seconds = if full_size("exchanged names") { 10 } else { 2 };
    let until = Instant::now() + Duration::from_secs(seconds);
    let mut rounds = 0;
    while Instant::now() < until {
        let socket = socket.to_str().expect("ours");
        let args = ["-F", "-S", socket, "--socket-mode=666", "--memfd"];
        let mut server = Process::spawn(&mut place.command(&args));
        let ended = || (!server.is_running()).then_some(());
        if wait_up_to(Duration::from_millis(20), ended).is_none() {
            let signals = [Signal::SIGTERM, Signal::SIGKILL];
            server.signal(signals[rounds % 2]);
        }
        let ended = server.end();
        assert!(!ended.stderr.contains("panicked"), "{ended:?}");
        check();
        rounds += 1;
    }
    assert!(attacker.is_running() && rounds > 10, "{rounds} rounds: {:?}", attacker.end());
}

/// A directory of another user, and in it a file that is root's.
fn their_directory(place: &Place) -> PathBuf {
    let theirs = place.path("theirs");
    fs::create_dir(&theirs).expect("a directory");
    fs::set_permissions(place.dir(), Permissions::from_mode(0o755)).expect("it is ours");
    chown(&theirs, Some(65534), Some(65534)).expect("root may");
    theirs
}

fn write_secret(path: &Path) -> u64 {
    fs::write(path, "secret").expect("it can be written");
    fs::set_permissions(path, Permissions::from_mode(0o600)).expect("it is ours");
    fs::metadata(path).expect("it is there").ino()
}

#[track_caller]
fn assert_untouched(path: &Path, inode: u64) {
    let meta = fs::symlink_metadata(path).unwrap_or_else(|error| panic!("{path:?}: {error}"));
    assert_eq!((meta.ino(), meta.mode() & 0o777, meta.len()), (inode, 0o600, 6), "{path:?}");
}

#[test]
fn no_file_behind_a_link_that_is_exchanged_for_the_socket_is_changed() {
    if !is_root("act as two users") {
        return;
    }
    let place = Place::new();
    let theirs = their_directory(&place);
    let secret = place.path("secret");
    let inode = write_secret(&secret);
    let (socket, link) = (theirs.join("socket"), theirs.join("link"));
    symlink(&secret, &link).expect("a link");
    start_while_names_are_exchanged(&place, &socket, &[&socket, &link, &secret], || {
        assert_untouched(&secret, inode);
    });
}

#[test]
fn no_file_that_is_exchanged_for_the_socket_is_changed_or_removed() {
    if !is_root("act as two users") {
        return;
    }
    let place = Place::new();
    let theirs = their_directory(&place);
    let (socket, file) = (theirs.join("socket"), theirs.join("file"));
    let inode = write_secret(&file);
    drop(UnixListener::bind(&socket).expect("the place is new"));
    start_while_names_are_exchanged(&place, &socket, &[&socket, &file], || {
        let names: Vec<_> = fs::read_dir(&theirs).expect("it is there").flatten().collect();
        let entry = names.iter().find(|entry| entry.ino() == inode);
        assert_untouched_entry(entry.map(fs::DirEntry::path).as_deref(), &names, inode);
    });
}

/// Its name may be exchanged while this looks; its inode stays.
#[track_caller]
fn assert_untouched_entry(path: Option<&Path>, names: &[fs::DirEntry], inode: u64) {
    let Some(path) = path else { panic!("it was removed: {names:?}") };
    let same = |path: &Path| {
        let meta = fs::symlink_metadata(path).ok().filter(|meta| meta.ino() == inode)?;
        Some((meta.mode() & 0o777, meta.len()))
    };
    let both = [path.with_file_name("socket"), path.with_file_name("file")];
    let found = wait_for("its name holds still", || both.iter().find_map(|path| same(path)));
    assert_eq!(found, (0o600, 6));
}

#[test]
fn no_file_in_a_directory_that_is_exchanged_is_changed_or_removed() {
    if !is_root("act as two users") {
        return;
    }
    let place = Place::new();
    let theirs = their_directory(&place);
    let safe = place.path("safe");
    fs::create_dir(&safe).expect("a directory");
    let secret = safe.join("socket");
    let inode = write_secret(&secret);
    let (directory, link) = (theirs.join("directory"), theirs.join("link"));
    fs::create_dir(&directory).expect("a directory");
    chown(&directory, Some(65534), Some(65534)).expect("root may");
    symlink(&safe, &link).expect("a link");
    start_while_names_are_exchanged(
        &place,
        &directory.join("socket"),
        &[&directory, &link],
        || {
            assert_untouched(&secret, inode);
        },
    );
}

#[test]
fn a_server_in_a_directory_of_another_user_serves_and_leaves_nothing() {
    if !is_root("act as two users") {
        return;
    }
    let place = Place::new();
    let theirs = their_directory(&place);
    let socket = theirs.join("socket");
    let names = || fs::read_dir(&theirs).expect("it is there").count();
    for _ in 0..2 {
        let args = ["-F", "-S", socket.to_str().expect("ours"), "--socket-mode=660"];
        let server = Process::spawn(&mut place.command(&args));
        let connected = wait_for("it listens", || UnixStream::connect(&socket).ok());
        drop(connected);
        assert_eq!(fs::metadata(&socket).expect("it is there").mode() & 0o777, 0o660);
        assert_eq!(names(), 2, "the socket and the control socket");
        run(&mut place.command(&[&args[..], &["--memfd"]].concat())).assert_refused(&["in use"]);
        assert_eq!(names(), 2, "the socket and the control socket");
        // Killed, it leaves its socket, which the next round replaces.
        drop(server);
    }
    let args = ["-F", "-S", socket.to_str().expect("ours")];
    let server = Process::spawn(&mut place.command(&args));
    wait_for("it listens", || UnixStream::connect(&socket).ok());
    server.stop();
    assert_eq!(names(), 0);
    place.assert_holds_only(&["theirs"]);
}
