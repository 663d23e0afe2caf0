/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A server on the C API with the loop of QEMU's program, and those of its options that the tests use:
 * -F -v -S SOCKET -M NAME | -m DIRECTORY -l SIZE -n VECTORS. SIGTERM ends it with status 0, an error with 1.
 */
#include <ivshmem-server.h>

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/select.h>
#include <unistd.h>

static volatile sig_atomic_t quit;

static void on_term(int number)
{
    (void)number;
    quit = 1;
}

static size_t size_of(const char *text)
{
    char *unit;
    size_t size = strtoul(text, &unit, 0);

    return *unit == 'M' ? size << 20 : *unit == 'K' ? size << 10 : size;
}

int main(int argc, char **argv)
{
    const char *socket_path = NULL, *memory = NULL;
    struct sigaction action = { .sa_handler = on_term };
    bool verbose = false, named = true;
    unsigned vectors = 1;
    size_t size = 4 << 20;
    IvshmemServer server;
    sigset_t term, before;
    int option, status = 0;

    while ((option = getopt(argc, argv, "FvS:M:m:l:n:")) != -1) {
        switch (option) {
        case 'F': break;
        case 'v': verbose = true; break;
        case 'S': socket_path = optarg; break;
        case 'M': memory = optarg; named = true; break;
        case 'm': memory = optarg; named = false; break;
        case 'l': size = size_of(optarg); break;
        case 'n': vectors = (unsigned)strtoul(optarg, NULL, 0); break;
        default: return 1;
        }
    }
    /* The signal is blocked except in pselect, so none is missed between two rounds. */
    sigemptyset(&term);
    sigaddset(&term, SIGTERM);
    sigprocmask(SIG_BLOCK, &term, &before);
    sigaction(SIGTERM, &action, NULL);
    if (ivshmem_server_init(&server, socket_path, memory, named, size, vectors, verbose) < 0 ||
        ivshmem_server_start(&server) < 0) {
        perror("cannot start");
        return 1;
    }
    while (!quit) {
        fd_set fds;
        int maxfd = 0, ready;

        FD_ZERO(&fds);
        ivshmem_server_get_fds(&server, &fds, &maxfd);
        ready = pselect(maxfd, &fds, NULL, NULL, NULL, &before);
        if (ready < 0 && errno != EINTR) {
            perror("cannot wait");
            status = 1;
            break;
        }
        if (ready > 0 && ivshmem_server_handle_fds(&server, &fds, maxfd) < 0) {
            perror("cannot serve");
            status = 1;
            break;
        }
        /* pselect handles no signal while a descriptor is readable, so pending signals are handled here. */
        sigprocmask(SIG_SETMASK, &before, NULL);
        sigprocmask(SIG_BLOCK, &term, NULL);
    }
    ivshmem_server_close(&server);
    return status;
}
