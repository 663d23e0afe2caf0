// SPDX-License-Identifier: GPL-2.0-or-later
//! What is shipped: the exported symbols, the soname, and a tree that `make install` made, in
//! which pkg-config finds everything that a C program needs.

#![forbid(unsafe_code)]

mod c;

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use c::{PRIVATE_LIBRARIES, expect_success, need, project, shared_library, static_library, words};
use tempfile::TempDir;

/// QEMU's seven, and this project's five.
const FUNCTIONS: [&str; 12] = [
    "ivshmem_server_close",
    "ivshmem_server_dispatch",
    "ivshmem_server_dump",
    "ivshmem_server_get_fd",
    "ivshmem_server_get_fds",
    "ivshmem_server_handle_fds",
    "ivshmem_server_init",
    "ivshmem_server_last_error",
    "ivshmem_server_search_peer",
    "ivshmem_server_set_log",
    "ivshmem_server_start",
    "ivshmem_server_version",
];

const PROGRAMS: [&str; 3] = ["ivshmem-bench", "ivshmem-client", "ivshmem-server"];

#[test]
fn the_shared_library_exports_the_functions_of_the_header_and_nothing_else() {
    need("nm", "binutils");
    let library = shared_library();
    let table = words("nm", &["-D".as_ref(), "--defined-only".as_ref(), library.as_os_str()]);
    let kinds: BTreeSet<&str> = table.chunks(3).map(|line| line[1].as_str()).collect();
    let names: BTreeSet<&str> = table.chunks(3).map(|line| line[2].as_str()).collect();
    assert_eq!(names, FUNCTIONS.into());
    assert_eq!(kinds, ["T"].into());
}

#[test]
fn the_static_library_defines_no_other_plain_name_of_ours() {
    need("nm", "binutils");
    let library = static_library();
    let table = words("nm", &["-g".as_ref(), "--defined-only".as_ref(), library.as_os_str()]);
    // The names of the objects in it have dots.
    let names =
        table.into_iter().filter(|word| word.starts_with("ivshmem_") && !word.contains('.'));
    assert_eq!(names.collect::<BTreeSet<_>>(), FUNCTIONS.map(String::from).into());
}

#[test]
fn the_soname_carries_the_number_of_the_abi() {
    need("readelf", "binutils");
    let library = shared_library();
    let dynamic = words("readelf", &["-d".as_ref(), library.as_os_str()]);
    let soname = dynamic.iter().position(|word| word == "(SONAME)").expect("a soname");
    assert!(dynamic[soname..].contains(&"[libivshmem_server.so.1]".into()), "{dynamic:?}");
}

#[test]
fn the_private_libraries_are_those_that_rustc_names() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let empty = dir.path().join("empty.rs");
    fs::write(&empty, "").expect("a file can be written");
    let mut rustc = Command::new(std::env::var_os("RUSTC").unwrap_or("rustc".into()));
    rustc.args(["--crate-type", "staticlib", "--print", "native-static-libs", "--out-dir"]);
    let said = expect_success(rustc.arg(dir.path()).arg(&empty)).stderr;
    let said = String::from_utf8(said).expect("text");
    let (_, list) = said.split_once("native-static-libs:").expect("the note");
    let list: BTreeSet<&str> =
        list.split_whitespace().take_while(|w| w.starts_with("-l")).collect();
    let ours = PRIVATE_LIBRARIES.into();
    assert!(list.is_subset(&ours), "rustc wants {list:?}, we say {ours:?}");

    let pc = fs::read_to_string(project("ivshmem-server.pc.in")).expect("the template");
    let line = pc.lines().find_map(|line| line.strip_prefix("Libs.private: ")).expect("the line");
    assert_eq!(line, PRIVATE_LIBRARIES.join(" "));
}

/// A tree made by `make install`, of what this test run has built.
struct Tree {
    /// Where `make` finds what was built; links to it.
    _built: TempDir,
    root: TempDir,
}

fn make(target: &str, built: &Path, root: &Path) {
    need("make", "make");
    let mut command = Command::new("make");
    command.arg("-C").arg(project(".")).arg(target).arg("PREFIX=/usr");
    command.arg(format!("DESTDIR={}", root.display()));
    command.arg(format!("TARGET={}", built.display()));
    command.env_remove("MAKEFLAGS").env_remove("MAKELEVEL");
    expect_success(&mut command);
}

