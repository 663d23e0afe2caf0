# SPDX-License-Identifier: GPL-2.0-or-later
# Made by `make papers` from the program's options. Do not edit.
# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_ivshmem_ctl_global_optspecs
    string join \n S/socket= control= d/directory= j/json h/help V/version
end

function __fish_ivshmem_ctl_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_ivshmem_ctl_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_ivshmem_ctl_using_subcommand
    set -l cmd (__fish_ivshmem_ctl_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c ivshmem-ctl -n "__fish_ivshmem_ctl_needs_command" -s S -l socket -d 'The server\'s socket; its control socket has the same path and ".control" [default: /tmp/ivshmem_socket]' -r -F
complete -c ivshmem-ctl -n "__fish_ivshmem_ctl_needs_command" -l control -d 'The control socket itself, for a server with --control' -r -F
complete -c ivshmem-ctl -n "__fish_ivshmem_ctl_needs_command" -s d -l directory -d 'All control sockets in DIR and in its directories: those whose name ends in ".control"' -r -f -a "(__fish_complete_directories)"
complete -c ivshmem-ctl -n "__fish_ivshmem_ctl_needs_command" -s j -l json -d 'Write one JSON object a line'
complete -c ivshmem-ctl -n "__fish_ivshmem_ctl_needs_command" -s h -l help -d 'Print help'
complete -c ivshmem-ctl -n "__fish_ivshmem_ctl_needs_command" -s V -l version -d 'Print version'
complete -c ivshmem-ctl -n "__fish_ivshmem_ctl_needs_command" -f -a "status" -d 'Show the server and its peers: process, user, program, name of the virtual machine, since when, and how many messages are not sent or not read'
complete -c ivshmem-ctl -n "__fish_ivshmem_ctl_needs_command" -f -a "watch" -d 'Print each client that joins, leaves or is refused, until the server ends'
complete -c ivshmem-ctl -n "__fish_ivshmem_ctl_needs_command" -f -a "disconnect" -d 'End the connection of a client. Its virtual machine goes on, but hears of no peer any more, and cannot connect again'
complete -c ivshmem-ctl -n "__fish_ivshmem_ctl_needs_command" -f -a "metrics" -d 'Print counters as OpenMetrics text, which Prometheus reads'
complete -c ivshmem-ctl -n "__fish_ivshmem_ctl_needs_command" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c ivshmem-ctl -n "__fish_ivshmem_ctl_using_subcommand status" -s S -l socket -d 'The server\'s socket; its control socket has the same path and ".control" [default: /tmp/ivshmem_socket]' -r -F
complete -c ivshmem-ctl -n "__fish_ivshmem_ctl_using_subcommand status" -l control -d 'The control socket itself, for a server with --control' -r -F
complete -c ivshmem-ctl -n "__fish_ivshmem_ctl_using_subcommand status" -s d -l directory -d 'All control sockets in DIR and in its directories: those whose name ends in ".control"' -r -f -a "(__fish_complete_directories)"
complete -c ivshmem-ctl -n "__fish_ivshmem_ctl_using_subcommand status" -s j -l json -d 'Write one JSON object a line'
complete -c ivshmem-ctl -n "__fish_ivshmem_ctl_using_subcommand status" -s h -l help -d 'Print help'
complete -c ivshmem-ctl -n "__fish_ivshmem_ctl_using_subcommand watch" -s S -l socket -d 'The server\'s socket; its control socket has the same path and ".control" [default: /tmp/ivshmem_socket]' -r -F
complete -c ivshmem-ctl -n "__fish_ivshmem_ctl_using_subcommand watch" -l control -d 'The control socket itself, for a server with --control' -r -F
complete -c ivshmem-ctl -n "__fish_ivshmem_ctl_using_subcommand watch" -s d -l directory -d 'All control sockets in DIR and in its directories: those whose name ends in ".control"' -r -f -a "(__fish_complete_directories)"
complete -c ivshmem-ctl -n "__fish_ivshmem_ctl_using_subcommand watch" -s j -l json -d 'Write one JSON object a line'
complete -c ivshmem-ctl -n "__fish_ivshmem_ctl_using_subcommand watch" -s h -l help -d 'Print help'
complete -c ivshmem-ctl -n "__fish_ivshmem_ctl_using_subcommand disconnect" -s S -l socket -d 'The server\'s socket; its control socket has the same path and ".control" [default: /tmp/ivshmem_socket]' -r -F
complete -c ivshmem-ctl -n "__fish_ivshmem_ctl_using_subcommand disconnect" -l control -d 'The control socket itself, for a server with --control' -r -F
complete -c ivshmem-ctl -n "__fish_ivshmem_ctl_using_subcommand disconnect" -s d -l directory -d 'All control sockets in DIR and in its directories: those whose name ends in ".control"' -r -f -a "(__fish_complete_directories)"
complete -c ivshmem-ctl -n "__fish_ivshmem_ctl_using_subcommand disconnect" -s j -l json -d 'Write one JSON object a line'
complete -c ivshmem-ctl -n "__fish_ivshmem_ctl_using_subcommand disconnect" -s h -l help -d 'Print help'
complete -c ivshmem-ctl -n "__fish_ivshmem_ctl_using_subcommand metrics" -s S -l socket -d 'The server\'s socket; its control socket has the same path and ".control" [default: /tmp/ivshmem_socket]' -r -F
complete -c ivshmem-ctl -n "__fish_ivshmem_ctl_using_subcommand metrics" -l control -d 'The control socket itself, for a server with --control' -r -F
complete -c ivshmem-ctl -n "__fish_ivshmem_ctl_using_subcommand metrics" -s d -l directory -d 'All control sockets in DIR and in its directories: those whose name ends in ".control"' -r -f -a "(__fish_complete_directories)"
complete -c ivshmem-ctl -n "__fish_ivshmem_ctl_using_subcommand metrics" -l http -d 'Read an HTTP request from stdin and write the response to stdout, for a systemd socket unit with Accept=yes, or inetd'
complete -c ivshmem-ctl -n "__fish_ivshmem_ctl_using_subcommand metrics" -s j -l json -d 'Write one JSON object a line'
complete -c ivshmem-ctl -n "__fish_ivshmem_ctl_using_subcommand metrics" -s h -l help -d 'Print help'
complete -c ivshmem-ctl -n "__fish_ivshmem_ctl_using_subcommand help; and not __fish_seen_subcommand_from status watch disconnect metrics help" -f -a "status" -d 'Show the server and its peers: process, user, program, name of the virtual machine, since when, and how many messages are not sent or not read'
complete -c ivshmem-ctl -n "__fish_ivshmem_ctl_using_subcommand help; and not __fish_seen_subcommand_from status watch disconnect metrics help" -f -a "watch" -d 'Print each client that joins, leaves or is refused, until the server ends'
complete -c ivshmem-ctl -n "__fish_ivshmem_ctl_using_subcommand help; and not __fish_seen_subcommand_from status watch disconnect metrics help" -f -a "disconnect" -d 'End the connection of a client. Its virtual machine goes on, but hears of no peer any more, and cannot connect again'
complete -c ivshmem-ctl -n "__fish_ivshmem_ctl_using_subcommand help; and not __fish_seen_subcommand_from status watch disconnect metrics help" -f -a "metrics" -d 'Print counters as OpenMetrics text, which Prometheus reads'
complete -c ivshmem-ctl -n "__fish_ivshmem_ctl_using_subcommand help; and not __fish_seen_subcommand_from status watch disconnect metrics help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
