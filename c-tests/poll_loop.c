/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * poll(2) loops: one takes its descriptors from the public fields, the other from
 * ivshmem_server_get_fds(). Only the second is woken for clients that read late.
 */
#include <poll.h>

#include "check.h"

#define MOST 16

static void poll_turn(IvshmemServer *server)
{
    struct pollfd list[MOST];
    nfds_t count = 0;
    fd_set ready;
    int maxfd = 0;

    list[count++] = (struct pollfd) { .fd = server->sock_fd, .events = POLLIN };
    for (IvshmemServerPeer *peer = server->peer_list.tqh_first; peer; peer = peer->next.tqe_next) {
        CHECK(count < MOST);
        list[count++] = (struct pollfd) { .fd = peer->sock_fd, .events = POLLIN };
    }
    CHECK(poll(list, count, 20000) > 0);
    FD_ZERO(&ready);
    for (nfds_t i = 0; i < count; i++) {
        if (list[i].revents) {
            FD_SET(list[i].fd, &ready);
            maxfd = list[i].fd >= maxfd ? list[i].fd + 1 : maxfd;
        }
    }
    CHECK(ivshmem_server_handle_fds(server, &ready, maxfd) == 0);
}

static int poll_all(IvshmemServer *server)
{
    struct pollfd list[MOST];
    nfds_t count = 0;
    fd_set fds;
    int maxfd = 0, ready;

    FD_ZERO(&fds);
    ivshmem_server_get_fds(server, &fds, &maxfd);
    for (int fd = 0; fd < maxfd; fd++) {
        if (FD_ISSET(fd, &fds)) {
            CHECK(count < MOST);
            list[count++] = (struct pollfd) { .fd = fd, .events = POLLIN };
        }
    }
    ready = poll(list, count, 0);
    if (ready > 0) {
        CHECK(ivshmem_server_handle_fds(server, &fds, maxfd) == 0);
    }
    return ready;
}

int main(void)
{
    IvshmemServer server;
    int clients[8];
    long got = 0;

    begin();
    start(&server, 4);
    for (int i = 0; i < 8; i++) {
        clients[i] = connect_to(socket_path);
        while (list_length(&server) != (unsigned)i + 1) {
            poll_turn(&server);
        }
        expect_greeting(clients[i], i);
        CHECK(drain(clients[i]) == 4 * (i + 1));
    }
    for (int i = 0; i < 7; i++) {
        close(clients[i]);
        while (list_length(&server) != 7 - (unsigned)i) {
            poll_turn(&server);
        }
    }
    for (int i = 0; i < 7; i++) {
        CHECK(expect(clients[7], i) == -1);
    }
    expect_nothing(clients[7]);
    ivshmem_server_close(&server);
    close(clients[7]);

    /* 8 clients of 64 vectors: more messages than a socket holds, and no client reads before all have joined */
    server.n_vectors = 64;
    server.cur_id = 0;
    CHECK(ivshmem_server_start(&server) == 0);
    for (int i = 0; i < 8; i++) {
        clients[i] = connect_to(socket_path);
        while (list_length(&server) != (unsigned)i + 1) {
            CHECK(poll_all(&server) > 0);
        }
    }
    while (poll_all(&server) > 0) {
    }
    while (got < 3 + 8 * 64) {
        got += drain(clients[7]);
        CHECK(got == 3 + 8 * 64 || poll_all(&server) > 0);
    }
    CHECK(got == 3 + 8 * 64);
    ivshmem_server_close(&server);
    for (int i = 0; i < 8; i++) {
        close(clients[i]);
    }
    return 0;
}
