// SPDX-License-Identifier: GPL-2.0-or-later
//! `--numa-node`: the nodes of the pages, as a client sees them in /proc/self/numa_maps.

#![forbid(unsafe_code)]

use std::fs;
use std::path::Path;

use ivshmem::Client;
use nix::sys::statfs::{TMPFS_MAGIC, statfs};

use super::{alone, refused, serve, text};
use crate::common::huge_pages::HugePages;
use crate::common::program::Place;

const PAGE: usize = 4096;

/// The first node that has memory.
fn node() -> String {
    let text = fs::read_to_string("/sys/devices/system/node/has_memory").expect("Linux with NUMA");
    let digits = text.find(|c: char| !c.is_ascii_digit()).expect("a line");
    text[..digits].to_owned()
}

/// The line of numa_maps about the memory of a client that has accessed each page.
fn line_of(client: &Client) -> String {
    let memory = client.memory();
    (0..memory.len()).step_by(PAGE).for_each(|at| memory.store_u8(at, 1).expect("it is there"));
    let start = format!("{:x}", memory.as_ptr() as usize);
    let maps = fs::read_to_string("/proc/self/numa_maps").expect("Linux with NUMA");
    let line = maps.lines().find(|line| line.trim_start_matches('0').starts_with(&start));
    line.unwrap_or_else(|| panic!("no {start} in {maps}")).to_owned()
}

/// How many pages are on each node.
fn nodes_of(line: &str) -> Vec<(String, usize)> {
    let entry = |word: &str| {
        let (node, pages) = word.strip_prefix('N')?.split_once('=')?;
        Some((node.to_owned(), pages.parse().ok()?))
    };
    line.split_whitespace().filter_map(entry).collect()
}

#[test]
fn all_pages_are_on_the_node_whatever_the_kind_of_memory_is() {
    let _alone = alone();
    let node = node();
    let place = Place::new();
    let (file, shared) = (place.path("memory"), format!("/dev/shm/{}-file", place.name));
    let kinds = [
        vec!["--memfd"],
        vec!["-M", &place.name],
        vec!["-m", "/dev/shm"],
        vec!["-m", text(place.dir())],
        vec!["--shm-file", &shared],
        vec!["--shm-file", text(&file)],
    ];
    for kind in &kinds {
        let args = [&kind[..], &["-l", "256K", "--numa-node", &node]].concat();
        let server = serve(&place, &args);
        let client = Client::connect(place.socket()).expect("it is served");
        let line = line_of(&client);
        assert_eq!(nodes_of(&line), [(node.clone(), (256 << 10) / PAGE)], "{kind:?}: {line}");
        // A file on a disk has no policy of its own, which the log says.
        let is_here = kind.contains(&text(place.dir())) || kind.contains(&text(&file));
        let is_on_disk = is_here && !is_tmpfs(place.dir());
        let is_bound = line.contains(&format!(" bind:{node} "));
        let ended = server.stop();
        let is_warned = ended.stderr.contains("may come to other nodes");
        assert_eq!((is_bound, is_warned), (!is_on_disk, is_on_disk), "{kind:?}: {line}");
        let _ = fs::remove_file(&shared);
    }
}

fn is_tmpfs(path: &Path) -> bool {
    statfs(path).expect("it is there").filesystem_type() == TMPFS_MAGIC
}

#[test]
fn memory_of_huge_pages_is_on_the_node() {
    let _alone = alone();
    let Some(_pages) = HugePages::reserve(2) else {
        return crate::common::skip::skip("the kernel has no 2 huge pages for us");
    };
    let (node, page) = (node(), HugePages::size());
    let place = Place::new();
    let option = format!("{}M", page >> 20);
    let size = (2 * page).to_string();
    let args = ["--memfd", "--hugetlb", &option, "-l", &size, "--numa-node", &node];
    let server = serve(&place, &args);
    let client = Client::connect(place.socket()).expect("it is served");
    let line = line_of(&client);
    assert_eq!(nodes_of(&line), [(node.clone(), 2)], "{line}");
    assert!(line.contains(" huge "), "{line}");
    server.stop();
}

#[test]
fn memory_that_is_bound_to_no_node_has_the_usual_policy() {
    let _alone = alone();
    let place = Place::new();
    let server = serve(&place, &["--memfd", "-l", "256K"]);
    let client = Client::connect(place.socket()).expect("it is served");
    let line = line_of(&client);
    assert!(line.contains(" default "), "{line}");
    server.stop();
}

#[test]
fn a_node_that_does_not_exist_is_refused_with_those_that_do() {
    let _alone = alone();
    let place = Place::new();
    let has = fs::read_to_string("/sys/devices/system/node/has_memory").expect("Linux with NUMA");
    let has = format!("are {}", has.trim());
    for (nodes, wrong) in [("1000", "1000"), ("0,999", "999"), ("4294967295", "4294967295")] {
        for kind in [&["--memfd"][..], &["-M", &place.name], &["-m", text(place.dir())]] {
            let args = [kind, &["--numa-node", nodes]].concat();
            refused(&place, &args, &[&format!("node {wrong} does not exist"), &has]);
        }
    }
    for wrong in ["", "x", "-1", "0,", "0-1"] {
        let option = format!("--numa-node={wrong}");
        refused(&place, &["--memfd", &option], &["--numa-node"]);
    }
    place.assert_holds_only(&[]);
}
