// SPDX-License-Identifier: GPL-2.0-or-later
//! The shared memory that the daemon serves: its size, its content, and what is refused.

// Only common::peer has unsafe code: for descriptors and bytes that were received. Every other module forbids it.
#![deny(unsafe_code)]

mod common;

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;
use std::process::Command;

use ivshmem::{ErrorKind, MemorySource, Server};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::Mode;
use nix::sys::statvfs::statvfs;
use nix::unistd::{linkat, mkfifo};

use common::huge_pages::HugePages;
use common::peer::Peer;
use common::program::{Place, Process, in_own_mounts, memory_of, run, size_of};
use common::skip::skip;
use common::target::is_root;

/// Starts the program where `dir` is a file system that is mounted so.
fn on_mount(place: &Place, mount: &str, dir: &Path, args: &[&str]) -> Option<Command> {
    let dir = dir.to_str().expect("ours").to_owned();
    let mut all = vec![dir];
    all.extend(place.args());
    all.extend(args.iter().map(|arg| (*arg).to_owned()));
    all.push("-F".to_owned());
    in_own_mounts(&format!("{mount} none \"$1\"; shift; exec \"$0\" \"$@\""), &all)
}

#[test]
fn sizes_are_rounded_up_to_a_power_of_two() {
    for (asked, served) in [
        ("1", 1),
        ("4096", 4096),
        ("4097", 8192),
        ("0x3000", 0x4000),
        ("1.5K", 2048),
        ("64k", 64 << 10),
        ("3M", 4 << 20),
        ("0.25M", 256 << 10),
    ] {
        let place = Place::new();
        let server = place.serve(&["-l", asked]);
        let peer = Peer::join(&place.socket(), 1);
        assert_eq!(size_of(&peer), served, "{asked}");
        assert_eq!(fs::metadata(place.shm()).expect("it has its name").len(), served, "{asked}");
        server.stop();
        place.assert_holds_only(&[]);
    }
}

/// What the file system of `dir` has left, in bytes.
fn room_in(dir: &Path) -> u64 {
    let system = statvfs(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    system.blocks_available() * system.fragment_size()
}

/// What the host has left, in bytes.
fn available_memory() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").expect("Linux with /proc");
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    number.and_then(|number| number.parse::<u64>().ok()).expect("kilobytes") << 10
}

#[test]
fn sizes_beyond_32_bits_are_really_served() {
    /// What the largest needs, with something to spare for everybody else.
    const NEEDED: u64 = 5 << 30;
    let place = Place::new();
    let dir = place.dir().to_str().expect("ours");
    // In a directory where that can be, as it is faster on a disk.
    for (asked, served, in_dir) in [
        ("1025M", 2 << 30, true),
        ("1.5G", 2 << 30, true),
        ("3G", 4 << 30, true),
        ("4G", 4 << 30, false),
    ] {
        let where_to = if in_dir { place.dir() } else { Path::new("/dev/shm") };
        let room = room_in(where_to).min(if in_dir { u64::MAX } else { available_memory() });
        if room < NEEDED {
            return skip(&format!("memory of {asked} wants {NEEDED} bytes, {room} are free"));
        }
        let args = ["-l", asked, "-m", dir];
        let server = place.serve(if in_dir { &args } else { &args[..2] });
        let peer = Peer::join(&place.socket(), 1);
        assert_eq!(size_of(&peer), served, "{asked}");
        memory_of(&peer).write_all_at(b"the end", served - 7).expect("all of it is there");
        let other = memory_of(&Peer::join(&place.socket(), 1));
        let named = if in_dir { other } else { File::open(place.shm()).expect("it has its name") };
        let mut bytes = [0; 7];
        named.read_exact_at(&mut bytes, served - 7).expect("all of it is there");
        assert_eq!(&bytes, b"the end", "{asked}");
        server.stop();
        place.assert_holds_only(&[]);
    }
}

