// SPDX-License-Identifier: GPL-2.0-or-later
//! AppArmor: the profile of the server, and what libvirt's helper permits QEMU.
//!
//! No rule is enforced here: the kernel may have no AppArmor, and the test must not change that of the machine. Instead
//! the files that servers use are compared with the rules.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use nix::unistd::geteuid;

use crate::common::daemon::program;
use crate::common::program::in_own_mounts;
use crate::common::skip::skip;
use crate::common::systemd::Systemd;
use crate::common::{find_in_path, text_of};
use crate::host::domain_xml;
use crate::profile::{Rules, accesses};
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
fn the_profile_permits_what_servers_do_with_files() {
    if !geteuid().is_root() {
        skip("a server that gives up root needs root");
        return;
    }
    for (program, package) in [("apparmor_parser", "apparmor"), ("strace", "strace")] {
        if find_in_path(program).is_none() {
            skip(&format!("{program} is not installed (Debian package {package})"));
            return;
        }
    }
    let dir = Systemd::directory();
    let trace = dir.path().join("trace").display().to_string();
    let client = env!("CARGO_BIN_EXE_ivshmem-client").to_owned();
    let [commands, _] = blocks("docs/libvirt.md", "## Without systemd");
    let commands = commands.replace("sudo ", "");
    let script = in_own_mounts(include_str!("trace.sh"), &[client, trace, commands]);
    let script = script.expect("root may mount file systems");
    let mut limited = Command::new("timeout");
    limited.arg("120").arg(script.get_program()).args(script.get_args());
    let output = run(&mut limited, "");
    assert!(output.status.success(), "{output:?}");

    let mut seen = BTreeSet::new();
    for file in fs::read_dir(dir.path()).expect("it is ours") {
        seen.extend(accesses(&text_of(&file.expect("an entry").path())));
    }
    let server = fs::canonicalize(program()).expect("it was built").display().to_string();
    let expanded = Command::new("apparmor_parser").args(["-Q", "-K", "-p", PROFILE]).output();
    let rules = Rules::parse(&String::from_utf8_lossy(&expanded.expect("it was found").stdout));
    let refused: Vec<_> = seen
        .iter()
        .map(|(path, letters)| (path.replace(&server, "/usr/bin/ivshmem-server"), *letters))
        // Pipes and anonymous memory have no path.
        .filter(|(path, _)| path.starts_with('/') && !path.starts_with("/memfd:"))
        .filter(|(path, letters)| !rules.permit(path, letters))
        .collect();
    assert!(refused.is_empty(), "the profile does not permit: {refused:#?}");
    // The trace is complete, and the rules permit not everything.
    for access in [
        ("/run/ivshmem/red", "w"),
        ("/run/ivshmem/red.pid", "l"),
        ("/run/ivshmem-server.pid", "l"),
        ("/etc/ivshmem-server/blue.conf", "r"),
        ("/dev/shm/ivshmem", "rw"),
        ("/dev/shm/.ivshmem-lock.ivshmem", "k"),
    ] {
        assert!(seen.contains(&(access.0.to_owned(), access.1)), "{access:?} of {seen:#?}");
    }
    assert!(!rules.permit("/etc/shadow", "r") && !rules.permit("/dev/shm/red", "r"));
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
