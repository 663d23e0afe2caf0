// SPDX-License-Identifier: GPL-2.0-or-later
//! Domains of a real libvirt, attached to the server by the recipes of README.md and docs/libvirt.md.
//!
//! The domains run with libvirt's own user, so the permissions of the socket count. A domain's processor is stopped;
//! the test does what its guest would do.

// Only common::peer has unsafe code: for descriptors and bytes that were received. Every other module forbids it.
#![deny(unsafe_code)]

mod apparmor;
#[path = "../common/mod.rs"]
mod common;
mod host;
mod profile;
mod recipe;

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use common::peer::Peer;
use common::program::size_of;
use common::vm::Vm;
use common::{text_of, wait_for};
use host::{Domain, Host};
use recipe::blocks;

const SOCKET: &str = "/var/lib/libvirt/shmem-red-sock";
const VECTORS: u16 = 2;

/// Each domain interrupts each other one through each vector, and reads what the other wrote to the memory.
#[track_caller]
fn check_all(domains: &mut [Domain]) {
    for from in 0..domains.len() {
        for to in (0..domains.len()).filter(|to| *to != from) {
            let (low, high) = domains.split_at_mut(from.max(to));
            let (low, high) = (&mut low[from.min(to)], &mut high[0]);
            let (from, to) = if from < to { (low, high) } else { (high, low) };
            check(&mut from.vm, &mut to.vm);
        }
    }
}

/// One machine writes to the memory and interrupts the other through each vector.
#[track_caller]
fn check(from: &mut Vm, to: &mut Vm) {
    let (sender, id) = (from.id(), to.id());
    for vector in 0..VECTORS {
        let text = format!("{sender} interrupts {id} by {vector}");
        let offset = u64::from(sender) * 4096;
        from.write_memory(offset, text.as_bytes());
        // The sender may learn of the other machine a moment later, and drops interrupts before that.
        wait_for(&text, || {
            from.ring(id, vector);
            to.pending().contains(&vector).then_some(())
        });
        assert_eq!(to.settled(), [vector].into(), "{text}");
        to.clear(vector);
        assert_eq!(to.read_memory(offset, text.len()), text.as_bytes());
    }
}

/// Asserts that the QEMU of a domain is no process of root, but of libvirt's user, which is in the group kvm.
#[track_caller]
fn assert_is_of_libvirts_user(host: &Host, domain: &Domain) {
    let status = host.status(domain);
    let user = host.number_of("/etc/passwd", "libvirt-qemu");
    let line = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("{name} {status}")).split_whitespace()
    };
    assert!(line("Uid:").all(|uid| uid == user.to_string()), "{status}");
    let kvm = host.number_of("/etc/group", "kvm").to_string();
    assert!(line("Groups:").any(|group| group == kvm), "{status}");
    assert!(line("CapEff:").all(|set| set.bytes().all(|digit| digit == b'0')), "{status}");
}

fn ids(domains: &mut [Domain]) -> Vec<u16> {
    domains.iter_mut().map(|domain| domain.vm.id()).collect()
}

#[test]
fn domains_by_the_recipe_of_the_readme_interrupt_each_other_over_a_restart_of_the_unit() {
    let Some(host) = Host::boot() else { return };
    let [commands, shmem] = blocks("README.md", "### libvirt");
    host.follow(&commands);
    let socket = host.path(SOCKET);
    for name in ["one", "two", "three"] {
        host.define(name, &shmem);
    }
    let mut domains = vec![host.start("one"), host.start("two")];
    for domain in &domains {
        assert_is_of_libvirts_user(&host, domain);
    }
    let before = ids(&mut domains);
    assert_eq!(Peer::join(&socket, VECTORS).others(), before);
    check_all(&mut domains);

    host.must(&["systemctl", "restart", "ivshmem-server@red"]);
    domains.push(host.start("three"));
    let now = ids(&mut domains);
    assert_eq!(now[..2], before, "the domains keep their ids");
    check_all(&mut domains);

    // A domain that is started again gets a new id: the others were told of the old one.
    host.stop(domains.remove(0));
    domains.push(host.start("one"));
    check_all(&mut domains);

    let mut now = ids(&mut domains);
    now.sort_unstable();
    let mut peer = Peer::join(&socket, VECTORS);
    assert_eq!(peer.others(), now);
    assert_eq!(size_of(&peer), 4 << 20);
    for mut domain in domains {
        let id = domain.vm.id();
        host.stop(domain);
        peer.wait_for_departure(id);
    }
    // libvirt has left the socket as it was, and the next domain attaches.
    let found = socket.metadata().expect("it is there");
    let kvm = host.number_of("/etc/group", "kvm");
    assert_eq!((found.uid(), found.gid(), found.mode() & 0o777), (0, kvm, 0o660));
    let mut last = host.start("two");
    peer.wait_for_peer(last.vm.id());
}