#[test]
fn memory_that_is_there_keeps_its_content_and_may_grow() {
    for has in [0, 1000, 4096, 64 << 10] {
        let place = Place::new();
        let content: Vec<u8> = (0..has).map(|at: usize| (at % 251) as u8 + 1).collect();
        fs::write(place.shm(), &content).expect("/dev/shm can be written");
        let inode = fs::metadata(place.shm()).expect("it is there").ino();
        let server = place.serve(&["-l", "64K"]);
        let peer = Peer::join(&place.socket(), 1);
        let memory = memory_of(&peer);
        assert_eq!(memory.metadata().expect("fstat works").ino(), inode, "the same object");
        let mut bytes = vec![0xff; 64 << 10];
        memory.read_exact_at(&mut bytes, 0).expect("all of it is there");
        assert_eq!(size_of(&peer), 64 << 10);
        assert_eq!(bytes[..has], content, "the content of {has} bytes");
        assert!(bytes[has..].iter().all(|byte| *byte == 0), "what was added is empty");
        server.stop();
        place.assert_holds_only(&[]);
    }
}

#[test]
fn memory_that_would_have_to_shrink_is_refused_and_left_alone() {
    let place = Place::new();
    // Not a power of two: it need not be one of ours.
    let content = vec![7; 100_000];
    fs::write(place.shm(), &content).expect("/dev/shm can be written");
    for args in [&["-F"][..], &[]] {
        let ended = run(place.command(&["-l", "64K"]).args(args));
        ended.assert_refused(&[&place.name, "100000", "65536", "shrink"]);
        assert_eq!(fs::read(place.shm()).expect("it is there"), content);
        assert!(place.names().is_empty(), "left behind: {:?}", place.names());
    }
}

#[test]
fn impossible_sizes_are_refused_and_leave_nothing() {
    let place = Place::new();
    for (size, parts) in [
        ("0", ["0", "1 to"]),
        ("0K", ["size 0", "1 to"]),
        ("15E", ["17293822569102704640", "1 to 4611686018427387904"]),
        ("4.1E", ["is not possible", "1 to 4611686018427387904"]),
        // Possible for a file, but not for this host.
        ("4E", ["4611686018427387904 bytes does not fit", "bytes left"]),
        ("1P", ["1125899906842624 bytes does not fit", "bytes left"]),
        ("16E", ["--size", "16E"]),
    ] {
        run(&mut place.command(&["-F", "-l", size])).assert_refused(&parts);
        place.assert_holds_only(&[]);
        let dir = place.dir().to_str().expect("ours");
        run(&mut place.command(&["-F", "-l", size, "-m", dir])).assert_refused(&parts);
        place.assert_holds_only(&[]);
    }
}

#[test]
fn a_file_system_that_is_too_small_is_found_out_at_the_start() {
    let place = Place::new();
    let dir = place.path("memory");
    fs::create_dir(&dir).expect("a directory");
    let in_dir = dir.to_str().expect("ours");
    let mount = "mount -t tmpfs -o size=1M";
    for (mounted, args) in [(&*dir, &["-m", in_dir][..]), (Path::new("/dev/shm"), &[])] {
        let start = |size| on_mount(&place, mount, mounted, &[args, &["-l", size]].concat());
        let Some(mut large) = start("1025K") else {
            return skip("mount namespaces are not to be had (unshare -rm)");
        };
        run(&mut large).assert_refused(&["2097152 bytes does not fit", "1048576 bytes left"]);
        place.assert_holds_only(&["memory"]);

        let mut server = Process::spawn(&mut start("1M").expect("it went well before"));
        server.wait_until_listening(&place.socket());
        let peer = Peer::join(&place.socket(), 1);
        let reserved = 512 * memory_of(&peer).metadata().expect("fstat works").blocks();
        assert_eq!(reserved, 1 << 20, "nobody else can take what a guest will write to");
        memory_of(&peer).write_all_at(&[1; 1 << 20], 0).expect("all of it is there");
        server.stop();
        place.assert_holds_only(&["memory"]);
    }
}

