// SPDX-License-Identifier: GPL-2.0-or-later
//! The peers as C sees them: nodes, linked into the structure's list as QEMU's tail queue.
//!
//! In that queue each link holds the next node and the address of the link before it; the links
//! of the head close the circle backward. This module only writes it. C can overwrite nodes and
//! head, so the order of the nodes is kept in a record of our own: each node there names its
//! neighbours by id. To find, add or remove a peer takes the same time for any number of peers.
//!
//! The record is a table by id, in blocks that exist only where there are peers. Ids are given
//! in order, so nearly all blocks are full: it takes 17 bytes a peer, where a hash table or a
//! search tree takes 35 to 70. It has at most 4,096 blocks, 1.1 MiB.

use std::os::fd::{AsRawFd, RawFd};
use std::ptr::{self, NonNull};

use super::abi::{
    EventNotifier, IVSHMEM_SERVER_MAX_VECTORS, IvshmemServer, IvshmemServerLink, IvshmemServerPeer,
    IvshmemServerPeerEntry,
};
use ivshmem::Peer;

/// A node, what it was made with, and its neighbours by id. A neighbour that is the node itself
/// is none: this keeps the record small.
#[derive(Debug)]
struct Node {
    peer: NonNull<IvshmemServerPeer>,
    socket: RawFd,
    before: u16,
    after: u16,
}

const _: () = assert!(size_of::<Option<Node>>() == 16);

// SAFETY: the node is an allocation of ours that is freed once, by the thread that drops it.
unsafe impl Send for Node {}

impl Node {
    fn new(peer: &Peer<'_>, before: Option<u16>) -> Self {
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
        let id = peer.id();
        let peer = NonNull::from(Box::leak(node));
        Self { peer, socket, before: before.unwrap_or(id), after: id }
    }

    fn link(&self) -> *mut IvshmemServerLink {
        // SAFETY: the node is allocated until `self` is dropped; no reference is made.
        unsafe { &raw mut (*self.peer.as_ptr()).next.tqe_circ }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // SAFETY: it came from Box::leak in `new`, and nothing else frees it. Whatever C may
        // have written there, the fields have nothing to drop.
        drop(unsafe { Box::from_raw(self.peer.as_ptr()) });
    }
}

/// Ids that one block of the table is for.
const BLOCK: usize = 16;

/// Nodes by id.
#[derive(Debug, Default)]
struct Table(Vec<Option<Box<[Option<Node>; BLOCK]>>>);

impl Table {
    fn get(&self, id: u16) -> Option<&Node> {
        let id = usize::from(id);
        self.0.get(id / BLOCK)?.as_ref()?[id % BLOCK].as_ref()
    }

    fn get_mut(&mut self, id: u16) -> Option<&mut Node> {
        let id = usize::from(id);
        self.0.get_mut(id / BLOCK)?.as_mut()?[id % BLOCK].as_mut()
    }

    fn insert(&mut self, id: u16, node: Node) {
        let id = usize::from(id);
        if self.0.len() <= id / BLOCK {
            self.0.resize_with(id / BLOCK + 1, || None);
        }
        self.0[id / BLOCK].get_or_insert_default()[id % BLOCK] = Some(node);
    }

    fn remove(&mut self, id: u16) -> Option<Node> {
        let id = usize::from(id);
        let place = self.0.get_mut(id / BLOCK)?;
        let block = place.as_mut()?;
        let node = block[id % BLOCK].take();
        if block.iter().all(Option::is_none) {
            *place = None;
        }
        node
    }
}

/// The nodes of one server. Dropped, it frees them and leaves the head as it is.
#[derive(Debug, Default)]
pub(super) struct List {
    nodes: Table,
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
    /// The node of a peer, for C.
    pub(super) fn find(&self, id: u16) -> Option<*mut IvshmemServerPeer> {
        self.nodes.get(id).map(|node| node.peer.as_ptr())
    }

    /// The address of the node with this id; NULL without an id.
    fn address(&self, id: Option<u16>) -> *mut IvshmemServerPeer {
        id.and_then(|id| self.find(id)).unwrap_or(ptr::null_mut())
    }

    /// The link of the node with this id. Without an id, the link in the head.
    fn link(&self, id: Option<u16>, head: *mut IvshmemServerLink) -> *mut IvshmemServerLink {
        id.and_then(|id| self.nodes.get(id)).map_or(head, Node::link)
    }

    /// Adds a peer at the end. Returns the number of its socket.
    ///
    /// # Safety
    /// `server` is valid for writes, and it is the one whose list this is.
    pub(super) unsafe fn push(&mut self, server: *mut IvshmemServer, peer: &Peer<'_>) -> RawFd {
        let id = peer.id();
        debug_assert!(self.nodes.get(id).is_none(), "two peers of one id");
        let node = Node::new(peer, self.last);
        // SAFETY: the caller vouches for the structure, and the links of nodes are valid until
        // these are dropped, which is after they leave the list.
        unsafe {
            let head = head_of(server);
            let before = self.link(self.last, head);
            let link = node.link();
            link.write(IvshmemServerLink { tql_next: ptr::null_mut(), tql_prev: before });
            (*before).tql_next = node.peer.as_ptr().cast();
            (*head).tql_prev = link;
        }
        let socket = node.socket;
        self.set_after(self.last, Some(id));
        self.last = Some(id);
        self.nodes.insert(id, node);
        socket
    }

    /// Removes a peer from the list and frees its node. Returns the number of its socket.
    ///
    /// # Safety
    /// As for `push`.
    pub(super) unsafe fn remove(&mut self, server: *mut IvshmemServer, id: u16) -> Option<RawFd> {
        let gone = self.nodes.remove(id)?;
        let other = |neighbour| (neighbour != id).then_some(neighbour);
        let (before, after) = (other(gone.before), other(gone.after));
        // SAFETY: as in `push`; the neighbours are still in the list.
        unsafe {
            let head = head_of(server);
            let link = self.link(before, head);
            (*self.link(after, head)).tql_prev = link;
            (*link).tql_next = self.address(after).cast();
        }
        self.set_after(before, after);
        self.set_before(after, before);
        Some(gone.socket)
    }

    /// Records which node comes after this one. Without an id, records the first node.
    fn set_after(&mut self, id: Option<u16>, after: Option<u16>) {
        let Some(id) = id else {
            self.first = after;
            return;
        };
        if let Some(node) = self.nodes.get_mut(id) {
            node.after = after.unwrap_or(id);
        }
    }

    /// Records which node comes before this one. Without an id, records the last node.
    fn set_before(&mut self, id: Option<u16>, before: Option<u16>) {
        let Some(id) = id else {
            self.last = before;
            return;
        };
        if let Some(node) = self.nodes.get_mut(id) {
            node.before = before.unwrap_or(id);
        }
    }

    /// Whether the head is as it was written last.
    ///
    /// # Safety
    /// `server` is valid for reads; what is there may be anything.
    pub(super) unsafe fn is_headed_by(&self, server: *mut IvshmemServer) -> bool {
        // SAFETY: the caller vouches for the structure. The read is volatile because the memory
        // may hold other data, about which the compiler must assume nothing.
        let (head, is) = unsafe {
            let head = head_of(server);
            (head, head.read_volatile())
        };
        is.tql_next == self.address(self.first).cast() && is.tql_prev == self.link(self.last, head)
    }
}
