/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A call that blocks (here on a stdout that is not read) does not block the calls for another server. */
#include <pthread.h>
#include <semaphore.h>
#include <sys/ioctl.h>

#include "check.h"

static IvshmemServer slow, quick;
static sem_t about_to_print;

static void *print(void *unused)
{
    sem_post(&about_to_print);
    for (int i = 0; i < 2000; i++) {
        ivshmem_server_dump(&slow);
    }
    return unused;
}

int main(void)
{
    char path[128], name[96], buffer[4096];
    int before, pipes[2], out, client, others[2], waiting;
    pthread_t thread;

    begin();
    before = open_descriptors();
    start(&slow, 64);
    client = join(&slow);
    snprintf(path, sizeof path, "%s2", socket_path);
    snprintf(name, sizeof name, "%s2", shm_name);
    CHECK(ivshmem_server_init(&quick, path, name, true, SIZE, 1, false) == 0);
    CHECK(ivshmem_server_start(&quick) == 0);

    fflush(stdout);
    out = dup(1);
    CHECK(pipe(pipes) == 0 && dup2(pipes[1], 1) == 1 && close(pipes[1]) == 0);
    CHECK(sem_init(&about_to_print, 0, 0) == 0);
    CHECK(pthread_create(&thread, NULL, print, NULL) == 0);
    CHECK(sem_wait(&about_to_print) == 0);
    /* The pipe is full when not one more page fits; then the thread blocks. */
    do {
        usleep(1000);
        CHECK(ioctl(pipes[0], FIONREAD, &waiting) == 0);
    } while (waiting < 60000);

    others[0] = join(&quick);
    others[1] = join(&quick);
    CHECK(list_length(&quick) == 2 && ivshmem_server_search_peer(&quick, 1) != NULL);
    expect_greeting(others[0], 0);
    ivshmem_server_close(&quick);
    CHECK(ioctl(pipes[0], FIONREAD, &waiting) == 0 && waiting >= 60000);

    /* Read the pipe, so that the thread can end. */
    CHECK(fflush(stderr) == 0);
    fcntl(pipes[0], F_SETFL, O_NONBLOCK);
    while (pthread_tryjoin_np(thread, NULL) == EBUSY) {
        while (read(pipes[0], buffer, sizeof buffer) > 0) {
        }
        usleep(100);
    }
    fflush(stdout);
    CHECK(dup2(out, 1) == 1 && close(out) == 0 && close(pipes[0]) == 0);
    ivshmem_server_close(&slow);
    close(client);
    close(others[0]);
    close(others[1]);
    sem_destroy(&about_to_print);
    CHECK(open_descriptors() == before);
    return 0;
}
