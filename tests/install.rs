// SPDX-License-Identifier: GPL-2.0-or-later
//! The files that are shipped: exported symbols, soname, the tree that `make install` makes and in which pkg-config
//! finds everything that a C program needs, the C examples built against that tree, and the packages for cargo.

#![forbid(unsafe_code)]

mod c;

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use ivshmem::client::Client;

use c::{PRIVATE_LIBRARIES, expect_success, need, project, shared_library, static_library, words};
use tempfile::TempDir;

/// The time limit for an action that takes a moment; long enough for a busy machine.
const PATIENCE: Duration = Duration::from_secs(10);

/// The seven functions of QEMU's header, and this project's five.
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

const PROGRAMS: [&str; 4] = ["ivshmem-bench", "ivshmem-client", "ivshmem-ctl", "ivshmem-server"];

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
    assert!(list.is_subset(&ours), "rustc requires {list:?}, the constant has {ours:?}");

    let pc = fs::read_to_string(project("ivshmem-server.pc.in")).expect("the template");
    let line = pc.lines().find_map(|line| line.strip_prefix("Libs.private: ")).expect("the line");
    assert_eq!(line, PRIVATE_LIBRARIES.join(" "));
}

/// A tree that `make install` made from the files of this test run.
struct Tree {
    /// The directory from which `make` installs.
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
        ("ivshmem-ctl", env!("CARGO_BIN_EXE_ivshmem-ctl")),
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

