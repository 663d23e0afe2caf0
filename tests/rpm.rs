// SPDX-License-Identifier: GPL-2.0-or-later
//! The rpm packages of `make rpm`, made from the programs of this test run, and the tarball of `make dist`.

#![forbid(unsafe_code)]

mod c;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use c::{expect_success, need, project, shared_library, static_library};

fn text_from(command: &mut Command) -> String {
    String::from_utf8(expect_success(command).stdout).expect("text")
}

#[test]
fn the_rpm_packages_have_their_files_scripts_and_dependencies() {
    need("rpmbuild", "rpm");
    need("strip", "binutils");
    let built = tempfile::tempdir().expect("a temporary directory");
    let output = tempfile::tempdir().expect("a temporary directory");
    let programs = [
        env!("CARGO_BIN_EXE_ivshmem-server"),
        env!("CARGO_BIN_EXE_ivshmem-client"),
        env!("CARGO_BIN_EXE_ivshmem-ctl"),
        env!("CARGO_BIN_EXE_ivshmem-bench"),
    ];
    let files = programs.map(PathBuf::from).into_iter().chain([static_library(), shared_library()]);
    for file in files {
        let copy = built.path().join(file.file_name().expect("a file"));
        fs::copy(&file, copy).expect("it was built");
    }
    let mut script = Command::new(project("scripts/rpm"));
    script.arg(built.path()).arg(output.path()).env_remove("MAKEFLAGS").env_remove("MAKELEVEL");
    let made = text_from(&mut script);
    let version = env!("CARGO_PKG_VERSION");
    let package = |name: &str| {
        let start = format!("/{name}-{version}-");
        let found = made.lines().find(|line| line.contains(&start));
        found.unwrap_or_else(|| panic!("no {name} in {made}")).to_owned()
    };
    let query = |options: &str, package: &str| {
        text_from(Command::new("rpm").args(["--query", "--package", options, package]))
    };
    for (name, files, needs) in [
        (
            "ivshmem-server",
            &[
                "/etc/ivshmem-server",
                "/usr/bin/ivshmem-bench",
                "/usr/bin/ivshmem-client",
                "/usr/bin/ivshmem-ctl",
                "/usr/bin/ivshmem-server",
                "/usr/lib/systemd/system/ivshmem-server@.service",
                "/usr/lib/systemd/system/ivshmem-server@.socket",
                "/usr/lib/systemd/system/ivshmem-metrics.socket",
                "/usr/lib/sysusers.d/ivshmem-server.conf",
                "/usr/share/ivshmem-server/unit.conf",
                "/usr/share/man/man1/ivshmem-server.1",
                "/usr/share/bash-completion/completions/ivshmem-server",
                "/usr/share/doc/ivshmem-server/docs/operate.md",
                "/LICENSE",
            ][..],
            "\nsystemd\n",
        ),
        ("libivshmem_server1", &["/libivshmem_server.so.1", "/LICENSE"], "libc.so.6"),
        (
            "ivshmem-server-devel",
            &[
                "/libivshmem_server.a",
                "/libivshmem_server.so",
                "/pkgconfig/ivshmem-server.pc",
                "/usr/include/ivshmem-server.h",
                "/examples/epoll.c",
            ],
            "libivshmem_server1(",
        ),
    ] {
        let package = package(name);
        let list = query("--list", &package);
        for file in files {
            assert!(list.lines().any(|line| line.ends_with(file)), "{name}: no {file} in\n{list}");
        }
        assert!(query("--requires", &package).contains(needs), "{name} does not need {needs}");
    }
    let scripts = query("--scripts", &package("ivshmem-server"));
    for part in
        ["systemd-sysusers /usr/lib/sysusers.d/ivshmem-server.conf", "try-reload-or-restart"]
    {
        assert!(scripts.contains(part), "no {part} in\n{scripts}");
    }
}

#[test]
fn the_tarball_has_each_file_of_git_below_a_directory_with_the_version() {
    need("make", "make");
    need("git", "git");
    let git = |words: &[&str]| Command::new("git").current_dir(project(".")).args(words).output();
    // A test in an unpacked tarball has no repository.
    if !git(&["rev-parse", "HEAD"]).is_ok_and(|output| output.status.success()) {
        return;
    }
    let make = |output: &Path| {
        let mut make = Command::new("make");
        make.arg("-C")
            .arg(project("."))
            .arg("dist")
            .env_remove("MAKEFLAGS")
            .env_remove("MAKELEVEL");
        make.arg(format!("PACKAGES={}", output.display()));
        expect_success(&mut make);
        output.join(format!("ivshmem-server-{}.tar.gz", env!("CARGO_PKG_VERSION")))
    };
    let output = tempfile::tempdir().expect("a temporary directory");
    let tarball = make(output.path());
    let first = fs::read(&tarball).expect("it was made");
    assert!(fs::read(make(output.path())).expect("it was made") == first, "not the same twice");
    let list = text_from(Command::new("tar").arg("-tzf").arg(&tarball));
    let start = format!("ivshmem-server-{}/", env!("CARGO_PKG_VERSION"));
    let files = list.lines().filter(|line| !line.ends_with('/'));
    let files: BTreeSet<&str> =
        files.map(|line| line.strip_prefix(&start).expect("it is below the directory")).collect();
    let mut command = Command::new("git");
    let known = command.current_dir(project(".")).args(["ls-tree", "-r", "--name-only", "HEAD"]);
    let known = text_from(known);
    assert_eq!(files, known.lines().collect());
}
