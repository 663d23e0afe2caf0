# SPDX-License-Identifier: GPL-2.0-or-later
# Made by `make papers` from the program's options. Do not edit.
complete -c ivshmem-server -l config -d 'Read options from FILE: long options without dashes, one a line. Those on the command line, and in the FILE of a later --config, replace them. With a \'-\' before its name (--config=-FILE) it may be missing' -r -F
complete -c ivshmem-server -s p -l pid-file -d 'Write the process id to FILE; no effect with -F' -r -F
complete -c ivshmem-server -s S -l socket -d 'Listen at this UNIX socket; at most 107 bytes' -r -F
complete -c ivshmem-server -l socket-mode -d 'Mode of the socket, in octal; write permission is permission to attach [default: 0777 minus the umask]' -r
complete -c ivshmem-server -l socket-owner -d 'Owner of the socket, by name or number; root only [default: the user of the server]' -r -f -a "(__fish_complete_users)"
complete -c ivshmem-server -l socket-group -d 'Group of the socket, by name or number; with --socket-mode 660 its members may attach' -r
complete -c ivshmem-server -s M -l shm-name -d 'Share the POSIX shared memory object NAME [default: ivshmem]' -r
complete -c ivshmem-server -l shm-mode -d 'Mode of a new object of -M or --shm-file, in octal; no effect with -m and --memfd. An existing object that other users may write beyond this mode is refused [default: 0700 minus the umask, and 0600 for --shm-file]' -r
complete -c ivshmem-server -l shm-group -d 'Group of a new object of -M, by name or number; needs --shm-mode. An existing object that another group may write is refused' -r
complete -c ivshmem-server -s m -l shm-dir -d 'Share an unnamed file in the directory DIR, which may be on hugetlbfs' -r -f -a "(__fish_complete_directories)"
complete -c ivshmem-server -l shm-file -d 'Share the file, block device or DAX device at PATH; a file is made if nothing is there. It is never removed. A device keeps its size, and QEMU cannot attach to it' -r -F
complete -c ivshmem-server -s l -l size -d 'Size of the shared memory: bytes, or a number with a suffix B, K, M, G, T, P or E, such as 1.5G; rounded up to a power of two [default: 4M, or the size of an existing --shm-file]' -r
complete -c ivshmem-server -l hugetlb -d 'Use huge pages of SIZE, such as 2M or 1G. With --memfd the memory is made of them; with -m and --shm-file the hugetlbfs must have this page size' -r
complete -c ivshmem-server -l numa-node -d 'Allocate the memory on these NUMA nodes only' -r
complete -c ivshmem-server -s n -l vectors -d 'Interrupt vectors of each machine, 1 to 2048; hexadecimal with 0x' -r
complete -c ivshmem-server -l allow-uid -d 'Admit only this user, by name or number; also the users and groups of each further --allow-uid and --allow-gid [default: all that may write to the socket]' -r -f -a "(__fish_complete_users)"
complete -c ivshmem-server -l allow-gid -d 'Admit only members of this group, by name or number; see --allow-uid' -r
complete -c ivshmem-server -l max-clients -d 'Clients that may be connected at the same time [default: as many as there are ids and descriptors]' -r
complete -c ivshmem-server -l max-clients-per-uid -d 'What one user may hold: connections, ended connections with unread messages, and ids that are remembered because a client was told of them [default: all but a reserve]' -r
complete -c ivshmem-server -l first-id -d 'Id of the first client, 0 to 65535; the next ones count up from it' -r
complete -c ivshmem-server -l user -d 'Give up root after the start: go on as this user, by name or number, with its groups and without capabilities. With --supervise the supervisor stays root' -r -f -a "(__fish_complete_users)"
complete -c ivshmem-server -l sandbox -d 'After the start, allow only the system calls and files that the server needs: on; log what it would forbid: log' -r -f -a "off\t'It works: there is no sandbox'
on\t'It fails'
log\t'It works, and the kernel logs it; files are not restricted'"
complete -c ivshmem-server -l ready-fd -d 'Once listening, write the line READY=1 to the open descriptor FD, and close it' -r
complete -c ivshmem-server -l log-level -d 'Write log lines of this level and above [default: RUST_LOG, or info in the journal and the system log, and warn elsewhere]' -r -f -a "error\t''
warn\t''
info\t''
debug\t''
trace\t''"
complete -c ivshmem-server -l control -d 'Path of the control socket, by which ivshmem-ctl looks at the server; if it cannot be made, the start fails [default: the socket\'s path and ".control"; if it cannot be made, a warning]' -r -F
complete -c ivshmem-server -s h -l help -d 'Show this help'
complete -c ivshmem-server -l print-capabilities -d 'Print what this program can do as JSON, for programs that start it; all other options are ignored'
complete -c ivshmem-server -s v -l verbose -d 'Print each join and leave on stdout; needs -F'
complete -c ivshmem-server -s F -l foreground -d 'Stay in the foreground; the default is to go to the background'
complete -c ivshmem-server -l memfd -d 'Share anonymous, sealed memory: no client can shrink it'
complete -c ivshmem-server -l size-exact -d 'Do not round the size up to a power of two: it must be a multiple of the page size. For QEMU\'s ivshmem-flat; a QEMU with ivshmem-doorbell aborts if the size is no power of two'
complete -c ivshmem-server -l keep -d 'Do not remove the object of -M at the end'
complete -c ivshmem-server -l no-control -d 'Make no control socket'
complete -c ivshmem-server -l hint -d 'Once listening, print commands that attach a QEMU, list the peers and interrupt them'
complete -c ivshmem-server -l supervise -d 'Keep a server running: start it again whenever it ends, and keep its clients meanwhile. SIGHUP starts the program file anew (an upgrade)'
complete -c ivshmem-server -s V -l version -d 'Print version'