/// Where nothing else bounds it, the machine's memory does: else the kernel would end other processes to fill it. In
/// earnest that would end this test too; so strace keeps the server from reserving anything.
#[test]
fn memory_beyond_what_the_machine_has_is_refused_before_it_is_filled() {
    let place = Place::new();
    let trace = "strace -qq -o /dev/null -e trace=fallocate -e inject=fallocate:error=EIO";
    let huge = ["-F", "-l", "1P"].map(str::to_owned);
    let sealed = [place.args().as_slice(), &huge, &["--memfd".to_owned()]].concat();
    let mut words = trace.split(' ');
    let mut strace = Command::new(words.next().expect("its name"));
    let refused = ["1125899906842624 bytes does not fit", "bytes left"];
    run(strace.args(words).arg(common::daemon::program()).args(&sealed)).assert_refused(&refused);
    place.assert_holds_only(&[]);

    let script = format!("mount -t tmpfs -o size=4P none /dev/shm && exec {trace} \"$0\" \"$@\"");
    match in_own_mounts(&script, &[place.args().as_slice(), &huge].concat()) {
        Some(mut named) => run(&mut named).assert_refused(&refused),
        None => skip("mount namespaces are not to be had (unshare -rm)"),
    }
    place.assert_holds_only(&[]);
}

#[test]
fn memory_without_a_name_leaves_none() {
    let place = Place::new();
    let server = place.serve(&["-m", place.dir().to_str().expect("ours"), "-l", "3M"]);
    let one = Peer::join(&place.socket(), 1);
    let two = Peer::join(&place.socket(), 1);
    assert_eq!(size_of(&one), 4 << 20);
    place.assert_holds_only(&["socket", "socket.control"]);
    memory_of(&one).write_all_at(b"shared", 12345).expect("it is there");
    let mut bytes = [0; 6];
    memory_of(&two).read_exact_at(&mut bytes, 12345).expect("it is there");
    assert_eq!(&bytes, b"shared");
    server.stop();
    place.assert_holds_only(&[]);
}

#[test]
fn memory_that_is_sealed_has_no_name_and_no_client_can_shrink_it() {
    let place = Place::new();
    let server = place.serve(&["--memfd", "-l", "100K"]);
    let peers = [(); 2].map(|()| Peer::join(&place.socket(), 1));
    place.assert_holds_only(&["socket", "socket.control"]);
    for size in [0, 4096, 1 << 20] {
        let resized = memory_of(&peers[0]).set_len(size);
        assert!(resized.is_err(), "a client made it {size} bytes");
    }
    assert_eq!(size_of(&peers[1]), 128 << 10);
    memory_of(&peers[0]).write_all_at(b"shared", 131_000).expect("all of it is there");
    let mut bytes = [0; 6];
    memory_of(&peers[1]).read_exact_at(&mut bytes, 131_000).expect("all of it is there");
    assert_eq!(&bytes, b"shared");
    server.stop();
}

#[test]
fn a_directory_that_is_none_or_is_not_there_is_refused() {
    let place = Place::new();
    fs::write(place.path("file"), "content").expect("it can be written");
    for (name, why) in [("missing", "No such file"), ("file", "Not a directory")] {
        let dir = place.path(name);
        let dir = dir.to_str().expect("ours");
        run(&mut place.command(&["-F", "-m", dir])).assert_refused(&[dir, why]);
        place.assert_holds_only(&["file"]);
    }
}

#[test]
fn a_slash_before_the_name_makes_no_difference() {
    let place = Place::new();
    let name = format!("/{}", place.name);
    let server = place.serve(&["-M", &name]);
    assert!(place.shm().exists());
    server.stop();
    place.assert_holds_only(&[]);
}

#[test]
fn what_is_no_memory_object_but_has_its_name_is_refused_and_left_alone() {
    let place = Place::new();
    fs::write(place.path("precious"), "content").expect("it can be written");
    symlink(place.path("precious"), place.shm()).expect("/dev/shm can be written");
    run(&mut place.command(&["-F"])).assert_refused(&[&place.name]);
    assert_eq!(fs::read(place.path("precious")).expect("it is there"), b"content");
    assert!(place.shm().is_symlink());
    fs::remove_file(place.shm()).expect("it is ours");

    fs::create_dir(place.shm()).expect("/dev/shm can be written");
    let ended = run(&mut place.command(&["-F"]));
    let intact = fs::remove_dir(place.shm());
    ended.assert_refused(&[&place.name]);
    intact.expect("the directory is still there");
    place.assert_holds_only(&["precious"]);

    mkfifo(&place.shm(), Mode::S_IRWXU).expect("/dev/shm can be written");
    let ended = run(&mut place.command(&["-F"]));
    let intact = fs::remove_file(place.shm());
    ended.assert_refused(&[&place.name, "no regular file"]);
    intact.expect("the pipe is still there");
}

