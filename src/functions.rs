// SPDX-License-Identifier: GPL-2.0-or-later
//! The seven functions. The comments are those of the C header.

use std::ffi::{c_char, c_int, c_uint};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;

use super::abi::{IvshmemServer, IvshmemServerPeer, IvshmemServerPeerList};
use super::registry::{self, Slot};
use super::report::{Failure, answer, say};
use super::state::{self, State};

/// Locks a server. One in which something panicked is not used any more, but for closing it.
fn lock(slot: &Slot) -> Result<MutexGuard<'_, Option<State>>, Failure> {
    slot.lock().map_err(|_| Errno::EIO.into())
}

/// What `body` makes of the server of this structure; `None` where none runs.
fn with<T>(
    server: *const IvshmemServer,
    body: impl FnOnce(&mut State) -> Result<T, Failure>,
) -> Result<Option<T>, Failure> {
    let Some(slot) = registry::find(server.addr()) else { return Ok(None) };
    let mut state = lock(&slot)?;
    state.as_mut().map(body).transpose()
}

/// Takes the server of this structure from the table, to be closed.
fn take(server: *const IvshmemServer) -> Option<State> {
    let slot = registry::find(server.addr())?;
    let state = slot.lock().unwrap_or_else(PoisonError::into_inner).take()?;
    registry::leave(server.addr(), &slot);
    Some(state)
}

/// Copies a string with its NUL.
///
/// # Safety
/// `from` is a C string, `to` is valid for writes and apart from it.
unsafe fn copy(from: *const c_char, to: *mut [c_char; 4096]) -> Result<(), Failure> {
    // SAFETY: the caller vouches for the string, of which not more than the array holds is read.
    let length = unsafe { libc::strnlen(from, 4096) };
    if length == 4096 {
        return Err(Errno::ENAMETOOLONG.into());
    }
    // SAFETY: both have length + 1 bytes, the caller says.
    unsafe { to.cast::<c_char>().copy_from_nonoverlapping(from, length + 1) };
    Ok(())
}

/// Sets out to start a server: says what it is to be. Nothing is opened or made yet.
///
/// The structure need not be initialised. What was in it is lost, except that a server that
/// runs is not forgotten: see EBUSY. Where the memory of a structure whose server was never
/// closed has become another structure, the old server is closed here.
///
/// @server:         the structure to be filled in
/// @unix_sock_path: path of the UNIX socket, of at most 107 bytes
/// @shm_path:       name of the POSIX shared memory object, or directory (which may be a
///                  hugetlbfs) for a file without a name
/// @use_shm_open:   whether shm_path is a name
/// @shm_size:       size of the shared memory in bytes; it is rounded up to a power of two, and
///                  on hugetlbfs to the page size
/// @n_vectors:      vectors of each peer, 1 to IVSHMEM_SERVER_MAX_VECTORS
/// @verbose:        whether to print what happens to stdout
///
/// # Returns
/// - 0: it is initialised, with no descriptors (-1), no peers, and 0 as the next id.
/// - -1, errno EINVAL: a pointer is NULL, or n_vectors is out of range.
/// - -1, errno ENAMETOOLONG: a path does not fit in the structure.
/// - -1, errno EBUSY: its server runs; it goes on undisturbed. ivshmem_server_close() it first.
///
/// # Safety
/// `server` points to a writable structure; the paths are NULL or end with a NUL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ivshmem_server_init(
    server: *mut IvshmemServer,
    unix_sock_path: *const c_char,
    shm_path: *const c_char,
    use_shm_open: bool,
    shm_size: usize,
    n_vectors: c_uint,
    verbose: bool,
) -> c_int {
    answer(-1, || {
        if server.is_null() {
            return Err(Errno::EINVAL.into());
        }
        // SAFETY: the caller vouches for the structure's memory, whatever is in it.
        if with(server, |state| Ok(unsafe { state.is_shown_by(server) }))? == Some(true) {
            return Err(Errno::EBUSY.into());
        }
        // A server that nothing shows any more: its structure is gone.
        drop(take(server));
        if unix_sock_path.is_null() || shm_path.is_null() || !state::is_possible(n_vectors) {
            // SAFETY: the caller vouches for the structure; all zeroes is a value of it, and
            // one that cannot be started.
            unsafe {
                server.write_bytes(0, 1);
                state::write_closed(server);
            }
            return Err(Errno::EINVAL.into());
        }
        // Made apart, as the paths may lie in the structure.
        let mut new = Box::new(IvshmemServer {
            unix_sock_path: [0; 4096],
            sock_fd: -1,
            shm_path: [0; 4096],
            use_shm_open,
            shm_size,
            shm_fd: -1,
            n_vectors,
            cur_id: 0,
            verbose,
            peer_list: IvshmemServerPeerList { tqh_first: std::ptr::null_mut() },
        });
        // SAFETY: the caller vouches for the strings, and the arrays are ours.
        let copied = unsafe {
            copy(unix_sock_path, &raw mut new.unix_sock_path)
                .and_then(|()| copy(shm_path, &raw mut new.shm_path))
        };
        if copied.is_err() {
            new.n_vectors = 0;
        }
        // SAFETY: the caller vouches for the structure.
        unsafe {
            server.copy_from_nonoverlapping(&raw const *new, 1);
            state::write_closed(server);
        }
        copied.map(|()| 0)
    })
}