fn install() -> Tree {
    let built = tempfile::tempdir().expect("a temporary directory");
    let root = tempfile::tempdir().expect("a temporary directory");
    for library in [static_library(), shared_library()] {
        let name = library.file_name().expect("a file");
        fs::copy(&library, built.path().join(name)).expect("a library can be copied");
    }
    for (name, program) in [
        ("ivshmem-server", env!("CARGO_BIN_EXE_ivshmem-server")),
        ("ivshmem-client", env!("CARGO_BIN_EXE_ivshmem-client")),
        ("ivshmem-bench", env!("CARGO_BIN_EXE_ivshmem-bench")),
    ] {
        fs::copy(program, built.path().join(name)).expect("the program was built");
    }
    make("install", built.path(), root.path());
    Tree { _built: built, root }
}

impl Tree {
    fn path(&self, path: &str) -> PathBuf {
        self.root.path().join(path)
    }

    fn pkg_config(&self, what: &[&str]) -> Vec<String> {
        need("pkg-config", "pkg-config");
        let mut command = Command::new("pkg-config");
        command.args(what).arg("ivshmem-server");
        command.env("PKG_CONFIG_LIBDIR", self.path("usr/lib/pkgconfig"));
        command.env("PKG_CONFIG_SYSROOT_DIR", self.root.path());
        let said = String::from_utf8(expect_success(&mut command).stdout).expect("text");
        said.split_whitespace().map(String::from).collect()
    }

    /// Builds the example and has a client come to it.
    fn build_and_serve(&self, flags: &[String]) {
        let program = self.path("event_loop");
        let mut cc = Command::new("cc");
        cc.args(["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]);
        cc.arg(project("examples/event_loop.c")).arg("-o").arg(&program).args(flags);
        expect_success(&mut cc);

        let name = self.root.path().file_name().expect("a name").to_string_lossy().into_owned();
        let socket = self.path("socket");
        let mut command = Command::new(&program);
        command.arg(&socket).arg(format!("ivshmem-example-{name}"));
        command.env("LD_LIBRARY_PATH", self.path("usr/lib")).stdout(Stdio::piped());
        let mut server = Running(command.spawn().expect("the example starts"));
        let mut lines = BufReader::new(server.0.stdout.take().expect("a pipe")).lines();
        let mut expect = |start: &str| {
            let line = lines.next().expect("a line more").expect("text");
            assert!(line.starts_with(start), "{line:?} is not {start:?}…");
        };
        expect("Using POSIX shared memory: ");
        expect("create & bind socket ");
        // The line comes before what it says is done.
        let patience = Instant::now() + Duration::from_secs(10);
        let client = loop {
            match UnixStream::connect(&socket) {
                Ok(client) => break client,
                Err(error) if Instant::now() > patience => panic!("it does not listen: {error}"),
                Err(_) => thread::sleep(Duration::from_millis(1)),
            }
        };
        expect("accept()=");
        expect("new peer id = 0");
        drop(client);
        expect("free peer 0");
        let pid = nix::unistd::Pid::from_raw(server.0.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::SIGTERM).expect("it is our child");
        expect("close server");
        assert!(server.0.wait().expect("it ends").success());
        assert!(!socket.exists());
    }
}

/// A process that does not outlive its test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_example_builds_and_runs_with_the_installed_shared_library() {
    let tree = install();
    let flags = tree.pkg_config(&["--cflags", "--libs"]);
    assert!(flags.contains(&"-livshmem_server".into()), "{flags:?}");
    fs::remove_file(tree.path("usr/lib/libivshmem_server.a")).expect("it was there");
    tree.build_and_serve(&flags);
    assert!(words("ldd", &[tree.path("event_loop")]).contains(&"libivshmem_server.so.1".into()));
}

#[test]
fn the_example_builds_and_runs_with_the_installed_static_library() {
    let tree = install();
    let flags = tree.pkg_config(&["--static", "--cflags", "--libs"]);
    fs::remove_file(tree.path("usr/lib/libivshmem_server.so")).expect("it was there");
    fs::remove_file(tree.path("usr/lib/libivshmem_server.so.1")).expect("it was there");
    tree.build_and_serve(&flags);
}

#[test]
fn the_installed_program_runs_and_uninstall_leaves_no_file() {
    let tree = install();
    assert_eq!(tree.pkg_config(&["--modversion"]), [env!("CARGO_PKG_VERSION")]);
    for program in PROGRAMS {
        expect_success(Command::new(tree.path("usr/bin").join(program)).arg("-h"));
    }
    assert!(tree.path("usr/include/ivshmem-server.h").is_file());
    make("uninstall", tree._built.path(), tree.root.path());
    let left = words(
        "find",
        &[tree.root.path().as_os_str(), "!".as_ref(), "-type".as_ref(), "d".as_ref()],
    );
    assert_eq!(left, Vec::<String>::new());
}

/// The files that `cargo publish` would put into a package, by their paths in it.
fn shipped(package: &str) -> BTreeSet<String> {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["package", "--list", "--allow-dirty", "--quiet", "--package", package]);
    cargo.arg("--manifest-path").arg(project("Cargo.toml"));
    let list = String::from_utf8(expect_success(&mut cargo).stdout).expect("text");
    list.lines().map(str::to_owned).collect()
}

