/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Out of descriptors: the newcomer is turned away, everybody else goes on, and the loop does not spin. */
#include "check.h"

int main(void)
{
    IvshmemServer server;
    struct rlimit limit, low;
    int client, other, turns = 0;

    begin();
    start(&server, 8);
    client = join(&server);
    drain(client);
    other = socket(AF_UNIX, SOCK_STREAM, 0);
    CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    low = limit;
    low.rlim_cur = (rlim_t)open_descriptors() + 3;
    CHECK(setrlimit(RLIMIT_NOFILE, &low) == 0);
    {
        struct sockaddr_un address = { .sun_family = AF_UNIX };

        strcpy(address.sun_path, socket_path);
        CHECK(connect(other, (struct sockaddr *)&address, sizeof address) == 0);
    }
    CHECK(turn(&server, 20000) > 0);
    while (turn(&server, 0) > 0) {
        CHECK(++turns < 100);
    }
    CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
    expect_end(other);
    expect_nothing(client);
    CHECK(list_length(&server) == 1 && server.cur_id == 1);
    close(other);
    other = join(&server);
    CHECK(list_length(&server) == 2);
    CHECK(drain(client) == 8);
    ivshmem_server_close(&server);
    close(client);
    close(other);
    return 0;
}
