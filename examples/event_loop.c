/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * An ivshmem server in a C program with a select loop. It uses only the functions of QEMU's header.
 *
 *     cc event_loop.c $(pkg-config --cflags --libs ivshmem-server) -o event_loop
 *     ./event_loop /tmp/ivshmem_socket
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>

#include <ivshmem-server.h>

static volatile sig_atomic_t stop;

static void on_signal(int number)
{
    (void)number;
    stop = 1;
}

int main(int argc, char **argv)
{
    static IvshmemServer server;
    const char *path = argc > 1 ? argv[1] : "/tmp/ivshmem_socket";
    sigset_t stops, none;

    /* Signals are blocked except in pselect: one that came between the check of `stop` and the
       wait would be lost. */
    sigemptyset(&none);
    sigemptyset(&stops);
    sigaddset(&stops, SIGINT);
    sigaddset(&stops, SIGTERM);
    sigprocmask(SIG_BLOCK, &stops, NULL);
    signal(SIGINT, on_signal);
    signal(SIGTERM, on_signal);

    setvbuf(stdout, NULL, _IOLBF, 0);
    /* POSIX shared memory "ivshmem", 4 MiB, 2 vectors for each peer; verbose lines on stdout. */
    if (ivshmem_server_init(&server, path, argc > 2 ? argv[2] : "ivshmem", true, 4 << 20, 2, true) < 0
        || ivshmem_server_start(&server) < 0) {
        fprintf(stderr, "%s: %s\n", path, strerror(errno));
        return 1;
    }
    while (!stop) {
        fd_set fds;
        int maxfd = 0;

        FD_ZERO(&fds); /* add other descriptors of the program here */
        ivshmem_server_get_fds(&server, &fds, &maxfd);
        if (pselect(maxfd, &fds, NULL, NULL, NULL, &none) < 0
                ? errno != EINTR
                : ivshmem_server_handle_fds(&server, &fds, maxfd) < 0) {
            break;
        }
    }
    ivshmem_server_close(&server);
    return !stop;
}
