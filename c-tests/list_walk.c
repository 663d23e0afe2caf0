/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The list of peers is QEMU's tail queue: in join order, forward and backward, at all times. */
#include "check.h"

#define COUNT 12

/* Our own form of QEMU's QTAILQ_LAST and QTAILQ_PREV. */
#define BEFORE(link) ((IvshmemServerPeer *)(link).tql_prev->tql_prev->tql_next)

static void check_list(IvshmemServer *server, const int64_t *ids, int count)
{
    IvshmemServerPeer *peer = server->peer_list.tqh_first;
    int i;

    for (i = 0; i < count; i++, peer = peer->next.tqe_next) {
        CHECK(peer != NULL && peer->id == ids[i]);
        CHECK(ivshmem_server_search_peer(server, ids[i]) == peer);
        CHECK(peer->vectors_count == 1 && peer->vectors[0].initialized);
        CHECK(fcntl(peer->sock_fd, F_GETFD) == FD_CLOEXEC);
        CHECK(fcntl(peer->vectors[0].rfd, F_GETFL) & O_NONBLOCK);
    }
    CHECK(peer == NULL);

    peer = count ? BEFORE(server->peer_list.tqh_circ) : NULL;
    for (i = count - 1; i >= 0; i--) {
        CHECK(peer != NULL && peer->id == ids[i]);
        peer = BEFORE(peer->next.tqe_circ);
    }
    CHECK(peer == NULL);
    CHECK(count || server->peer_list.tqh_circ.tql_prev == &server->peer_list.tqh_circ);
    CHECK(!count || server->peer_list.tqh_first->next.tqe_circ.tql_prev == &server->peer_list.tqh_circ);
}

int main(void)
{
    /* Clients leave: the first, the last, one in the middle, two neighbours, and then all. */
    static const int order[COUNT] = { 0, 11, 5, 6, 4, 1, 10, 3, 8, 7, 2, 9 };
    IvshmemServer server;
    int socks[COUNT], count = 0;
    int64_t ids[COUNT];

    begin();
    start(&server, 1);
    check_list(&server, ids, 0);
    while (count < COUNT) {
        socks[count] = join(&server);
        ids[count] = count;
        count++;
        check_list(&server, ids, count);
    }
    for (int i = 0; i < COUNT; i++) {
        int at = 0;

        close(socks[order[i]]);
        SERVE_UNTIL(&server, list_length(&server) == (unsigned)count - 1);
        while (ids[at] != order[i]) {
            at++;
        }
        memmove(ids + at, ids + at + 1, (size_t)(--count - at) * sizeof *ids);
        check_list(&server, ids, count);
        CHECK(ivshmem_server_search_peer(&server, order[i]) == NULL && errno == ENOENT);
    }
    CHECK(ivshmem_server_search_peer(&server, -1) == NULL);
    CHECK(ivshmem_server_search_peer(&server, 65536) == NULL);

    /* Several clients join in one call; then some leave in the same call in which others join. */
    for (int i = 0; i < 3; i++) {
        socks[i] = connect_to(socket_path);
        ids[i] = COUNT + i;
    }
    SERVE_UNTIL(&server, list_length(&server) == 3);
    check_list(&server, ids, 3);
    close(socks[0]);
    close(socks[2]);
    socks[0] = connect_to(socket_path);
    SERVE_UNTIL(&server, list_length(&server) == 2 && server.cur_id == COUNT + 4);
    ids[0] = COUNT + 1;
    ids[1] = COUNT + 3;
    check_list(&server, ids, 2);
    ivshmem_server_close(&server);
    check_list(&server, ids, 0);
    close(socks[0]);
    close(socks[1]);
    return 0;
}
