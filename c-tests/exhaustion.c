/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Without a free descriptor the new client is refused, the others go on, and the loop does not spin. */
#include "check.h"

static void connect_socket(int sock)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };

    strcpy(address.sun_path, socket_path);
    CHECK(connect(sock, (struct sockaddr *)&address, sizeof address) == 0);
}

int main(void)
{
    IvshmemServer server;
    struct rlimit limit, low;
    int client, other, third, turns = 0;

    begin();
    start(&server, 8);
    client = join(&server);
    drain(client);
    other = socket(AF_UNIX, SOCK_STREAM, 0);
    CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    low = limit;
    low.rlim_cur = (rlim_t)open_descriptors() + 3;
    CHECK(setrlimit(RLIMIT_NOFILE, &low) == 0);
    connect_socket(other);
    CHECK(turn(&server, 20000) > 0);
    while (turn(&server, 0) > 0) {
        CHECK(++turns < 100);
    }
    CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
    expect_refusal(other);
    expect_nothing(client);
    CHECK(list_length(&server) == 1 && server.cur_id == 1);
    close(other);
    other = join(&server);
    CHECK(list_length(&server) == 2);
    CHECK(drain(client) == 8);

    /* The server has not even the reserve with which it refuses clients: new connections wait. */
    third = socket(AF_UNIX, SOCK_STREAM, 0);
    low.rlim_cur = 3;
    CHECK(setrlimit(RLIMIT_NOFILE, &low) == 0);
    connect_socket(third);
    CHECK(turn(&server, 20000) > 0);
    turns = 0;
    for (int i = 0; i < 1000; i++) {
        turns += turn(&server, 0) > 0;
    }
    CHECK(turns < 500);
    CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
    SERVE_UNTIL(&server, list_length(&server) == 3);
    CHECK(drain(client) == 8);
    close(third);
    ivshmem_server_close(&server);
    close(client);
    close(other);
    return 0;
}
