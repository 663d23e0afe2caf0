/* SPDX-License-Identifier: GPL-2.0-or-later */
/* get_fd and dispatch serve without an fd_set; dispatch tells an edge-triggered loop when work is left. */
#include <sys/epoll.h>

#include "check.h"

#define CLIENTS 60
#define VECTORS 4

/* Reads all messages that are there for all clients, and returns their number. */
static long drain_all(const int *clients, int count)
{
    long got = 0;

    for (int i = 0; i < count; i++) {
        got += drain(clients[i]);
    }
    return got;
}

int main(void)
{
    const long all = CLIENTS * (3 + CLIENTS * VECTORS);
    struct epoll_event event = { .events = EPOLLIN | EPOLLET };
    IvshmemServer server;
    int clients[CLIENTS], loop, fd, more, calls = 0;
    long got = 0;

    begin();
    FAILS(ivshmem_server_get_fd(NULL), EINVAL);
    FAILS(ivshmem_server_dispatch(NULL), EINVAL);
    init(&server, VECTORS);
    FAILS(ivshmem_server_get_fd(&server), EINVAL);
    FAILS(ivshmem_server_dispatch(&server), EINVAL);
    CHECK(ivshmem_server_start(&server) == 0);
    fd = ivshmem_server_get_fd(&server);
    CHECK(fd > 2 && fcntl(fd, F_GETFD) == FD_CLOEXEC);
    CHECK(ivshmem_server_dispatch(&server) == 0);

    loop = epoll_create1(EPOLL_CLOEXEC);
    CHECK(loop >= 0 && epoll_ctl(loop, EPOLL_CTL_ADD, fd, &event) == 0);
    CHECK(epoll_wait(loop, &event, 1, 0) == 0);
    for (int i = 0; i < CLIENTS; i++) {
        clients[i] = connect_to(socket_path);
    }
    /* Work is left until it returns 0. After that, new work makes the descriptor readable. */
    while (got < all) {
        CHECK(epoll_wait(loop, &event, 1, 20000) == 1);
        do {
            more = ivshmem_server_dispatch(&server);
            CHECK(more == 0 || more == 1);
            calls++;
            got += drain_all(clients, CLIENTS);
        } while (more == 1);
    }
    CHECK(got == all && calls >= (int)(all / 5000));
    CHECK(list_length(&server) == CLIENTS && ivshmem_server_get_fd(&server) == fd);
    while (ivshmem_server_dispatch(&server) == 1) {
    }
    CHECK(epoll_wait(loop, &event, 1, 0) >= 0 && ivshmem_server_dispatch(&server) == 0);

    close(clients[0]);
    CHECK(epoll_wait(loop, &event, 1, 20000) == 1);
    while (ivshmem_server_dispatch(&server) == 1) {
    }
    CHECK(list_length(&server) == CLIENTS - 1);
    CHECK(drain_all(clients + 1, CLIENTS - 1) == CLIENTS - 1);

    ivshmem_server_close(&server);
    FAILS(ivshmem_server_get_fd(&server), EINVAL);
    FAILS(ivshmem_server_dispatch(&server), EINVAL);
    for (int i = 1; i < CLIENTS; i++) {
        close(clients[i]);
    }
    close(loop);
    return 0;
}
