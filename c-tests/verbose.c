/* SPDX-License-Identifier: GPL-2.0-or-later */
/* With `verbose`, the reference's lines come on stdout, through C's own buffer; without it, none. */
#include "check.h"

int main(void)
{
    IvshmemServer server;
    char path[96], text[4096], should[4096], odd[96];
    int out, file, client, sock_fd, vector[2];
    ssize_t length;

    begin();
    snprintf(path, sizeof path, "%s/stdout", directory);
    file = open(path, O_CREAT | O_RDWR | O_TRUNC, 0600);
    fflush(stdout);
    out = dup(1);
    CHECK(file >= 0 && dup2(file, 1) == 1);

    /* not verbose */
    start(&server, 2);
    close(join(&server));
    SERVE_UNTIL(&server, list_length(&server) == 0);
    ivshmem_server_close(&server);
    fflush(stdout);
    CHECK(lseek(file, 0, SEEK_END) == 0);

    /* The caller's own lines stay in order. A path is printed unchanged. */
    snprintf(odd, sizeof odd, "%s/%%s%%n\xff", directory);
    CHECK(ivshmem_server_init(&server, odd, shm_name, true, SIZE, 2, true) == 0);
    printf("before start\n");
    CHECK(ivshmem_server_start(&server) == 0);
    printf("after start\n");
    client = join(&server);
    sock_fd = server.peer_list.tqh_first->sock_fd;
    vector[0] = server.peer_list.tqh_first->vectors[0].rfd;
    vector[1] = server.peer_list.tqh_first->vectors[1].rfd;
    server.verbose = false;
    ivshmem_server_dump(&server);
    server.verbose = true;
    close(client);
    SERVE_UNTIL(&server, list_length(&server) == 0);
    client = join(&server);
    ivshmem_server_close(&server);
    close(client);
    server.use_shm_open = false;
    strcpy(server.shm_path, "/nonexistent");
    FAILS(ivshmem_server_start(&server), ENOENT);
    fflush(stdout);

    CHECK(dup2(out, 1) == 1);
    length = pread(file, text, sizeof text - 1, 0);
    CHECK(length > 0);
    text[length] = 0;
    snprintf(should, sizeof should,
             "before start\n"
             "Using POSIX shared memory: %s\n"
             "create & bind socket %s\n"
             "after start\n"
             "accept()=%d\n"
             "new peer id = 0\n"
             "peer_id = 0\n"
             "  vector 0 is enabled (fd=%d)\n"
             "  vector 1 is enabled (fd=%d)\n"
             "free peer 0\n"
             "accept()=%d\n"
             "new peer id = 1\n"
             "close server\n"
             "free peer 1\n"
             "Using file-backed shared memory: /nonexistent\n"
             "create & bind socket %s\n"
             "cannot start: ",
             shm_name, odd, sock_fd, vector[0], vector[1], sock_fd, odd);
    if (strncmp(text, should, strlen(should)) != 0) {
        fprintf(stderr, "--- is\n%s--- should be\n%s\n", text, should);
        return 1;
    }
    close(file);
    close(out);
    unlink(path);
    return 0;
}
