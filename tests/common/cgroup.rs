// SPDX-License-Identifier: GPL-2.0-or-later
//! A memory cgroup for a server: the kernel charges the unread messages of all clients to it.

#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::unistd::Pid;

use super::skip::skip;

/// A memory cgroup below that of this process. It is removed when this value is dropped; its processes must have
/// ended before.
pub(crate) struct Cgroup {
    dir: PathBuf,
    files: &'static Files,
}

/// The names of the control files.
struct Files {
    limit: &'static str,
    usage: &'static str,
    peak: &'static str,
    kills: &'static str,
}

const V1: Files = Files {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    peak: "memory.max_usage_in_bytes",
    kills: "memory.oom_control",
};

const V2: Files = Files {
    limit: "memory.max",
    usage: "memory.current",
    peak: "memory.peak",
    kills: "memory.events",
};

impl Cgroup {
    /// Makes a cgroup with this limit. If the machine does not allow it, the test is recorded as skipped.
    pub(crate) fn with_limit(bytes: u64) -> Option<Self> {
        let cgroup = parents().into_iter().find_map(|(dir, files)| Self::make(&dir, files, bytes));
        if cgroup.is_none() {
            skip(
                "a memory cgroup needs root, and a writable cgroup file system with the memory controller",
            );
        }
        cgroup
    }

    fn make(parent: &Path, files: &'static Files, bytes: u64) -> Option<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        // With v2 the parent has to pass the controller on. It may do so already.
        let _ = fs::write(parent.join("cgroup.subtree_control"), "+memory");
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = parent.join(format!("ivshmem-test-{}-{number}", std::process::id()));
        fs::create_dir(&dir).ok()?;
        let cgroup = Self { dir, files };
        fs::write(cgroup.dir.join(files.limit), bytes.to_string()).ok()?;
        cgroup.read(files.peak)?;
        Some(cgroup)
    }

    /// A command that moves itself into the cgroup and then becomes the program that follows, for
    /// [`Builder::under`](super::daemon::Builder::under).
    pub(crate) fn command(&self) -> Vec<String> {
        let procs = self.dir.join("cgroup.procs");
        let procs = procs.to_str().expect("the path is UTF-8");
        let script = "echo $$ >\"$1\" && shift && exec \"$@\"";
        ["sh", "-c", script, "sh", procs].map(str::to_owned).into()
    }

    /// Moves a running process into the cgroup. What it has is not charged to the cgroup.
    pub(crate) fn take(&self, process: Pid) {
        fs::write(self.dir.join("cgroup.procs"), process.to_string()).expect("we are root");
    }

    /// Processes that the kernel has killed for want of memory.
    pub(crate) fn killed(&self) -> u64 {
        let text = fs::read_to_string(self.dir.join(self.files.kills)).expect("it is there");
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        count.and_then(|count| count.trim().parse().ok()).expect("Linux 4.13 or newer")
    }

    /// The memory that is charged now, in bytes.
    pub(crate) fn usage(&self) -> u64 {
        self.read(self.files.usage).expect("the cgroup has the controller")
    }

    /// The most that was charged so far, in bytes.
    pub(crate) fn peak(&self) -> u64 {
        self.read(self.files.peak).expect("the cgroup has the controller")
    }

    fn read(&self, file: &str) -> Option<u64> {
        fs::read_to_string(self.dir.join(file)).ok()?.trim().parse().ok()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.dir) {
            eprintln!("cannot remove {}: {error}", self.dir.display());
        }
    }
}

/// The directories below which a memory cgroup may be possible: the cgroup of this process, and the root.
fn parents() -> Vec<(PathBuf, &'static Files)> {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mut parents = Vec::new();
    for mount in mounts.lines() {
        let fields: Vec<_> = mount.split_ascii_whitespace().collect();
        let (root, files) = match fields[..] {
            [_, root, "cgroup", options, ..] if options.split(',').any(|o| o == "memory") => {
                (Path::new(root), &V1)
            }
            [_, root, "cgroup2", ..] => (Path::new(root), &V2),
            _ => continue,
        };
        let is_ours = |controllers: &str| match files.limit == V1.limit {
            true => controllers.split(',').any(|name| name == "memory"),
            false => controllers.is_empty(),
        };
        // NUMBER:CONTROLLERS:PATH
        for line in own.lines() {
            let mut fields = line.splitn(3, ':').skip(1);
            if let (Some(controllers), Some(path)) = (fields.next(), fields.next()) {
                if is_ours(controllers) {
                    parents.push((root.join(path.trim_start_matches('/')), files));
                }
            }
        }
        parents.push((root.to_owned(), files));
    }
    parents
}
