/* SPDX-License-Identifier: GPL-2.0-or-later */
/* One thread replaces the log function while others serve and log. No function is called after its replacement. */
#include <pthread.h>
#include <stdatomic.h>

#include "check.h"

#define THREADS 4

static atomic_int done;
static atomic_long lines;

static void note(int level, const char *text, void *opaque)
{
    atomic_int *alive = opaque;

    (void)level;
    CHECK(*text != 0 && atomic_load(alive));
    /* Time for the other thread to replace the function, if set_log() did not wait for this call. */
    usleep(200);
    CHECK(atomic_load(alive));
    atomic_fetch_add(&lines, 1);
}

static void *serve(void *number)
{
    const int rounds = amount(300, 20);
    IvshmemServer server;
    char path[128], name[96];

    snprintf(path, sizeof path, "%s%d", socket_path, *(int *)number);
    snprintf(name, sizeof name, "%s-%d", shm_name, *(int *)number);
    CHECK(ivshmem_server_init(&server, path, name, true, SIZE, 1, false) == 0);
    CHECK(ivshmem_server_start(&server) == 0);
    for (int i = 0; i < rounds; i++) {
        close(join(&server));
        SERVE_UNTIL(&server, list_length(&server) == 0);
    }
    ivshmem_server_close(&server);
    atomic_fetch_add(&done, 1);
    return NULL;
}

int main(void)
{
    int numbers[THREADS];
    pthread_t threads[THREADS];
    atomic_int *alive = NULL;

    begin();
    for (int i = 0; i < THREADS; i++) {
        numbers[i] = i;
        CHECK(pthread_create(&threads[i], NULL, serve, &numbers[i]) == 0);
    }
    /* The data of a function is freed as soon as the next one is set; ASan and valgrind would report its use. */
    do {
        atomic_int *next = malloc(sizeof *next);
        long before = atomic_load(&lines);

        CHECK(next != NULL);
        atomic_init(next, 1);
        ivshmem_server_set_log(note, next, 7);
        if (alive != NULL) {
            atomic_store(alive, 0);
            free(alive);
        }
        alive = next;
        while (atomic_load(&lines) < before + 3 && atomic_load(&done) < THREADS) {
            usleep(50);
        }
    } while (atomic_load(&done) < THREADS);
    ivshmem_server_set_log(NULL, NULL, 7);
    free(alive);
    for (int i = 0; i < THREADS; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
    }
    CHECK(atomic_load(&lines) > 0);
    return 0;
}
