# SPDX-License-Identifier: GPL-2.0-or-later
# usage: sh -ec "$(cat trace.sh)" SERVER CLIENT TRACE COMMANDS
# Runs the commands of a recipe, and other servers, with strace in a mount namespace. What the servers do with files goes to
# TRACE.PID.
client=$1 trace=$2 commands=$3
for directory in /run /dev/shm; do mount -t tmpfs none "$directory"; done
mkdir /run/etc /run/bin
cp -a /etc/. /run/etc
mount --bind /run/etc /etc
systemd-sysusers --inline 'g kvm -' 'u ivshmem -'
mkdir -p /etc/ivshmem-server
echo 'vectors 2' >/etc/ivshmem-server/blue.conf
# -D: the server, not strace, is the child of the shell.
cat >/run/bin/ivshmem-server <<EOF
#!/bin/sh
exec strace -D -f -q -y -s 4096 -o "$trace.\$\$" -e trace=%file,connect,bind,flock "$0" "\$@"
EOF
chmod 755 /run/bin/ivshmem-server
PATH=/run/bin:$PATH
trap 'kill -KILL $(cat /run/ivshmem/*.pid /run/ivshmem-server.pid 2>/dev/null) 2>/dev/null || :' EXIT

# end SIGNAL PID : ends a server, and waits until it has gone and its trace is complete
end() {
    kill -"$1" "$2"
    while kill -0 "$2" 2>/dev/null; do sleep 0.01; done
    until grep -q "^$2 *+++" "$trace".*; do sleep 0.01; done
}
children() {
    cat "/proc/$1/task/$1/children"
}

eval "$commands"
"$client" -S /run/ivshmem/red -e dump
supervisor=$(cat /run/ivshmem/red.pid)
before=$(children "$supervisor")
kill -HUP "$supervisor"
while [ "$(children "$supervisor")" = "$before" ] || [ -z "$(children "$supervisor")" ]; do sleep 0.01; done
"$client" -S /run/ivshmem/red -e dump
end TERM "$supervisor"

# A named memory, the default pid file, options from a file. Killed once: the next one takes over.
for signal in KILL TERM; do
    ivshmem-server -S /run/ivshmem/blue --config /etc/ivshmem-server/blue.conf --shm-mode 660
    "$client" -S /run/ivshmem/blue -e dump
    end $signal "$(cat /run/ivshmem-server.pid)"
done

# Other kinds of memory.
for memory in "--memfd --numa-node 0" "--shm-file /run/ivshmem/memory"; do
    # shellcheck disable=SC2086 # two words
    ivshmem-server -S /run/ivshmem/blue $memory
    "$client" -S /run/ivshmem/blue -e dump
    end TERM "$(cat /run/ivshmem-server.pid)"
done