/// Starts the server: opens the shared memory, binds the socket, listens.
///
/// It takes what the fields of the structure say at this moment, `cur_id` included: that is the
/// id of the first client. It may be called again after ivshmem_server_close().
///
/// No other server's socket or memory is touched; a socket that a killed server left behind is
/// replaced. On an error nothing is left behind.
///
/// @server: the initialised structure
///
/// # Returns
/// - 0: it listens; `sock_fd` and `shm_fd` are open.
/// - -1, errno EINVAL: the pointer is NULL, or `n_vectors`, `shm_size` or the name of the shared
///   memory is not possible.
/// - -1, errno ENAMETOOLONG: the path of the socket does not fit in a socket address, or a path
///   has no end.
/// - -1, errno EBUSY: it runs already, or the shared memory is in use by another server.
/// - -1, errno EADDRINUSE: the socket is in use by a running process.
/// - -1, errno EEXIST: something that is no socket is in its place, or the shared memory is
///   larger than asked for.
/// - -1, errno ENOSPC: the shared memory does not fit in its file system.
/// - -1, errno EMFILE: no descriptors are left, or none that fits in an fd_set.
/// - -1, another errno: that of the system call that failed.
///
/// # Safety
/// `server` is NULL or points to a structure that ivshmem_server_init() has initialised.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ivshmem_server_start(server: *mut IvshmemServer) -> c_int {
    answer(-1, || {
        if server.is_null() {
            return Err(Errno::EINVAL.into());
        }
        let slot: Slot = Arc::new(Mutex::new(None));
        // Held until it runs: whoever finds it in the table waits here, and not at the table.
        let mut place = lock(&slot)?;
        if !registry::take(server.addr(), &slot) {
            return Err(Errno::EBUSY.into());
        }
        let unwound = Vacate { server, slot: &slot };
        // SAFETY: the caller vouches for the structure.
        *place = Some(unsafe { State::start(server)? });
        std::mem::forget(unwound);
        Ok(0)
    })
}

/// Gives up a place in the table when a start fails, be it by a panic.
struct Vacate<'a> {
    server: *const IvshmemServer,
    slot: &'a Slot,
}

impl Drop for Vacate<'_> {
    fn drop(&mut self) {
        registry::leave(self.server.addr(), self.slot);
    }
}

