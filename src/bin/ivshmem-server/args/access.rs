// SPDX-License-Identifier: GPL-2.0-or-later
//! Users and groups: checks which clients may attach (`--allow-uid`, `--allow-gid`), and parses names.

#![forbid(unsafe_code)]

use ivshmem::Applicant;
use nix::unistd::{Group, User};

/// The users and groups that may attach. Everybody may if both lists are empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Access {
    pub(crate) uids: Vec<u32>,
    pub(crate) gids: Vec<u32>,
}

impl Access {
    pub(crate) fn is_limited(&self) -> bool {
        !self.uids.is_empty() || !self.gids.is_empty()
    }

    /// Checks the user, the group and the supplementary groups of a process.
    pub(crate) fn check(&self, applicant: &Applicant<'_>) -> Result<(), String> {
        let who = applicant.credentials();
        let has_group = |gid: &u32| self.gids.contains(gid);
        if self.uids.contains(&who.uid) || has_group(&who.gid) {
            return Ok(());
        }
        if !self.gids.is_empty() {
            match applicant.groups() {
                Ok(groups) if groups.iter().any(has_group) => return Ok(()),
                Ok(_) => {}
                Err(error) => return Err(format!("its groups are not known: {error}")),
            }
        }
        Err("neither its user nor one of its groups is in --allow-uid or --allow-gid".into())
    }
}

/// The account that a server goes on as (`--user`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Account {
    /// As given, for messages.
    pub(crate) text: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// None if the number has no account; then it has no further groups.
    pub(crate) name: Option<String>,
}

/// Parses a user other than root. A number that has no account is its own group.
pub(crate) fn account(text: &str) -> Result<Account, String> {
    let uid = user(text)?;
    if uid == 0 {
        return Err("this user is root; give another user".into());
    }
    let found = User::from_uid(uid.into())
        .map_err(|errno| format!("cannot look up the user: {}", errno.desc()))?;
    let gid = found.as_ref().map_or(uid, |user| user.gid.as_raw());
    Ok(Account { text: text.to_owned(), uid, gid, name: found.map(|user| user.name) })
}

/// Parses a user: a name, or a number.
pub(crate) fn user(text: &str) -> Result<u32, String> {
    id(text, "user", |name| Ok(User::from_name(name)?.map(|user| user.uid.as_raw())))
}

/// Parses a group: a name, or a number.
pub(crate) fn group(text: &str) -> Result<u32, String> {
    id(text, "group", |name| Ok(Group::from_name(name)?.map(|group| group.gid.as_raw())))
}

fn id(
    text: &str,
    what: &str,
    find: impl FnOnce(&str) -> nix::Result<Option<u32>>,
) -> Result<u32, String> {
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        return text.parse().map_err(|_| format!("a {what} number is 0 to {}", u32::MAX));
    }
    match find(text) {
        Ok(Some(id)) => Ok(id),
        Ok(None) => Err(format!("there is no {what} of this name; give a name or a number")),
        Err(errno) => Err(format!("cannot look up the {what}: {}", errno.desc())),
    }
}