    /// Builds an example, and checks that it serves two clients and ends at SIGTERM. All examples print the same
    /// verbose lines.
    fn build_and_serve(&self, example: &str, flags: &[String]) {
        let program = self.path(example);
        let mut cc = Command::new("cc");
        cc.args(["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]);
        cc.arg(project(&format!("examples/{example}.c"))).arg("-o").arg(&program).args(flags);
        expect_success(&mut cc);

        let name = self.root.path().file_name().expect("a name").to_string_lossy().into_owned();
        let socket = self.path("socket");
        let mut command = Command::new(&program);
        command.arg(&socket).arg(format!("ivshmem-example-{name}"));
        command.env("LD_LIBRARY_PATH", self.path("usr/lib")).stdout(Stdio::piped());
        let mut server = Running(command.spawn().expect("the example starts"));
        let mut lines = BufReader::new(server.0.stdout.take().expect("a pipe")).lines();
        let mut expect = |start: &str| {
            let line = lines.next().expect("another line").expect("text");
            assert!(line.starts_with(start), "{example}: {line:?} instead of {start:?}…");
        };
        expect("Using POSIX shared memory: ");
        expect("create & bind socket ");
        // The example prints this line before it listens.
        let deadline = Instant::now() + PATIENCE;
        let mut first = loop {
            match Client::connect(&socket) {
                Ok(client) => break client,
                Err(error) if Instant::now() > deadline => panic!("{example}: {error}"),
                Err(_) => thread::sleep(Duration::from_millis(1)),
            }
        };
        expect("accept()=");
        expect("new peer id = 0");
        let second = Client::connect(&socket).expect("the example listens");
        expect("accept()=");
        expect("new peer id = 1");
        dispatch_until(&mut first, |client| client.peer(1).is_some());
        check_ring(&first, &second);
        check_ring(&second, &first);
        drop(second);
        expect("free peer 1");
        dispatch_until(&mut first, |client| client.peer(1).is_none());
        drop(first);
        expect("free peer 0");
        let pid = nix::unistd::Pid::from_raw(server.0.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::SIGTERM).expect("it is our child");
        expect("close server");
        assert!(server.0.wait().expect("it ends").success(), "{example}");
        assert!(!socket.exists(), "{example} left its socket");
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

/// Handles the server's messages until `done` returns true.
#[track_caller]
fn dispatch_until(client: &mut Client, done: impl Fn(&Client) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done(client) {
        let left = deadline.saturating_duration_since(Instant::now());
        assert!(!left.is_zero(), "no message from the server within {PATIENCE:?}");
        client.wait(Some(left)).expect("the server runs");
    }
}

/// Rings the last of the two vectors.
#[track_caller]
fn check_ring(from: &Client, to: &Client) {
    from.ring(to.id(), 1).expect("the peer is connected");
    let mut vector = to.vector(1).expect("each client has two vectors");
    let rung = vector.wait(Some(PATIENCE)).expect("an eventfd can be read");
    assert!(rung, "peer {} did not receive the ring of peer {}", to.id(), from.id());
}

/// The examples that need only this library.
const EXAMPLES: [&str; 2] = ["event_loop", "epoll"];

#[test]
fn the_examples_build_and_serve_with_the_installed_shared_library() {
    let tree = install();
    let flags = tree.pkg_config(&["--cflags", "--libs"]);
    assert!(flags.contains(&"-livshmem_server".into()), "{flags:?}");
    fs::remove_file(tree.path("usr/lib/libivshmem_server.a")).expect("it was there");
    for example in EXAMPLES {
        tree.build_and_serve(example, &flags);
        let libraries = words("ldd", &[tree.path(example)]);
        assert!(libraries.contains(&"libivshmem_server.so.1".into()), "{libraries:?}");
    }
}

#[test]
fn the_examples_build_and_serve_with_the_installed_static_library() {
    let tree = install();
    let flags = tree.pkg_config(&["--static", "--cflags", "--libs"]);
    fs::remove_file(tree.path("usr/lib/libivshmem_server.so")).expect("it was there");
    fs::remove_file(tree.path("usr/lib/libivshmem_server.so.1")).expect("it was there");
    for example in EXAMPLES {
        tree.build_and_serve(example, &flags);
    }
}

#[test]
fn the_example_for_glib_builds_and_serves() {
    need("pkg-config", "pkg-config");
    let found = Command::new("pkg-config").args(["--exists", "glib-2.0"]).status();
    assert!(
        found.expect("pkg-config runs").success(),
        "glib-2.0 is not installed; on Debian: apt-get install libglib2.0-dev"
    );
    let tree = install();
    let mut flags = tree.pkg_config(&["--cflags", "--libs"]);
    flags.extend(words("pkg-config", &["--cflags", "--libs", "glib-2.0"]));
    tree.build_and_serve("glib", &flags);
}

#[test]
fn every_c_example_is_run() {
    let files = fs::read_dir(project("examples")).expect("a directory");
    let names: BTreeSet<String> = files
        .filter_map(|entry| entry.expect("an entry").file_name().into_string().ok())
        .filter_map(|name| name.strip_suffix(".c").map(String::from))
        .collect();
    let run = EXAMPLES.into_iter().chain(["glib"]);
    assert_eq!(names, run.map(String::from).collect());
}

/// `make deps` must install each package whose absence one of the tests in this directory reports.
#[test]
fn scripts_deps_names_every_package_that_a_test_asks_for() {
    let deps = fs::read_to_string(project("scripts/deps")).expect("a script");
    let known: BTreeSet<&str> = deps
        .split_whitespace()
        .filter_map(|word| word.split_once(':'))
        .map(|pair| pair.1)
        .collect();
    let files = ["tests", "tests/c", "tests/common"].map(|directory| {
        let entries = fs::read_dir(project(directory)).expect("a directory");
        entries.map(|entry| entry.expect("an entry").path()).filter(|path| path.is_file())
    });
    let mut packages = BTreeSet::new();
    for file in files.into_iter().flatten() {
        let text = fs::read_to_string(&file).expect("text");
        packages.extend(text.split(concat!("apt-get ", "install ")).skip(1).filter_map(package));
        // The arguments of `need` are a command and its package.
        let calls = text.split(concat!("need", "(\"")).skip(1);
        packages.extend(
            calls
                .filter_map(|call| call.split_once("\", \"")?.1.split_once('"'))
                .map(|pair| pair.0.to_owned()),
        );
    }
    assert!(packages.contains("libglib2.0-dev") && packages.contains("pkg-config"), "{packages:?}");
    for package in &packages {
        assert!(known.contains(package.as_str()), "scripts/deps does not install {package}");
    }
}

/// The name that a text begins with; none if it begins with a placeholder.
fn package(text: &str) -> Option<String> {
    let end = text.find(|c: char| !(c.is_ascii_alphanumeric() || "-.+".contains(c)));
    let name = &text[..end.unwrap_or(text.len())];
    (!name.is_empty()).then(|| name.to_owned())
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
    for own in ["usr/share/doc/ivshmem-server", "usr/share/ivshmem-server", "etc/ivshmem-server"] {
        assert!(!tree.path(own).exists(), "{own} is left");
    }
}

#[test]
fn uninstall_leaves_the_files_of_others_also_in_its_own_directories() {
    let tree = install();
    let others = [
        "etc/ivshmem-server/red.conf",
        "usr/bin/other",
        "usr/share/doc/ivshmem-server/examples/mine.c",
        "usr/share/man/man1/other.1",
    ];
    for other in others {
        fs::write(tree.path(other), "other").expect("the directory was installed");
    }
    make("uninstall", tree._built.path(), tree.root.path());
    let mut find = Command::new("find");
    find.current_dir(tree.root.path()).args(["usr", "etc", "!", "-type", "d"]);
    let left = String::from_utf8(expect_success(&mut find).stdout).expect("text");
    assert_eq!(left.lines().collect::<BTreeSet<_>>(), others.into());
}

#[test]
fn the_installed_units_name_the_installed_program_and_its_files() {
    let tree = install();
    let unit = |name: &str| {
        let path = tree.path("usr/lib/systemd/system").join(name);
        fs::read_to_string(path).expect("it was installed")
    };
    let service = unit("ivshmem-server@.service");
    let start = service.lines().find_map(|line| line.strip_prefix("ExecStart=")).expect("a line");
    let words: Vec<&str> = start.split(' ').collect();
    assert_eq!(words[0], "/usr/bin/ivshmem-server");
    let defaults = "usr/share/ivshmem-server/unit.conf";
    assert!(words.contains(&&*format!("--config=/{defaults}")), "{start}");
    assert!(words.contains(&"--config=-/etc/ivshmem-server/%i.conf"), "{start}");
    assert!(tree.path(defaults).is_file() && tree.path("etc/ivshmem-server").is_dir());
    assert!(
        unit("ivshmem-server@.socket").contains("\nListenStream=/var/lib/libvirt/shmem-%i-sock\n")
    );
    let accounts = fs::read_to_string(tree.path("usr/lib/sysusers.d/ivshmem-server.conf"));
    assert!(accounts.expect("it was installed").contains("\nu ivshmem "));
}

#[test]
fn other_directories_are_written_into_the_units() {
    need("make", "make");
    let root = tempfile::tempdir().expect("a temporary directory");
    let mut command = Command::new("make");
    command.arg("-C").arg(project(".")).arg("install-units");
    command.args(["PREFIX=/opt/x", "UNITDIR=/units", "SYSCONFDIR=/opt/x/etc"]);
    command.arg(format!("DESTDIR={}", root.path().display()));
    command.env_remove("MAKEFLAGS").env_remove("MAKELEVEL");
    expect_success(&mut command);
    let service = root.path().join("units/ivshmem-server@.service");
    let service = fs::read_to_string(service).expect("it was installed");
    let start = "\nExecStart=/opt/x/bin/ivshmem-server --foreground --supervise \
                 --socket=/var/lib/libvirt/shmem-%i-sock \
                 --control=/run/ivshmem-server/%i/%i.control \
                 --config=/opt/x/share/ivshmem-server/unit.conf \
                 --config=-/opt/x/etc/ivshmem-server/%i.conf\n";
    assert!(service.contains(start), "{service}");
    assert!(root.path().join("opt/x/lib/sysusers.d/ivshmem-server.conf").is_file());
}

/// The files that `cargo publish` would put into a package, by their paths in it.
fn shipped(package: &str) -> BTreeSet<String> {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["package", "--list", "--allow-dirty", "--quiet", "--package", package]);
    cargo.arg("--manifest-path").arg(project("Cargo.toml"));
    let list = String::from_utf8(expect_success(&mut cargo).stdout).expect("text");
    list.lines().map(str::to_owned).collect()
}

/// The targets of the links in a Markdown text, without links to other sites.
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
        "packaging/systemd/ivshmem-server@.service",
        "packaging/systemd/ivshmem-server@.socket",
        "packaging/systemd/unit.conf",
        "packaging/sysusers.d/ivshmem-server.conf",
        "packaging/man/ivshmem-server.1",
        "packaging/completions/_ivshmem-server",
        "examples/event_loop.c",
        "examples/epoll.c",
        "examples/glib.c",
    ] {
        assert!(files.contains(file), "no {file} in {files:?}");
    }
    // The scripts that these targets call. The other targets are for the repository.
    for target in ["all", "run", "install", "install-units", "install-papers", "uninstall"] {
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
