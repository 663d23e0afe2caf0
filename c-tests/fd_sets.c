/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The library's use of an fd_set: it adds only its own descriptors that fit, and ignores all others. */
#include "check.h"

int main(void)
{
    IvshmemServer server, second;
    struct {
        fd_set fds;
        unsigned char guard[256];
    } set;
    fd_set before, peers;
    char path[128];
    int maxfd, client, waiting, top, last, pipes[2];

    begin();
    start(&server, 1);
    client = join(&server);
    drain(client);
    CHECK(pipe(pipes) == 0);

    /* Other descriptors in the set and a larger maxfd stay. */
    FD_ZERO(&set.fds);
    FD_SET(pipes[1], &set.fds);
    maxfd = 900;
    ivshmem_server_get_fds(&server, &set.fds, &maxfd);
    CHECK(maxfd == 900 && FD_ISSET(pipes[1], &set.fds) && !FD_ISSET(pipes[0], &set.fds));
    CHECK(FD_ISSET(server.sock_fd, &set.fds));
    CHECK(FD_ISSET(server.peer_list.tqh_first->sock_fd, &set.fds));
    FD_ZERO(&set.fds);
    maxfd = 0;
    ivshmem_server_get_fds(&server, &set.fds, &maxfd);
    CHECK(maxfd > server.sock_fd && FD_ISSET(maxfd - 1, &set.fds));
    before = set.fds;

    /* Without one of the server's descriptors below maxfd, handle_fds does nothing: the connection waits. */
    waiting = connect_to(socket_path);
    FD_ZERO(&set.fds);
    CHECK(ivshmem_server_handle_fds(&server, &set.fds, FD_SETSIZE) == 0);
    FD_SET(pipes[0], &set.fds);
    FD_SET(client, &set.fds);
    CHECK(ivshmem_server_handle_fds(&server, &set.fds, FD_SETSIZE) == 0);
    set.fds = before;
    CHECK(ivshmem_server_handle_fds(&server, &set.fds, 0) == 0);
    CHECK(ivshmem_server_handle_fds(&server, &set.fds, -7) == 0);
    CHECK(ivshmem_server_handle_fds(&server, &set.fds, 3) == 0);
    CHECK(server.cur_id == 1);
    FAILS(ivshmem_server_handle_fds(&server, NULL, FD_SETSIZE), EINVAL);
    FD_ZERO(&set.fds);
    FD_SET(server.sock_fd, &set.fds);
    CHECK(ivshmem_server_handle_fds(&server, &set.fds, server.sock_fd) == 0);
    CHECK(server.cur_id == 1);
    CHECK(ivshmem_server_handle_fds(&server, &set.fds, server.sock_fd + 1) == 0);
    CHECK(server.cur_id == 2);
    close(waiting);
    /* A maxfd above FD_SETSIZE means all of the set. A call for any reason removes a client that left. */
    CHECK(ivshmem_server_handle_fds(&server, &set.fds, 0x7fffffff) == 0);
    SERVE_UNTIL(&server, list_length(&server) == 1);

    /* A client's socket alone in the set is enough. */
    FD_ZERO(&peers);
    FD_SET(server.peer_list.tqh_first->sock_fd, &peers);
    CHECK(write(client, "!", 1) == 1);
    CHECK(ivshmem_server_handle_fds(&server, &peers, FD_SETSIZE) == 0);
    CHECK(list_length(&server) == 0);
    close(client);
    /* its connection stays open until it has read its messages or ended, as now */
    FD_ZERO(&peers);
    maxfd = 0;
    ivshmem_server_get_fds(&server, &peers, &maxfd);
    CHECK(ivshmem_server_handle_fds(&server, &peers, maxfd) == 0);

    /* All descriptors below 1024 are taken: clients are served, and no bit is written outside of the set. */
    top = last = -1;
    while (last < FD_SETSIZE) {
        last = dup(pipes[0]);
        CHECK(last >= 0);
        top = top < 0 ? last : top;
    }
    memset(set.guard, 0xa5, sizeof set.guard);
    client = join(&server);
    CHECK(client > FD_SETSIZE && server.peer_list.tqh_first->sock_fd > FD_SETSIZE);
    FD_ZERO(&set.fds);
    maxfd = 0;
    ivshmem_server_get_fds(&server, &set.fds, &maxfd);
    CHECK(maxfd <= FD_SETSIZE && FD_ISSET(server.sock_fd, &set.fds));
    for (size_t i = 0; i < sizeof set.guard; i++) {
        CHECK(set.guard[i] == 0xa5);
    }
    expect_greeting(client, 2);
    close(client);
    SERVE_UNTIL(&server, list_length(&server) == 0);

    /* A server whose own descriptor does not fit in an fd_set is refused, and leaves no file. */
    snprintf(path, sizeof path, "%s2", socket_path);
    CHECK(ivshmem_server_init(&second, path, "/never-made", true, SIZE, 1, false) == 0);
    FAILS(ivshmem_server_start(&second), EMFILE);
    CHECK(!exists(path) && second.sock_fd == -1);

    while (last >= top) {
        close(last--);
    }
    ivshmem_server_close(&server);
    close(pipes[0]);
    close(pipes[1]);
    return 0;
}
