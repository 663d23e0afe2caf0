// SPDX-License-Identifier: GPL-2.0-or-later
//! `--shm-file` with devices.

#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use super::{alone, assert_content, refused, serve, text};
use crate::common::loop_device::LoopDevice;
use crate::common::peer::Peer;
use crate::common::program::{Place, memory_of};

#[test]
fn a_block_device_is_served_with_its_size_and_content() {
    let _alone = alone();
    let place = Place::new();
    let Some(device) = LoopDevice::new(&place.path("disk"), 1 << 20) else { return };
    let path = text(device.path());
    let numbers = fs::metadata(device.path()).expect("it is there").rdev();
    for options in [&[][..], &["-l", "1M"]] {
        let server = serve(&place, &[options, &["--shm-file", path]].concat());
        let peers = [(); 2].map(|()| Peer::join(&place.socket(), 1));
        let memory = memory_of(&peers[0]);
        assert_eq!(memory.metadata().expect("fstat works").rdev(), numbers);
        memory.write_all_at(b"the end", (1 << 20) - 7).expect("all of it is there");
        assert_content(&peers[1], (1 << 20) - 7, b"the end");
        let ended = server.stop();
        assert!(ended.stderr.contains("QEMU cannot attach"), "{ended:?}");
    }
    // What is a hole there was not reserved.
    let blocks = fs::metadata(place.path("disk")).expect("it is there").blocks();
    assert!(blocks * 512 < 1 << 19, "{blocks} blocks");
    let mut bytes = [0; 7];
    let device_file = File::open(device.path()).expect("root may");
    device_file.read_exact_at(&mut bytes, (1 << 20) - 7).expect("all of it is there");
    assert_eq!(&bytes, b"the end");
    // A link to it, as those below /dev/disk.
    let link = place.path("link");
    symlink(device.path(), &link).expect("the place is ours");
    serve(&place, &["--shm-file", text(&link)]).stop();
    place.assert_holds_only(&["disk", "link"]);
}

#[test]
fn a_device_keeps_its_size_which_must_be_possible() {
    let _alone = alone();
    let place = Place::new();
    let Some(device) = LoopDevice::new(&place.path("disk"), 1 << 20) else { return };
    let path = text(device.path());
    for (size, bytes) in [("512K", "524288"), ("2M", "2097152")] {
        refused(&place, &["--shm-file", path, "-l", size], &[path, "1048576", bytes, "device"]);
    }
    let numa = ["--shm-file", path, "--numa-node", "0"];
    refused(&place, &numa, &[path, "device", "NUMA"]);
    let huge = ["--shm-file", path, "--hugetlb", "2M"];
    refused(&place, &huge, &[path, "huge pages of 2M", "usual pages"]);
    let Some(device) = LoopDevice::new(&place.path("uneven"), 3 << 20) else { return };
    let path = text(device.path());
    refused(&place, &["--shm-file", path], &[path, "3145728 bytes", "power of two"]);
    serve(&place, &["--shm-file", path, "--size-exact"]).stop();
}

#[test]
fn a_device_that_is_mounted_or_served_is_refused() {
    let _alone = alone();
    let (place, other) = (Place::new(), Place::new());
    let Some(device) = LoopDevice::new(&place.path("disk"), 1 << 20) else { return };
    let path = text(device.path());
    let server = serve(&place, &["--shm-file", path]);
    let peer = Peer::join(&place.socket(), 1);
    refused(&other, &["--shm-file", path], &[path, "in use", "another server"]);
    server.stop();
    // Its client does not keep the next server from starting.
    serve(&other, &["--shm-file", path]).stop();
    drop(peer);

    let made = Command::new("mkfs.ext4").args(["-q", path]).output();
    assert!(made.expect("mkfs.ext4 (Debian package e2fsprogs)").status.success());
    let point = place.path("mounted");
    fs::create_dir(&point).expect("the place is ours");
    let mounted = Command::new("mount").arg(device.path()).arg(&point).status();
    assert!(mounted.expect("mount (Debian package mount)").success());
    let result = std::panic::catch_unwind(|| {
        refused(&other, &["--shm-file", path], &[path, "in use", "mounted"]);
    });
    let unmounted = Command::new("umount").arg(&point).status().expect("umount");
    assert!(unmounted.success());
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

#[test]
fn a_character_device_without_memory_is_refused() {
    let _alone = alone();
    let place = Place::new();
    for path in ["/dev/zero", "/dev/null", "/dev/tty"] {
        refused(&place, &["--shm-file", path], &[path, "character device", "DAX"]);
    }
}

#[test]
fn no_file_is_made_in_place_of_a_device_that_is_not_there() {
    let _alone = alone();
    let place = Place::new();
    let path = format!("/dev/{}", place.name);
    refused(&place, &["--shm-file", &path], &[&path, "no such device"]);
    assert!(!Path::new(&path).exists());
    let shared = format!("/dev/shm/{}", place.name);
    serve(&place, &["--shm-file", &shared, "-l", "64K"]).stop();
    fs::remove_file(shared).expect("it is kept");
    place.assert_holds_only(&[]);
}

/// QEMU takes the size from fstat(2).
#[test]
fn a_qemu_that_attaches_to_a_device_ends_with_an_error_and_the_server_goes_on() {
    let _alone = alone();
    let place = Place::new();
    let Some(device) = LoopDevice::new(&place.path("disk"), 1 << 20) else { return };
    let mut server = serve(&place, &["--shm-file", text(device.path())]);
    let chardev = format!("socket,id=c,path={}", place.socket().display());
    let qemu = Command::new("qemu-system-x86_64")
        .args(["-S", "-accel", "tcg", "-machine", "pc", "-m", "16", "-nodefaults", "-display"])
        .args(["none", "-chardev", &chardev, "-device", "ivshmem-doorbell,vectors=1,chardev=c"])
        .stdin(Stdio::null())
        .output();
    let qemu = qemu.expect("qemu-system-x86_64 (Debian package qemu-system-x86)");
    assert_eq!(qemu.status.code(), Some(1), "{qemu:?}");
    assert!(server.is_running());
    Peer::join(&place.socket(), 1);
    server.stop();
}
