/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A server for QEMU's ivshmem-doorbell devices.
 *
 * This takes the place of the file of the same name in QEMU's contrib/ivshmem-server: the same
 * functions, the same structures, the same memory layout. It stands alone, and also works in a
 * QEMU tree, where it uses QEMU's own EventNotifier and QTAILQ.
 *
 * How it is used: init, start, then for ever FD_ZERO, get_fds, select for reading, handle_fds;
 * at last close. No function waits for a client. Calls for one server from several threads wait
 * for each other, those for different servers do not. After start the process may fork, as
 * daemon(3) does.
 *
 * Made by cbindgen: change src/ instead, and run `make header`.
 */


#ifndef IVSHMEM_SERVER_H
#define IVSHMEM_SERVER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/select.h>

/* In a QEMU tree osdep.h has come first. These two are then wanted as they are there. */
#ifdef QEMU_OSDEP_H
#include "qemu/event_notifier.h"
#include "qemu/queue.h"
#endif

#ifdef QTAILQ_HEAD
typedef QTailQLink IvshmemServerLink;
#endif


#if !defined(IVSHMEM_PROTOCOL_VERSION)
/**
 * The version of the protocol, which is the first thing a client is told.
 */
#define IVSHMEM_PROTOCOL_VERSION 0
#endif

/**
 * The largest number of vectors that a peer can have in this API.
 */
#define IVSHMEM_SERVER_MAX_VECTORS 64

#if !defined(QTAILQ_HEAD)
/**
 * One end of a backward link in the list of peers.
 */
typedef struct IvshmemServerTailLink {
    /**
     * The next peer, or NULL.
     */
    void *tql_next;
    /**
     * The link that points here; in a list's head, the last link.
     */
    struct IvshmemServerTailLink *tql_prev;
} IvshmemServerTailLink;
#endif

#if !defined(QTAILQ_HEAD)
/**
 * What QEMU calls a QTailQLink; it is QEMU's own where that was defined before.
 */
typedef struct IvshmemServerTailLink IvshmemServerLink;
#endif

/**
 * A peer's place in the list: what QTAILQ_ENTRY of QEMU's queue.h makes.
 */
typedef union IvshmemServerPeerEntry {
    /**
     * The next peer, or NULL.
     */
    struct IvshmemServerPeer *tqe_next;
    /**
     * The link, for walking backward.
     */
    IvshmemServerLink tqe_circ;
} IvshmemServerPeerEntry;

#if !defined(QEMU_EVENT_NOTIFIER_H)
/**
 * A vector of a peer: an eventfd. Writing to it interrupts the peer.
 */
typedef struct EventNotifier {
    /**
     * The eventfd, to read from; -1 if there is none.
     */
    int rfd;
    /**
     * The eventfd, to write to; the same descriptor.
     */
    int wfd;
    /**
     * Whether there is one.
     */
    bool initialized;
} EventNotifier;
#endif

/**
 * A client that is connected.
 *
 * It is the library's: to be read, not to be written, closed or freed. It stays until the
 * ivshmem_server_handle_fds() in which the client leaves, or until ivshmem_server_close().
 */
typedef struct IvshmemServerPeer {
    /**
     * Its place in the list.
     */
    union IvshmemServerPeerEntry next;
    /**
     * The connection.
     */
    int sock_fd;
    /**
     * Its id, 0 to 65535.
     */
    int64_t id;
    /**
     * Its vectors.
     */
    struct EventNotifier vectors[IVSHMEM_SERVER_MAX_VECTORS];
    /**
     * How many vectors it has.
     */
    unsigned int vectors_count;
} IvshmemServerPeer;

/**
 * The list of peers: what QTAILQ_HEAD of QEMU's queue.h makes. QEMU's macros work on it.
 */
typedef union IvshmemServerPeerList {
    /**
     * The first peer, or NULL.
     */
    struct IvshmemServerPeer *tqh_first;
    /**
     * The link, for walking backward.
     */
    IvshmemServerLink tqh_circ;
} IvshmemServerPeerList;

/**
 * A server.
 *
 * All of it may be read at any time; what is set by ivshmem_server_init() may be changed until
 * ivshmem_server_start(), and `verbose` always. The structure must not move while the server
 * runs, as the server is known by its address.
 */
typedef struct IvshmemServer {
    /**
     * Path of the UNIX socket.
     */
    char unix_sock_path[4096];
    /**
     * The listening socket; -1 while the server does not run.
     */
    int sock_fd;
    /**
     * Name of the POSIX shared memory, or directory of its file.
     */
    char shm_path[4096];
    /**
     * Whether shm_path is a name, and not a directory.
     */
    bool use_shm_open;
    /**
     * Size of the shared memory in bytes, as asked for.
     */
    size_t shm_size;
    /**
     * The shared memory; -1 while the server does not run.
     */
    int shm_fd;
    /**
     * Vectors of each peer.
     */
    unsigned int n_vectors;
    /**
     * The id that the next client gets.
     */
    uint16_t cur_id;
    /**
     * Whether to print what happens to stdout.
     */
    bool verbose;
    /**
     * The peers, in the order in which they joined.
     */
    union IvshmemServerPeerList peer_list;
} IvshmemServer;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * Sets out to start a server: says what it is to be. Nothing is opened or made yet.
 *
 * The structure need not be initialised. What was in it is lost, except that a server that
 * runs is not forgotten: see EBUSY. Where the memory of a structure whose server was never
 * closed has become another structure, the old server is closed here.
 *
 * @server:         the structure to be filled in
 * @unix_sock_path: path of the UNIX socket, of at most 107 bytes
 * @shm_path:       name of the POSIX shared memory object, or directory (which may be a
 *                  hugetlbfs) for a file without a name
 * @use_shm_open:   whether shm_path is a name
 * @shm_size:       size of the shared memory in bytes; it is rounded up to a power of two, and
 *                  on hugetlbfs to the page size
 * @n_vectors:      vectors of each peer, 1 to IVSHMEM_SERVER_MAX_VECTORS
 * @verbose:        whether to print what happens to stdout
 *
 * # Returns
 * - 0: it is initialised, with no descriptors (-1), no peers, and 0 as the next id.
 * - -1, errno EINVAL: a pointer is NULL, or n_vectors is out of range.
 * - -1, errno ENAMETOOLONG: a path does not fit in the structure.
 * - -1, errno EBUSY: its server runs; it goes on undisturbed. ivshmem_server_close() it first.
 *
 * # Safety
 * `server` points to a writable structure; the paths are NULL or end with a NUL.
 */
