// SPDX-License-Identifier: GPL-2.0-or-later
//! The examples of docs/fleet.md: the container's command runs as process 1 in a private root directory.

// One function in common::peer takes over received descriptors; every other module forbids unsafe code.
#![deny(unsafe_code)]

mod common;
#[path = "supervise/supervisor.rs"]
#[allow(dead_code, reason = "the tests of the supervisor use the rest")]
mod supervisor;

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::geteuid;

use common::daemon::program;
use common::peer::Peer;
use common::program::{Place, Process, run};
use common::skip::skip;
use common::{is_asleep, wait_for};
use supervisor::{children, servers};

/// Makes `$1` a root directory that is read-only, with the directories `$2` and `$3` at the places where the container has
/// them, and executes the rest there.
const CONTAINER: &str = r#"
set -eu
root=$1 sockets=$2 runtime=$3
shift 3
mount --make-rprivate /
mount --bind "$root" "$root"
mount --bind "$sockets" "$root/run/ivshmem"
mount --bind "$runtime" "$root/run/supervisor"
mount -t proc proc "$root/proc"
mount -t tmpfs none "$root/dev"
touch "$root/dev/null"
mount --bind /dev/null "$root/dev/null"
mount -o remount,bind,ro "$root"
exec chroot "$root" "$@"
"#;

fn example(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/fleet").join(name);
    fs::read_to_string(path).expect("it is in the repository")
}

/// The words of the container's command.
fn command() -> Vec<String> {
    let text = example("daemonset.yaml");
    let lines = text.lines().skip_while(|line| line.trim() != "command:").skip(1);
    lines.map_while(|line| line.trim().strip_prefix("- ").map(str::to_owned)).collect()
}

/// The files that the program needs to start.
fn libraries() -> Vec<PathBuf> {
    let listed = run(Command::new("ldd").arg(program()));
    assert!(listed.status.success(), "{listed:?}");
    let words = listed.stdout.split_whitespace().filter(|word| word.starts_with('/'));
    words.map(PathBuf::from).collect()
}

#[test]
fn the_command_of_the_container_runs_as_process_1_in_a_root_with_nothing_else() {
    if !geteuid().is_root() {
        return skip("a private root directory needs root");
    }
    let place = Place::new();
    let (root, sockets) = (place.path("root"), place.path("sockets"));
    for directory in ["run/ivshmem", "run/supervisor", "proc", "dev", "usr/bin"] {
        fs::create_dir_all(root.join(directory)).expect("the place is ours");
    }
    for directory in [&sockets, &place.path("runtime")] {
        fs::create_dir(directory).expect("the place is ours");
    }
    fs::copy(program(), root.join("usr/bin/ivshmem-server")).expect("it was built");
    for library in libraries() {
        let inside = root.join(library.strip_prefix("/").expect("absolute"));
        fs::create_dir_all(inside.parent().expect("a directory")).expect("the place is ours");
        fs::copy(&library, inside).expect("it is there");
    }
    let words = command();
    assert_eq!(words[0], "/usr/bin/ivshmem-server");
    let mut outer = Command::new("unshare");
    outer.args(["--pid", "--mount", "--fork", "--kill-child", "sh", "-c", CONTAINER, "container"]);
    outer.arg(&root).arg(&sockets).arg(place.path("runtime")).args(&words);
    outer.env_clear().env("RUNTIME_DIRECTORY", "/run/supervisor");
    outer.env("PATH", std::env::var_os("PATH").expect("a path"));
    let container = Process::spawn(&mut outer);
    let socket = sockets.join("red");
    // Its path in /proc/net/unix is that of its own root.
    wait_for("the server listens", || UnixStream::connect(&socket).ok());
    let mut first = Peer::join(&socket, 2);
    let init = children(container.pid())[0];
    let server = servers(init)[0];
    wait_for("the server waits for events", || is_asleep(server).then_some(()));
    kill(server, Signal::SIGKILL).expect("it runs");
    let mut second = Peer::join(&socket, 2);
    second.wait_for_peer(first.id());
    first.wait_for_peer(second.id());
    kill(init, Signal::SIGTERM).expect("it runs");
    let ended = container.end();
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    assert!(!socket.exists(), "the end for good removes the socket");
}

#[test]
fn the_examples_are_valid_yaml_and_name_what_is_there() {
    let check =
        "import sys, yaml\nfor name in sys.argv[1:]:\n    list(yaml.safe_load_all(open(name)))\n";
    let path = |name| Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/fleet").join(name);
    let mut python = Command::new("/usr/bin/python3");
    python.args(["-c", check]).arg(path("daemonset.yaml")).arg(path("playbook.yml"));
    let checked = run(&mut python);
    assert!(checked.status.success(), "Debian package python3-yaml: {checked:?}");
    let unit =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/systemd/ivshmem-server@.service");
    assert!(unit.is_file() && example("playbook.yml").contains("name: ivshmem-server@red"));
}
