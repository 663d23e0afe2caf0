/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A caller that overwrites the structure and the nodes spoils only its own view: the server goes on. */
#include "check.h"

int main(void)
{
    IvshmemServer server;
    int clients[4], before;

    begin();
    before = open_descriptors();
    start(&server, 2);
    for (int i = 0; i < 3; i++) {
        clients[i] = join(&server);
        drain(clients[i]);
    }
    for (int fill = 0; fill < 3; fill++) {
        static const int fills[3] = { 0xff, 0x00, 0x5a };
        fd_set fds;
        int maxfd = 0;

        for (int64_t id = 0; id < 70000; id++) {
            IvshmemServerPeer *peer = ivshmem_server_search_peer(&server, id);

            if (peer != NULL) {
                memset(peer, fills[fill], sizeof *peer);
            }
        }
        memset(&server, fills[fill], sizeof server);
        server.verbose = false;

        /* Peers are still found and served: one joins, one leaves. */
        clients[3] = connect_to(socket_path);
        FD_ZERO(&fds);
        ivshmem_server_get_fds(&server, &fds, &maxfd);
        CHECK(select(maxfd, &fds, NULL, NULL, NULL) > 0);
        CHECK(ivshmem_server_handle_fds(&server, &fds, maxfd) == 0);
        CHECK(server.cur_id == fill + 4);
        expect_greeting(clients[3], fill + 3);
        drain(clients[3]);
        drain(clients[0]);
        close(clients[1]);
        SERVE_UNTIL(&server, ivshmem_server_search_peer(&server, fill ? fill + 2 : 1) == NULL);
        CHECK(expect(clients[0], fill ? fill + 2 : 1) == -1);
        clients[1] = clients[3];
        FAILS(ivshmem_server_start(&server), EBUSY);
    }
    memset(&server, 0xff, sizeof server);
    server.verbose = false;
    ivshmem_server_close(&server);
    CHECK(server.sock_fd == -1 && server.peer_list.tqh_first == NULL);
    CHECK(!exists(socket_path) && !shm_exists());
    for (int i = 0; i < 3; i++) {
        close(clients[i]);
    }
    CHECK(open_descriptors() == before);
    return 0;
}
