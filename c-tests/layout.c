/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Size, offset and type of every field are those of QEMU's header. */
#include "check.h"

#define OFFSET(type, field, offset) _Static_assert(offsetof(type, field) == (offset), #field)
#define TYPE(type, field, is) _Static_assert(_Generic(((type *)0)->field, is: 1, default: 0), #field)
#define ARRAY(type, field, is) _Static_assert(_Generic(&((type *)0)->field, is: 1, default: 0), #field)

_Static_assert(sizeof(IvshmemServer) == 8240, "IvshmemServer");
_Static_assert(sizeof(struct IvshmemServerPeer) == 808, "IvshmemServerPeer");
_Static_assert(sizeof(EventNotifier) == 12, "EventNotifier");
_Static_assert(IVSHMEM_SERVER_MAX_VECTORS == 64 && IVSHMEM_PROTOCOL_VERSION == 0, "constants");

OFFSET(IvshmemServer, unix_sock_path, 0);
ARRAY(IvshmemServer, unix_sock_path, char (*)[4096]);
OFFSET(IvshmemServer, sock_fd, 4096);
TYPE(IvshmemServer, sock_fd, int);
OFFSET(IvshmemServer, shm_path, 4100);
ARRAY(IvshmemServer, shm_path, char (*)[4096]);
OFFSET(IvshmemServer, use_shm_open, 8196);
TYPE(IvshmemServer, use_shm_open, bool);
OFFSET(IvshmemServer, shm_size, 8200);
TYPE(IvshmemServer, shm_size, size_t);
OFFSET(IvshmemServer, shm_fd, 8208);
TYPE(IvshmemServer, shm_fd, int);
OFFSET(IvshmemServer, n_vectors, 8212);
TYPE(IvshmemServer, n_vectors, unsigned);
OFFSET(IvshmemServer, cur_id, 8216);
TYPE(IvshmemServer, cur_id, uint16_t);
OFFSET(IvshmemServer, verbose, 8218);
TYPE(IvshmemServer, verbose, bool);
OFFSET(IvshmemServer, peer_list, 8224);
TYPE(IvshmemServer, peer_list.tqh_first, IvshmemServerPeer *);
TYPE(IvshmemServer, peer_list.tqh_circ.tql_next, void *);

OFFSET(IvshmemServerPeer, next, 0);
TYPE(IvshmemServerPeer, next.tqe_next, IvshmemServerPeer *);
OFFSET(IvshmemServerPeer, next.tqe_circ.tql_prev, 8);
OFFSET(IvshmemServerPeer, sock_fd, 16);
TYPE(IvshmemServerPeer, sock_fd, int);
OFFSET(IvshmemServerPeer, id, 24);
TYPE(IvshmemServerPeer, id, int64_t);
OFFSET(IvshmemServerPeer, vectors, 32);
ARRAY(IvshmemServerPeer, vectors, EventNotifier (*)[64]);
OFFSET(IvshmemServerPeer, vectors_count, 800);
TYPE(IvshmemServerPeer, vectors_count, unsigned);

OFFSET(EventNotifier, rfd, 0);
TYPE(EventNotifier, rfd, int);
OFFSET(EventNotifier, wfd, 4);
TYPE(EventNotifier, wfd, int);
OFFSET(EventNotifier, initialized, 8);
TYPE(EventNotifier, initialized, bool);

int main(void)
{
    /* C and the library use the same layout: start reads the fields that C wrote. */
    IvshmemServer server;

    begin();
    init(&server, 64);
    CHECK(server.shm_size == SIZE && server.n_vectors == 64 && server.use_shm_open);
    CHECK(!strcmp(server.unix_sock_path, socket_path) && !strcmp(server.shm_path, shm_name));
    CHECK(server.sock_fd == -1 && server.shm_fd == -1 && server.cur_id == 0 && !server.verbose);
    CHECK(server.peer_list.tqh_first == NULL);
    CHECK(server.peer_list.tqh_circ.tql_prev == &server.peer_list.tqh_circ);
    return 0;
}