#[test]
fn domains_name_the_socket_of_a_server_without_systemd_and_need_permission_on_it() {
    let Some(host) = Host::boot() else { return };
    let [commands, shmem] = blocks("docs/libvirt.md", "## Without systemd");
    host.follow(&commands);
    let socket = host.path("/run/ivshmem/red");
    for name in ["one", "two", "three"] {
        host.define(name, &shmem);
    }
    let mut domains = vec![host.start("one")];
    assert_is_of_libvirts_user(&host, &domains[0]);

    fs::set_permissions(&socket, Permissions::from_mode(0o600)).expect("it is there");
    let error = host.fail_to_start("two");
    let expected = "Failed to connect to '/run/ivshmem/red': Permission denied";
    assert!(error.contains(expected), "{error}");
    fs::set_permissions(&socket, Permissions::from_mode(0o660)).expect("it is there");
    domains.push(host.start("two"));
    check_all(&mut domains);

    let before = ids(&mut domains);
    let supervisor = text_of(&host.path("/run/ivshmem/red.pid"));
    let supervisor = supervisor.trim();
    let children = format!("/proc/{supervisor}/task/{supervisor}/children");
    let server = text_of(&host.path(&children));
    host.must(&["kill", "-KILL", server.trim()]);
    domains.push(host.start("three"));
    assert_eq!(ids(&mut domains)[..2], before, "the domains keep their ids");
    check_all(&mut domains);
    assert_ne!(text_of(&host.path(&children)), server, "the server was started again");
    for domain in domains {
        host.stop(domain);
    }
    assert!(Peer::join(&socket, VECTORS).others().is_empty());
}

#[test]
fn a_running_domain_gets_the_device_and_a_domain_with_it_is_not_saved() {
    let Some(host) = Host::boot() else { return };
    let [commands, shmem] = blocks("docs/libvirt.md", "## With the systemd unit");
    assert_eq!([commands.clone(), shmem.clone()], blocks("README.md", "### libvirt"));
    host.follow(&commands);
    host.define("one", &shmem);
    host.define("two", "");
    let mut domains = vec![host.start("one")];
    let qtest = host.start_alone("two");
    fs::write(host.path("/run/shmem.xml"), shmem).expect("/run is private");
    host.must(&["virsh", "attach-device", "two", "/run/shmem.xml", "--live"]);
    domains.push(Domain { name: "two", vm: Vm::attach(qtest) });
    check_all(&mut domains);

    for domain in &domains {
        let output = host.run(&["virsh", "managedsave", domain.name]);
        let error = String::from_utf8_lossy(&output.stderr);
        let expected = "Migration is disabled when using feature 'peer mode' in device 'ivshmem'";
        assert!(!output.status.success() && error.contains(expected), "{output:?}");
    }
    check_all(&mut domains);
}

#[test]
fn libvirt_explains_what_is_wrong_with_the_xml_or_the_server() {
    let Some(host) = Host::boot() else { return };
    let [_, shmem] = blocks("README.md", "### libvirt");
    for (wrong, error) in [
        (shmem.replace("<server/>", ""), "msi option is only supported with a server"),
        (
            "<shmem name='red'><model type='ivshmem-doorbell'/></shmem>".to_owned(),
            "is supported only with server option enabled",
        ),
        (
            shmem.replace("<server/>", "<server/><size unit='M'>4</size>"),
            "shmem model 'ivshmem-doorbell' does not support size setting",
        ),
    ] {
        let refused = host.fail_to_define("one", &wrong);
        assert!(refused.contains(error), "{refused}");
        let page = text_of("docs/libvirt.md".as_ref());
        assert!(page.contains(error), "docs/libvirt.md has {error:?}");
    }
    host.define("one", &shmem);
    let error = host.fail_to_start("one");
    let expected = "Failed to connect to '/var/lib/libvirt/shmem-red-sock': No such file";
    assert!(error.contains(expected), "{error}");
}