fn prepare(place: &Place, mode: u32) {
    fs::write(place.shm(), "").expect("/dev/shm can be written");
    fs::set_permissions(place.shm(), Permissions::from_mode(mode)).expect("it is ours");
}

/// An administrator may prepare it, to say which group may read it.
#[test]
fn an_empty_object_that_was_prepared_is_used_and_outlives_a_failed_start() {
    let place = Place::new();
    prepare(&place, 0o640);
    for foreground in [&["-F"][..], &[]] {
        let nowhere = ["-S", "/nowhere/socket"];
        run(place.command(foreground).args(nowhere)).assert_refused(&["/nowhere/socket"]);
        let meta = fs::metadata(place.shm()).expect("it is there still");
        assert_eq!((meta.len(), meta.mode() & 0o777), (0, 0o640));
    }
    let server = place.serve(&[]);
    let meta = fs::metadata(place.shm()).expect("it is there still");
    assert_eq!((meta.len(), meta.mode() & 0o777), (64 << 10, 0o640));
    server.stop();

    // One that a server made, and could do nothing with, does not.
    prepare(&place, 0o700);
    run(&mut place.command(&["-F", "-S", "/nowhere/socket"])).assert_refused(&["/nowhere/socket"]);
    place.assert_holds_only(&[]);
}

#[test]
fn an_object_that_others_may_write_is_refused_unless_the_memory_mode_allows_it() {
    let place = Place::new();
    for mode in [0o660, 0o606, 0o666, 0o777] {
        prepare(&place, mode);
        let named = [&*place.name, &format!("mode {mode:04o}"), "0700"];
        run(&mut place.command(&["-F"])).assert_refused(&named);
        let meta = fs::metadata(place.shm()).expect("it is left alone");
        assert_eq!((meta.len(), meta.mode() & 0o777), (0, mode));
    }
    prepare(&place, 0o660);
    let mut server = Process::spawn(place.command(&["--shm-mode", "660"]).arg("-F"));
    server.wait_until_listening(&place.socket());
    server.stop();
    let mut server = Process::spawn(place.command(&["--shm-mode", "606"]).arg("-F"));
    server.wait_until_listening(&place.socket());
    let mode = fs::metadata(place.shm()).expect("it is new").mode() & 0o777;
    assert_eq!(mode, 0o606, "whatever the umask is");
    server.stop();
    let start = |mode| {
        let builder = Server::builder().socket_path(place.socket()).size(4096);
        builder.memory(MemorySource::posix(&place.name)).memory_mode(mode).start()
    };
    prepare(&place, 0o666);
    let error = start(0o660).expect_err("others may write it");
    assert_eq!((error.kind(), error.errno()), (ErrorKind::Untrusted, Errno::EACCES as i32));
    prepare(&place, 0o660);
    drop(start(0o660).expect("the group may"));
    // A new one gets that mode, whatever the umask is.
    let server = start(0o666).expect("it starts");
    assert_eq!(fs::metadata(place.shm()).expect("it is there").mode() & 0o777, 0o666);
    drop(server);
    let error = start(0o60).expect_err("the server itself could not open it again");
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    place.assert_holds_only(&[]);
}

#[test]
fn an_object_or_a_lock_file_of_another_user_is_refused_and_its_owner_named() {
    if !is_root("make files of other users") {
        return;
    }
    let place = Place::new();
    for mode in [0o600, 0o666] {
        prepare(&place, mode);
        chown(place.shm(), Some(65534), Some(65534)).expect("root may");
        let mode = format!("{mode:04o}");
        run(&mut place.command(&["-F"])).assert_refused(&[
            &place.name,
            "belongs to user id 65534",
            &mode,
            "user id 0",
        ]);
        assert_eq!(fs::metadata(place.shm()).expect("it is left alone").len(), 0);
        fs::remove_file(place.shm()).expect("root may");
    }
    fs::write(place.shm_lock(), "").expect("/dev/shm can be written");
    chown(place.shm_lock(), Some(65534), None).expect("root may");
    run(&mut place.command(&["-F"])).assert_refused(&["lock file", "user id 65534"]);
    fs::remove_file(place.shm_lock()).expect("root may");
    place.assert_holds_only(&[]);
}

