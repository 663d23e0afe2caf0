/* SPDX-License-Identifier: GPL-2.0-or-later */
/* init on the structure of a running server is refused. On memory that was reused it works. */
#include "check.h"

int main(void)
{
    IvshmemServer server, copy;
    fd_set fds;
    int before, client;

    begin();
    before = open_descriptors();
    start(&server, 1);
    client = join(&server);
    drain(client);
    FAILS(ivshmem_server_init(&server, "/tmp/other", "/other", true, 1, 2, true), EBUSY);
    FAILS(ivshmem_server_init(&server, NULL, NULL, true, 1, 0, true), EBUSY);
    CHECK(!strcmp(server.unix_sock_path, socket_path) && server.n_vectors == 1 && !server.verbose);
    CHECK(list_length(&server) == 1 && exists(socket_path) && shm_exists());
    expect_nothing(client);
    CHECK(close(join(&server)) == 0);

    /* A copy of the structure is another server, which does not run. */
    copy = server;
    FD_ZERO(&fds);
    FD_SET(server.sock_fd, &fds);
    FAILS(ivshmem_server_handle_fds(&copy, &fds, FD_SETSIZE), EINVAL);
    FAILS(ivshmem_server_start(&copy), EBUSY);
    ivshmem_server_close(&copy);
    CHECK(exists(socket_path) && shm_exists());

    /* The structure's memory was reused without a close: init closes the old server. */
    memset(&server, 0, sizeof server);
    CHECK(ivshmem_server_init(&server, socket_path, shm_name, true, SIZE, 3, false) == 0);
    drain(client);
    expect_end(client);
    CHECK(!exists(socket_path) && !shm_exists());
    CHECK(close(client) == 0);
    CHECK(open_descriptors() == before);
    CHECK(ivshmem_server_start(&server) == 0);
    client = join(&server);
    expect_greeting(client, 0);
    ivshmem_server_close(&server);

    /* After close, init works again. */
    CHECK(ivshmem_server_init(&server, socket_path, shm_name, true, SIZE, 3, false) == 0);
    CHECK(close(client) == 0);
    CHECK(open_descriptors() == before);
    return 0;
}
