// SPDX-License-Identifier: GPL-2.0-or-later
//! The command line: the options of the reference with its syntax, each with a long form, and some
//! more.

#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, Parser};
use ivshmem::MAX_VECTORS;

#[path = "args/access.rs"]
mod access;
#[path = "args/config.rs"]
mod config;

use access::Access;
pub(crate) use access::Account;
use config::Lines;

/// Shares memory and interrupts between QEMU virtual machines. To attach a machine:
/// -chardev socket,path=SOCKET,id=ID -device ivshmem-doorbell,vectors=N,chardev=ID
#[derive(Clone, Debug, Parser)]
#[command(name = "ivshmem-server", version, disable_help_flag = true, args_override_self = true)]
pub(crate) struct Args {
    /// Show this help
    #[arg(short = 'h', long, action = clap::ArgAction::Help)]
    help: Option<bool>,

    /// Print what this program can do as JSON, for programs that start it; all other options are
    /// ignored
    #[arg(long)]
    print_capabilities: bool,

    /// Read options from FILE: long options without dashes, one a line. Those on the command line,
    /// and in the FILE of a later --config, replace them. With a '-' before its name (--config=-FILE)
    /// it may be missing
    #[arg(long, value_name = "FILE")]
    config: Vec<PathBuf>,

    /// Print each join and leave on stdout; needs -F
    #[arg(short, long)]
    pub(crate) verbose: bool,

    /// Stay in the foreground; the default is to go to the background
    #[arg(short = 'F', long)]
    pub(crate) foreground: bool,

    /// Write the process id to FILE; no effect with -F
    #[arg(short, long, value_name = "FILE", default_value = "/var/run/ivshmem-server.pid")]
    pub(crate) pid_file: PathBuf,

    /// Listen at this UNIX socket; at most 107 bytes
    #[arg(short = 'S', long, value_name = "PATH", default_value = "/tmp/ivshmem_socket")]
    pub(crate) socket: PathBuf,

    /// Mode of the socket, in octal; write permission is permission to attach [default: 0777 minus
    /// the umask]
    #[arg(long, value_name = "MODE", value_parser = mode)]
    pub(crate) socket_mode: Option<u32>,

    /// Owner of the socket, by name or number; root only [default: the user of the server]
    #[arg(long, value_name = "USER", value_parser = access::user)]
    pub(crate) socket_owner: Option<u32>,

    /// Group of the socket, by name or number; with --socket-mode 660 its members may attach
    #[arg(long, value_name = "GROUP", value_parser = access::group)]
    pub(crate) socket_group: Option<u32>,

    /// Share the POSIX shared memory object NAME [default: ivshmem]
    #[arg(short = 'M', long, value_name = "NAME", overrides_with_all = ["shm_dir", "memfd", "shm_file"])]
    shm_name: Option<OsString>,

    /// Mode of a new object of -M or --shm-file, in octal; no effect with -m and --memfd. An
    /// existing object that other users may write beyond this mode is refused [default: 0700 minus
    /// the umask, and 0600 for --shm-file]
    #[arg(long, value_name = "MODE", value_parser = mode)]
    pub(crate) shm_mode: Option<u32>,

    /// Group of a new object of -M, by name or number; needs --shm-mode. An existing object that
    /// another group may write is refused
    #[arg(long, value_name = "GROUP", value_parser = access::group, requires = "shm_mode")]
    pub(crate) shm_group: Option<u32>,

    /// Share an unnamed file in the directory DIR, which may be on hugetlbfs
    #[arg(short = 'm', long, value_name = "DIR", overrides_with_all = ["shm_name", "memfd", "shm_file"])]
    shm_dir: Option<PathBuf>,

    /// Share anonymous, sealed memory: no client can shrink it
    #[arg(long, overrides_with_all = ["shm_name", "shm_dir", "shm_file"])]
    memfd: bool,

    /// Share the file, block device or DAX device at PATH; a file is made if nothing is there. It
    /// is never removed. A device keeps its size, and QEMU cannot attach to it
    #[arg(long, value_name = "PATH", overrides_with_all = ["shm_name", "shm_dir", "memfd"])]
    shm_file: Option<PathBuf>,

