// SPDX-License-Identifier: GPL-2.0-or-later
//! `--sandbox`: once the server has everything open, the kernel allows it only the system calls and the files that it
//! still needs. A client that took over the process could start no program and read no file of the host.
//!
//! - seccomp: system calls that are not listed fail with EPERM. Some are allowed only with certain arguments: no memory
//!   becomes executable, no file is opened for writing, and sockets are UNIX sockets.
//! - Landlock: below the directories where the server removes its names at the end, it can remove and move names; /proc
//!   can be read, and /dev/null be used. Nothing else can be opened. Kernels before Linux 5.13 do not have it.
//!
//! It must not know what the server does with a call.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, PathFdError, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetStatus, make_bitflags,
};
use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Length, SeccompCmpOp as Compare,
    SeccompCondition, SeccompFilter, SeccompRule,
};

use crate::Failure;
use crate::args::Sandbox;

/// Calls that are allowed with any arguments.
#[rustfmt::skip]
const CALLS: &[c_long] = &[
    // Descriptors.
    libc::SYS_read, libc::SYS_write, libc::SYS_readv, libc::SYS_writev, libc::SYS_pread64, libc::SYS_close,
    libc::SYS_close_range, libc::SYS_lseek, libc::SYS_fcntl, libc::SYS_dup, libc::SYS_dup2, libc::SYS_dup3,
    libc::SYS_poll, libc::SYS_ppoll, libc::SYS_epoll_ctl, libc::SYS_epoll_wait, libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2, libc::SYS_eventfd2, libc::SYS_timerfd_settime, libc::SYS_timerfd_gettime,
    libc::SYS_pipe2,
    // Sockets.
    libc::SYS_connect, libc::SYS_accept4, libc::SYS_sendto, libc::SYS_sendmsg, libc::SYS_sendmmsg,
    libc::SYS_recvfrom, libc::SYS_recvmsg, libc::SYS_getsockopt, libc::SYS_setsockopt, libc::SYS_shutdown,
    libc::SYS_getsockname, libc::SYS_getpeername, libc::SYS_listen,
    // Names and files.
    libc::SYS_fstat, libc::SYS_newfstatat, libc::SYS_statx, libc::SYS_fstatfs, libc::SYS_readlink,
    libc::SYS_readlinkat, libc::SYS_getdents64, libc::SYS_unlink, libc::SYS_unlinkat, libc::SYS_renameat2,
    libc::SYS_mkdirat, libc::SYS_ftruncate, libc::SYS_fallocate, libc::SYS_flock, libc::SYS_fsync,
    // Memory.
    libc::SYS_brk, libc::SYS_munmap, libc::SYS_mremap, libc::SYS_madvise,
    // Processes, threads, signals, time.
    libc::SYS_exit, libc::SYS_exit_group, libc::SYS_getpid, libc::SYS_getppid, libc::SYS_gettid, libc::SYS_getuid,
    libc::SYS_geteuid, libc::SYS_getgid, libc::SYS_getegid, libc::SYS_tgkill, libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask, libc::SYS_rt_sigreturn, libc::SYS_sigaltstack, libc::SYS_futex, libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity, libc::SYS_nanosleep, libc::SYS_clock_nanosleep, libc::SYS_clock_gettime,
    libc::SYS_gettimeofday, libc::SYS_getrandom, libc::SYS_prlimit64, libc::SYS_getrlimit, libc::SYS_getrusage,
    // clone3 is listed, as another filter refuses it.
    libc::SYS_clone3, libc::SYS_set_robust_list, libc::SYS_rseq, libc::SYS_membarrier, libc::SYS_restart_syscall, libc::SYS_uname,
    libc::SYS_sysinfo,
];

/// Requests of ioctl(2): what is unread, and whether a stream is a terminal.
const IOCTLS: &[u64] =
    &[libc::FIONREAD, libc::TIOCOUTQ, libc::FIONBIO, libc::FIOCLEX, libc::TCGETS, libc::TIOCGWINSZ];

