/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * An ivshmem server in a C program with an edge-triggered epoll loop.
 *
 *     cc epoll.c $(pkg-config --cflags --libs ivshmem-server) -o epoll
 *     ./epoll /tmp/ivshmem_socket
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>

#include <ivshmem-server.h>

static void write_log(int level, const char *text, void *opaque)
{
    (void)opaque;
    fprintf(stderr, "<%d>%s\n", level, text);
}

int main(int argc, char **argv)
{
    static IvshmemServer server;
    const char *path = argc > 1 ? argv[1] : "/tmp/ivshmem_socket";
    const char *name = argc > 2 ? argv[2] : "ivshmem";
    struct epoll_event on_server = { .events = EPOLLIN | EPOLLET, .data.u32 = 0 };
    struct epoll_event on_signal = { .events = EPOLLIN, .data.u32 = 1 };
    bool stop = false;
    int loop, signals, more = 0;
    sigset_t stops;

    sigemptyset(&stops);
    sigaddset(&stops, SIGINT);
    sigaddset(&stops, SIGTERM);
    sigprocmask(SIG_BLOCK, &stops, NULL);

    setvbuf(stdout, NULL, _IOLBF, 0);
    ivshmem_server_set_log(write_log, NULL, 4); /* warnings and worse */
    /* POSIX shared memory of 4 MiB, 2 vectors for each peer, verbose lines on stdout. */
    if (ivshmem_server_init(&server, path, name, true, 4 << 20, 2, true) < 0
        || ivshmem_server_start(&server) < 0) {
        fprintf(stderr, "cannot start: %s\n", ivshmem_server_last_error());
        return 1;
    }
    loop = epoll_create1(EPOLL_CLOEXEC);
    signals = signalfd(-1, &stops, SFD_CLOEXEC);
    if (loop < 0 || signals < 0
        || epoll_ctl(loop, EPOLL_CTL_ADD, signals, &on_signal) < 0
        || epoll_ctl(loop, EPOLL_CTL_ADD, ivshmem_server_get_fd(&server), &on_server) < 0) {
        perror("cannot wait for events");
        ivshmem_server_close(&server);
        return 1;
    }
    while (!stop && more >= 0) {
        struct epoll_event ready;
        /* While the server has work left, only look for what else is ready. */
        int count = epoll_wait(loop, &ready, 1, more ? 0 : -1);

        if (count < 0 && errno != EINTR) {
            break;
        }
        if (count > 0 && ready.data.u32 == 1) {
            stop = true;
        } else if (count > 0 || more) {
            more = ivshmem_server_dispatch(&server);
        }
    }
    if (more < 0) {
        fprintf(stderr, "cannot serve: %s\n", ivshmem_server_last_error());
    }
    ivshmem_server_close(&server);
    return !stop;
}
