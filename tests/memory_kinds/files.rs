// SPDX-License-Identifier: GPL-2.0-or-later
//! `--shm-file` with regular files, and what is refused.

#![forbid(unsafe_code)]

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use super::{alone, assert_content, command, refused, serve, sigkill, text};
use crate::common::daemon::program;
use crate::common::peer::Peer;
use crate::common::program::{Place, Process, memory_of, run, size_of};
use crate::common::skip::skip;
use crate::common::target::is_root;
use crate::common::wait_for;

/// A file of the user's with this content.
fn file(place: &Place, content: &[u8]) -> PathBuf {
    let path = place.path("memory");
    fs::write(&path, content).expect("it can be written");
    fs::set_permissions(&path, Permissions::from_mode(0o600)).expect("it is ours");
    path
}

#[test]
fn a_new_file_has_its_mode_and_all_of_its_room_and_is_kept() {
    let _alone = alone();
    for (options, mode, size) in [
        (&["-l", "3M"][..], 0o600, 4 << 20),
        (&["-l", "64K", "--shm-mode", "660"], 0o660, 64 << 10),
        (&["--shm-mode=606"], 0o606, 4 << 20),
    ] {
        let place = Place::new();
        let path = place.path("memory");
        let server = serve(&place, &[options, &["--shm-file", text(&path)]].concat());
        let peer = Peer::join(&place.socket(), 1);
        assert_eq!(size_of(&peer), size);
        let meta = fs::metadata(&path).expect("it was made");
        assert_eq!((meta.len(), meta.mode() & 0o777), (size, mode));
        assert!(meta.blocks() * 512 >= size, "it is reserved");
        memory_of(&peer).write_all_at(b"kept", size - 4).expect("all of it is there");
        server.stop();
        let mut bytes = [0; 4];
        let kept = File::open(&path).expect("it is kept");
        kept.read_exact_at(&mut bytes, size - 4).expect("all of it is there");
        assert_eq!(&bytes, b"kept");
        place.assert_holds_only(&["memory"]);
    }
}

#[test]
fn a_file_that_exists_keeps_its_content_and_gives_the_size() {
    let _alone = alone();
    let place = Place::new();
    let content: Vec<u8> = (0..128 << 10).map(|at: usize| (at % 251) as u8).collect();
    let path = file(&place, &content);
    let inode = fs::metadata(&path).expect("it is there").ino();
    for options in [&[][..], &["-l", "100K"]] {
        let server = serve(&place, &[options, &["--shm-file", text(&path)]].concat());
        let peer = Peer::join(&place.socket(), 1);
        assert_eq!(size_of(&peer), 128 << 10);
        assert_content(&peer, 0, &content);
        assert_eq!(memory_of(&peer).metadata().expect("fstat works").ino(), inode);
        server.stop();
    }
    // As an object of -M does, it grows.
    let server = serve(&place, &["--shm-file", text(&path), "-l", "256K"]);
    let peer = Peer::join(&place.socket(), 1);
    assert_eq!(size_of(&peer), 256 << 10);
    assert_content(&peer, 0, &content);
    server.stop();
    assert_eq!(fs::metadata(&path).expect("it is kept").len(), 256 << 10);
    place.assert_holds_only(&["memory"]);
}

#[test]
fn a_file_whose_size_is_not_possible_is_refused_and_left_alone() {
    let _alone = alone();
    let place = Place::new();
    let path = file(&place, &[7; 100_000]);
    let file = ["--shm-file", text(&path)];
    refused(&place, &file, &[text(&path), "100000 bytes", "power of two", "PCI"]);
    refused(&place, &[&file[..], &["-l", "64K"]].concat(), &["100000", "65536", "shrink"]);
    refused(&place, &[&file[..], &["-l", "0"]].concat(), &["size 0 "]);
    assert_eq!(fs::read(&path).expect("it is there"), [7; 100_000]);
    place.assert_holds_only(&["memory"]);

    // An empty file gives no size.
    fs::write(&path, "").expect("it is ours");
    let server = serve(&place, &file);
    assert_eq!(size_of(&Peer::join(&place.socket(), 1)), 4 << 20);
    server.stop();
}

#[test]
fn a_start_that_fails_removes_only_a_file_that_it_made() {
    let _alone = alone();
    let place = Place::new();
    let path = place.path("memory");
    let args = ["--shm-file", text(&path), "-S", "/nowhere/socket"];
    refused(&place, &args, &["/nowhere/socket"]);
    place.assert_holds_only(&[]);
    // Like one that a server of -M has made and could do nothing with.
    file(&place, b"");
    refused(&place, &args, &["/nowhere/socket"]);
    assert_eq!(fs::metadata(&path).expect("it is there").len(), 0);
    place.assert_holds_only(&["memory"]);
}

