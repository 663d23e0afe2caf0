/* SPDX-License-Identifier: GPL-2.0-or-later */
/* 256 clients join at once: no call sends more than the budget, and the select loop goes on until all is sent. */
#include "check.h"

#define MOST 256
#define RESIDENTS 40
#define VECTORS 2
/* about 4,096 messages, and the excess of one batch */
#define BUDGET 5000

static int clients[RESIDENTS + MOST];

int main(void)
{
    const int joining = amount(MOST, 50), count = RESIDENTS + joining;
    /* Each new client is sent its greeting and the vectors of all clients. The others are sent the vectors of the new ones. */
    const long all = joining * (3L + (long)count * VECTORS) + (long)RESIDENTS * joining * VECTORS;
    IvshmemServer server;
    long got = 0;
    int calls = 0;

    begin();
    start(&server, VECTORS);
    for (int i = 0; i < RESIDENTS; i++) {
        clients[i] = join(&server);
        for (int k = 0; k <= i; k++) {
            drain(clients[k]);
        }
    }
    while (turn(&server, 0) > 0) {
        for (int i = 0; i < RESIDENTS; i++) {
            drain(clients[i]);
        }
    }
    for (int i = 0; i < RESIDENTS; i++) {
        drain(clients[i]);
    }
    for (int i = RESIDENTS; i < count; i++) {
        clients[i] = connect_to(socket_path);
    }
    while (got < all) {
        long now = 0;

        CHECK(turn(&server, 20000) > 0);
        calls++;
        for (int i = 0; i < count; i++) {
            now += drain(clients[i]);
        }
        CHECK(now <= BUDGET);
        got += now;
    }
    CHECK(got == all && calls >= (int)(all / BUDGET));
    CHECK(list_length(&server) == (unsigned)count);
    while (turn(&server, 0) > 0) {
    }
    ivshmem_server_close(&server);
    for (int i = 0; i < count; i++) {
        expect_end(clients[i]);
        close(clients[i]);
    }
    return 0;
}