#[test]
fn a_name_of_memory_need_not_be_utf_8() {
    let place = Place::new();
    let name = OsStr::from_bytes(&[place.name.as_bytes(), b"-\xff"].concat()).to_owned();
    let builder = Server::builder().socket_path(place.socket()).size(4096);
    let server = builder.memory(MemorySource::posix(&name)).start().expect("it starts");
    assert_eq!(fs::metadata(Path::new("/dev/shm").join(&name)).expect("it is there").len(), 4096);
    drop(server);
    place.assert_holds_only(&[]);
}

#[test]
fn memory_without_a_name_cannot_be_given_one() {
    let place = Place::new();
    let server = place.serve(&["-m", place.dir().to_str().expect("ours")]);
    let memory = memory_of(&Peer::join(&place.socket(), 1));
    let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
    let linked =
        linkat(AT_FDCWD, &*path, AT_FDCWD, &place.path("kept"), AtFlags::AT_SYMLINK_FOLLOW);
    assert_eq!(linked, Err(Errno::ENOENT));
    server.stop();
    place.assert_holds_only(&[]);
}

/// Where a client could add one, `F_SEAL_FUTURE_WRITE` would keep all later clients from mapping the memory.
#[test]
fn memory_that_is_sealed_takes_no_further_seal_and_is_not_executable() {
    let place = Place::new();
    let server = place.serve(&["--memfd"]);
    let memory = memory_of(&Peer::join(&place.socket(), 1));
    for seal in [SealFlag::F_SEAL_WRITE, SealFlag::from_bits_retain(libc::F_SEAL_FUTURE_WRITE)] {
        assert_eq!(fcntl(&memory, FcntlArg::F_ADD_SEALS(seal)), Err(Errno::EPERM), "{seal:?}");
    }
    let flags = MFdFlags::from_bits_retain(libc::MFD_NOEXEC_SEAL);
    if memfd_create(c"probe", flags).is_err() {
        server.stop();
        return skip("the kernel has no MFD_NOEXEC_SEAL (Linux 6.3)");
    }
    let seals = fcntl(&memory, FcntlArg::F_GET_SEALS).expect("it is a memfd");
    assert_ne!(seals & libc::F_SEAL_EXEC, 0, "{seals:#x}");
    assert_eq!(memory.metadata().expect("fstat works").mode() & 0o111, 0);
    server.stop();
}

#[test]
fn memory_on_a_hugetlbfs_has_whole_pages() {
    let Some(_pages) = HugePages::reserve(4) else {
        return skip("the kernel has no 4 huge pages for us (/proc/sys/vm/nr_hugepages)");
    };
    let page = HugePages::size();
    let place = Place::new();
    let dir = place.path("memory");
    fs::create_dir(&dir).expect("a directory");
    let start = |size: u64| {
        let args = ["-m", dir.to_str().expect("ours"), "-l", &size.to_string()];
        on_mount(&place, "mount -t hugetlbfs", &dir, &args)
    };
    for (asked, served) in [(1, page), (page, page), (page + 1, 2 * page), (3 * page, 4 * page)] {
        let Some(mut command) = start(asked) else {
            return skip("mount namespaces are not to be had (unshare -rm)");
        };
        let mut server = Process::spawn(&mut command);
        server.wait_until_listening(&place.socket());
        assert_eq!(size_of(&Peer::join(&place.socket(), 1)), served, "{asked}");
        server.stop();
        place.assert_holds_only(&["memory"]);
    }
    // More pages than there are are found out at the start.
    let wanted = 1_u64 << 50;
    run(&mut start(wanted).expect("it went well before"))
        .assert_refused(&[&format!("{wanted} bytes does not fit")]);
    place.assert_holds_only(&["memory"]);
}
