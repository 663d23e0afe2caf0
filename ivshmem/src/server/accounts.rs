// SPDX-License-Identifier: GPL-2.0-or-later
//! What each user holds: connections, and ended connections with unread messages. The ids that
//! are remembered on a user's account are counted by the roster.
//!
//! This module counts. What a user may hold is decided in `limits`.

#![forbid(unsafe_code)]

use std::collections::HashMap;

/// The clients of one user.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Account {
    pub(super) connected: u32,
    /// Ended, but with unread messages that take up kernel memory.
    pub(super) lingering: u32,
    /// Clients that left since the last round of the broadcast began.
    pub(super) just_left: u32,
}

#[derive(Debug, Default)]
pub(super) struct Accounts {
    accounts: HashMap<u32, Account>,
    lingering: u32,
}

impl Accounts {
    pub(super) fn of(&self, uid: u32) -> Account {
        self.accounts.get(&uid).copied().unwrap_or_default()
    }

    pub(super) fn lingering(&self) -> u32 {
        self.lingering
    }

    pub(super) fn joined(&mut self, uid: u32) {
        self.accounts.entry(uid).or_default().connected += 1;
    }

    pub(super) fn left(&mut self, uid: u32) {
        let account = self.accounts.entry(uid).or_default();
        account.connected -= 1;
        account.just_left += 1;
    }

    pub(super) fn lingers(&mut self, uid: u32) {
        self.accounts.entry(uid).or_default().lingering += 1;
        self.lingering += 1;
    }

    pub(super) fn settled(&mut self, uid: u32) {
        self.accounts.entry(uid).or_default().lingering -= 1;
        self.lingering -= 1;
    }

    /// A round of the broadcast is complete: each departure before it was told.
    pub(super) fn round_ended(&mut self) {
        self.accounts.retain(|_, account| {
            account.just_left = 0;
            *account != Account::default()
        });
    }

    /// The users that hold something, with their accounts.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, Account)> + '_ {
        self.accounts.iter().map(|(&uid, &account)| (uid, account))
    }
}
