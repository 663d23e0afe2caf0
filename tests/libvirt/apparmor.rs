// SPDX-License-Identifier: GPL-2.0-or-later
//! AppArmor: the profile of the server, and what libvirt's helper permits QEMU.
//!
//! No rule is enforced here: the kernel may have no AppArmor, and the test must not change that of the machine.

#![forbid(unsafe_code)]

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use nix::unistd::geteuid;

use crate::common::find_in_path;
use crate::common::skip::skip;
use crate::common::text_of;
use crate::host::domain_xml;
use crate::recipe::blocks;

const PROFILE: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/apparmor/usr.bin.ivshmem-server");
const HELPER: &str = "/usr/lib/libvirt/virt-aa-helper";

fn run(command: &mut Command, input: &str) -> Output {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program was found");
    let mut stdin = child.stdin.take().expect("it is piped");
    // A program that ends early, with an error, may not read everything.
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    child.wait_with_output().expect("waitpid works")
}

#[test]
fn the_profile_of_the_server_is_valid() {
    let Some(parser) = find_in_path("apparmor_parser") else {
        skip("apparmor_parser is not installed (Debian package apparmor)");
        return;
    };
    let profile = text_of(Path::new(PROFILE));
    // It compiles the profile, and gives it neither to the kernel nor to the cache.
    let compile = |text: &str| {
        run(Command::new(&parser).args(["-Q", "-K", "--quiet"]), text).status.success()
    };
    assert!(compile(&profile));
    assert!(!compile(&profile.replace("capability kill", "capability no_such_capability")));
    // With the rules that docs/libvirt.md gives as an example.
    let [_, rules] = blocks("docs/libvirt.md", "### The profile of the server");
    let local = "include if exists <local/usr.bin.ivshmem-server>";
    assert!(profile.contains(local));
    assert!(compile(&profile.replace(local, &rules)), "{rules}");
}

#[test]
fn libvirts_helper_permits_the_sockets_of_the_recipes() {
    if !geteuid().is_root() || !Path::new(HELPER).exists() {
        skip("virt-aa-helper needs root and the Debian package libvirt-daemon");
        return;
    }
    let uuid = "6a0e3f5c-1d1c-4c1e-9f57-0a3c8f1b2d4e";
    let rules = |shmem: &str| {
        let xml = domain_xml("one", shmem).replace("<name>", &format!("<uuid>{uuid}</uuid><name>"));
        let mut helper = Command::new(HELPER);
        helper.args(["--create", "--dryrun", "--uuid", &format!("libvirt-{uuid}")]);
        run(&mut helper, &xml)
    };
    let [_, default] = blocks("README.md", "### libvirt");
    let [_, named] = blocks("docs/libvirt.md", "## Without systemd");
    for (shmem, socket) in
        [(&default, "/var/lib/libvirt/shmem-red-sock"), (&named, "/run/ivshmem/red")]
    {
        let output = rules(shmem);
        let text = [&output.stdout[..], &output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        assert!(output.status.success(), "{output:?}");
        assert!(text.contains(&format!("\"{socket}\" rw,\n")), "{text}");
    }
    let refused = rules(&named.replace("/run/ivshmem/red", "/etc/ivshmem/red"));
    let error = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && error.contains("skipped restricted file"), "{refused:?}");
    let written = fs::exists(format!("/etc/apparmor.d/libvirt/libvirt-{uuid}"));
    assert!(!written.expect("it can be looked up"), "--dryrun writes no file");
}
