# SPDX-License-Identifier: GPL-2.0-or-later
# Made by `make papers` from the program's options. Do not edit.
complete -c ivshmem-client -s S -l socket -d 'The server\'s UNIX socket' -r -F
complete -c ivshmem-client -s e -l exec -d 'Run this command and do not read stdin; may be given several times: the commands run in order, until one fails' -r
complete -c ivshmem-client -l give-up -d 'After the end of the input, exit if there is no server for this long' -r
complete -c ivshmem-client -s n -l vectors -d 'Number of vectors that the server gives to each peer, 1 to 2048; must not be larger than that number [default: detected]' -r
complete -c ivshmem-client -s h -l help -d 'Show this help'
complete -c ivshmem-client -s v -l verbose -d 'Print more events'
complete -c ivshmem-client -s j -l json -d 'Write one JSON object a line, and no prompt'
complete -c ivshmem-client -s V -l version -d 'Print version'
