/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A fork between start and the loop, as in QEMU's program: the parent's exit does not affect the server. */
#include <signal.h>
#include <sys/wait.h>

#include "check.h"

static volatile sig_atomic_t quit;

static void on_term(int number)
{
    (void)number;
    quit = 1;
}

static void serve(IvshmemServer *server)
{
    struct sigaction action = { .sa_handler = on_term };
    sigset_t term, none;

    /* The signal is blocked except in pselect: one that comes before a plain select would be missed. */
    sigemptyset(&none);
    sigemptyset(&term);
    sigaddset(&term, SIGTERM);
    sigprocmask(SIG_BLOCK, &term, NULL);
    sigaction(SIGTERM, &action, NULL);
    while (!quit) {
        fd_set fds;
        int maxfd = 0, ready;

        FD_ZERO(&fds);
        ivshmem_server_get_fds(server, &fds, &maxfd);
        ready = pselect(maxfd, &fds, NULL, NULL, NULL, &none);
        if (ready > 0) {
            CHECK(ivshmem_server_handle_fds(server, &fds, maxfd) == 0);
        }
    }
    ivshmem_server_close(server);
    CHECK(!exists(socket_path));
}

int main(void)
{
    IvshmemServer server;
    int status, sock, pids[2], got = 0;
    pid_t middle, daemon = 0;
    char end;

    begin();
    CHECK(pipe(pids) == 0);
    /* This process is the client. Its child starts the server, forks, and exits. */
    middle = fork();
    if (middle == 0) {
        start(&server, 2);
        daemon = fork();
        if (daemon == 0) {
            close(pids[0]);
            serve(&server);
            _exit(0);
        }
        CHECK(write(pids[1], &daemon, sizeof daemon) == sizeof daemon);
        _exit(7);
    }
    close(pids[1]);
    CHECK(waitpid(middle, &status, 0) == middle && WIFEXITED(status));
    /* 99 is valgrind's status for a leak: the server still runs in the child's child. */
    CHECK(WEXITSTATUS(status) == 7 || WEXITSTATUS(status) == 99);
    CHECK(read(pids[0], &daemon, sizeof daemon) == sizeof daemon);
    CHECK(exists(socket_path) && shm_exists());

    sock = connect_to(socket_path);
    while (got < 5) {
        int64_t value;
        int fd;

        if (receive(sock, &value, &fd) == MESSAGE) {
            got++;
            close(fd);
        } else {
            usleep(1000);
        }
    }
    CHECK(kill(daemon, SIGTERM) == 0);
    /* The pipe is open until the daemon ends. */
    CHECK(read(pids[0], &end, 1) == 0);
    expect_end(sock);
    CHECK(!exists(socket_path) && !shm_exists());
    close(sock);
    close(pids[0]);
    return 0;
}