#[test]
fn what_is_no_memory_is_refused_and_named() {
    let _alone = alone();
    let place = Place::new();
    let path = place.path("memory");
    mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).expect("the place is empty");
    refused(&place, &["--shm-file", text(&path)], &[text(&path), "is a FIFO", "regular file"]);
    fs::remove_file(&path).expect("it is there still");
    fs::create_dir(&path).expect("the place is empty");
    refused(&place, &["--shm-file", text(&path)], &[text(&path), "is a directory"]);
    fs::remove_dir(&path).expect("it is there still");
    let _socket = UnixListener::bind(&path).expect("the place is empty");
    refused(&place, &["--shm-file", text(&path)], &[text(&path), "is a socket"]);
    let missing = place.path("missing/memory");
    refused(&place, &["--shm-file", text(&missing)], &[text(&missing), "No such file"]);
    refused(&place, &["--shm-file", "/tmp/"], &["/tmp/", "must end in a name"]);
    refused(&place, &["--shm-file", ""], &["--shm-file", "value"]);
    let mode = ["--shm-file", text(&missing), "--shm-mode", "400"];
    refused(&place, &mode, &["mode 400", "600 to 777"]);
    place.assert_holds_only(&["memory"]);
}

#[test]
fn a_file_that_others_may_write_or_that_has_a_second_name_is_refused() {
    let _alone = alone();
    let place = Place::new();
    let path = file(&place, &[7; 4096]);
    let args = ["--shm-file", text(&path)];
    fs::set_permissions(&path, Permissions::from_mode(0o660)).expect("it is ours");
    refused(&place, &args, &[text(&path), "mode 0660", "0600"]);
    serve(&place, &[&args[..], &["--shm-mode", "660"]].concat()).stop();
    fs::set_permissions(&path, Permissions::from_mode(0o600)).expect("it is ours");
    fs::hard_link(&path, place.path("second")).expect("it is ours");
    refused(&place, &args, &[text(&path), "second name"]);
    assert_eq!(fs::read(&path).expect("it is there"), [7; 4096]);
}

#[test]
fn a_file_of_another_user_is_refused_and_its_owner_named() {
    let _alone = alone();
    if !is_root("make files of other users") {
        return;
    }
    let place = Place::new();
    let path = file(&place, &[7; 4096]);
    chown(&path, Some(65534), None).expect("root may");
    refused(&place, &["--shm-file", text(&path)], &[text(&path), "user id 65534", "user id 0"]);
    fs::remove_file(&path).expect("root may");
    let lock = place.path(".ivshmem-lock.memory");
    fs::write(&lock, "").expect("the place is ours");
    chown(&lock, Some(65534), None).expect("root may");
    refused(&place, &["--shm-file", text(&path)], &[text(&lock), "lock file", "user id 65534"]);
    place.assert_holds_only(&[".ivshmem-lock.memory"]);
}

#[test]
fn a_link_is_followed_only_if_no_other_user_could_have_made_it() {
    let _alone = alone();
    if !is_root("make links of other users") {
        return;
    }
    let place = Place::new();
    let path = file(&place, &[7; 4096]);
    let link = place.path("link");
    symlink("memory", &link).expect("the place is ours");
    let args = ["--shm-file", text(&link)];
    let server = serve(&place, &args);
    assert_content(&Peer::join(&place.socket(), 1), 0, &[7; 4096]);
    server.stop();

    // Also in a directory where others may make links, as /tmp.
    fs::set_permissions(place.dir(), Permissions::from_mode(0o1777)).expect("it is ours");
    serve(&place, &args).stop();
    std::os::unix::fs::lchown(&link, Some(65534), None).expect("root may");
    refused(&place, &args, &[text(&link), "symbolic link of user id 65534"]);
    fs::remove_file(&link).expect("root may");
    symlink("memory", &link).expect("the place is ours");
    fs::set_permissions(place.dir(), Permissions::from_mode(0o777)).expect("it is ours");
    refused(&place, &args, &[text(&link), "symbolic link"]);
    fs::set_permissions(place.dir(), Permissions::from_mode(0o700)).expect("it is ours");
    fs::remove_file(&link).expect("root may");
    symlink("link", &link).expect("the place is ours");
    refused(&place, &args, &[text(&link), "symbolic links"]);
    assert_eq!(fs::read(&path).expect("it is there"), [7; 4096]);
}

#[test]
fn one_server_serves_a_file_at_a_time() {
    let _alone = alone();
    let (place, other) = (Place::new(), Place::new());
    let path = file(&place, &[7; 4096]);
    let server = serve(&place, &["--shm-file", text(&path)]);
    refused(&other, &["--shm-file", text(&path)], &[text(&path), "in use by another server"]);
    // By another path too.
    let link = other.path("link");
    symlink(&path, &link).expect("the place is ours");
    refused(&other, &["--shm-file", text(&link)], &[text(&link), "in use by another server"]);
    server.stop();
    serve(&other, &["--shm-file", text(&path)]).stop();
    place.assert_holds_only(&["memory"]);
}

