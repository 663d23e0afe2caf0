// SPDX-License-Identifier: GPL-2.0-or-later
//! What the wire says, and its limits: the ground floor. It knows no other module.
//!
//! A server sends messages to its clients, and a client sends nothing. A message is a signed
//! little-endian number of 8 bytes, with at most one descriptor in `SCM_RIGHTS`. (Source:
//! docs/specs/ivshmem-spec in QEMU's tree.)

#![forbid(unsafe_code)]

/// The protocol version: the value of the first message.
///
/// ```
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("socket");
/// # let mut server = ivshmem::Server::builder().socket_path(&path).start()?;
/// # std::thread::spawn(move || server.run());
/// use std::io::Read;
///
/// let mut first = [0; 8];
/// std::os::unix::net::UnixStream::connect(&path)?.read_exact(&mut first)?;
/// assert_eq!(i64::from_le_bytes(first), ivshmem::PROTOCOL_VERSION);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub const PROTOCOL_VERSION: i64 = 0;

/// The largest number of vectors that a peer can have: MSI-X has no more.
///
/// ```
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("socket");
/// use ivshmem::{MAX_VECTORS, Server};
///
/// assert!(Server::builder().socket_path(&path).vectors(MAX_VECTORS + 1).start().is_err());
/// assert!(Server::builder().socket_path(&path).vectors(MAX_VECTORS).start().is_ok());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub const MAX_VECTORS: u32 = 2048;

/// The value of the message that carries the shared memory.
pub(crate) const MEMORY: i64 = -1;

/// In place of the protocol version: the client is refused. QEMU says "server sent version 1,
/// expecting 0", and ends.
pub(crate) const REFUSED_VERSION: i64 = 1;

/// In place of the id or the memory: the client is refused. QEMU says "server sent invalid
/// message", and ends.
pub(crate) const REFUSED_VALUE: i64 = -2;

/// Bytes of one message.
pub(crate) const MESSAGE: usize = 8;

/// How many ids there are: an id has 16 bits.
pub(crate) const ID_SPACE: u32 = 1 << 16;

/// The longest path of a socket, in bytes: `sun_path` of `unix(7)` without its final NUL.
pub(crate) const MAX_SOCKET_PATH: usize = 107;
