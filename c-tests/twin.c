/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Prints the effects of a fixed series of calls: results, descriptors, the list, and every message.
 *
 * The same object is linked with this library and, if available, with QEMU's own; both must print
 * the same. So the series has only calls that the reference survives. Values that differ between
 * two correct runs (descriptor numbers, addresses) are printed as a relation.
 */
#include "check.h"

static IvshmemServer server;
static int failures;

static int walk_turn(void)
{
    fd_set fds;
    int maxfd = 0, ready;
    struct timeval soon = { 0, 200000 };

    FD_ZERO(&fds);
    ivshmem_server_get_fds(&server, &fds, &maxfd);
    ready = select(maxfd, &fds, NULL, NULL, &soon);
    if (ready > 0) {
        failures += ivshmem_server_handle_fds(&server, &fds, maxfd) != 0;
    }
    return ready;
}

/* Calls handle_fds until no work is left. The number of calls may differ between the two. */
static void serve(void)
{
    while (walk_turn() > 0) {
    }
    printf("served, %d failures\n", failures);
}

static const char *kind(int fd)
{
    static char link[64], target[64];
    ssize_t length;

    if (fd < 0) {
        return "none";
    }
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    length = readlink(link, target, sizeof target - 1);
    if (length < 0) {
        return "closed";
    }
    target[length] = 0;
    return strstr(target, "socket:")    ? "socket"
           : strstr(target, "eventfd")  ? "eventfd"
           : strstr(target, "/dev/shm") ? "shared memory"
                                        : "file";
}

static void show(const char *when)
{
    fd_set fds;
    int maxfd = 0, in_set = 1, low = 1;
    IvshmemServerPeer *peer, *last = NULL;

    FD_ZERO(&fds);
    printf("== %s: socket %s, memory %s, next id %u, %u vectors, size %zu\n", when,
           kind(server.sock_fd), kind(server.shm_fd), server.cur_id, server.n_vectors,
           server.shm_size);
    if (server.sock_fd >= 0) {
        ivshmem_server_get_fds(&server, &fds, &maxfd);
        in_set = FD_ISSET(server.sock_fd, &fds) && server.sock_fd < maxfd;
    }
    for (peer = server.peer_list.tqh_first; peer; last = peer, peer = peer->next.tqe_next) {
        in_set = in_set && FD_ISSET(peer->sock_fd, &fds) && peer->sock_fd < maxfd;
        low = low && peer->sock_fd > server.sock_fd;
        printf("peer %d: %s, found %d, %u vectors:", (int)peer->id, kind(peer->sock_fd),
               ivshmem_server_search_peer(&server, peer->id) == peer, peer->vectors_count);
        for (unsigned i = 0; i < peer->vectors_count; i++) {
            EventNotifier *vector = &peer->vectors[i];

            printf(" %s%s%s", kind(vector->rfd), vector->rfd == vector->wfd ? "" : " (two)",
                   vector->initialized ? "" : " (not initialized)");
        }
        printf("; next unused %d; linked %d\n", peer->vectors[peer->vectors_count].initialized,
               peer->next.tqe_circ.tql_prev
                   == (last ? &last->next.tqe_circ : &server.peer_list.tqh_circ));
    }
    printf("in the set %d, in order %d, tail %d, unknown ids %d %d\n", in_set, low,
           server.peer_list.tqh_circ.tql_prev
               == (last ? &last->next.tqe_circ : &server.peer_list.tqh_circ),
           ivshmem_server_search_peer(&server, 77) == NULL,
           ivshmem_server_search_peer(&server, -1) == NULL);
}

/* Prints all messages that a client has not read. */
static void listen_as(const char *name, int sock)
{
    int64_t value;
    int fd;
    enum received got;

    printf("%s receives", name);
    while ((got = receive(sock, &value, &fd)) == MESSAGE) {
        printf(" %d", (int)value);
        if (fd >= 0) {
            int flags = fcntl(fd, F_GETFL);

            printf("[%s%s]", kind(fd), flags & O_NONBLOCK ? "" : ", blocking");
            close(fd);
        }
    }
    printf("%s\n", got == END ? ", end" : "");
}

int main(void)
{
    int a, b, c, before;
    fd_set none;

    begin();
    before = open_descriptors();
    FD_ZERO(&none);
    printf("init %d\n",
           ivshmem_server_init(&server, socket_path, shm_name, true, 3 << 20, 2, false));
    printf("start %d\n", ivshmem_server_start(&server));
    show("started");
    printf("memory has %ld bytes\n", (long)lseek(server.shm_fd, 0, SEEK_END));
    printf("handle_fds of nothing %d\n", ivshmem_server_handle_fds(&server, &none, 0));

    a = connect_to(socket_path);
    serve();
    listen_as("a", a);
    show("a is here");
    b = connect_to(socket_path);
    serve();
    listen_as("a", a);
    listen_as("b", b);
    show("b is here");
    c = connect_to(socket_path);
    serve();
    listen_as("a", a);
    listen_as("b", b);
    listen_as("c", c);
    show("c is here");
    close(b);
    serve();
    listen_as("a", a);
    listen_as("c", c);
    show("b has gone");
    CHECK(write(a, "x", 1) == 1);
    serve();
    listen_as("a", a);
    listen_as("c", c);
    show("a said something");
    close(a);
    a = connect_to(socket_path);
    serve();
    listen_as("a", a);
    listen_as("c", c);
    show("a is back");

    ivshmem_server_close(&server);
    listen_as("a", a);
    listen_as("c", c);
    printf("closed: socket %d, memory %d, path %d, name %d\n", server.sock_fd, server.shm_fd,
           exists(socket_path), shm_exists());
    close(a);
    close(c);
    printf("descriptors left %d\n", open_descriptors() - before);

    server.use_shm_open = false;
    strcpy(server.shm_path, "/tmp");
    server.n_vectors = 1;
    printf("start again %d\n", ivshmem_server_start(&server));
    show("started again");
    a = connect_to(socket_path);
    serve();
    listen_as("a", a);
    show("a new one");
    close(a);
    ivshmem_server_close(&server);
    printf("descriptors left %d\n", open_descriptors() - before);

    strcpy(server.shm_path, "/nonexistent");
    printf("no directory: start %d\n", ivshmem_server_start(&server));
    printf("descriptors left %d\n", open_descriptors() - before);
    return 0;
}
