// SPDX-License-Identifier: GPL-2.0-or-later
//! How many descriptors a client may leave in flight, so that those who do not read leave some
//! for those who do.
//!
//! Linux counts the descriptors that a user has sent and nobody has received yet, over all its
//! sockets. When there are more than the sender's limit of open files, it answers
//! `ETOOMANYREFS` to everything that carries a descriptor, whoever it is for. A socket of the
//! usual size takes 278 messages: with a limit of 1024, four clients that stopped reading would
//! silence the server for everybody, for as long as they please.
//!
//! So one half of the limit goes to sockets of the usual size, first come, first served. Whoever
//! comes later gets a smaller one: as there can be no more clients than the limit of open files
//! has room for, the other half is enough for `(1 + vectors) / 2` messages each. A client that
//! reads is told all it is to be told through either; the small one takes more turns.
//!
//! The small ones are not for everybody, as they cost more: up to 1.4 times the processor time
//! per message at one vector, 1.1 times at 64.
//!
//! A process with `CAP_SYS_RESOURCE` or `CAP_SYS_ADMIN` is exempt, but not in a user namespace.

#![forbid(unsafe_code)]

use std::fs;
use std::os::unix::net::UnixStream;

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::socket::{getsockopt, setsockopt, sockopt};

/// The least that Linux charges a socket for a message of 8 bytes. (It is 768 on x86-64: a
/// `sk_buff`, and a buffer that ends with a `skb_shared_info`.)
const CHARGE: u32 = 512;

/// Keeps count of the sockets of the usual size.
#[derive(Debug)]
pub(super) struct InFlight {
    exempt: bool,
    vectors: u32,
    /// What the sockets of the usual size can hold.
    taken: u64,
}

/// A socket's part of what can be in flight, if it is of the usual size.
#[derive(Debug)]
pub(super) struct Share(u32);

impl InFlight {
    pub(super) fn new(vectors: u32) -> Self {
        Self { exempt: is_privileged(), vectors, taken: 0 }
    }

    /// Sets the size of a new client's socket.
    pub(super) fn enter(&mut self, socket: &UnixStream) -> nix::Result<Share> {
        if self.exempt {
            return Ok(Share(0));
        }
        let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft);
        let usual = getsockopt(socket, sockopt::SndBuf)? as u32 / CHARGE;
        let small = self.vectors.div_ceil(2);
        if usual <= small || self.taken + u64::from(usual) <= limit / 2 {
            self.taken += u64::from(usual);
            return Ok(Share(usual));
        }
        // The kernel doubles what it is told, and does not go below what 6 messages take.
        setsockopt(socket, sockopt::SndBuf, &((small * CHARGE / 2) as usize))?;
        Ok(Share(0))
    }

    /// Takes back what a client had that left.
    pub(super) fn leave(&mut self, share: &Share) {
        self.taken -= u64::from(share.0);
    }
}

/// Whether the kernel lets this process have any number of descriptors in flight.
fn is_privileged() -> bool {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    has_capability(&read("/proc/thread-self/status"))
        && is_initial_namespace(&read("/proc/thread-self/uid_map"))
}

fn has_capability(status: &str) -> bool {
    const SYS_ADMIN: u64 = 1 << 21;
    const SYS_RESOURCE: u64 = 1 << 24;
    status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .is_some_and(|effective| effective & (SYS_ADMIN | SYS_RESOURCE) != 0)
}

/// Whether every user of the system is mapped to itself, as in the first namespace.
fn is_initial_namespace(uid_map: &str) -> bool {
    uid_map.split_ascii_whitespace().eq(["0", "0", "4294967295"])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn privilege_is_a_capability_in_the_initial_namespace() {
        assert!(has_capability("Name:\tx\nCapEff:\t0000000001000000\n"));
        assert!(has_capability("CapEff:\t000001ffffffffff\n"));
        assert!(!has_capability("CapPrm:\t000001ffffffffff\nCapEff:\t0000000000000400\n"));
        assert!(is_initial_namespace("         0          0 4294967295\n"));
        assert!(!is_initial_namespace("         0     100000      65536\n"));
    }

    /// One with a limit is as one without privilege, whoever runs this test.
    fn flight(vectors: u32) -> InFlight {
        InFlight { exempt: false, vectors, taken: 0 }
    }

    #[test]
    fn sockets_of_the_usual_size_take_up_half_of_the_limit_and_come_back() {
        let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let mut flight = flight(16);
        let (socket, _other) = UnixStream::pair().unwrap();
        let usual = getsockopt(&socket, sockopt::SndBuf).unwrap();
        let mut shares = Vec::new();
        let small = loop {
            let (socket, _other) = UnixStream::pair().unwrap();
            let share = flight.enter(&socket).unwrap();
            if share.0 == 0 {
                break getsockopt(&socket, sockopt::SndBuf).unwrap();
            }
            shares.push(share);
        };
        let held = usual as u32 / CHARGE;
        assert_eq!(shares.len() as u64, limit / 2 / u64::from(held));
        assert!(small < usual && small as u32 / CHARGE <= 9, "{small} bytes");
        flight.leave(&shares.pop().unwrap());
        assert_eq!(flight.enter(&socket).unwrap().0, held);
    }

    #[test]
    fn a_socket_is_never_made_larger() {
        let (socket, _other) = UnixStream::pair().unwrap();
        let usual = getsockopt(&socket, sockopt::SndBuf).unwrap();
        let mut flight = flight(2048);
        flight.taken = u64::MAX / 2;
        flight.enter(&socket).unwrap();
        assert_eq!(getsockopt(&socket, sockopt::SndBuf).unwrap(), usual);
    }
}
