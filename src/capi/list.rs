// SPDX-License-Identifier: GPL-2.0-or-later
//! The peers as C sees them: nodes, linked into the structure's list as QEMU's tail queue.
//!
//! In that queue each link holds the next node and the address of the link before it; the
//! links of the head close the circle backward. Here it is only written. What is where is
//! known from a map of our own, since C can overwrite nodes and head.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::{self, NonNull};

use super::abi::{
    EventNotifier, IVSHMEM_SERVER_MAX_VECTORS, IvshmemServer, IvshmemServerLink, IvshmemServerPeer,
    IvshmemServerPeerEntry,
};
use crate::Peer;

/// A node, and its neighbours by id.
#[derive(Debug)]
struct Node {
    peer: NonNull<IvshmemServerPeer>,
    socket: RawFd,
    before: Option<u16>,
    after: Option<u16>,
}

// SAFETY: the node is an allocation of ours that is freed once, by whichever thread drops it.
unsafe impl Send for Node {}

impl Node {
    fn new(peer: &Peer<'_>) -> Self {
        let none = EventNotifier { rfd: -1, wfd: -1, initialized: false };
        let mut vectors = [none; IVSHMEM_SERVER_MAX_VECTORS];
        let mut count = 0;
        for (vector, eventfd) in vectors.iter_mut().zip(peer.vectors()) {
            let fd = eventfd.as_raw_fd();
            *vector = EventNotifier { rfd: fd, wfd: fd, initialized: true };
            count += 1;
        }
        let socket = peer.socket().as_raw_fd();
        let node = Box::new(IvshmemServerPeer {
            next: IvshmemServerPeerEntry { tqe_next: ptr::null_mut() },
            sock_fd: socket,
            id: peer.id().into(),
            vectors,
            vectors_count: count,
        });
        Self { peer: NonNull::from(Box::leak(node)), socket, before: None, after: None }
    }

    fn link(&self) -> *mut IvshmemServerLink {
        // SAFETY: the node is allocated until `self` is dropped; no reference is made.
        unsafe { &raw mut (*self.peer.as_ptr()).next.tqe_circ }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // SAFETY: it came from Box::leak in `new`, and nobody else frees it. Whatever C may
        // have written there, the fields have nothing to drop.
        drop(unsafe { Box::from_raw(self.peer.as_ptr()) });
    }
}

/// The nodes of one server. Dropped, it frees them and leaves the head as it is.
#[derive(Debug, Default)]
pub(super) struct List {
    nodes: HashMap<u16, Node>,
    first: Option<u16>,
    last: Option<u16>,
}

/// The link in the head of the list.
///
/// # Safety
/// `server` is valid for writes.
unsafe fn head_of(server: *mut IvshmemServer) -> *mut IvshmemServerLink {
    // SAFETY: it stays within the structure that the caller vouches for.
    unsafe { &raw mut (*server).peer_list.tqh_circ }
}

/// Makes the structure's list an empty one.
///
/// # Safety
/// `server` is valid for writes.
pub(super) unsafe fn write_empty(server: *mut IvshmemServer) {
    // SAFETY: the caller vouches for the structure.
    unsafe {
        let head = head_of(server);
        head.write(IvshmemServerLink { tql_next: ptr::null_mut(), tql_prev: head });
    }
}

impl List {
    fn node(&self, id: u16) -> &Node {
        &self.nodes[&id]
    }

    /// The node of a peer, for C.
    pub(super) fn find(&self, id: u16) -> Option<*mut IvshmemServerPeer> {
        self.nodes.get(&id).map(|node| node.peer.as_ptr())
    }

    /// Adds a peer at the end; its socket.
    ///
    /// # Safety
    /// `server` is valid for writes, and it is the one whose list this is.
    pub(super) unsafe fn push(&mut self, server: *mut IvshmemServer, peer: &Peer<'_>) -> RawFd {
        let id = peer.id();
        let mut node = Node::new(peer);
        node.before = self.last;
        // SAFETY: the caller vouches for the structure, and the links of nodes are valid until
        // these are dropped, which is after they leave the list.
        unsafe {
            let head = head_of(server);
            let before = self.last.map_or(head, |last| self.node(last).link());
            let link = node.link();
            link.write(IvshmemServerLink { tql_next: ptr::null_mut(), tql_prev: before });
            (*before).tql_next = node.peer.as_ptr().cast();
            (*head).tql_prev = link;
        }
        if let Some(last) = self.last {
            self.nodes.get_mut(&last).expect("the last is one of them").after = Some(id);
        }
        self.first.get_or_insert(id);
        self.last = Some(id);
        let socket = node.socket;
        let other = self.nodes.insert(id, node);
        debug_assert!(other.is_none(), "two peers of one id");
        socket
    }

    /// Takes a peer out of the list and frees its node; the socket that it had.
    ///
    /// # Safety
    /// As for `push`.
    pub(super) unsafe fn remove(&mut self, server: *mut IvshmemServer, id: u16) -> Option<RawFd> {
        let gone = self.nodes.remove(&id)?;
        match gone.before {
            Some(before) => self.nodes.get_mut(&before).expect("a neighbour").after = gone.after,
            None => self.first = gone.after,
        }
        match gone.after {
            Some(after) => self.nodes.get_mut(&after).expect("a neighbour").before = gone.before,
            None => self.last = gone.before,
        }
        // SAFETY: as in `push`; the neighbours are still in the list.
        unsafe {
            let head = head_of(server);
            let before = gone.before.map_or(head, |id| self.node(id).link());
            let after = gone.after.map(|id| self.node(id));
            (*after.map_or(head, Node::link)).tql_prev = before;
            (*before).tql_next = after.map_or(ptr::null_mut(), |node| node.peer.as_ptr().cast());
        }
        Some(gone.socket)
    }

    /// Whether the head is as it was written last.
    ///
    /// # Safety
    /// `server` is valid for reads; what is there may be anything.
    pub(super) unsafe fn is_headed_by(&self, server: *mut IvshmemServer) -> bool {
        // SAFETY: the caller vouches for the structure. Volatile, as its bytes may be left
        // over from something else, and nothing may be concluded but what they are.
        let (head, is) = unsafe {
            let head = head_of(server);
            (head, head.read_volatile())
        };
        let first = self.first.map_or(ptr::null_mut(), |id| self.node(id).peer.as_ptr().cast());
        let last = self.last.map_or(head, |id| self.node(id).link());
        is.tql_next == first && is.tql_prev == last
    }
}
