/* SPDX-License-Identifier: GPL-2.0-or-later */
/**
 * @file
 * A server for QEMU's ivshmem-doorbell devices.
 *
 * This header replaces the file of the same name in QEMU's contrib/ivshmem-server: it has the
 * same functions, structures and memory layout. It needs no QEMU. In a QEMU tree it uses QEMU's
 * own EventNotifier and QTAILQ.
 *
 * A program with select(2) calls init and start; then in a loop FD_ZERO, get_fds, select for
 * reading, handle_fds; and close at the end. A program with another event loop calls init and
 * start, watches the descriptor of get_fd for reading, and calls dispatch when it is readable.
 * No function waits for a client. After start the process may fork, as daemon(3) does.
 *
 * Functions may be called from any thread. Calls for one server wait for each other; calls for
 * different servers do not. The fields of the structure are not protected so: each function,
 * and IvshmemServer, says what other threads may do meanwhile.
 *
 * Made by cbindgen. To change it, change src/ and run `make header`.
 */


#ifndef IVSHMEM_SERVER_H
#define IVSHMEM_SERVER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/select.h>

/** The version of this header, as a string. See ivshmem_server_version(). */
#define IVSHMEM_SERVER_VERSION "0.1.0"
/** The first number of the version. */
#define IVSHMEM_SERVER_VERSION_MAJOR 0
/** The second number of the version. */
#define IVSHMEM_SERVER_VERSION_MINOR 1
/** The third number of the version. */
#define IVSHMEM_SERVER_VERSION_PATCH 0

/* In a QEMU tree, where osdep.h is always the first header, QEMU's own definitions are used. */
#ifdef QEMU_OSDEP_H
#include "qemu/event_notifier.h"
#include "qemu/queue.h"
#endif

#ifdef QTAILQ_HEAD
typedef QTailQLink IvshmemServerLink;
#endif


#if !defined(IVSHMEM_PROTOCOL_VERSION)
/**
 * The version of the protocol. It is the first message that a client is sent.
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
 * It belongs to the library: read it, but do not write it, close its descriptors or free it. It
 * stays until the ivshmem_server_handle_fds() or ivshmem_server_dispatch() that removes the
 * client, or until ivshmem_server_close().
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
 * The library knows a server by the address of its structure, so the structure must not move
 * while the server runs.
 *
 * The fields that ivshmem_server_init() sets may be changed until ivshmem_server_start(), and
 * `verbose` also later, in the thread that serves. Which thread may read which field when:
 * - `unix_sock_path`, `shm_path`, `use_shm_open`, `shm_size`, `n_vectors`: any thread, at any
 *   time after ivshmem_server_init(). The library only reads them.
 * - `sock_fd`, `shm_fd`: any thread, but not while another thread is in ivshmem_server_start()
 *   or ivshmem_server_close(), which write them.
 * - `cur_id`, `peer_list` and the peers: as above, and not while another thread is in
 *   ivshmem_server_handle_fds() or ivshmem_server_dispatch() either.
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
     * Size of the shared memory in bytes, before it is rounded up.
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
     * Whether to print joins, departures and the like to stdout.
     */
    bool verbose;
    /**
     * The peers, in the order in which they joined.
     */
    union IvshmemServerPeerList peer_list;
} IvshmemServer;

