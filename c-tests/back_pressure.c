/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Clients that read late lose nothing: a loop that selects only for reading is woken for them too. */
#include "check.h"

#define CLIENTS 20
#define VECTORS 64

int main(void)
{
    IvshmemServer server;
    int clients[CLIENTS];
    long got[CLIENTS] = { 0 }, all = 0;

    begin();
    start(&server, VECTORS);
    for (int i = 0; i < CLIENTS; i++) {
        clients[i] = join(&server);
    }
    /* More messages than a socket holds, and no client reads: the loop waits, and does not spin. */
    while (turn(&server, 0) > 0) {
    }
    for (int i = 0; i < CLIENTS; i++) {
        got[i] = drain(clients[i]);
        CHECK(got[i] < CLIENTS * VECTORS);
    }
    while (all < CLIENTS * (3 + CLIENTS * VECTORS)) {
        CHECK(turn(&server, 20000) > 0);
        all = 0;
        for (int i = 0; i < CLIENTS; i++) {
            got[i] += drain(clients[i]);
            all += got[i];
        }
    }
    for (int i = 0; i < CLIENTS; i++) {
        CHECK(got[i] == 3 + CLIENTS * VECTORS);
        expect_nothing(clients[i]);
    }
    while (turn(&server, 0) > 0) {
    }
    ivshmem_server_close(&server);
    for (int i = 0; i < CLIENTS; i++) {
        expect_end(clients[i]);
        close(clients[i]);
    }
    return 0;
}
