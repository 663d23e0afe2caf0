/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A start that fails does not close, unlink or change an object of another process. */
#include "check.h"

int main(void)
{
    IvshmemServer server, other;
    char path[128], file[96];
    int before, shm, client;
    char byte;

    begin();
    start(&server, 1);
    client = join(&server);
    drain(client);
    CHECK(pwrite(server.shm_fd, "x", 1, 0) == 1);
    before = open_descriptors();

    /* the socket and the memory of a running server */
    CHECK(ivshmem_server_init(&other, socket_path, "/other-name", true, SIZE, 1, false) == 0);
    FAILS(ivshmem_server_start(&other), EADDRINUSE);
    snprintf(path, sizeof path, "%s2", socket_path);
    CHECK(ivshmem_server_init(&other, path, shm_name, true, 2 * SIZE, 1, false) == 0);
    FAILS(ivshmem_server_start(&other), EBUSY);
    ivshmem_server_close(&other);
    CHECK(!exists(path) && exists(socket_path) && shm_exists());
    CHECK(lseek(server.shm_fd, 0, SEEK_END) == (off_t)SIZE);
    CHECK(pread(server.shm_fd, &byte, 1, 0) == 1 && byte == 'x');
    CHECK(open_descriptors() == before);
    expect_nothing(client);
    CHECK(close(join(&server)) == 0);
    ivshmem_server_close(&server);
    CHECK(close(client) == 0);

    /* an existing memory object and a file at the socket's path, when the socket cannot be bound */
    shm = shm_open(shm_name, O_CREAT | O_EXCL | O_RDWR, 0600);
    CHECK(shm >= 0 && ftruncate(shm, 4096) == 0);
    snprintf(file, sizeof file, "%s/file", directory);
    CHECK(close(open(file, O_CREAT | O_WRONLY, 0600)) == 0);
    before = open_descriptors();
    CHECK(ivshmem_server_init(&other, file, shm_name, true, SIZE, 1, false) == 0);
    FAILS(ivshmem_server_start(&other), EEXIST);
    ivshmem_server_close(&other);
    CHECK(exists(file) && shm_exists() && lseek(shm, 0, SEEK_END) == 4096);

    /* A memory object that is larger than the configured size is not truncated. */
    CHECK(ivshmem_server_init(&other, path, shm_name, true, 1024, 1, false) == 0);
    FAILS(ivshmem_server_start(&other), EEXIST);
    CHECK(shm_exists() && lseek(shm, 0, SEEK_END) == 4096 && !exists(path));

    /* close before start, while descriptor 0 is open and the fields name existing objects */
    strcpy(other.unix_sock_path, file);
    other.sock_fd = 0;
    other.shm_fd = shm;
    ivshmem_server_close(&other);
    CHECK(exists(file) && shm_exists() && fcntl(0, F_GETFD) >= 0 && fcntl(shm, F_GETFD) >= 0);
    CHECK(open_descriptors() == before);
    CHECK(close(shm) == 0 && shm_unlink(shm_name) == 0 && unlink(file) == 0);
    return 0;
}
