/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Verbose lines about refused clients come at most once a second, however many are refused. */
#include <time.h>

#include "check.h"

#define CLIENTS 100

static long now(void)
{
    struct timespec time;

    CHECK(clock_gettime(CLOCK_MONOTONIC, &time) == 0);
    return (long)time.tv_sec;
}

int main(void)
{
    IvshmemServer server;
    char path[96], line[512];
    int out, file;
    long lines = 0, began;
    FILE *text;

    begin();
    snprintf(path, sizeof path, "%s/stdout", directory);
    file = open(path, O_CREAT | O_RDWR | O_TRUNC, 0600);
    fflush(stdout);
    out = dup(1);
    CHECK(file >= 0 && dup2(file, 1) == 1);
    start(&server, 1);
    server.verbose = true;
    began = now();
    for (int i = 0; i < CLIENTS; i++) {
        /* It closes the connection before the server accepts it. */
        close(connect_to(socket_path));
        CHECK(turn(&server, 20000) > 0);
    }
    while (turn(&server, 0) > 0) {
    }
    CHECK(list_length(&server) == 0 && server.cur_id == 0);
    server.verbose = false;
    ivshmem_server_close(&server);
    fflush(stdout);
    CHECK(dup2(out, 1) == 1 && lseek(file, 0, SEEK_SET) == 0);
    text = fdopen(file, "r");
    CHECK(text != NULL);
    while (fgets(line, sizeof line, text) != NULL) {
        CHECK(strncmp(line, "client refused: it hung up", 26) == 0);
        lines++;
    }
    /* One line at once, and one for each second after it. */
    CHECK(lines >= 1 && lines <= now() - began + 2);
    fclose(text);
    close(out);
    unlink(path);
    return 0;
}
