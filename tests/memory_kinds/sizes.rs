// SPDX-License-Identifier: GPL-2.0-or-later
//! `--size-exact` and `--keep`.

#![forbid(unsafe_code)]

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};

use super::{alone, assert_content, refused, serve, sigkill, text};
use crate::common::peer::Peer;
use crate::common::program::{Place, memory_of, size_of};

#[test]
fn an_exact_size_is_not_rounded_up() {
    let _alone = alone();
    let place = Place::new();
    let file = place.path("memory");
    for kind in [
        &["--memfd"][..],
        &["-M", &place.name],
        &["-m", text(place.dir())],
        &["--shm-file", text(&file)],
    ] {
        for (size, is_warned) in [("3M", true), ("4M", false), ("12K", true)] {
            let _ = fs::remove_file(&file);
            let server = serve(&place, &[kind, &["-l", size, "--size-exact"]].concat());
            let peer = Peer::join(&place.socket(), 1);
            let bytes = match size {
                "12K" => 12 << 10,
                "3M" => 3 << 20,
                _ => 4 << 20,
            };
            assert_eq!(size_of(&peer), bytes, "{kind:?}");
            memory_of(&peer).write_all_at(b"end", bytes - 3).expect("all of it is there");
            let ended = server.stop();
            assert_eq!(ended.stderr.contains("ivshmem-doorbell"), is_warned, "{ended:?}");
        }
        for (size, parts) in [("100", ["exactly 100 bytes", "4096"]), ("0", ["size 0", "1 to"])] {
            refused(&place, &[kind, &["-l", size, "--size-exact"]].concat(), &parts);
        }
    }
}

#[test]
fn an_exact_size_is_that_of_a_file_that_exists() {
    let _alone = alone();
    let place = Place::new();
    let file = place.path("memory");
    let content = vec![7; 12 << 10];
    serve(&place, &["--shm-file", text(&file), "-l", "12K", "--size-exact"]).stop();
    fs::write(&file, &content).expect("it is ours");
    let args = ["--shm-file", text(&file), "--size-exact"];
    let server = serve(&place, &args);
    let peer = Peer::join(&place.socket(), 1);
    assert_eq!(size_of(&peer), 12 << 10);
    assert_content(&peer, 0, &content);
    sigkill(server);
    refused(&place, &["--shm-file", text(&file), "-l", "8K"], &["12288", "8192", "shrink"]);
    assert_eq!(fs::read(&file).expect("it is kept"), content);
    serve(&place, &args).stop();
    assert_eq!(fs::read(&file).expect("it is kept"), content);
}

#[test]
fn an_object_that_is_kept_is_served_again_with_its_content() {
    let _alone = alone();
    let place = Place::new();
    let args = ["-M", &place.name, "-l", "64K"];
    let keep = [&args[..], &["--keep"]].concat();
    let server = serve(&place, &keep);
    memory_of(&Peer::join(&place.socket(), 1)).write_all_at(b"kept", 0).expect("it is there");
    server.stop();
    let inode = fs::metadata(place.shm()).expect("it is kept").ino();
    assert!(!place.shm_lock().exists(), "nothing else is left");
    let server = serve(&place, &keep);
    let peer = Peer::join(&place.socket(), 1);
    assert_content(&peer, 0, b"kept");
    memory_of(&peer).set_len(1 << 20).expect("a client can");
    server.stop();
    let meta = fs::metadata(place.shm()).expect("it is kept");
    assert_eq!((meta.ino(), meta.len()), (inode, 64 << 10), "what a client added is cut off");
    sigkill(serve(&place, &keep));
    serve(&place, &keep).stop();
    assert!(place.shm().exists() && !place.shm_lock().exists());
    serve(&place, &args).stop();
    place.assert_holds_only(&[]);
}

#[test]
fn a_start_that_fails_leaves_no_object_to_keep() {
    let _alone = alone();
    let place = Place::new();
    let args = ["-M", &place.name, "--keep", "-S", "/nowhere/socket"];
    refused(&place, &args, &["/nowhere/socket"]);
    place.assert_holds_only(&[]);
}

#[test]
fn memory_without_a_name_cannot_be_kept() {
    let _alone = alone();
    let place = Place::new();
    for kind in [&["--memfd"][..], &["-m", text(place.dir())]] {
        refused(&place, &[kind, &["--keep"]].concat(), &["no name", "kept"]);
    }
    let file = place.path("memory");
    serve(&place, &["--shm-file", text(&file), "--keep"]).stop();
    place.assert_holds_only(&["memory"]);
}