    /// Size of the shared memory: bytes, or a number with a suffix B, K, M, G, T, P or E, such as
    /// 1.5G; rounded up to a power of two [default: 4M, or the size of an existing --shm-file]
    #[arg(short = 'l', long, value_name = "SIZE", value_parser = size)]
    pub(crate) size: Option<u64>,

    /// Do not round the size up to a power of two: it must be a multiple of the page size. For
    /// QEMU's ivshmem-flat; a QEMU with ivshmem-doorbell aborts if the size is no power of two
    #[arg(long)]
    pub(crate) size_exact: bool,

    /// Use huge pages of SIZE, such as 2M or 1G. With --memfd the memory is made of them; with -m
    /// and --shm-file the hugetlbfs must have this page size
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) hugetlb: Option<u64>,

    /// Allocate the memory on these NUMA nodes only
    #[arg(long, value_name = "NODE[,NODE]", value_delimiter = ',')]
    pub(crate) numa_node: Vec<u32>,

    /// Do not remove the object of -M at the end
    #[arg(long)]
    pub(crate) keep: bool,

    /// Interrupt vectors of each machine, 1 to 2048; hexadecimal with 0x
    #[arg(short = 'n', long, value_name = "VECTORS", default_value = "1", value_parser = vectors)]
    pub(crate) vectors: u32,

    /// Admit only this user, by name or number; also the users and groups of each further
    /// --allow-uid and --allow-gid [default: all that may write to the socket]
    #[arg(long, value_name = "USER", value_parser = access::user)]
    allow_uid: Vec<u32>,

    /// Admit only members of this group, by name or number; see --allow-uid
    #[arg(long, value_name = "GROUP", value_parser = access::group)]
    allow_gid: Vec<u32>,

    /// Clients that may be connected at the same time [default: as many as there are ids and
    /// descriptors]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub(crate) max_clients: Option<u32>,

    /// What one user may hold: connections, ended connections with unread messages, and ids that
    /// are remembered because a client was told of them [default: all but a reserve]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub(crate) max_clients_per_uid: Option<u32>,

    /// Id of the first client, 0 to 65535; the next ones count up from it
    #[arg(long, value_name = "ID", default_value = "0", value_parser = clap::value_parser!(u16))]
    pub(crate) first_id: u16,

    /// Give up root after the start: go on as this user, by name or number, with its groups and
    /// without capabilities. With --supervise the supervisor stays root
    #[arg(long, value_name = "USER", value_parser = access::account)]
    pub(crate) user: Option<Account>,

    /// After the start, allow only the system calls and files that the server needs: on; log what it
    /// would forbid: log
    #[arg(long, value_name = "MODE", value_enum, default_value = "off")]
    pub(crate) sandbox: Sandbox,

    /// Once listening, write the line READY=1 to the open descriptor FD, and close it
    #[arg(long, value_name = "FD", value_parser = descriptor)]
    pub(crate) ready_fd: Option<i32>,

    /// Write log lines of this level and above [default: RUST_LOG, or info in the journal and the
    /// system log, and warn elsewhere]
    #[arg(long, value_name = "LEVEL", value_parser = ["error", "warn", "info", "debug", "trace"])]
    pub(crate) log_level: Option<String>,

    /// Path of the control socket, by which ivshmem-ctl looks at the server; if it cannot be made,
    /// the start fails [default: the socket's path and ".control"; if it cannot be made, a warning]
    #[arg(long, value_name = "PATH", overrides_with = "no_control")]
    pub(crate) control: Option<PathBuf>,

    /// Make no control socket
    #[arg(long, overrides_with = "control")]
    pub(crate) no_control: bool,

    /// Once listening, print commands that attach a QEMU, list the peers and interrupt them
    #[arg(long)]
    pub(crate) hint: bool,

    /// Keep a server running: start it again whenever it ends, and keep its clients meanwhile.
    /// SIGHUP starts the program file anew (an upgrade)
    #[arg(long)]
    pub(crate) supervise: bool,

    /// Run as the server of a supervisor in the background; see `supervise`
    #[arg(long, hide = true)]
    pub(crate) supervised: bool,

    /// Run as the background process; see `detach`
    #[arg(long, hide = true)]
    pub(crate) detached: bool,

    /// The arguments, with those of the configuration files.
    #[arg(skip)]
    pub(crate) words: Vec<OsString>,
}

