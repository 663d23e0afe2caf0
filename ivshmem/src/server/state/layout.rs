// SPDX-License-Identifier: GPL-2.0-or-later
//! Where each number lies in a state file. The format number changes with anything in this file.
//!
//! All numbers have the byte order of the machine: the file never leaves it.

#![forbid(unsafe_code)]

/// The first 8 bytes. They are written last.
pub(super) const MAGIC: u64 = u64::from_le_bytes(*b"ivshmst\n");

/// The number of this format. A test builds the program once more with another number.
pub(super) const FORMAT: u32 = if cfg!(ivshmem_other_format) { 2 } else { 1 };

/// The header, which has a page.
pub(super) mod header {
    pub(in super::super) const MAGIC: usize = 0;
    pub(in super::super) const FORMAT: usize = 8;
    pub(in super::super) const VECTORS: usize = 12;
    pub(in super::super) const FIRST: usize = 16;
    pub(in super::super) const SPACE: usize = 20;
    /// The number of ids that were ever given.
    pub(in super::super) const GIVEN: usize = 24;
    /// The number of client records that were ever used.
    pub(in super::super) const SLOTS: usize = 28;
    /// Device, inode and size of the shared memory.
    pub(in super::super) const MEMORY: usize = 32;
    /// `SO_COOKIE` of the listening socket.
    pub(in super::super) const LISTENER: usize = 56;
    /// Device and inode of the path of the listening socket; 0 without a path.
    pub(in super::super) const PATH: usize = 64;
    pub(in super::super) const SIZE: usize = 4096;
}

/// The record of an id: its last owner that left.
pub(super) mod id {
    /// The key of the owner.
    pub(in super::super) const KEY: usize = 0;
    /// The number of its departure; 0 if it has not left.
    pub(in super::super) const LEFT: usize = 8;
    /// 0, or how many times an id had become free when this one did.
    pub(in super::super) const FREED: usize = 16;
    pub(in super::super) const OWNER: usize = 24;
    pub(in super::super) const SIZE: usize = 32;
}

/// The record of a client. The ids of its eventfds, 32 bits each, follow.
pub(super) mod client {
    /// 0 if the record is not used. Written last.
    pub(in super::super) const KEY: usize = 0;
    /// `SO_COOKIE` of its socket.
    pub(in super::super) const COOKIE: usize = 8;
    pub(in super::super) const ID: usize = 16;
    pub(in super::super) const OWNER: usize = 20;
    pub(in super::super) const GREETED: usize = 24;
    pub(in super::super) const CURSOR_VECTORS: usize = 28;
    pub(in super::super) const CURSOR_KEY: usize = 32;
    pub(in super::super) const HEARD: usize = 40;
    /// The number of messages that a send may be sending just now.
    pub(in super::super) const PENDING: usize = 48;
    /// Of a partial write: the number of bytes that were sent, and the message.
    pub(in super::super) const PARTIAL_SENT: usize = 52;
    pub(in super::super) const PARTIAL: usize = 56;
    pub(in super::super) const SIZE: usize = 64;
}

/// The places of the records, which depend on the numbers of ids and vectors.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub(super) vectors: u32,
    pub(super) space: u32,
    /// The first record of a client, and the bytes of each.
    clients: usize,
    client_size: usize,
}

impl Layout {
    pub(super) fn new(vectors: u32, space: u32) -> Self {
        let clients = header::SIZE + space as usize * id::SIZE;
        // A multiple of 8, so that each number is aligned.
        let client_size = (client::SIZE + 4 * vectors as usize).next_multiple_of(8);
        Self { vectors, space, clients, client_size }
    }

    /// Bytes of the file. Most of them are a hole until records are used.
    pub(super) fn size(self) -> usize {
        let size = self.client(self.space);
        size.next_multiple_of(4096)
    }

    /// The record of the `offset`-th id.
    pub(super) fn id(self, offset: u32) -> usize {
        header::SIZE + offset as usize * id::SIZE
    }

    #[inline]
    pub(super) fn client(self, slot: u32) -> usize {
        self.clients + slot as usize * self.client_size
    }
}
