// SPDX-License-Identifier: GPL-2.0-or-later
//! Building C programs against the header and the libraries that `cargo test` has just built,
//! and running them.

#![forbid(unsafe_code)]
// Each test program compiles this module for itself and uses its own part of it.
#![allow(dead_code)]

use std::ffi::OsStr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit};
use tempfile::TempDir;

/// The system libraries that the static library needs; `tests/install.rs` compares them with rustc's list.
pub(crate) const PRIVATE_LIBRARIES: [&str; 7] =
    ["-lgcc_s", "-lutil", "-lrt", "-lpthread", "-lm", "-ldl", "-lc"];

/// The time limit for a C program, which is slow under valgrind on a busy machine. Its own `alarm` is shorter.
const LIMIT: Duration = Duration::from_secs(120);

/// A file of this project.
pub(crate) fn project(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Builds the C library in this test's profile, once, and returns its path. The library is no rlib, so `cargo test`
/// alone does not build it.
fn built(name: &str) -> PathBuf {
    static DIRECTORY: LazyLock<PathBuf> = LazyLock::new(|| {
        let test = std::env::current_exe().expect("a test knows its own file");
        let profile = test.ancestors().nth(2).expect("target/PROFILE/deps/TEST").to_owned();
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--quiet", "--lib", "--package", "ivshmem-server"]);
        cargo.arg("--manifest-path").arg(project("Cargo.toml"));
        cargo.arg("--target-dir").arg(profile.parent().expect("target"));
        if profile.ends_with("release") {
            cargo.arg("--release");
        }
        expect_success(&mut cargo);
        profile
    });
    let library = DIRECTORY.join(name);
    assert!(library.is_file(), "cargo did not build {}", library.display());
    library
}

/// The static library.
pub(crate) fn static_library() -> PathBuf {
    built("libivshmem_server.a")
}

/// The shared library, as cargo names it.
pub(crate) fn shared_library() -> PathBuf {
    built("libivshmem_server.so")
}

/// A directory in which the linker and the loader find the shared library.
pub(crate) fn shared_directory() -> &'static Path {
    static DIRECTORY: LazyLock<TempDir> = LazyLock::new(|| {
        let dir = tempfile::tempdir().expect("a temporary directory");
        for name in ["libivshmem_server.so", "libivshmem_server.so.1"] {
            symlink(shared_library(), dir.path().join(name)).expect("symlink works");
        }
        dir
    });
    DIRECTORY.path()
}

/// A compiler.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Compiler {
    /// The cc crate's choice: `CC`, or cc.
    Default,
    /// A command, and the Debian package that it is in.
    Named(&'static str, &'static str),
}

impl Compiler {
    /// The compiler with every warning an error.
    pub(crate) fn strict(self) -> Command {
        let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
        let mut build = cc::Build::new();
        build.target(&target).host(&target).opt_level(1).debug(true).cargo_metadata(false);
        build.cargo_warnings(false);
        if let Self::Named(command, package) = self {
            need(command, package);
            build.compiler(command);
        }
        let mut command = build.get_compiler().to_command();
        command.args(["-Wall", "-Wextra", "-Wpedantic", "-Werror"]);
        command.arg("-I").arg(project("include"));
        command
    }
}

/// Fails if a command is missing, and names its package.
#[track_caller]
pub(crate) fn need(command: &str, package: &str) {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).any(|dir| dir.join(command).is_file());
    assert!(found, "{command} is not installed; on Debian: apt-get install {package}");
}

/// How a C test is linked and run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Static,
    Shared,
    Sanitized,
    Valgrind,
}

/// Builds a C program of the project.
#[track_caller]
pub(crate) fn build(source: &str, mode: Mode, directory: &Path) -> PathBuf {
    let program = directory.join("program");
    let mut command = Compiler::Default.strict();
    command.args(["-std=c11", "-D_GNU_SOURCE"]).arg(project(source)).arg("-o").arg(&program);
    if mode == Mode::Sanitized {
        command.args(["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]);
    }
    if mode == Mode::Shared {
        command.arg("-L").arg(shared_directory()).arg("-livshmem_server").arg("-pthread");
    } else {
        command.arg(static_library()).args(PRIVATE_LIBRARIES);
    }
    expect_success(&mut command);
    program
}

/// Runs a C program that was built in this mode.
#[track_caller]
pub(crate) fn run(program: &Path, mode: Mode) -> Output {
    let mut command = match mode {
        Mode::Valgrind => {
            need("valgrind", "valgrind");
            // valgrind's program cannot have a larger limit than valgrind at its start.
            let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("getrlimit works");
            let mut command = Command::new("prlimit");
            command.arg(format!("--nofile={hard}:")).args([
                "valgrind",
                "--quiet",
                "--error-exitcode=99",
                "--leak-check=full",
            ]);
            command.args(["--show-leak-kinds=all", "--errors-for-leak-kinds=all"]);
            command.args(["--track-fds=yes", "--child-silent-after-fork=yes"]);
            command.arg(program);
            command
        }
        Mode::Sanitized => {
            let mut command = Command::new(program);
            command.env("ASAN_OPTIONS", "detect_leaks=1:abort_on_error=1");
            command
        }
        Mode::Static | Mode::Shared => Command::new(program),
    };
    if mode != Mode::Static {
        command.env("C_TESTS_SMALL", "1");
    }
    command.env("LD_LIBRARY_PATH", shared_directory());
    expect_success(&mut command)
}

/// Runs a command, which must succeed within the time limit.
#[track_caller]
pub(crate) fn expect_success(command: &mut Command) -> Output {
    let output = finish(command);
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let name = words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{name}\n{}\n--- stdout\n{}--- stderr\n{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    output
}

/// Runs a command, which must end within the time limit.
#[track_caller]
pub(crate) fn finish(command: &mut Command) -> Output {
    let out = tempfile::tempfile().expect("a temporary file");
    let err = tempfile::tempfile().expect("a temporary file");
    command.stdin(Stdio::null());
    command.stdout(out.try_clone().expect("dup works"));
    command.stderr(err.try_clone().expect("dup works"));
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => panic!("cannot run {command:?}: {error}"),
    };
    let deadline = Instant::now() + LIMIT;
    let status = loop {
        match child.try_wait().expect("waitpid works") {
            Some(status) => break status,
            None if Instant::now() > deadline => {
                let _ = child.kill();
                let _ = child.wait();
                panic!("{command:?} did not end within {LIMIT:?}");
            }
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    };
    let read = |mut file: std::fs::File| {
        use std::io::{Read, Seek};
        let mut bytes = Vec::new();
        file.rewind().expect("a file can be read again");
        file.read_to_end(&mut bytes).expect("a file can be read");
        bytes
    };
    Output { status, stdout: read(out), stderr: read(err) }
}

/// The words that a command prints.
#[track_caller]
pub(crate) fn words<I: AsRef<OsStr>>(command: &str, arguments: &[I]) -> Vec<String> {
    let output = expect_success(Command::new(command).args(arguments));
    let text = String::from_utf8(output.stdout).expect("it prints text");
    text.split_whitespace().map(String::from).collect()
}