/// Enters the sandbox. `directories` have the names that the server removes at its end.
pub(crate) fn enter(sandbox: Sandbox, directories: &[PathBuf]) -> Result<(), Failure> {
    let action = match sandbox {
        Sandbox::Off => return Ok(()),
        Sandbox::On => SeccompAction::Errno(libc::EPERM as u32),
        Sandbox::Log => SeccompAction::Log,
    };
    if sandbox == Sandbox::On {
        restrict_files(directories)?;
    }
    let failed = |error| format!("cannot enter the sandbox (--sandbox): {error}");
    // A thread is started by clone(2), whose flags a filter can see. The C library takes it if there is no clone3.
    let without_clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    for program in [
        program(without_clone3, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32)),
        rules().and_then(|rules| program(rules, action, SeccompAction::Allow)),
    ] {
        let program = program.map_err(|error| failed(error.to_string()))?;
        seccompiler::apply_filter_all_threads(&program)
            .map_err(|error| failed(error.to_string()))?;
    }
    log::debug!("the sandbox is {}", if sandbox == Sandbox::On { "on" } else { "logging" });
    Ok(())
}

type Rules = BTreeMap<c_long, Vec<SeccompRule>>;

fn program(
    rules: Rules,
    otherwise: SeccompAction,
    listed: SeccompAction,
) -> Result<BpfProgram, seccompiler::BackendError> {
    SeccompFilter::new(rules, otherwise, listed, std::env::consts::ARCH.try_into()?)?.try_into()
}

fn rules() -> Result<Rules, seccompiler::BackendError> {
    let mut rules: Rules = CALLS.iter().map(|&call| (call, Vec::new())).collect();
    let mut allow = |call, argument, compare, value: u64| {
        let condition = SeccompCondition::new(argument, Length::Dword, compare, value)?;
        let rule = SeccompRule::new(vec![condition])?;
        rules.entry(call).or_default().push(rule);
        Ok(())
    };
    let exec = libc::PROT_EXEC as u64;
    allow(libc::SYS_mmap, 2, Compare::MaskedEq(exec), 0)?;
    allow(libc::SYS_mprotect, 2, Compare::MaskedEq(exec), 0)?;
    allow(libc::SYS_openat, 2, Compare::MaskedEq(libc::O_ACCMODE as u64), libc::O_RDONLY as u64)?;
    for call in [libc::SYS_socket, libc::SYS_socketpair] {
        allow(call, 0, Compare::Eq, libc::AF_UNIX as u64)?;
    }
    let thread = libc::CLONE_THREAD as u64;
    allow(libc::SYS_clone, 0, Compare::MaskedEq(thread), thread)?;
    allow(libc::SYS_prctl, 0, Compare::Eq, libc::PR_SET_NAME as u64)?;
    for &request in IOCTLS {
        allow(libc::SYS_ioctl, 1, Compare::Eq, request)?;
    }
    Ok(rules)
}

/// Landlock. Without it the server goes on, and the log says so.
fn restrict_files(directories: &[PathBuf]) -> Result<(), Failure> {
    let failed = |error: &dyn std::fmt::Display| {
        Failure::from(format!("cannot restrict files for the sandbox (--sandbox): {error}"))
    };
    let abi = ABI::V6;
    // To remove a name from a directory that others may write, the server moves it to a directory of its own first.
    let names = make_bitflags!(AccessFs::{ReadDir | RemoveFile | RemoveDir | MakeDir | MakeSock | MakeReg | Refer});
    let reads = make_bitflags!(AccessFs::{ReadFile | ReadDir});
    let writes = make_bitflags!(AccessFs::{ReadFile | WriteFile});
    let mut rules: Vec<(&Path, BitFlags<AccessFs>)> =
        vec![(Path::new("/proc"), reads), (Path::new("/dev/null"), writes)];
    rules.extend(directories.iter().map(|directory| (directory.as_path(), names)));
    let mut ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(abi))
        .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(abi)))
        .and_then(Ruleset::create)
        .map_err(|error| failed(&error))?;
    for (path, access) in rules {
        match PathFd::new(path) {
            Ok(fd) => {
                ruleset = ruleset
                    .add_rule(PathBeneath::new(fd, access))
                    .map_err(|error| failed(&error))?;
            }
            // What is not there cannot be reached either.
            Err(PathFdError::OpenCall { source, .. }) if source.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(failed(&error)),
        }
    }
    let status = ruleset.restrict_self().map_err(|error| failed(&error))?;
    if status.ruleset == RulesetStatus::NotEnforced {
        log::warn!(
            "the sandbox does not restrict files: this kernel has no Landlock (Linux 5.13 or newer, and \"landlock\" in its list of security modules)"
        );
    }
    Ok(())
}