int ivshmem_server_init(struct IvshmemServer *server,
                        const char *unix_sock_path,
                        const char *shm_path,
                        bool use_shm_open,
                        size_t shm_size,
                        unsigned int n_vectors,
                        bool verbose);

/**
 * Starts the server: opens the shared memory, binds the socket, listens.
 *
 * It takes what the fields of the structure say at this moment, `cur_id` included: that is the
 * id of the first client. It may be called again after ivshmem_server_close().
 *
 * No other server's socket or memory is touched; a socket that a killed server left behind is
 * replaced. On an error nothing is left behind.
 *
 * @server: the initialised structure
 *
 * # Returns
 * - 0: it listens; `sock_fd` and `shm_fd` are open.
 * - -1, errno EINVAL: the pointer is NULL, or `n_vectors`, `shm_size` or the name of the shared
 *   memory is not possible.
 * - -1, errno ENAMETOOLONG: the path of the socket does not fit in a socket address, or a path
 *   has no end.
 * - -1, errno EBUSY: it runs already, or the shared memory is in use by another server.
 * - -1, errno EADDRINUSE: the socket is in use by a running process.
 * - -1, errno EEXIST: something that is no socket is in its place, or the shared memory is
 *   larger than asked for.
 * - -1, errno ENOSPC: the shared memory does not fit in its file system.
 * - -1, errno EMFILE: no descriptors are left, or none that fits in an fd_set.
 * - -1, another errno: that of the system call that failed.
 *
 * # Safety
 * `server` is NULL or points to a structure that ivshmem_server_init() has initialised.
 */
int ivshmem_server_start(struct IvshmemServer *server);

/**
 * Closes the server: disconnects the clients, removes the socket and the name of the shared
 * memory, and closes all descriptors.
 *
 * `sock_fd` and `shm_fd` become -1, the list becomes empty; the other fields stay as they are,
 * and ivshmem_server_start() may be called again. Nothing happens if the server does not run.
 *
 * @server: the structure, or NULL
 *
 * # Safety
 * `server` is NULL or points to a writable structure, of which no other thread makes use.
 */
void ivshmem_server_close(struct IvshmemServer *server);

/**
 * Adds the descriptors that are to be watched for reading to an fd_set.
 *
 * They are the listening socket, those clients that fit in an fd_set, and one more, which
 * stands for everything: it alone is enough. It becomes readable also when a client that was
 * slow can be sent more, and when something happens at a descriptor beyond FD_SETSIZE. So a
 * loop that does not use select(2) must take its descriptors from here too.
 *
 * Nothing happens if a pointer is NULL or the server does not run.
 *
 * @server: the structure
 * @fds:    the set to add to; it is not cleared first
 * @maxfd:  one more than the largest descriptor in the set; raised when a larger one is added
 *
 * # Safety
 * The pointers are NULL or valid; `fds` has been initialised by FD_ZERO().
 */
void ivshmem_server_get_fds(const struct IvshmemServer *server, fd_set *fds, int *maxfd);

/**
 * Does what there is to do: lets clients in and out, tells them of each other. Never waits.
 *
 * Descriptors in the set that are not the server's are ignored; with none of its own there,
 * below maxfd, it does nothing. What a client does, or fails to do, ends that client at worst.
 *
 * @server: the structure
 * @fds:    the set as select(2) left it
 * @maxfd:  one more than the largest descriptor that is looked at in the set
 *
 * # Returns
 * - 0: done.
 * - -1, errno EINVAL: a pointer is NULL, or the server does not run.
 * - -1, another errno: the system does not tell of events any more.
 *
 * # Safety
 * The pointers are NULL or valid.
 */
int ivshmem_server_handle_fds(struct IvshmemServer *server, fd_set *fds, int maxfd);

/**
 * Finds a peer by its id.
 *
 * @server:  the structure
 * @peer_id: the id
 *
 * # Returns
 * - the peer: see IvshmemServerPeer for how long it stays.
 * - NULL, errno EINVAL: the pointer is NULL.
 * - NULL, errno ENOENT: there is no such peer, or the server does not run.
 *
 * # Safety
 * `server` is NULL or points to a structure.
 */
struct IvshmemServerPeer *ivshmem_server_search_peer(struct IvshmemServer *server, int64_t peer_id);

/**
 * Prints the peers and their vectors to stdout.
 *
 * Nothing happens if the pointer is NULL or the server does not run.
 *
 * @server: the structure
 *
 * # Safety
 * `server` is NULL or points to a structure.
 */
void ivshmem_server_dump(const struct IvshmemServer *server);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* IVSHMEM_SERVER_H */
