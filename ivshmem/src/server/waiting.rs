// SPDX-License-Identifier: GPL-2.0-or-later
//! Accepted connections that wait to be admitted, because clients of their user come and go too
//! fast. Each user has a queue; the users take turns.

#![forbid(unsafe_code)]

use std::collections::{BTreeMap, VecDeque};
use std::os::unix::net::UnixStream;

use nix::sys::resource::{Resource, getrlimit};

use super::applicant::Credentials;

/// The connections of one user that may wait, at most: each takes up a descriptor.
const MOST: usize = 1024;

/// No more than this part of all descriptors may be taken up by one user's waiting connections.
const PART: u64 = 8;

#[derive(Debug, Default)]
pub(super) struct Waiting {
    users: BTreeMap<u32, VecDeque<(UnixStream, Credentials)>>,
    len: usize,
    /// The user whose connection was taken last.
    last: u32,
}

impl Waiting {
    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn has(&self, uid: u32) -> bool {
        self.users.contains_key(&uid)
    }

    /// Adds a connection. Fails with the connection if too many of its user wait.
    pub(super) fn add(
        &mut self,
        socket: UnixStream,
        credentials: Credentials,
    ) -> Result<(), UnixStream> {
        let queue = self.users.entry(credentials.uid).or_default();
        let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft);
        if queue.len() >= MOST || queue.len() as u64 >= limit / PART {
            return Err(socket);
        }
        queue.push_back((socket, credentials));
        self.len += 1;
        Ok(())
    }

    /// Takes a connection of the next user for which `ready` is true.
    pub(super) fn next(
        &mut self,
        ready: impl Fn(u32) -> bool,
    ) -> Option<(UnixStream, Credentials)> {
        use std::ops::Bound::{Excluded, Unbounded};
        let after = self.users.range((Excluded(self.last), Unbounded));
        let uid = after.chain(&self.users).map(|(&uid, _)| uid).find(|&uid| ready(uid))?;
        self.last = uid;
        self.take(uid, VecDeque::pop_front)
    }

    /// Takes the newest connection of the user of whom most wait.
    pub(super) fn drop_one(&mut self) -> Option<(UnixStream, Credentials)> {
        let (&uid, _) = self.users.iter().max_by_key(|(_, queue)| queue.len())?;
        self.take(uid, VecDeque::pop_back)
    }

    fn take<T>(
        &mut self,
        uid: u32,
        pop: impl FnOnce(&mut VecDeque<(UnixStream, Credentials)>) -> Option<T>,
    ) -> Option<T> {
        let queue = self.users.get_mut(&uid)?;
        let taken = pop(queue)?;
        self.len -= 1;
        if queue.is_empty() {
            self.users.remove(&uid);
        }
        Some(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection(uid: u32) -> (UnixStream, Credentials) {
        let (socket, _) = UnixStream::pair().expect("two descriptors");
        (socket, Credentials { pid: 1, uid, gid: uid })
    }

    #[test]
    fn users_take_turns_and_one_user_has_a_limit() {
        let mut waiting = Waiting::default();
        let add = |waiting: &mut Waiting, uid| {
            let (socket, credentials) = connection(uid);
            waiting.add(socket, credentials).is_ok()
        };
        let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
        let most = MOST.min((limit / PART) as usize);
        let added = (0..most + 3).filter(|_| add(&mut waiting, 1)).count();
        assert_eq!(added, most);
        assert!(add(&mut waiting, 2) && add(&mut waiting, 2) && add(&mut waiting, 3));
        assert_eq!((waiting.len(), waiting.has(3), waiting.has(4)), (most + 3, true, false));

        let next = |waiting: &mut Waiting, ready: fn(u32) -> bool| {
            waiting.next(ready).map(|(_, credentials)| credentials.uid)
        };
        let order: Vec<_> = (0..6).filter_map(|_| next(&mut waiting, |_| true)).collect();
        assert_eq!(order, [1, 2, 3, 1, 2, 1]);
        assert_eq!(next(&mut waiting, |uid| uid != 1), None);
        assert!(add(&mut waiting, 2));
        assert_eq!(waiting.drop_one().expect("some wait").1.uid, 1);
        while waiting.drop_one().is_some() {}
        assert!(waiting.is_empty() && !waiting.has(1) && !waiting.has(2));
    }
}
