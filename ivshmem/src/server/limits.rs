// SPDX-License-Identifier: GPL-2.0-or-later
//! Who may be admitted: the caller's rule, the limits, and what is reserved for other users.
//!
//! # The reserve
//! One user must not lock out the others. So the last ids and the last descriptors are for users
//! that hold few: 1,024 of 65,536 ids, and the descriptors of 16 clients, but never more than a
//! sixty-fourth of all. A user that holds a quarter of the reserve, or more, gets none of it.

#![forbid(unsafe_code)]

use std::fmt;
use std::fs;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit};

use super::Refusal;
use super::applicant::{Applicant, Credentials};
use super::core::Core;

/// The rule of the caller: [`Builder::admit`](super::Builder::admit).
type Rule = Box<dyn FnMut(&Applicant<'_>) -> Result<(), String> + Send + Sync>;

/// The part of all ids that is reserved.
const RESERVED_IDS: u32 = 64;

/// The clients whose descriptors are reserved.
const RESERVED_CLIENTS: u64 = 16;

/// No more than this part of all descriptors is reserved.
const RESERVED_DESCRIPTORS: u64 = 64;

/// Nothing is reserved if it would be for fewer clients than this.
const FEWEST: u64 = 4;

/// How long a count of the open descriptors is good for.
const PERIOD: Duration = Duration::from_secs(1);

#[derive(Default)]
pub(super) struct Limits {
    pub(super) rule: Option<Rule>,
    pub(super) clients: Option<u32>,
    pub(super) clients_per_uid: Option<u32>,
    /// The descriptors of this process that are not the server's, and when they were counted.
    others: Option<(u64, Instant)>,
}

impl fmt::Debug for Limits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Limits")
            .field("rule", &self.rule.is_some())
            .field("clients", &self.clients)
            .field("clients_per_uid", &self.clients_per_uid)
            .finish_non_exhaustive()
    }
}

impl Limits {
    /// Whether an applicant may be admitted. `waiting` is the number of connections that wait.
    pub(super) fn check(
        &mut self,
        core: &mut Core,
        applicant: &Applicant<'_>,
        waiting: usize,
    ) -> Result<(), Refusal> {
        if let Some(rule) = &mut self.rule {
            rule(applicant).map_err(Refusal::NotPermitted)?;
        }
        if let Some(limit) = self.clients {
            if core.clients.len() >= limit as usize {
                return Err(Refusal::TooManyClients { limit });
            }
        }
        let uid = applicant.credentials().uid;
        if let Some(limit) = self.clients_per_uid {
            if held(core, uid) >= limit {
                core.clients.forget();
                core.settle_all();
                let held = held(core, uid);
                if held >= limit {
                    return Err(Refusal::TooManyOfUser { uid, held, limit });
                }
            }
        }
        check_ids(core, uid)?;
        self.check_descriptors(core, uid, waiting)
    }

    fn check_descriptors(
        &mut self,
        core: &mut Core,
        uid: u32,
        waiting: usize,
    ) -> Result<(), Refusal> {
        let all = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft);
        let each = 1 + core.vectors() as u64;
        let clients = RESERVED_CLIENTS.min(all / RESERVED_DESCRIPTORS / each);
        let few = u64::from(held(core, uid)) < (clients / 4).max(1);
        if clients < FEWEST || few {
            return Ok(());
        }
        let left = |limits: &mut Self, core: &Core| {
            let ours = core.descriptors() + waiting as u64;
            all.saturating_sub(ours + limits.others(ours))
        };
        if left(self, core) >= (clients + 1) * each {
            return Ok(());
        }
        core.settle_all();
        if left(self, core) >= (clients + 1) * each {
            return Ok(());
        }
        Err(Refusal::Reserved { uid, held: held(core, uid), what: "descriptors" })
    }

    /// The open descriptors of this process that are not among the `ours` of this server.
    fn others(&mut self, ours: u64) -> u64 {
        match self.others {
            Some((others, counted)) if counted.elapsed() < PERIOD => others,
            _ => {
                let open =
                    fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count() as u64);
                // One is the directory itself.
                let others = open.saturating_sub(ours + 1);
                self.others = Some((others, Instant::now()));
                others
            }
        }
    }
}

fn check_ids(core: &mut Core, uid: u32) -> Result<(), Refusal> {
    let reserved = core.clients.id_space() / RESERVED_IDS;
    let is_short =
        |core: &Core| core.clients.ids_left().0 <= reserved && held(core, uid) >= reserved / 4;
    if reserved > 0 && is_short(core) {
        core.clients.forget();
        if is_short(core) {
            return Err(Refusal::Reserved { uid, held: held(core, uid), what: "ids" });
        }
    }
    Ok(())
}

/// What a user holds: connections, ended ones with unread messages, and remembered ids.
fn held(core: &Core, uid: u32) -> u32 {
    let account = core.accounts.of(uid);
    account.connected + account.lingering + core.clients.remembered_of(uid)
}

/// The user that holds most, for the log.
pub(super) fn largest_holder(core: &Core) -> Option<String> {
    let users = core.accounts.iter().map(|(uid, _)| uid).chain(core.clients.owners());
    let uid = users.max_by_key(|&uid| (held(core, uid), uid))?;
    let account = core.accounts.of(uid);
    let ids = core.clients.remembered_of(uid);
    let (clients, ended) = (account.connected, account.lingering);
    Some(format!(
        "uid {uid} holds most: {clients} clients, {ended} ended ones with unread messages, {ids} \
         remembered ids"
    ))
}

/// An applicant for log lines: "pid 1, uid 0, gid 0, program \"x\"".
pub(super) fn describe(credentials: &Credentials) -> String {
    match credentials.program() {
        Some(program) => format!("{credentials}, program {program:?}"),
        None => credentials.to_string(),
    }
}
