// SPDX-License-Identifier: GPL-2.0-or-later
//! A client for which there is no id is refused before any eventfd is made for it.
//!
//! The limit of open files belongs to the process, so this is the only test in this program.

#![forbid(unsafe_code)]

use std::fs;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use ivshmem::{Event, Refusal, Server};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// The limit for an action that takes a moment; long enough for a busy machine.
const PATIENCE: Duration = Duration::from_secs(10);

/// More than the free descriptors below.
const VECTORS: u32 = 64;

#[test]
fn a_client_without_an_id_is_refused_before_its_eventfds_are_made() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("socket");
    let builder = Server::builder().socket_path(&path).vectors(VECTORS).id_space(1);
    let mut server = builder.start().expect("a server");
    let _first = UnixStream::connect(&path).expect("the server listens");
    let events = server.wait(Some(PATIENCE)).expect("a client causes no error");
    assert!(matches!(events[..], [Event::Joined { id: 0, .. }]), "{events:?}");

    let open = fs::read_dir("/proc/self/fd").expect("Linux with /proc").count() as u64;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("it is a known limit");
    // Room for both ends of a connection, but not for the vectors.
    setrlimit(Resource::RLIMIT_NOFILE, open + 8, hard).expect("it is below the hard limit");
    let _second = UnixStream::connect(&path).expect("the server listens");
    let events = server.wait(Some(PATIENCE)).expect("a client causes no error");
    // Not NoDescriptors.
    assert!(matches!(events[..], [Event::Refused { reason: Refusal::NoIds, .. }]), "{events:?}");

    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("it is the hard limit");
}