/// What happens to a system call that the server does not need.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Sandbox {
    /// It works: there is no sandbox
    #[default]
    Off,
    /// It fails
    On,
    /// It works, and the kernel logs it; files are not restricted
    Log,
}

/// The kind of shared memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Memory {
    Name(OsString),
    Directory(PathBuf),
    Sealed,
    File(PathBuf),
}

impl Memory {
    /// For the log.
    pub(crate) fn description(&self) -> String {
        match self {
            Self::Name(name) => format!("shared memory {name:?}"),
            Self::Directory(directory) => format!("memory in the directory {directory:?}"),
            Self::Sealed => "sealed anonymous memory".to_owned(),
            Self::File(path) => format!("memory in the file {path:?}"),
        }
    }
}

impl Args {
    /// The users and groups that may attach.
    pub(crate) fn access(&self) -> Access {
        Access { uids: self.allow_uid.clone(), gids: self.allow_gid.clone() }
    }

    /// The last of `-M`, `-m`, `--memfd` and `--shm-file` wins: each option overrides the others.
    pub(crate) fn memory(&self) -> Memory {
        match (&self.shm_name, &self.shm_dir, &self.shm_file) {
            _ if self.memfd => Memory::Sealed,
            (None, Some(directory), _) => Memory::Directory(directory.clone()),
            (None, None, Some(file)) => Memory::File(file.clone()),
            (name, ..) => Memory::Name(name.clone().unwrap_or_else(|| "ivshmem".into())),
        }
    }
}

/// Parses the command line, and the configuration files that it names. Help and version are returned
/// as errors, as usual with clap.
pub(crate) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Args, clap::Error> {
    let mut words: Vec<OsString> = arguments.into_iter().collect();
    // The supervisor has read the files, and passes their options on.
    let lines = if is_child_of_supervisor() {
        Lines::default()
    } else {
        Lines::of(&words, &Args::command())?
    };
    lines.insert_into(&mut words);
    let parsed = Args::try_parse_from(&words).and_then(check);
    let mut args = parsed.map_err(|error| lines.locate(error))?;
    args.words = words.into_iter().skip(1).collect();
    Ok(args)
}

/// The text of an error of [`parse`] on one line, without the usage.
pub(crate) fn one_line(error: &clap::Error) -> String {
    config::text_of(error)
}

/// What clap does not check.
fn check(args: Args) -> Result<Args, clap::Error> {
    if args.verbose && !args.foreground {
        let mut error = Args::command().error(
            ErrorKind::MissingRequiredArgument,
            "cannot use verbose (-v) in daemon mode: add -F to stay in the foreground",
        );
        error.insert(ContextKind::InvalidArg, ContextValue::String("--verbose".into()));
        return Err(error);
    }
    Ok(args)
}

/// Whether the process that started this one is a supervisor; see `supervise`.
pub(crate) fn is_child_of_supervisor() -> bool {
    let parent = std::os::unix::process::parent_id().to_string();
    std::env::var("IVSHMEM_SUPERVISOR").is_ok_and(|supervisor| supervisor == parent)
}

/// Parses the number of a descriptor that is not one of the standard streams.
fn descriptor(text: &str) -> Result<i32, String> {
    digits(text, 10)
        .flatten()
        .and_then(|number| i32::try_from(number).ok())
        .filter(|&number| number > 2)
        .ok_or_else(|| {
            "a descriptor is a number of 3 or above; 0, 1 and 2 are the standard streams".into()
        })
}

