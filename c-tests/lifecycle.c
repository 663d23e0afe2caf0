/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Start, close and start again, any number of times; a call in the wrong order does no harm. */
#include "check.h"

int main(void)
{
    IvshmemServer server;
    fd_set fds;
    int before, maxfd = 0, sock, first, second;

    begin();
    before = open_descriptors();
    FD_ZERO(&fds);
    FD_SET(0, &fds);

    /* before start */
    init(&server, 2);
    ivshmem_server_close(&server);
    ivshmem_server_close(&server);
    ivshmem_server_dump(&server);
    CHECK(ivshmem_server_search_peer(&server, 0) == NULL && errno == ENOENT);
    ivshmem_server_get_fds(&server, &fds, &maxfd);
    CHECK(maxfd == 0);
    FAILS(ivshmem_server_handle_fds(&server, &fds, 1), EINVAL);
    CHECK(open_descriptors() == before);

    for (int round = 0; round < 5; round++) {
        CHECK(ivshmem_server_start(&server) == 0);
        CHECK(server.sock_fd > 2 && server.shm_fd > 2);
        CHECK(fcntl(server.sock_fd, F_GETFD) == FD_CLOEXEC && fcntl(server.shm_fd, F_GETFD) == FD_CLOEXEC);
        CHECK(exists(socket_path) && shm_exists());

        /* The next id continues after the last one. */
        CHECK(server.cur_id == 2 * round);
        first = join(&server);
        expect_greeting(first, 2 * round);
        second = join(&server);
        CHECK(server.cur_id == 2 * round + 2 && list_length(&server) == 2);

        /* A second start fails, and the running server goes on. */
        FAILS(ivshmem_server_start(&server), EBUSY);
        sock = server.sock_fd;
        CHECK(list_length(&server) == 2 && fcntl(sock, F_GETFD) == FD_CLOEXEC);

        ivshmem_server_close(&server);
        CHECK(server.sock_fd == -1 && server.shm_fd == -1 && server.peer_list.tqh_first == NULL);
        CHECK(server.peer_list.tqh_circ.tql_prev == &server.peer_list.tqh_circ);
        CHECK(server.shm_size == SIZE && server.n_vectors == 2 && server.cur_id == 2 * round + 2);
        CHECK(!exists(socket_path) && !shm_exists());
        drain(first);
        expect_end(first);
        ivshmem_server_close(&server);
        FAILS(ivshmem_server_handle_fds(&server, &fds, 1), EINVAL);
        CHECK(close(first) == 0 && close(second) == 0);
        CHECK(open_descriptors() == before);
    }

    /* start reads the current values of the fields. */
    server.cur_id = 0xffff;
    server.n_vectors = 1;
    server.use_shm_open = false;
    strcpy(server.shm_path, directory);
    server.shm_size = 3 << 20;
    strcat(server.unix_sock_path, "2");
    CHECK(ivshmem_server_start(&server) == 0);
    CHECK(server.shm_size == 3 << 20);
    CHECK(lseek(server.shm_fd, 0, SEEK_END) == 4 << 20);
    CHECK(!exists(socket_path) && exists(server.unix_sock_path) && !shm_exists());
    first = join(&server);
    CHECK(server.cur_id == 0 && server.peer_list.tqh_first->vectors_count == 1);
    expect_greeting(first, 0xffff);
    ivshmem_server_close(&server);
    CHECK(!exists(server.unix_sock_path));
    CHECK(close(first) == 0);
    CHECK(open_descriptors() == before);
    return 0;
}