/// Where the links of a Markdown text lead, those to other sites left out.
fn links(text: &str) -> Vec<&str> {
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    let local = targets.filter(|target| !target.contains("://") && !target.starts_with('#'));
    local.map(|target| target.split('#').next().expect("the part before it")).collect()
}

#[test]
fn each_package_has_the_files_that_its_readme_and_documents_link_to() {
    for (package, directory) in [("ivshmem", "ivshmem"), ("ivshmem-server", ".")] {
        let files = shipped(package);
        for page in files.iter().filter(|file| file.ends_with(".md")) {
            let path = project(directory).join(page);
            let text = fs::read_to_string(&path).expect("a page that is shipped");
            let parent = Path::new(page).parent().expect("a file has a directory");
            for link in links(&text) {
                let target = parent.join(link);
                // In docs/, a link to the root begins with `../`.
                let target = target.to_str().expect("text").replace("docs/../", "");
                assert!(files.contains(&target), "{package}: {page} links to {target}");
            }
        }
    }
}

#[test]
fn the_package_has_what_building_and_installing_the_c_library_needs() {
    let files = shipped("ivshmem-server");
    let makefile = fs::read_to_string(project("Makefile")).expect("it is there");
    for file in [
        "build.rs",
        "Makefile",
        "LICENSE",
        "include/ivshmem-server.h",
        "ivshmem-server.pc.in",
        "examples/event_loop.c",
    ] {
        assert!(files.contains(file), "no {file} in {files:?}");
    }
    // The scripts that these targets call. The other targets are for the repository.
    for target in ["all", "run", "install", "uninstall"] {
        let start = format!("\n{target}:");
        let (_, recipe) = makefile.split_once(&start).expect("a target of that name");
        let recipe = recipe.split("\n\n").next().expect("the part before the next target");
        for rest in recipe.split("scripts/").skip(1) {
            let name = rest.split_whitespace().next().expect("a name");
            let script = format!("scripts/{name}");
            assert!(files.contains(&script), "make {target}: no {script} in {files:?}");
        }
    }
    let library = shipped("ivshmem");
    for file in ["LICENSE", "README.md", "examples/server.rs", "examples/client.rs"] {
        assert!(library.contains(file), "no {file} in {library:?}");
    }
}

#[test]
fn cargo_install_gives_the_three_programs() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let mut cargo = Command::new(env!("CARGO"));
    // The test's own profile and target directory: most of it is built already.
    let test = std::env::current_exe().expect("a test knows its own file");
    let profile = test.ancestors().nth(2).expect("target/PROFILE/deps/TEST");
    cargo.args(["install", "--quiet", "--locked", "--no-track", "--path"]).arg(project("."));
    cargo.arg("--root").arg(root.path());
    cargo.arg("--target-dir").arg(profile.parent().expect("target"));
    if !profile.ends_with("release") {
        cargo.arg("--debug");
    }
    expect_success(&mut cargo);
    let bin = root.path().join("bin");
    let names: BTreeSet<String> = fs::read_dir(&bin)
        .expect("programs")
        .map(|entry| entry.expect("it can be read").file_name().to_string_lossy().into_owned())
        .collect();
    assert_eq!(names, PROGRAMS.map(String::from).into());
    for program in PROGRAMS {
        expect_success(Command::new(bin.join(program)).arg("--version"));
    }
}
