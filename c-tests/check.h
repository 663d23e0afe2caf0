/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Shared by the C tests: checks, a server in a temporary directory, and a client that only receives. */
#ifndef CHECK_H
#define CHECK_H

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "ivshmem-server.h"

#define CHECK(condition)                                                                     \
    do {                                                                                     \
        if (!(condition)) {                                                                  \
            int check_errno = errno;                                                         \
            fprintf(stderr, "%s:%d: not so: %s (errno %d: %s)\n", __FILE__, __LINE__,        \
                    #condition, check_errno, strerror(check_errno));                         \
            _exit(1);                                                                        \
        }                                                                                    \
    } while (0)

/* The call returns a negative value and sets this errno. */
#define FAILS(call, error)                                                                   \
    do {                                                                                     \
        errno = 0;                                                                           \
        CHECK((call) < 0);                                                                   \
        CHECK(errno == (error));                                                             \
    } while (0)

/* Serves until the condition holds. */
#define SERVE_UNTIL(server, condition)                                                       \
    do {                                                                                     \
        while (!(condition)) {                                                               \
            CHECK(turn((server), 20000) > 0);                                                \
        }                                                                                    \
    } while (0)

#define SIZE ((size_t)1 << 20)

static char directory[64];
static char socket_path[96];
static char shm_name[64];

static inline void clean_up(void)
{
    rmdir(directory);
}

/* The first call in main: makes a temporary directory and the names in it, and limits the run time. */
static inline void begin(void)
{
    struct rlimit limit;

    alarm(100);
    /* The usual limit of 1,024 is too low for some tests. */
    CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    limit.rlim_cur = limit.rlim_max;
    CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
    strcpy(directory, "/tmp/ivshmem-c-XXXXXX");
    CHECK(mkdtemp(directory) != NULL);
    atexit(clean_up);
    snprintf(socket_path, sizeof socket_path, "%s/socket", directory);
    snprintf(shm_name, sizeof shm_name, "/%s", strrchr(directory, '/') + 1);
}

static inline void init(IvshmemServer *server, unsigned n_vectors)
{
    memset(server, 0xa5, sizeof *server);
    CHECK(ivshmem_server_init(server, socket_path, shm_name, true, SIZE, n_vectors, false) == 0);
}

static inline void start(IvshmemServer *server, unsigned n_vectors)
{
    init(server, n_vectors);
    CHECK(ivshmem_server_start(server) == 0);
}

/* One round of the loop in QEMU's program. Returns the result of select. */
static inline int turn(IvshmemServer *server, int milliseconds)
{
    fd_set fds;
    int maxfd = 0, ready;
    struct timeval timeout = { milliseconds / 1000, milliseconds % 1000 * 1000 };

    FD_ZERO(&fds);
    ivshmem_server_get_fds(server, &fds, &maxfd);
    ready = select(maxfd, &fds, NULL, NULL, &timeout);
    CHECK(ready >= 0 || errno == EINTR);
    if (ready > 0) {
        CHECK(ivshmem_server_handle_fds(server, &fds, maxfd) == 0);
    }
    return ready;
}

static inline int connect_to(const char *path)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    int sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    CHECK(sock >= 0);
    CHECK(strlen(path) < sizeof address.sun_path);
    strcpy(address.sun_path, path);
    CHECK(connect(sock, (struct sockaddr *)&address, sizeof address) == 0);
    return sock;
}

enum received { NOTHING, MESSAGE, END };

/* Takes a message if there is one. *fd is its descriptor, or -1. */
static inline enum received receive(int sock, int64_t *value, int *fd)
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int) * 4)];
    } control;
    unsigned char bytes[8];
    struct iovec part = { bytes, sizeof bytes };
    struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
                              .msg_controllen = sizeof control };
    ssize_t got = recvmsg(sock, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    struct cmsghdr *header;

    *fd = -1;
    if (got < 0) {
        if (errno == ECONNRESET) {
            return END;
        }
        CHECK(errno == EAGAIN);
        return NOTHING;
    }
    if (got == 0) {
        return END;
    }
    CHECK(got == 8 && !(message.msg_flags & MSG_CTRUNC));
    *value = 0;
    for (int i = 7; i >= 0; i--) {
        *value = (int64_t)((uint64_t)*value << 8 | bytes[i]);
    }
    header = CMSG_FIRSTHDR(&message);
    if (header != NULL) {
        CHECK(header->cmsg_type == SCM_RIGHTS && header->cmsg_len == CMSG_LEN(sizeof(int)));
        memcpy(fd, CMSG_DATA(header), sizeof *fd);
        CHECK(*fd >= 0);
    }
    return MESSAGE;
}

/* Reads the next message, which must be there already and have this value. Returns its descriptor, or -1. */
static inline int expect(int sock, int64_t value)
{
    int64_t got;
    int fd;

    CHECK(receive(sock, &got, &fd) == MESSAGE);
    CHECK(got == value);
    return fd;
}

/* The same for a message with a descriptor, which it closes. */
static inline void expect_fd(int sock, int64_t value)
{
    int fd = expect(sock, value);

    CHECK(fd >= 0 && close(fd) == 0);
}

static inline void expect_nothing(int sock)
{
    int64_t value;
    int fd;

    CHECK(receive(sock, &value, &fd) == NOTHING);
}

static inline void expect_end(int sock)
{
    int64_t value;
    int fd;

    CHECK(receive(sock, &value, &fd) == END);
}

/* Checks that a client is refused: it receives an unknown version, and the end of the stream. */
static inline void expect_refusal(int sock)
{
    CHECK(expect(sock, 1) == -1);
    expect_end(sock);
}

/* Checks the messages that every client receives first. */
static inline void expect_greeting(int sock, int64_t id)
{
    CHECK(expect(sock, IVSHMEM_PROTOCOL_VERSION) == -1);
    CHECK(expect(sock, id) == -1);
    expect_fd(sock, -1);
}

/* Connects a client and serves until it has joined. Returns its socket. */
static inline int join(IvshmemServer *server)
{
    int sock = connect_to(server->unix_sock_path);
    unsigned next = server->cur_id;

    SERVE_UNTIL(server, server->cur_id != next);
    return sock;
}

/* Receives all messages that are there. Returns their number. */
static inline long drain(int sock)
{
    int64_t value;
    int fd;
    long count = 0;

    while (receive(sock, &value, &fd) == MESSAGE) {
        count++;
        if (fd >= 0) {
            close(fd);
        }
    }
    return count;
}

static inline int open_descriptors(void)
{
    DIR *dir = opendir("/proc/self/fd");
    int count = -1; /* without the directory's own descriptor */

    CHECK(dir != NULL);
    for (struct dirent *entry; (entry = readdir(dir)) != NULL;) {
        count += entry->d_name[0] != '.';
    }
    closedir(dir);
    return count;
}

static inline int exists(const char *path)
{
    struct stat status;

    return lstat(path, &status) == 0;
}

static inline int shm_exists(void)
{
    int fd = shm_open(shm_name, O_RDONLY, 0);

    return fd >= 0 && close(fd) == 0;
}

static inline unsigned list_length(const IvshmemServer *server)
{
    unsigned length = 0;

    for (IvshmemServerPeer *peer = server->peer_list.tqh_first; peer; peer = peer->next.tqe_next) {
        length++;
    }
    return length;
}

/* The number of repetitions of a slow step: `small` in the modes that run slowly, such as valgrind. */
static inline int amount(int usual, int small)
{
    return getenv("C_TESTS_SMALL") ? small : usual;
}

#endif