/// Parses a size: a number, with a fraction if it has a suffix; or `0x…` without a suffix.
fn size(text: &str) -> Result<u64, String> {
    let wrong = || {
        "a size is a number of bytes, or one with a suffix B, K, M, G, T, P or E, such as 4M or \
         1.5G"
            .to_string()
    };
    let large = || "a size is less than 16E".to_string();
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return digits(hex, 16).ok_or_else(wrong)?.ok_or_else(large);
    }
    let (number, shift) = match text.char_indices().next_back() {
        Some((end, suffix)) if !suffix.is_ascii_digit() => {
            let shift = "BKMGTPE".find(suffix.to_ascii_uppercase()).ok_or_else(wrong)?;
            (&text[..end], shift * 10)
        }
        _ => (text, 0),
    };
    let (whole, fraction) = match number.split_once('.') {
        Some((_, _)) if shift == 0 => return Err(wrong()),
        Some((whole, fraction)) => (whole, fraction),
        None => (number, "0"),
    };
    let whole = digits(whole, 10).ok_or_else(wrong)?.ok_or_else(large)?;
    if !fraction.chars().all(|c| c.is_ascii_digit()) {
        return Err(wrong());
    }
    // Digits beyond the 18th are worth less than two bytes.
    let fraction = &fraction[..fraction.len().min(18)];
    let parts = digits(fraction, 10).ok_or_else(wrong)?.ok_or_else(large)?;
    let fraction = (u128::from(parts) << shift) / 10u128.pow(fraction.len() as u32);
    u64::try_from((u128::from(whole) << shift) + fraction).map_err(|_| large())
}

/// Parses a number of vectors, in the bases of `strtoul(…, 0)`.
fn vectors(text: &str) -> Result<u32, String> {
    let (number, base) =
        if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
            (hex, 16)
        } else if text.len() > 1 && text.starts_with('0') {
            (&text[1..], 8)
        } else {
            (text, 10)
        };
    digits(number, base)
        .flatten()
        .and_then(|number| u32::try_from(number).ok())
        .filter(|number| (1..=MAX_VECTORS).contains(number))
        .ok_or_else(|| format!("the number of vectors is 1 to {MAX_VECTORS}"))
}

/// Parses a file mode, in octal as for chmod(1).
fn mode(text: &str) -> Result<u32, String> {
    digits(text, 8)
        .flatten()
        .and_then(|mode| u32::try_from(mode).ok())
        .filter(|&mode| mode <= 0o777)
        .ok_or_else(|| "a mode is 0 to 777 in octal, such as 660".into())
}

