// SPDX-License-Identifier: GPL-2.0-or-later
//! The seven functions. The comments are those of the C header.

use std::ffi::{c_char, c_int, c_uint};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;

use super::abi::{IvshmemServer, IvshmemServerPeer, IvshmemServerPeerList};
use super::registry::{self, Slot};
use super::report::{Failure, answer, say};
use super::state::{self, State};
use super::verbose::Line;

/// Locks a server. One in which something panicked can only be closed.
fn lock(slot: &Slot) -> Result<MutexGuard<'_, Option<State>>, Failure> {
    slot.lock().map_err(|_| {
        let text = "a call for this server panicked before; it can only be closed";
        Failure::new(Errno::EIO, text)
    })
}

/// What `body` returns for the server of this structure; `None` where none runs.
pub(super) fn with<T>(
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

/// Copies the string of this name with its NUL.
///
/// # Safety
/// `from` is a C string, `to` is valid for writes and apart from it.
unsafe fn copy(from: *const c_char, to: *mut [c_char; 4096], name: &str) -> Result<(), Failure> {
    // SAFETY: the caller vouches for the string, of which not more than the array holds is read.
    let length = unsafe { libc::strnlen(from, 4096) };
    if length == 4096 {
        let text = format!("{name} has more than 4095 bytes; use a shorter one");
        return Err(Failure::new(Errno::ENAMETOOLONG, text));
    }
    // SAFETY: both have length + 1 bytes, the caller says.
    unsafe { to.cast::<c_char>().copy_from_nonoverlapping(from, length + 1) };
    Ok(())
}

/// Initialises the structure with its configuration. Opens and creates nothing.
///
/// The structure need not be initialised before. Its content is overwritten, except while its
/// server runs: see EBUSY. If an earlier server of a structure at this address was never closed,
/// and the structure no longer shows it, that server is closed here.
///
/// Threads: no other thread may use the structure.
///
/// @param server         the structure to fill in
/// @param unix_sock_path path of the UNIX socket, 1 to 107 bytes
/// @param shm_path       name of the POSIX shared memory object, or a directory (which may be a
///                       hugetlbfs) for a file without a name
/// @param use_shm_open   true: shm_path is a name; false: it is a directory
/// @param shm_size       size of the shared memory in bytes; it is rounded up to a power of two,
///                       and on hugetlbfs to the page size
/// @param n_vectors      vectors of each peer, 1 to IVSHMEM_SERVER_MAX_VECTORS
/// @param verbose        true: print joins, departures and the like to stdout
/// @return
/// - 0: initialised, with no descriptors (-1), no peers, and 0 as the next id.
/// - -1, errno EINVAL: a pointer is NULL, or n_vectors is out of range.
/// - -1, errno ENAMETOOLONG: a path does not fit in the structure.
/// - -1, errno EBUSY: its server runs, and is left alone. Call ivshmem_server_close() first.
/// - -1, errno EIO: the library has a bug and panicked, in this call or in one before for this
///   server.
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
            return Err(Failure::null("server"));
        }
        // SAFETY: the caller vouches for the structure's memory, whatever is in it.
        if with(server, |state| Ok(unsafe { state.is_shown_by(server) }))? == Some(true) {
            let text = "the server of this structure runs; call ivshmem_server_close() first";
            return Err(Failure::new(Errno::EBUSY, text));
        }
        // A server that nothing shows any more: its structure is gone.
        drop(take(server));
        let checked = match (unix_sock_path.is_null(), shm_path.is_null()) {
            (true, _) => Err(Failure::null("unix_sock_path")),
            (_, true) => Err(Failure::null("shm_path")),
            _ => state::check_vectors(n_vectors),
        };
        if let Err(failure) = checked {
            // SAFETY: the caller vouches for the structure; all zeroes is a value of it, and
            // one that cannot be started.
            unsafe {
                server.write_bytes(0, 1);
                state::write_closed(server);
            }
            return Err(failure);
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
            copy(unix_sock_path, &raw mut new.unix_sock_path, "unix_sock_path")
                .and_then(|()| copy(shm_path, &raw mut new.shm_path, "shm_path"))
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
/// It reads the configuration from the structure, `cur_id` included: that is the id of the first
/// client. It may be called again after ivshmem_server_close().
///
/// It does not touch the socket or the memory of another server. It replaces a socket that a
/// killed server left behind. On an error it leaves nothing behind.
///
/// Threads: no other thread may use the structure's fields meanwhile. Other functions, called
/// for the same server, wait until this one returns.
///
/// @param server the initialised structure
/// @return
/// - 0: it listens; `sock_fd` and `shm_fd` are open.
/// - -1, errno EINVAL: the pointer is NULL, or `n_vectors`, `shm_size` or the name of the shared
///   memory is not valid.
/// - -1, errno ENAMETOOLONG: the path of the socket does not fit in a socket address, or a path
///   has no NUL.
/// - -1, errno EBUSY: it runs already, or another server uses the shared memory.
/// - -1, errno EADDRINUSE: a running process uses the socket.
/// - -1, errno EEXIST: a file that is not a socket has the socket's path, or the shared memory
///   is larger than `shm_size`.
/// - -1, errno ENOSPC: the shared memory does not fit in its file system.
/// - -1, errno EMFILE: no descriptor is left, or none that fits in an fd_set.
/// - -1, errno EIO: the library has a bug and panicked.
/// - -1, another errno: that of the system call that failed.
///
/// # Safety
/// `server` is NULL or points to a structure that ivshmem_server_init() has initialised.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ivshmem_server_start(server: *mut IvshmemServer) -> c_int {
    answer(-1, || {
        if server.is_null() {
            return Err(Failure::null("server"));
        }
        let slot: Slot = Arc::new(Mutex::new(None));
        // Held until it runs: a thread that finds it in the table waits for this lock, and does
        // not hold the table's.
        let mut place = lock(&slot)?;
        if !registry::take(server.addr(), &slot) {
            let text = "the server of this structure runs already";
            return Err(Failure::new(Errno::EBUSY, text));
        }
        let unwound = Vacate { server, slot: &slot };
        // SAFETY: the caller vouches for the structure.
        *place = Some(unsafe { State::start(server)? });
        std::mem::forget(unwound);
        Ok(0)
    })
}

