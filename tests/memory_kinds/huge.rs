// SPDX-License-Identifier: GPL-2.0-or-later
//! `--hugetlb`: memory of huge pages.

#![forbid(unsafe_code)]

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::statvfs::fstatvfs;

use super::{alone, refused, serve, text};
use crate::common::huge_pages::{HugeMount, HugePages};
use crate::common::peer::Peer;
use crate::common::program::{Place, memory_of, size_of};
use crate::common::skip::skip;
use crate::common::vm::Vm;

/// The usual size of huge pages, as an option has it.
fn page() -> (String, u64) {
    let size = HugePages::size();
    (format!("{}M", size >> 20), size)
}

/// The size of the pages that a client received.
fn page_of(peer: &Peer) -> u64 {
    fstatvfs(memory_of(peer).as_fd()).expect("fstatvfs works").block_size()
}

#[test]
fn sealed_memory_has_huge_pages_that_no_client_can_shrink_and_a_qemu_can_use() {
    let _alone = alone();
    let Some(_pages) = HugePages::reserve(4) else {
        return skip("the kernel has no 4 huge pages for us (/proc/sys/vm/nr_hugepages)");
    };
    let free = HugePages::number("free_hugepages");
    let (option, page) = page();
    let place = Place::new();
    for (asked, served) in [(1, page), (page + 1, 2 * page), (3 * page, 4 * page)] {
        let size = asked.to_string();
        let server = serve(&place, &["--memfd", "--hugetlb", &option, "-l", &size]);
        let peer = Peer::join(&place.socket(), 1);
        assert_eq!((size_of(&peer), page_of(&peer)), (served, page));
        assert_eq!(HugePages::number("free_hugepages") + served / page, free);
        let memory = memory_of(&peer);
        for size in [0, page, 8 * page] {
            let resized = memory.set_len(size);
            assert!(resized.is_err() || size == served, "a client made it {size} bytes");
        }
        let seal = SealFlag::from_bits_retain(nix::libc::F_SEAL_FUTURE_WRITE);
        assert_eq!(fcntl(&memory, FcntlArg::F_ADD_SEALS(seal)), Err(Errno::EPERM));
        let mut vms = [Vm::start(&place.socket(), 1), Vm::start(&place.socket(), 1)];
        vms[0].write_memory(served - 8, b"the end.");
        assert_eq!(vms[1].read_memory(served - 8, 8), b"the end.");
        server.stop();
    }
    assert_eq!(HugePages::number("free_hugepages"), free);
}

#[test]
fn too_few_pages_are_an_error_that_says_how_many_and_how_to_make_them() {
    let _alone = alone();
    let Some(pages) = HugePages::reserve(1) else {
        return skip("the kernel has no huge page for us (/proc/sys/vm/nr_hugepages)");
    };
    let (option, page) = page();
    let place = Place::new();
    let free = HugePages::number("free_hugepages") - HugePages::number("resv_hugepages");
    let needed = (free + 1).next_power_of_two();
    let size = (needed * page).to_string();
    let sysctl = format!("sysctl vm.nr_hugepages={}", pages.total() + needed - free);
    let expected =
        [&*format!("needs {needed} huge pages of {option}"), &format!("{free} are free"), &sysctl];
    refused(&place, &["--memfd", "--hugetlb", &option, "-l", &size], &expected);
    // On a node of its own: the file of that node.
    let node = ["--memfd", "--hugetlb", &option, "-l", &size, "--numa-node", "0"];
    refused(&place, &node, &["huge pages", "/sys/devices/system/node/node0/hugepages/"]);
    let Some(mount) = HugeMount::new(place.path("huge")) else {
        return skip("a hugetlbfs cannot be mounted");
    };
    refused(&place, &["-m", text(mount.path()), "-l", &size], &expected);
    assert_eq!(HugePages::number("free_hugepages"), free, "none was taken");
}

#[test]
fn memory_with_other_pages_than_asked_for_is_refused() {
    let _alone = alone();
    let (option, page) = page();
    let place = Place::new();
    let directory = ["-m", text(place.dir()), "--hugetlb", &option];
    let named = [text(place.dir()), &*format!("huge pages of {option}"), "usual pages"];
    refused(&place, &directory, &named);
    refused(&place, &["-M", &place.name, "--hugetlb", &option], &[&place.name, "usual pages"]);
    let file = place.path("memory");
    let args = ["--shm-file", text(&file), "--hugetlb", &option];
    refused(&place, &args, &[text(&file), "usual pages"]);
    for wrong in ["3M", "0", "8K", "15E"] {
        let known = ["huge pages of", "the kernel has the sizes", &*option];
        refused(&place, &["--memfd", "--hugetlb", wrong], &known);
    }
    place.assert_holds_only(&[]);

    let Some(_pages) = HugePages::reserve(2) else {
        return skip("the kernel has no 2 huge pages for us (/proc/sys/vm/nr_hugepages)");
    };
    let Some(mount) = HugeMount::new(place.path("huge")) else {
        return skip("a hugetlbfs cannot be mounted");
    };
    let directory = ["-m", text(mount.path())];
    let other = if page == 1 << 30 { "2M" } else { "1G" };
    let wrong = [&directory[..], &["--hugetlb", other]].concat();
    refused(&place, &wrong, &[text(mount.path()), &format!("pages of {option}")]);
    let server = serve(&place, &[&directory[..], &["--hugetlb", &option, "-l", "1"]].concat());
    let peer = Peer::join(&place.socket(), 1);
    assert_eq!((size_of(&peer), page_of(&peer)), (page, page));
    server.stop();
}

#[test]
fn a_file_on_a_hugetlbfs_is_served_and_kept() {
    let _alone = alone();
    let Some(_pages) = HugePages::reserve(2) else {
        return skip("the kernel has no 2 huge pages for us (/proc/sys/vm/nr_hugepages)");
    };
    let place = Place::new();
    let Some(mount) = HugeMount::new(place.path("huge")) else {
        return skip("a hugetlbfs cannot be mounted");
    };
    let (option, page) = page();
    let path = mount.path().join("memory");
    let args = ["--shm-file", text(&path), "--hugetlb", &option];
    let size = (2 * page).to_string();
    let server = serve(&place, &[&args[..], &["-l", &size]].concat());
    let mut vm = Vm::start(&place.socket(), 1);
    vm.write_memory(page + 8, b"kept");
    server.stop();
    vm.quit();
    assert_eq!(fs::metadata(&path).expect("it is kept").len(), 2 * page);
    let server = serve(&place, &args);
    let mut vm = Vm::start(&place.socket(), 1);
    assert_eq!(vm.read_memory(page + 8, 4), b"kept");
    server.stop();
    let names = fs::read_dir(mount.path()).expect("it is mounted").count();
    assert_eq!(names, 1, "no lock file is left");
    // Reading is what a hugetlbfs can do since Linux 2.6.
    let mut bytes = [0; 4];
    let file = fs::File::open(&path).expect("it is kept");
    file.read_exact_at(&mut bytes, page + 8).expect("it is there");
    assert_eq!(&bytes, b"kept");
}