#ifdef __cplusplus
extern "C" {
#endif /* __cplusplus */

/**
 * Initialises the structure with its configuration. Opens and creates nothing.
 *
 * The structure need not be initialised before. Its content is overwritten, except while its
 * server runs: see EBUSY. If an earlier server of a structure at this address was never closed,
 * and the structure no longer shows it, that server is closed here.
 *
 * Threads: no other thread may use the structure.
 *
 * @param server         the structure to fill in
 * @param unix_sock_path path of the UNIX socket, 1 to 107 bytes
 * @param shm_path       name of the POSIX shared memory object, or a directory (which may be a
 *                       hugetlbfs) for a file without a name
 * @param use_shm_open   true: shm_path is a name; false: it is a directory
 * @param shm_size       size of the shared memory in bytes; it is rounded up to a power of two,
 *                       and on hugetlbfs to the page size
 * @param n_vectors      vectors of each peer, 1 to IVSHMEM_SERVER_MAX_VECTORS
 * @param verbose        true: print joins, departures and the like to stdout
 * @return
 * - 0: initialised, with no descriptors (-1), no peers, and 0 as the next id.
 * - -1, errno EINVAL: a pointer is NULL, or n_vectors is out of range.
 * - -1, errno ENAMETOOLONG: a path does not fit in the structure.
 * - -1, errno EBUSY: its server runs, and is left alone. Call ivshmem_server_close() first.
 * - -1, errno EIO: the library has a bug and panicked, in this call or in one before for this
 *   server.
 *
 * @pre `server` points to a writable structure; the paths are NULL or end with a NUL.
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
 * It reads the configuration from the structure, `cur_id` included: that is the id of the first
 * client. It may be called again after ivshmem_server_close().
 *
 * It does not touch the socket or the memory of another server. It replaces a socket that a
 * killed server left behind. On an error it leaves nothing behind.
 *
 * Threads: no other thread may use the structure's fields meanwhile. Other functions, called
 * for the same server, wait until this one returns.
 *
 * @param server the initialised structure
 * @return
 * - 0: it listens; `sock_fd` and `shm_fd` are open.
 * - -1, errno EINVAL: the pointer is NULL, or `n_vectors`, `shm_size` or the name of the shared
 *   memory is not valid.
 * - -1, errno ENAMETOOLONG: the path of the socket does not fit in a socket address, or a path
 *   has no NUL.
 * - -1, errno EBUSY: it runs already, or another server uses the shared memory.
 * - -1, errno EADDRINUSE: a running process uses the socket.
 * - -1, errno EEXIST: a file that is not a socket has the socket's path, or the shared memory
 *   is larger than `shm_size`.
 * - -1, errno ENOSPC: the shared memory does not fit in its file system.
 * - -1, errno EMFILE: no descriptor is left, or none that fits in an fd_set.
 * - -1, errno EIO: the library has a bug and panicked.
 * - -1, another errno: that of the system call that failed.
 *
 * @pre `server` is NULL or points to a structure that ivshmem_server_init() has initialised.
 */
int ivshmem_server_start(struct IvshmemServer *server);

/**
 * Closes the server: disconnects the clients, removes the socket and the name of the shared
 * memory, and closes all descriptors.
 *
 * `sock_fd` and `shm_fd` become -1, and the list becomes empty. The other fields stay as they
 * are, and ivshmem_server_start() may be called again. Nothing happens if the server does not
 * run. This function also works for a server that answers EIO. Should it panic itself, errno is
 * EIO.
 *
 * Threads: any thread, but no other thread may use the structure's fields or its peers
 * meanwhile. Calls that other threads are in end first; later ones find no server.
 *
 * @param server the structure, or NULL
 *
 * @pre `server` is NULL or points to a writable structure.
 */
void ivshmem_server_close(struct IvshmemServer *server);

/**
 * Adds the descriptors to watch for reading to an fd_set.
 *
 * These are the listening socket, the clients' sockets that fit in an fd_set, and the server's
 * own descriptor, which alone is enough: see ivshmem_server_get_fd(). It is readable also when a
 * slow client can be sent more, and for clients whose descriptor does not fit in an fd_set.
 *
 * Nothing happens if a pointer is NULL or the server does not run. If the library has panicked
 * in a call for this server, nothing is added and errno is EIO.
 *
 * Threads: any thread, at any time.
 *
 * @param server the structure
 * @param fds    the set to add to; it is not cleared first
 * @param maxfd  one more than the largest descriptor in the set; raised if a larger one is added
 *
 * @pre The pointers are NULL or valid; `fds` has been initialised by FD_ZERO().
 */
void ivshmem_server_get_fds(const struct IvshmemServer *server, fd_set *fds, int *maxfd);

/**
 * Does the work that is due: admits and removes clients, and sends messages. It never waits.
 *
 * It ignores descriptors in the set that are not the server's. If none below maxfd is the
 * server's, it does nothing. Nothing that a client does is an error.
 *
 * One call sends some 4,096 messages at most. The descriptors stay readable while work is left.
 *
 * Threads: any thread; calls for one server run one after another. It writes `cur_id` and the
 * list of peers, and may free peers: no other thread may use these meanwhile.
 *
 * @param server the structure
 * @param fds    the set as select(2) left it
 * @param maxfd  one more than the largest descriptor to look at in the set
 * @return
 * - 0: done.
 * - -1, errno EINVAL: a pointer is NULL, or the server does not run.
 * - -1, errno EIO: the library has a bug and panicked, in this call or in one before for this
 *   server. Only ivshmem_server_close() works then.
 * - -1, another errno: the system does not report events any more.
 *
 * @pre The pointers are NULL or valid.
 */
int ivshmem_server_handle_fds(struct IvshmemServer *server, fd_set *fds, int maxfd);

/**
 * Finds a peer by its id. The time does not depend on the number of peers.
 *
 * Threads: any thread, at any time. The peer may be used only while no other thread is in
 * ivshmem_server_handle_fds(), ivshmem_server_dispatch() or ivshmem_server_close().
 *
 * @param server  the structure
 * @param peer_id the id
 * @return
 * - the peer: see IvshmemServerPeer for how long it stays.
 * - NULL, errno EINVAL: the pointer is NULL.
 * - NULL, errno ENOENT: there is no such peer, or the server does not run.
 * - NULL, errno EIO: the library has a bug and panicked, in this call or in one before for this
 *   server.
 *
 * @pre `server` is NULL or points to a structure.
 */
struct IvshmemServerPeer *ivshmem_server_search_peer(struct IvshmemServer *server, int64_t peer_id);

/**
 * Prints the peers and their vectors to stdout.
 *
 * Nothing happens if the pointer is NULL or the server does not run. If the library has panicked
 * in a call for this server, nothing is printed and errno is EIO.
 *
 * Threads: any thread, at any time.
 *
 * @param server the structure
 *
 * @pre `server` is NULL or points to a structure.
 */
void ivshmem_server_dump(const struct IvshmemServer *server);

/*
 * Additions: functions that QEMU's header does not have. IVSHMEM_SERVER_VERSION is defined where
 * they are.
 */

/**
 * Returns the server's one descriptor, for an event loop without an fd_set.
 *
 * It is readable when ivshmem_server_dispatch() has work to do. It is an epoll instance: watch
 * it for reading with poll(2), epoll(7) or any event loop. Do not read from it or close it. It
 * stays the same until ivshmem_server_close().
 *
 * Threads: any thread, at any time.
 *
 * @param server the structure
 * @return
 * - 0 or more: the descriptor.
 * - -1, errno EINVAL: the pointer is NULL, or the server does not run.
 * - -1, errno EIO: the library has a bug and panicked in a call for this server.
 *
 * @pre `server` is NULL or points to a structure.
 */
int ivshmem_server_get_fd(const struct IvshmemServer *server);

/**
 * Does the work that is due, as ivshmem_server_handle_fds() does, without a look at an fd_set.
 * It never waits, and sends some 4,096 messages at most.
 *
 * A level-triggered loop (select, poll, epoll without EPOLLET, glib) calls it once each time
 * the descriptor is readable, and needs to know only whether it failed. An edge-triggered loop
 * is not woken again for work that is left: it calls this function again until it returns 0,
 * and may serve its other descriptors in between.
 *
 * Threads: as for ivshmem_server_handle_fds().
 *
 * @param server the structure
 * @return
 * - 1: more work is due now.
 * - 0: no work is due. The descriptor becomes readable when there is some.
 * - -1, errno EINVAL: the pointer is NULL, or the server does not run.
 * - -1, errno EIO: the library has a bug and panicked, in this call or in one before for this
 *   server. Only ivshmem_server_close() works then.
 * - -1, another errno: the system does not report events any more.
 *
 * @pre `server` is NULL or points to a structure.
 */
int ivshmem_server_dispatch(struct IvshmemServer *server);

/**
 * Returns a sentence about the last call that failed in this thread: one that set errno.
 *
 * It names the thing that is wrong, its value, and what would be right. A call that succeeds
 * does not change it.
 *
 * Threads: each thread has its own.
 *
 * @return the text, in UTF-8 and without a newline; "" if no call failed in this thread. It is
 * valid until the next call that fails in this thread, or until the thread ends.
 */
const char *ivshmem_server_last_error(void);

/**
 * Sets the function that the library's log lines go to, for the whole process. Without one
 * they go nowhere.
 *
 * The function is called at the end of the call that caused the line, in that call's thread,
 * with no lock of a server held. It may call the functions of this header, except this one:
 * that does nothing then, and sets errno to EDEADLK. It must return: no longjmp, and no C++
 * exception.
 *
 * Threads: any thread, at any time. The function is called from every thread that calls this
 * library, and from several at once. After this call has returned, the function before is
 * neither running nor called again, so what its `opaque` points to may be freed.
 *
 * @param log       the function, or NULL for none. Its `level` is a severity as in syslog(3), from
 *                  3 (LOG_ERR) to 7 (LOG_DEBUG). Its `text` is UTF-8 without a newline, and
 *                  valid until it returns.
 * @param opaque    a pointer that is passed to the function
 * @param max_level the largest level that is wanted, such as 4 (LOG_WARNING)
 *
 * @pre `log` is NULL, or a function that may be called with `opaque` from any thread until it is
 * replaced.
 */
void ivshmem_server_set_log(void (*log)(int level, const char *text, void *opaque),
                            void *opaque,
                            int max_level);

/**
 * Returns the version of the library that the program runs with.
 *
 * IVSHMEM_SERVER_VERSION is that of the header which the program was compiled with.
 *
 * Threads: any thread, at any time.
 *
 * @return the version, such as "1.2.3". It stays valid for as long as the library is loaded.
 */
const char *ivshmem_server_version(void);

#ifdef __cplusplus
}  /* extern "C" */
#endif  /* __cplusplus */

#endif  /* IVSHMEM_SERVER_H */
