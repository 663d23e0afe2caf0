/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A call that fails sets the error text of its thread; a call that succeeds does not change it. */
#include <pthread.h>

#include "check.h"

/* Whether the last error contains this text. */
#define SAYS(text) CHECK(strstr(ivshmem_server_last_error(), (text)) != NULL)

static void *other_thread(void *server)
{
    CHECK(strcmp(ivshmem_server_last_error(), "") == 0);
    CHECK(ivshmem_server_search_peer(server, 77) == NULL);
    SAYS("no peer with id 77");
    return NULL;
}

int main(void)
{
    IvshmemServer server, other;
    pthread_t thread;
    char path[128];

    begin();
    CHECK(strcmp(ivshmem_server_last_error(), "") == 0);
    start(&server, 1);
    CHECK(strcmp(ivshmem_server_last_error(), "") == 0);

    CHECK(ivshmem_server_init(&other, socket_path, "/other", true, SIZE, 1, false) == 0);
    FAILS(ivshmem_server_start(&other), EADDRINUSE);
    SAYS("in use by a running process");
    SAYS(socket_path);
    CHECK(ivshmem_server_get_fd(&server) >= 0);
    SAYS("in use by a running process");

    /* Each thread has its own text. */
    CHECK(pthread_create(&thread, NULL, other_thread, &server) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
    SAYS("in use by a running process");

    FAILS(ivshmem_server_init(&other, socket_path, shm_name, true, SIZE, 65, false), EINVAL);
    SAYS("n_vectors is 65; it must be 1 to 64");
    FAILS(ivshmem_server_init(&other, NULL, shm_name, true, SIZE, 1, false), EINVAL);
    SAYS("unix_sock_path is NULL");
    FAILS(ivshmem_server_dispatch(&other), EINVAL);
    SAYS("does not run");
    FAILS(ivshmem_server_start(&server), EBUSY);
    SAYS("runs already");

    /* The text of the system's error appears once. */
    snprintf(path, sizeof path, "%s/none/socket", directory);
    CHECK(ivshmem_server_init(&other, path, "/other", true, SIZE, 1, false) == 0);
    FAILS(ivshmem_server_start(&other), ENOENT);
    SAYS(path);
    SAYS("No such file or directory");
    CHECK(strstr(strstr(ivshmem_server_last_error(), "No such file") + 1, "No such file") == NULL);
    ivshmem_server_close(&server);
    SAYS("No such file or directory");

    CHECK(strcmp(ivshmem_server_version(), IVSHMEM_SERVER_VERSION) == 0);
    snprintf(path, sizeof path, "%d.%d.%d", IVSHMEM_SERVER_VERSION_MAJOR,
             IVSHMEM_SERVER_VERSION_MINOR, IVSHMEM_SERVER_VERSION_PATCH);
    CHECK(strncmp(path, IVSHMEM_SERVER_VERSION, strlen(path)) == 0);
    return 0;
}
