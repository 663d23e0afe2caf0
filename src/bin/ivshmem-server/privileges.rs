// SPDX-License-Identifier: GPL-2.0-or-later
//! `--user`: gives up root once the server has bound its socket and opened its memory.
//!
//! libc changes the ids of all threads. The kernel then removes the capabilities, unless the securebits of the process
//! say otherwise, so all threads are checked. What the process has open stays open. At its end it can remove only those
//! names that its new user may remove.

#![forbid(unsafe_code)]

use std::ffi::CString;
use std::fs;
use std::io;
use std::path::Path;

use nix::sys::prctl;
use nix::unistd::{
    Gid, Uid, geteuid, getresgid, getresuid, initgroups, setgroups, setresgid, setresuid,
};

use crate::Failure;
use crate::args::Account;

/// The capability sets that a program can use, in /proc/PID/status.
const SETS: [&str; 3] = ["CapPrm:", "CapEff:", "CapAmb:"];

/// Refuses `--user` for a process that cannot change its user, before it does anything.
pub(crate) fn check(account: Option<&Account>) -> Result<(), Failure> {
    match account {
        Some(account) if !geteuid().is_root() => Err(format!(
            "--user {} needs root, and this process runs as user id {}; start it as root, or leave out --user",
            account.text,
            geteuid()
        )
        .into()),
        _ => Ok(()),
    }
}

/// Goes on as `account`, with its groups and without capabilities.
pub(crate) fn give_up(account: &Account) -> Result<(), Failure> {
    let failed = |what: &'static str| {
        let text = account.text.clone();
        move |error: io::Error| {
            Failure::from(format!("cannot go on as user {text}: {what}: {error}"))
        }
    };
    let (uid, gid) = (Uid::from_raw(account.uid), Gid::from_raw(account.gid));
    match account.name.as_deref().map(CString::new) {
        Some(Ok(name)) => initgroups(&name, gid),
        _ => setgroups(&[]),
    }
    .map_err(|errno| failed("set the groups")(errno.into()))?;
    setresgid(gid, gid, gid).map_err(|errno| failed("set the group")(errno.into()))?;
    setresuid(uid, uid, uid).map_err(|errno| failed("set the user")(errno.into()))?;
    // No program that this process could execute gives them back.
    prctl::set_no_new_privs().map_err(|errno| failed("forbid new privileges")(errno.into()))?;
    // The change has made /proc/self root's. The library reads in it what its descriptors are.
    prctl::set_dumpable(true).map_err(|errno| failed("open /proc/self")(errno.into()))?;
    let users = getresuid().map_err(|errno| failed("read the user")(errno.into()))?;
    let groups = getresgid().map_err(|errno| failed("read the group")(errno.into()))?;
    let is_changed = [users.real, users.effective, users.saved].iter().all(|&user| user == uid)
        && [groups.real, groups.effective, groups.saved].iter().all(|&group| group == gid);
    if !is_changed {
        return Err(failed("the kernel has kept ids of before")(io::ErrorKind::Other.into()));
    }
    for thread in fs::read_dir("/proc/self/task").map_err(failed("look at the threads"))? {
        let thread = thread.map_err(failed("look at the threads"))?.path();
        if let Some(left) = capabilities(&thread).map_err(failed("read the capabilities"))? {
            return Err(format!(
                "cannot go on as user {}: capabilities are left ({left}); clear the securebits of the caller",
                account.text
            )
            .into());
        }
    }
    Ok(())
}

/// The line of a capability set that is not empty.
fn capabilities(thread: &Path) -> io::Result<Option<String>> {
    let status = match fs::read_to_string(thread.join("status")) {
        // The thread has ended.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        status => status?,
    };
    Ok(left_in(&status))
}

fn left_in(status: &str) -> Option<String> {
    let is_left = |line: &&str| {
        SETS.iter().any(|set| {
            line.strip_prefix(set).is_some_and(|bits| bits.trim().bytes().any(|bit| bit != b'0'))
        })
    };
    status.lines().find(is_left).map(|line| line.replace('\t', " "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_set_that_a_program_can_use_is_checked() {
        let empty = "CapInh:\t0000000000000400\nCapPrm:\t0000000000000000\nCapBnd:\t000001ffffffffff\n\
                     CapEff:\t0000000000000000\nCapAmb:\t0000000000000000\n";
        assert_eq!(left_in(empty), None);
        for set in SETS {
            let one = empty.replace(&format!("{set}\t0000"), &format!("{set}\t0001"));
            assert_eq!(left_in(&one), Some(format!("{set} 0001000000000000")));
        }
    }
}
