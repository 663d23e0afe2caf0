# SPDX-License-Identifier: GPL-2.0-or-later
# Made by `make papers` from the program's options. Do not edit.
complete -c ivshmem-bench -s S -l socket -d 'Use the server at this socket instead of starting one' -r -F
complete -c ivshmem-bench -s n -l vectors -d 'Vectors of each peer; with -S the server determines it' -r
complete -c ivshmem-bench -l only -d 'Measure only this; may be given more than once' -r -f -a "doorbell\t'Doorbell round trips between two peers'
memory\t'Copies to and from the shared memory'
join\t'The time to join'"
complete -c ivshmem-bench -l trips -d 'Doorbell round trips of each kind in each round' -r
complete -c ivshmem-bench -s r -l rounds -d 'Rounds; library and bare system calls take turns in each' -r
complete -c ivshmem-bench -l joins -d 'Clients that join, one after another' -r
complete -c ivshmem-bench -s h -l help -d 'Show this help'
complete -c ivshmem-bench -l overwrite -d 'With -S: also measure writing, which destroys the content of the shared memory'
complete -c ivshmem-bench -s j -l json -d 'Write one JSON object instead of a table'
complete -c ivshmem-bench -s V -l version -d 'Print version'
