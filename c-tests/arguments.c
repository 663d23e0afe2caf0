/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Invalid arguments are refused with an errno that tells why, and no file is left behind. */
#include "check.h"

static char long_path[5000];

int main(void)
{
    IvshmemServer server;
    fd_set fds;
    int maxfd = 0, before;

    begin();
    before = open_descriptors();
    FD_ZERO(&fds);

    /* NULL for each pointer */
    FAILS(ivshmem_server_init(NULL, "s", "m", true, SIZE, 1, false), EINVAL);
    FAILS(ivshmem_server_init(&server, NULL, "m", true, SIZE, 1, false), EINVAL);
    FAILS(ivshmem_server_init(&server, "s", NULL, true, SIZE, 1, false), EINVAL);
    FAILS(ivshmem_server_start(NULL), EINVAL);
    FAILS(ivshmem_server_handle_fds(NULL, &fds, 0), EINVAL);
    errno = 0;
    CHECK(ivshmem_server_search_peer(NULL, 0) == NULL && errno == EINVAL);
    ivshmem_server_close(NULL);
    ivshmem_server_dump(NULL);
    ivshmem_server_get_fds(NULL, &fds, &maxfd);
    ivshmem_server_get_fds(&server, NULL, &maxfd);
    ivshmem_server_get_fds(&server, &fds, NULL);
    CHECK(maxfd == 0);

    /* vectors; after a failed init, start fails too */
    FAILS(ivshmem_server_init(&server, socket_path, shm_name, true, SIZE, 0, false), EINVAL);
    FAILS(ivshmem_server_start(&server), EINVAL);
    FAILS(ivshmem_server_init(&server, socket_path, shm_name, true, SIZE, 65, false), EINVAL);
    FAILS(ivshmem_server_start(&server), EINVAL);
    init(&server, 64);
    server.n_vectors = 65;
    FAILS(ivshmem_server_start(&server), EINVAL);
    server.n_vectors = 0xffffffff;
    FAILS(ivshmem_server_start(&server), EINVAL);

    /* paths */
    memset(long_path, 'x', sizeof long_path - 1);
    FAILS(ivshmem_server_init(&server, long_path, shm_name, true, SIZE, 1, false), ENAMETOOLONG);
    FAILS(ivshmem_server_start(&server), EINVAL);
    FAILS(ivshmem_server_init(&server, socket_path, long_path, true, SIZE, 1, false), ENAMETOOLONG);
    long_path[4096] = 0;
    FAILS(ivshmem_server_init(&server, long_path, shm_name, true, SIZE, 1, false), ENAMETOOLONG);
    long_path[4095] = 0;
    CHECK(ivshmem_server_init(&server, long_path, shm_name, true, SIZE, 1, false) == 0);
    FAILS(ivshmem_server_start(&server), ENAMETOOLONG);
    init(&server, 1);
    memset(server.unix_sock_path, 'x', sizeof server.unix_sock_path);
    FAILS(ivshmem_server_start(&server), ENAMETOOLONG);
    init(&server, 1);
    memset(server.shm_path, 'x', sizeof server.shm_path);
    FAILS(ivshmem_server_start(&server), ENAMETOOLONG);
    init(&server, 1);
    strcpy(server.unix_sock_path, "");
    FAILS(ivshmem_server_start(&server), ENAMETOOLONG);
    init(&server, 1);
    strcpy(server.unix_sock_path, "/nonexistent/socket");
    FAILS(ivshmem_server_start(&server), ENOENT);
    init(&server, 1);
    strcpy(server.shm_path, "a/b");
    FAILS(ivshmem_server_start(&server), EINVAL);
    init(&server, 1);
    strcpy(server.shm_path, "/nonexistent");
    server.use_shm_open = false;
    FAILS(ivshmem_server_start(&server), ENOENT);

    /* size */
    init(&server, 1);
    server.shm_size = 0;
    FAILS(ivshmem_server_start(&server), EINVAL);
    server.shm_size = SIZE_MAX;
    FAILS(ivshmem_server_start(&server), EINVAL);

    CHECK(server.sock_fd == -1 && server.shm_fd == -1);
    CHECK(open_descriptors() == before);
    CHECK(!exists(socket_path) && !shm_exists());
    return 0;
}
