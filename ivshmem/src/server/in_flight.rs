// SPDX-License-Identifier: GPL-2.0-or-later
//! The in-flight budget: limits the descriptors that clients can leave in flight, so that clients
//! that do not read do not block the others.
//!
//! Linux counts the descriptors that a user has sent and that no process has received yet, over
//! all sockets of the user. When the count exceeds the sender's limit of open files, every
//! message with a descriptor fails with `ETOOMANYREFS`, for every receiver. A socket of the usual
//! size takes 278 messages. So with a limit of 1024, four clients that stopped reading would
//! block the server for all clients.
//!
//! One half of the limit is for sockets of the usual size, which the first clients get. Later
//! clients get smaller sockets. The limit of open files also limits the number of clients, so
//! the other half is enough for `(1 + vectors) / 2` messages each. A client that reads receives
//! all its messages through a small socket too, but with more system calls.
//!
//! Small sockets cost more: up to 1.4 times the processor time of a message at one vector, and
//! 1.1 times at 64. So they are used only when the first half is taken.
//!
//! The kernel exempts a process with `CAP_SYS_RESOURCE` or `CAP_SYS_ADMIN`, except in a user
//! namespace.

#![forbid(unsafe_code)]

use std::fs;
use std::os::unix::net::UnixStream;

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::socket::{getsockopt, setsockopt, sockopt};

/// A lower bound of the bytes that Linux charges a socket for a message of 8 bytes. (On x86-64 it
/// is 768: a `sk_buff`, and a buffer that ends with a `skb_shared_info`.)
const CHARGE: u32 = 512;

/// Counts the sockets of the usual size.
#[derive(Debug)]
pub(super) struct InFlight {
    exempt: bool,
    vectors: u32,
    /// The number of messages that all sockets of the usual size can hold.
    taken: u64,
}

/// The number of messages that a socket of the usual size can hold; 0 for a small socket.
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
        // The kernel doubles this value, and its minimum is the size of 6 messages.
        setsockopt(socket, sockopt::SndBuf, &((small * CHARGE / 2) as usize))?;
        Ok(Share(0))
    }

    /// Gives the share of a removed client back to the budget.
    pub(super) fn leave(&mut self, share: &Share) {
        self.taken -= u64::from(share.0);
    }
}

/// Whether the kernel exempts this process from the limit of descriptors in flight.
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

/// Whether this is the initial user namespace, in which every user id is mapped to itself.
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

    /// An in-flight budget that is not exempt, even if root runs this test.
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
