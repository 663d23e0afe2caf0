/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The program's log function receives the lines up to its level. Without a function there are no lines. */
#include <syslog.h>

#include "check.h"

struct seen {
    int lines, worst, joined, left;
    IvshmemServer *server;
    int nested;
};

static void note(int level, const char *text, void *opaque)
{
    struct seen *seen = opaque;

    CHECK(level >= LOG_ERR && level <= LOG_DEBUG && *text != 0 && strchr(text, '\n') == NULL);
    seen->lines++;
    seen->worst = level > seen->worst ? level : seen->worst;
    seen->joined += strstr(text, "joined") != NULL;
    seen->left += strstr(text, "left") != NULL;
    if (seen->server != NULL && !seen->nested) {
        /* The function may call the library, also for the same server, but not set_log. */
        seen->nested = 1;
        CHECK(ivshmem_server_search_peer(seen->server, 9999) == NULL && errno == ENOENT);
        CHECK(ivshmem_server_dispatch(seen->server) >= 0);
        errno = 0;
        ivshmem_server_set_log(NULL, NULL, 0);
        CHECK(errno == EDEADLK);
        CHECK(strstr(ivshmem_server_last_error(), "set_log") != NULL);
    }
}

/* One client joins and leaves. */
static void visit(IvshmemServer *server)
{
    int client = join(server);

    close(client);
    SERVE_UNTIL(server, list_length(server) == 0);
}

int main(void)
{
    struct seen info = { 0 }, errors = { 0 }, nested = { 0 };
    char path[96];
    int file, err;
    IvshmemServer server;

    begin();
    start(&server, 1);
    snprintf(path, sizeof path, "%s/stderr", directory);
    file = open(path, O_CREAT | O_RDWR | O_TRUNC, 0600);
    err = dup(2);
    CHECK(file >= 0 && err >= 0 && dup2(file, 2) == 2);

    visit(&server);
    ivshmem_server_set_log(note, &info, LOG_INFO);
    visit(&server);
    CHECK(info.joined == 1 && info.left == 1 && info.worst == LOG_INFO);

    ivshmem_server_set_log(note, &errors, LOG_ERR);
    visit(&server);
    ivshmem_server_set_log(note, &errors, LOG_CRIT);
    visit(&server);
    CHECK(info.lines == 2 && errors.lines == 0);

    nested.server = &server;
    ivshmem_server_set_log(note, &nested, LOG_DEBUG);
    visit(&server);
    CHECK(nested.joined == 1 && nested.left == 1 && nested.nested);

    ivshmem_server_set_log(NULL, &nested, LOG_DEBUG);
    visit(&server);
    CHECK(nested.lines == 2 && info.lines == 2);

    /* The library printed nothing itself. */
    CHECK(dup2(err, 2) == 2 && lseek(file, 0, SEEK_END) == 0);
    ivshmem_server_close(&server);
    close(file);
    close(err);
    unlink(path);
    return 0;
}
