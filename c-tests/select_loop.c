/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The loop of QEMU's program, and every message to three clients that join and leave. */
#include "check.h"

#define VECTORS 2

static void expect_vectors(int sock, int64_t id)
{
    for (int i = 0; i < VECTORS; i++) {
        expect_fd(sock, id);
    }
}

int main(void)
{
    IvshmemServer server;
    int a, b, c, own[VECTORS], theirs[VECTORS];
    uint64_t rung;
    IvshmemServerPeer *peer;

    begin();
    start(&server, VECTORS);
    a = join(&server);
    expect_greeting(a, 0);
    for (int i = 0; i < VECTORS; i++) {
        own[i] = expect(a, 0);
        CHECK(own[i] >= 0);
    }
    expect_nothing(a);

    b = join(&server);
    expect_vectors(a, 1);
    expect_nothing(a);
    expect_greeting(b, 1);
    for (int i = 0; i < VECTORS; i++) {
        theirs[i] = expect(b, 0);
    }
    expect_vectors(b, 1);
    expect_nothing(b);

    /* For each vector: the receiver's eventfd is the one that the sender rings, and the one in the server's list. */
    peer = ivshmem_server_search_peer(&server, 0);
    CHECK(peer != NULL && peer->id == 0 && peer->vectors_count == VECTORS);
    for (int i = 0; i < VECTORS; i++) {
        uint64_t one = 1;

        CHECK(write(theirs[i], &one, 8) == 8);
        CHECK(read(own[i], &rung, 8) == 8 && rung == 1);
        CHECK(read(own[i], &rung, 8) == -1 && errno == EAGAIN);
        CHECK(peer->vectors[i].initialized && peer->vectors[i].rfd == peer->vectors[i].wfd);
        CHECK(write(peer->vectors[i].wfd, &one, 8) == 8);
        CHECK(read(own[i], &rung, 8) == 8 && rung == 1);
        close(own[i]);
        close(theirs[i]);
    }
    CHECK(!peer->vectors[VECTORS].initialized && peer->vectors[VECTORS].wfd == -1);

    /* A client that sends data is removed, and the others receive its departure once. */
    CHECK(write(b, "?", 1) == 1);
    SERVE_UNTIL(&server, list_length(&server) == 1);
    CHECK(ivshmem_server_search_peer(&server, 1) == NULL);
    CHECK(expect(a, 1) == -1);
    expect_nothing(a);
    expect_end(b);
    close(b);

    c = join(&server);
    expect_vectors(a, 2);
    expect_greeting(c, 2);
    expect_vectors(c, 0);
    expect_vectors(c, 2);
    close(a);
    SERVE_UNTIL(&server, list_length(&server) == 1);
    CHECK(expect(c, 0) == -1);
    expect_nothing(c);

    /* A client that leaves before it is admitted has no effect on the others. */
    close(connect_to(socket_path));
    CHECK(turn(&server, 20000) > 0);
    SERVE_UNTIL(&server, list_length(&server) == 1);

    CHECK(turn(&server, 0) == 0);
    CHECK(lseek(server.shm_fd, 0, SEEK_END) == (off_t)SIZE);
    ivshmem_server_close(&server);
    drain(c);
    expect_end(c);
    close(c);
    return 0;
}