/// Removes the entry from the table when a start fails or panics.
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
/// `sock_fd` and `shm_fd` become -1, and the list becomes empty. The other fields stay as they
/// are, and ivshmem_server_start() may be called again. Nothing happens if the server does not
/// run. This function also works for a server that answers EIO. Should it panic itself, errno is
/// EIO.
///
/// Threads: any thread, but no other thread may use the structure's fields or its peers
/// meanwhile. Calls that other threads are in end first; later ones find no server.
///
/// @param server the structure, or NULL
///
/// # Safety
/// `server` is NULL or points to a writable structure.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ivshmem_server_close(server: *mut IvshmemServer) {
    answer((), || {
        let Some(state) = take(server) else { return Ok(()) };
        // SAFETY: its server ran, so the caller has a structure there.
        let verbose = unsafe { state::is_verbose(server) };
        if verbose {
            say(Line::Close.text());
        }
        let ids = state.close();
        // SAFETY: as above.
        unsafe { state::write_closed(server) };
        if verbose {
            ids.iter().for_each(|&id| say(Line::FreePeer(id).text()));
        }
        Ok(())
    });
}

/// Adds the descriptors to watch for reading to an fd_set.
///
/// These are the listening socket, the clients' sockets that fit in an fd_set, and the server's
/// own descriptor, which alone is enough: see ivshmem_server_get_fd(). It is readable also when a
/// slow client can be sent more, and for clients whose descriptor does not fit in an fd_set.
///
/// Nothing happens if a pointer is NULL or the server does not run. If the library has panicked
/// in a call for this server, nothing is added and errno is EIO.
///
/// Threads: any thread, at any time.
///
/// @param server the structure
/// @param fds    the set to add to; it is not cleared first
/// @param maxfd  one more than the largest descriptor in the set; raised if a larger one is added
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

/// Does the work that is due: admits and removes clients, and sends messages. It never waits.
///
/// It ignores descriptors in the set that are not the server's. If none below maxfd is the
/// server's, it does nothing. Nothing that a client does is an error.
///
/// One call sends some 4,096 messages at most. The descriptors stay readable while work is left.
///
/// Threads: any thread; calls for one server run one after another. It writes `cur_id` and the
/// list of peers, and may free peers: no other thread may use these meanwhile.
///
/// @param server the structure
/// @param fds    the set as select(2) left it
/// @param maxfd  one more than the largest descriptor to look at in the set
/// @return
/// - 0: done.
/// - -1, errno EINVAL: a pointer is NULL, or the server does not run.
/// - -1, errno EIO: the library has a bug and panicked, in this call or in one before for this
///   server. Only ivshmem_server_close() works then.
/// - -1, another errno: the system does not report events any more.
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
            return Err(Failure::null("fds"));
        }
        if server.is_null() {
            return Err(Failure::null("server"));
        }
        let done = with(server, |state| {
            // SAFETY: the caller vouches for the set and, its server running, the structure.
            unsafe { if state.is_called(fds, maxfd) { state.dispatch(server) } else { Ok(()) } }
        })?;
        done.map(|()| 0).ok_or_else(Failure::not_running)
    })
}

/// Finds a peer by its id. The time does not depend on the number of peers.
///
/// Threads: any thread, at any time. The peer may be used only while no other thread is in
/// ivshmem_server_handle_fds(), ivshmem_server_dispatch() or ivshmem_server_close().
///
/// @param server  the structure
/// @param peer_id the id
/// @return
/// - the peer: see IvshmemServerPeer for how long it stays.
/// - NULL, errno EINVAL: the pointer is NULL.
/// - NULL, errno ENOENT: there is no such peer, or the server does not run.
/// - NULL, errno EIO: the library has a bug and panicked, in this call or in one before for this
///   server.
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
            return Err(Failure::null("server"));
        }
        let found = with(server, |state| Ok(state.peer(peer_id)))?;
        found.flatten().ok_or_else(|| {
            Failure::new(Errno::ENOENT, format!("there is no peer with id {peer_id}"))
        })
    })
}

/// Prints the peers and their vectors to stdout.
///
/// Nothing happens if the pointer is NULL or the server does not run. If the library has panicked
/// in a call for this server, nothing is printed and errno is EIO.
///
/// Threads: any thread, at any time.
///
/// @param server the structure
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
