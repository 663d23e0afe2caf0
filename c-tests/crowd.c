/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A select loop serves 1,500 clients, most with a descriptor above 1023; then close, and start again. */
#include "check.h"

#define MOST 1500

int main(void)
{
    static int clients[MOST];
    const int count = amount(MOST, 40);
    struct rlimit limit;
    IvshmemServer server;
    int before;

    begin();
    /* three descriptors for each client: both ends of the connection, and a vector */
    CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur >= 3u * (unsigned)count + 200);
    before = open_descriptors();
    init(&server, 1);
    for (int round = 0; round < 2; round++) {
        int first = server.cur_id, reader;

        CHECK(ivshmem_server_start(&server) == 0);
        for (int i = 0; i < count; i++) {
            clients[i] = connect_to(socket_path);
            SERVE_UNTIL(&server, server.cur_id == first + i + 1);
        }
        CHECK(list_length(&server) == (unsigned)count);
        CHECK(count < MOST || clients[count - 1] > 2 * FD_SETSIZE);

        /* Most clients never read. The first, one in the middle and the last receive all messages. */
        for (int which = 0; which < 3; which++) {
            long got = 0;

            reader = clients[which * (count - 1) / 2];
            while (got < 3 + count) {
                long now = drain(reader);

                got += now;
                if (now == 0) {
                    CHECK(turn(&server, 20000) > 0);
                }
            }
            CHECK(got == 3 + count);
        }

        /* A client with a descriptor above 1023 leaves, and another one joins. */
        reader = clients[count - 1];
        close(clients[count - 2]);
        SERVE_UNTIL(&server, list_length(&server) == (unsigned)count - 1);
        CHECK(expect(reader, first + count - 2) == -1);
        clients[count - 2] = join(&server);
        expect_fd(reader, first + count);
        expect_nothing(reader);

        ivshmem_server_close(&server);
        CHECK(server.peer_list.tqh_first == NULL && !exists(socket_path));
        expect_end(reader);
        for (int i = 0; i < count; i++) {
            close(clients[i]);
        }
        CHECK(open_descriptors() == before);
    }
    return 0;
}