/// Parses a number that has digits only. The outer `None`: it has other characters. The inner
/// `None`: it does not fit in 64 bits.
fn digits(text: &str, base: u32) -> Option<Option<u64>> {
    let only = !text.is_empty() && text.chars().all(|c| c.is_digit(base));
    only.then(|| u64::from_str_radix(text, base).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(line: &str) -> Result<Args, String> {
        parse(line.split_whitespace().map(OsString::from)).map_err(|error| error.to_string())
    }

    #[test]
    fn sizes_take_suffixes_and_fractions() {
        for (text, bytes) in [
            ("0", 0),
            ("4194304", 4 << 20),
            ("1K", 1 << 10),
            ("1k", 1 << 10),
            ("7B", 7),
            ("4M", 4 << 20),
            ("1.5G", 3 << 29),
            ("0.5K", 512),
            ("3G", 3 << 30),
            ("2T", 2 << 40),
            ("1P", 1 << 50),
            ("15E", 15 << 60),
            ("15.5E", 31 << 59),
            ("0x1000", 4096),
            ("1.0000000000000000000000000001K", 1024),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn text_that_is_not_a_size_is_refused() {
        for text in [
            "",
            "K",
            "1.5",
            "-1",
            "+1",
            " 1",
            "1 ",
            "1KK",
            "1X",
            "1.K",
            ".5K",
            "1.-5K",
            "16E",
            "18446744073709551616",
            "0x",
            "0xg",
            "0x10000000000000000",
            "1,5G",
            "1.5.5G",
            "0.10600000000000000001x1t",
            "0.00000000000000000é0G",
            "é",
        ] {
            assert!(size(text).is_err(), "{text:?} gave {:?}", size(text));
        }
    }

    #[test]
    fn vectors_take_the_bases_of_strtoul() {
        for (text, number) in [("1", 1), ("64", 64), ("0x40", 64), ("010", 8), ("2048", 2048)] {
            assert_eq!(vectors(text), Ok(number), "{text}");
        }
        for text in ["", "0", "0x0", "2049", "-1", "1.0", "08", "99999999999999999999", "x"] {
            assert!(vectors(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn defaults_are_those_of_the_reference() {
        let args = args("ivshmem-server").unwrap();
        assert_eq!(args.pid_file, PathBuf::from("/var/run/ivshmem-server.pid"));
        assert_eq!(args.socket, PathBuf::from("/tmp/ivshmem_socket"));
        assert_eq!(args.memory(), Memory::Name("ivshmem".into()));
        // The library's default size is that of the reference.
        assert_eq!((args.size, args.vectors), (None, 1));
        assert!(!args.verbose && !args.foreground);
    }

    #[test]
    fn the_last_of_the_memory_options_wins() {
        let memory = |line: &str| args(line).unwrap().memory();
        assert_eq!(memory("x -M a -m /b"), Memory::Directory("/b".into()));
        assert_eq!(memory("x -m /b -M a"), Memory::Name("a".into()));
        assert_eq!(memory("x -m /b -M a -m /c"), Memory::Directory("/c".into()));
        assert_eq!(memory("x --memfd -M a"), Memory::Name("a".into()));
        assert_eq!(memory("x -m /b --memfd"), Memory::Sealed);
        assert_eq!(memory("x -M a -M b"), Memory::Name("b".into()));
        assert_eq!(memory("x -M a --shm-file /f"), Memory::File("/f".into()));
        assert_eq!(memory("x --memfd --shm-file /f"), Memory::File("/f".into()));
        assert_eq!(memory("x --shm-file /f -m /b"), Memory::Directory("/b".into()));
        assert_eq!(memory("x --shm-file /f --memfd"), Memory::Sealed);
        assert_eq!(memory("x --shm-file /f -M a"), Memory::Name("a".into()));
    }

    #[test]
    fn numa_nodes_are_a_list() {
        assert!(args("x").unwrap().numa_node.is_empty());
        assert_eq!(args("x --numa-node 0").unwrap().numa_node, [0]);
        assert_eq!(args("x --numa-node 0,2").unwrap().numa_node, [0, 2]);
    }

    #[test]
    fn errors_name_the_option_the_value_and_the_correct_form() {
        for (line, parts) in [
            ("x -n 65536", ["--vectors", "65536", "1 to 2048"]),
            ("x -l 5Q", ["--size", "5Q", "suffix"]),
            ("x --socket-mode 888", ["--socket-mode", "888", "octal"]),
            ("x --allow-gid 4294967296", ["--allow-gid", "4294967296", "0 to 4294967295"]),
            ("x --max-clients 0", ["--max-clients", "0", "1..=65536"]),
            ("x --max-clients-per-uid many", ["--max-clients-per-uid", "many", "digit"]),
            ("x --numa-node 0,x", ["--numa-node", "x", "digit"]),
            ("x --hugetlb big", ["--hugetlb", "big", "suffix"]),
            ("x --shm-mode 1777", ["--shm-mode", "1777", "octal"]),
            ("x --shm-group 0", ["--shm-mode", "required", "Usage"]),
            ("x --socket-owner 4294967296", ["--socket-owner", "4294967296", "0 to 4294967295"]),
            ("x --user 0", ["--user", "0", "root"]),
            ("x --ready-fd 2", ["--ready-fd", "2", "3 or above"]),
            ("x --ready-fd x", ["--ready-fd", "x", "3 or above"]),
            ("x --log-level loud", ["--log-level", "loud", "debug"]),
            ("x -v", ["-v", "daemon", "-F"]),
            ("x -z", ["-z", "unexpected", "Usage"]),
        ] {
            let error = args(line).unwrap_err();
            for part in parts {
                assert!(error.contains(part), "{line}: no {part:?} in {error}");
            }
        }
    }
}
