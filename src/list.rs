// SPDX-License-Identifier: GPL-2.0-or-later
//! The peers as C sees them: nodes, linked into the structure's list as QEMU's tail queue.
//!
//! In that queue each link holds the next node and the address of the link before it; the
//! links of the head close the circle backward. Here it is only written. What is where is
//! known from a record of our own, since C can overwrite nodes and head.

use std::os::fd::{AsRawFd, RawFd};
use std::ptr::{self, NonNull};

use super::abi::{
    EventNotifier, IVSHMEM_SERVER_MAX_VECTORS, IvshmemServer, IvshmemServerLink, IvshmemServerPeer,
    IvshmemServerPeerEntry,
};
use ivshmem::Peer;

/// A node, and what it was made with.
#[derive(Debug)]
struct Node {
    peer: NonNull<IvshmemServerPeer>,
    socket: RawFd,
    id: u16,
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
        Self { peer: NonNull::from(Box::leak(node)), socket, id: peer.id() }
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

/// The nodes of one server, in join order. Dropped, it frees them and leaves the head as it is.
///
/// To find one costs a look at each, which is less than telling each that it has left.
#[derive(Debug, Default)]
pub(super) struct List {
    nodes: Vec<Node>,
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
    fn index(&self, id: u16) -> Option<usize> {
        self.nodes.iter().position(|node| node.id == id)
    }

    /// The node of a peer, for C.
    pub(super) fn find(&self, id: u16) -> Option<*mut IvshmemServerPeer> {
        self.index(id).map(|index| self.nodes[index].peer.as_ptr())
    }

    /// Adds a peer at the end; its socket.
    ///
    /// # Safety
    /// `server` is valid for writes, and it is the one whose list this is.
    pub(super) unsafe fn push(&mut self, server: *mut IvshmemServer, peer: &Peer<'_>) -> RawFd {
        debug_assert!(self.index(peer.id()).is_none(), "two peers of one id");
        let node = Node::new(peer);
        // SAFETY: the caller vouches for the structure, and the links of nodes are valid until
        // these are dropped, which is after they leave the list.
        unsafe {
            let head = head_of(server);
            let before = self.nodes.last().map_or(head, Node::link);
            let link = node.link();
            link.write(IvshmemServerLink { tql_next: ptr::null_mut(), tql_prev: before });
            (*before).tql_next = node.peer.as_ptr().cast();
            (*head).tql_prev = link;
        }
        let socket = node.socket;
        self.nodes.push(node);
        socket
    }

    /// Takes a peer out of the list and frees its node; the socket that it had.
    ///
    /// # Safety
    /// As for `push`.
    pub(super) unsafe fn remove(&mut self, server: *mut IvshmemServer, id: u16) -> Option<RawFd> {
        let index = self.index(id)?;
        let gone = self.nodes.remove(index);
        // SAFETY: as in `push`; the neighbours are still in the list.
        unsafe {
            let head = head_of(server);
            let before = index.checked_sub(1).map_or(head, |index| self.nodes[index].link());
            let after = self.nodes.get(index);
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
        let first = self.nodes.first().map_or(ptr::null_mut(), |node| node.peer.as_ptr().cast());
        let last = self.nodes.last().map_or(head, Node::link);
        is.tql_next == first && is.tql_prev == last
    }
}
