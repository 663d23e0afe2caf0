/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * An ivshmem server in a C program with GLib's main loop.
 *
 *     cc glib.c $(pkg-config --cflags --libs ivshmem-server glib-2.0) -o glib
 *     ./glib /tmp/ivshmem_socket
 */
#include <glib-unix.h>
#include <stdio.h>

#include <ivshmem-server.h>

struct program {
    IvshmemServer server;
    GMainLoop *loop;
    bool failed;
};

/* The loop is level-triggered: it calls this again while work is left. */
static gboolean on_ready(gint fd, GIOCondition condition, gpointer opaque)
{
    struct program *program = opaque;

    (void)fd;
    (void)condition;
    if (ivshmem_server_dispatch(&program->server) < 0) {
        g_printerr("cannot serve: %s\n", ivshmem_server_last_error());
        program->failed = true;
        g_main_loop_quit(program->loop);
        return G_SOURCE_REMOVE;
    }
    return G_SOURCE_CONTINUE;
}

static gboolean on_stop(gpointer opaque)
{
    struct program *program = opaque;

    g_main_loop_quit(program->loop);
    return G_SOURCE_CONTINUE;
}

static void write_log(int level, const char *text, void *opaque)
{
    (void)opaque;
    g_log("ivshmem", level <= 3 ? G_LOG_LEVEL_CRITICAL : G_LOG_LEVEL_WARNING, "%s", text);
}

int main(int argc, char **argv)
{
    static struct program program;
    const char *path = argc > 1 ? argv[1] : "/tmp/ivshmem_socket";
    const char *name = argc > 2 ? argv[2] : "ivshmem";

    setvbuf(stdout, NULL, _IOLBF, 0);
    program.loop = g_main_loop_new(NULL, FALSE);
    g_unix_signal_add(SIGINT, on_stop, &program);
    g_unix_signal_add(SIGTERM, on_stop, &program);
    ivshmem_server_set_log(write_log, NULL, 4); /* warnings and worse */
    /* POSIX shared memory of 4 MiB, 2 vectors for each peer, verbose lines on stdout. */
    if (ivshmem_server_init(&program.server, path, name, true, 4 << 20, 2, true) < 0
        || ivshmem_server_start(&program.server) < 0) {
        g_printerr("cannot start: %s\n", ivshmem_server_last_error());
        return 1;
    }
    g_unix_fd_add(ivshmem_server_get_fd(&program.server), G_IO_IN, on_ready, &program);
    g_main_loop_run(program.loop);
    ivshmem_server_close(&program.server);
    g_main_loop_unref(program.loop);
    return program.failed;
}
