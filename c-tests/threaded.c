/* SPDX-License-Identifier: GPL-2.0-or-later */
/* One thread starts the server, another serves, and the first closes it, as in QEMU's own test. */
#include <poll.h>
#include <pthread.h>

#include "check.h"

struct server_thread {
    IvshmemServer server;
    int pipe[2];
    pthread_t thread;
};

static void *serve(void *data)
{
    struct server_thread *t = data;

    for (;;) {
        fd_set fds;
        int maxfd = t->pipe[0] + 1;

        FD_ZERO(&fds);
        FD_SET(t->pipe[0], &fds);
        ivshmem_server_get_fds(&t->server, &fds, &maxfd);
        CHECK(select(maxfd, &fds, NULL, NULL, NULL) > 0);
        if (FD_ISSET(t->pipe[0], &fds)) {
            return NULL;
        }
        CHECK(ivshmem_server_handle_fds(&t->server, &fds, maxfd) == 0);
    }
}

static int wait_and_expect(int sock, int64_t value)
{
    struct pollfd wait = { .fd = sock, .events = POLLIN };

    CHECK(poll(&wait, 1, 20000) == 1);
    return expect(sock, value);
}

#define SERVERS 3

int main(void)
{
    static struct server_thread threads[SERVERS];
    int before, clients[SERVERS][2];

    begin();
    before = open_descriptors();
    for (int i = 0; i < SERVERS; i++) {
        char path[128], name[96];

        snprintf(path, sizeof path, "%s%d", socket_path, i);
        snprintf(name, sizeof name, "%s%d", shm_name, i);
        CHECK(ivshmem_server_init(&threads[i].server, path, name, true, SIZE, 1, false) == 0);
        CHECK(ivshmem_server_start(&threads[i].server) == 0);
        CHECK(pipe(threads[i].pipe) == 0);
        CHECK(pthread_create(&threads[i].thread, NULL, serve, &threads[i]) == 0);
    }
    for (int i = 0; i < SERVERS; i++) {
        for (int n = 0; n < 2; n++) {
            int sock = clients[i][n] = connect_to(threads[i].server.unix_sock_path);

            wait_and_expect(sock, 0);
            wait_and_expect(sock, n);
            close(wait_and_expect(sock, -1));
            for (int peer = 0; peer <= n; peer++) {
                close(wait_and_expect(sock, peer));
            }
        }
        close(wait_and_expect(clients[i][0], 1));
    }
    for (int i = 0; i < SERVERS; i++) {
        close(clients[i][1]);
        CHECK(wait_and_expect(clients[i][0], 1) == -1);
    }
    for (int i = 0; i < SERVERS; i++) {
        CHECK(write(threads[i].pipe[1], "q", 1) == 1);
        CHECK(pthread_join(threads[i].thread, NULL) == 0);
        CHECK(list_length(&threads[i].server) == 1);
        ivshmem_server_close(&threads[i].server);
        close(clients[i][0]);
        close(threads[i].pipe[0]);
        close(threads[i].pipe[1]);
    }
    CHECK(open_descriptors() == before);
    return 0;
}