#[test]
fn of_twenty_servers_that_start_at_once_one_serves_a_file() {
    let _alone = alone();
    let place = Place::new();
    let path = place.path("memory");
    let places: Vec<Place> = (0..20).map(|_| Place::new()).collect();
    let args = ["--shm-file", text(&path), "-l", "64K"];
    let start = |place| Process::spawn(&mut command(place, &args));
    let mut servers: Vec<Process> = places.iter().map(start).collect();
    wait_for("all but one have ended", || {
        (servers.iter_mut().filter_map(|server| server.is_running().then_some(())).count() == 1)
            .then_some(())
    });
    for mut server in servers {
        if server.is_running() {
            server.stop();
        } else {
            server.end().assert_refused(&[text(&path), "in use by another server"]);
        }
    }
    place.assert_holds_only(&["memory"]);
}

/// As root makes it for a service, which may write nothing else there.
#[test]
fn a_file_in_a_directory_that_the_server_may_not_write_is_served_by_one_server() {
    let _alone = alone();
    if !is_root("run servers as another user") {
        return;
    }
    let (place, other) = (Place::new(), Place::new());
    let path = file(&place, &[7; 4096]);
    let run_dirs = [place.path("run"), other.path("run")];
    chown(&path, Some(65534), None).expect("root may");
    for directory in [place.dir(), other.dir()] {
        fs::set_permissions(directory, Permissions::from_mode(0o755)).expect("it is ours");
    }
    for directory in &run_dirs {
        fs::create_dir(directory).expect("the place is ours");
        chown(directory, Some(65534), None).expect("root may");
    }
    let by_nobody = |run: &PathBuf| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(program());
        command.args(["-F", "--shm-file", text(&path), "-S"]).arg(run.join("socket"));
        command
    };
    let mut server = Process::spawn(&mut by_nobody(&run_dirs[0]));
    server.wait_until_listening(&run_dirs[0].join("socket"));
    run(&mut by_nobody(&run_dirs[1])).assert_refused(&[text(&path), "in use by another server"]);
    assert_content(&Peer::join(&run_dirs[0].join("socket"), 1), 0, &[7; 4096]);
    server.stop();
    place.assert_holds_only(&["memory", "run"]);
}

#[test]
fn growth_by_a_client_is_cut_off_at_the_end_and_after_a_kill() {
    let _alone = alone();
    let place = Place::new();
    let path = file(&place, &[7; 4096]);
    let args = ["--shm-file", text(&path)];
    let length = || fs::metadata(&path).expect("it is kept").len();
    let server = serve(&place, &args);
    let peer = Peer::join(&place.socket(), 1);
    memory_of(&peer).set_len(8192).expect("a client can");
    let ended = server.stop();
    assert!(ended.stderr.contains("cut back to 4096"), "{ended:?}");
    assert_eq!(length(), 4096);

    for options in [&[][..], &["-l", "4K"]] {
        let server = serve(&place, &args);
        let peer = Peer::join(&place.socket(), 1);
        sigkill(server);
        memory_of(&peer).set_len(1 << 30).expect("a client can");
        let server = serve(&place, &[&args[..], options].concat());
        assert_eq!(length(), 4096);
        let ended = server.stop();
        assert!(ended.stderr.contains("cut back to 4096"), "{ended:?}");
    }
    assert_eq!(fs::read(&path).expect("it is kept"), [7; 4096]);
    place.assert_holds_only(&["memory"]);
}

#[test]
fn a_larger_file_that_replaces_one_of_a_killed_server_is_not_cut_back() {
    let _alone = alone();
    let place = Place::new();
    let path = file(&place, &[7; 4096]);
    let args = ["--shm-file", text(&path)];
    sigkill(serve(&place, &args));
    fs::rename(&path, place.path("before")).expect("it is ours");
    file(&place, &[8; 8192]);
    run(&mut command(&place, &[&args[..], &["-l", "4K"]].concat())).assert_refused(&["shrink"]);
    let server = serve(&place, &args);
    assert_content(&Peer::join(&place.socket(), 1), 0, &[8; 8192]);
    server.stop();
    assert_eq!(fs::read(&path).expect("it is kept"), [8; 8192]);
}

#[test]
fn a_file_that_cannot_be_mapped_is_refused() {
    if !is_root("own a file of the kernel") {
        return;
    }
    let _alone = alone();
    let place = Place::new();
    let path = "/sys/kernel/mm/transparent_hugepage/enabled";
    if !Path::new(path).exists() {
        return skip(
            "the kernel has no transparent huge pages, whose file of 4,096 bytes this needs",
        );
    }
    refused(&place, &["--shm-file", path], &[path]);
}

#[test]
fn the_last_option_for_memory_wins_and_verbose_output_names_the_file() {
    let _alone = alone();
    let place = Place::new();
    let path = place.path("memory");
    let server = serve(&place, &["-v", "--memfd", "--shm-file", text(&path)]);
    let ended = server.stop();
    let line = format!("Using shared memory at {}", text(&path));
    assert!(ended.stdout.contains(&line), "{ended:?}");
    fs::remove_file(&path).expect("it is kept");
    let mut server = Process::spawn(&mut command(&place, &["--shm-file", text(&path), "--memfd"]));
    server.wait_until_listening(&place.socket());
    assert!(!path.exists());
    server.stop();
}