/// Closes the server: disconnects the clients, removes the socket and the name of the shared
/// memory, and closes all descriptors.
///
/// `sock_fd` and `shm_fd` become -1, the list becomes empty; the other fields stay as they are,
/// and ivshmem_server_start() may be called again. Nothing happens if the server does not run.
///
/// @server: the structure, or NULL
///
/// # Safety
/// `server` is NULL or points to a writable structure, of which no other thread makes use.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ivshmem_server_close(server: *mut IvshmemServer) {
    answer((), || {
        let Some(state) = take(server) else { return Ok(()) };
        // SAFETY: its server ran, so the caller has a structure there.
        let verbose = unsafe { state::is_verbose(server) };
        if verbose {
            say("close server");
        }
        let ids = state.close();
        // SAFETY: as above.
        unsafe { state::write_closed(server) };
        if verbose {
            ids.iter().for_each(|id| say(format!("free peer {id}")));
        }
        Ok(())
    });
}

/// Adds the descriptors that are to be watched for reading to an fd_set.
///
/// They are the listening socket, those clients that fit in an fd_set, and one more, which
/// stands for everything: it alone is enough. It becomes readable also when a client that was
/// slow can be sent more, and when something happens at a descriptor beyond FD_SETSIZE. So a
/// loop that does not use select(2) must take its descriptors from here too.
///
/// Nothing happens if a pointer is NULL or the server does not run.
///
/// @server: the structure
/// @fds:    the set to add to; it is not cleared first
/// @maxfd:  one more than the largest descriptor in the set; raised when a larger one is added
///
/// # Safety
/// The pointers are NULL or valid; `fds` has been initialised by FD_ZERO().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ivshmem_server_get_fds(
    server: *const IvshmemServer,
    fds: *mut libc::fd_set,
    maxfd: *mut c_int,
) {
    answer((), || {
        if fds.is_null() || maxfd.is_null() {
            return Ok(());
        }
        with(server, |state| {
            // SAFETY: the caller vouches for both.
            unsafe { state.descriptors().add_to(fds, maxfd) };
            Ok(())
        })?;
        Ok(())
    });
}

/// Does what there is to do: lets clients in and out, tells them of each other. Never waits.
///
/// Descriptors in the set that are not the server's are ignored; with none of its own there,
/// below maxfd, it does nothing. What a client does, or fails to do, ends that client at worst.
///
/// @server: the structure
/// @fds:    the set as select(2) left it
/// @maxfd:  one more than the largest descriptor that is looked at in the set
///
/// # Returns
/// - 0: done.
/// - -1, errno EINVAL: a pointer is NULL, or the server does not run.
/// - -1, another errno: the system does not tell of events any more.
///
/// # Safety
/// The pointers are NULL or valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ivshmem_server_handle_fds(
    server: *mut IvshmemServer,
    fds: *mut libc::fd_set,
    maxfd: c_int,
) -> c_int {
    answer(-1, || {
        if fds.is_null() {
            return Err(Errno::EINVAL.into());
        }
        let done = with(server, |state| {
            // SAFETY: the caller vouches for the set and, its server running, the structure.
            unsafe { if state.is_called(fds, maxfd) { state.dispatch(server) } else { Ok(()) } }
        })?;
        done.map(|()| 0).ok_or(Errno::EINVAL.into())
    })
}

/// Finds a peer by its id.
///
/// @server:  the structure
/// @peer_id: the id
///
/// # Returns
/// - the peer: see IvshmemServerPeer for how long it stays.
/// - NULL, errno EINVAL: the pointer is NULL.
/// - NULL, errno ENOENT: there is no such peer, or the server does not run.
///
/// # Safety
/// `server` is NULL or points to a structure.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ivshmem_server_search_peer(
    server: *mut IvshmemServer,
    peer_id: i64,
) -> *mut IvshmemServerPeer {
    answer(std::ptr::null_mut(), || {
        if server.is_null() {
            return Err(Errno::EINVAL.into());
        }
        let found = with(server, |state| Ok(state.peer(peer_id)))?;
        found.flatten().ok_or(Errno::ENOENT.into())
    })
}

/// Prints the peers and their vectors to stdout.
///
/// Nothing happens if the pointer is NULL or the server does not run.
///
/// @server: the structure
///
/// # Safety
/// `server` is NULL or points to a structure.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ivshmem_server_dump(server: *const IvshmemServer) {
    answer((), || {
        with(server, |state| {
            state.dump();
            Ok(())
        })?;
        Ok(())
    });
}
