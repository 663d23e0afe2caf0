/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A poll(2) loop that makes its own list of descriptors from the public fields. */
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

int main(void)
{
    IvshmemServer server;
    int clients[8];

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
    return 0;
}
