#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""A program that the supervisor starts in place of the server: it does what a test says over DIR/control.

DIR is the directory of the socket that the command line names with -S. If DIR/die exists, the program exits with status
3 at once. It uses only the standard library, and implements the protocol of sd_notify(3) itself.
"""

import os
import signal
import socket
import struct
import sys
import time

DIR = os.path.dirname(sys.argv[sys.argv.index("-S") + 1])
if os.path.exists(DIR + "/die"):
    sys.exit(3)
NOTIFY = os.environ["NOTIFY_SOCKET"]
COUNT = int(os.environ.get("LISTEN_FDS", "0"))
NAMES = os.environ.get("LISTEN_FDNAMES", "").split(":")
# What the server that ran before stored for itself. This program does not go on from there.
OF_SERVER = ["state", "mem", "sock"]
STORED = COUNT - sum(name in OF_SERVER for name in NAMES)

control = socket.socket(socket.AF_UNIX)
control.connect(DIR + "/control")
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
notify.connect(NOTIFY)


def say(line):
    control.sendall((line + "\n").encode())


def on_signal(number, _frame):
    say(f"signal {number}")
    os._exit(0)


def send(text, fds=()):
    if fds:
        socket.send_fds(notify, [text.encode()], fds)
    else:
        notify.send(text.encode())


def barrier():
    read, write = os.pipe()
    send("BARRIER=1", [write])
    os.close(write)
    assert os.read(read, 1) == b"", "the other end is closed"
    os.close(read)


def name_of(number):
    """Short names, but none that the server has: it would remove those that belong to no state."""
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    text = ""
    while True:
        text = digits[number % 36] + text
        number //= 36
        if number == 0:
            return "x" + text


def store(count, each):
    """Stores `count` names with `each` eventfds, whose value says the name."""
    start = time.monotonic()
    for number in range(count):
        fds = [os.eventfd(number + 1, os.EFD_NONBLOCK) for _ in range(each)]
        send(f"FDSTORE=1\nFDNAME={name_of(number)}\nFDPOLL=0", fds)
        for fd in fds:
            os.close(fd)
    barrier()
    return time.monotonic() - start


def check():
    """Whether each descriptor that came back is the one of its name."""
    if STORED == 0:
        return "0"
    if os.environ["LISTEN_PID"] != str(os.getpid()):
        return "wrong_LISTEN_PID"
    if NAMES == [""]:
        return "no_names"
    if len(NAMES) != COUNT:
        return f"{len(NAMES)}_names_for_{COUNT}_descriptors"
    for fd, name in enumerate(NAMES, 3):
        if name in OF_SERVER:
            continue
        value = os.eventfd_read(fd)
        os.eventfd_write(fd, value)
        if name_of(value - 1) != name:
            return f"{fd}_is_of_{name_of(value - 1)}_not_of_{name}"
    return str(STORED)


def linger(urgent):
    """Stores a connection whose close(2) would wait for a minute, and removes it: its client has passed a TCP socket with
    unsent data and SO_LINGER."""
    listener = socket.create_server(("127.0.0.1", 0))
    tcp = socket.create_connection(listener.getsockname())
    peer, _ = listener.accept()
    tcp.setblocking(False)
    try:
        while True:
            tcp.send(bytes(1 << 20))
    except BlockingIOError:
        pass
    tcp.setblocking(True)
    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))
    ours, client = socket.socketpair()
    socket.send_fds(client, [b"!"], [tcp.fileno()], socket.MSG_OOB if urgent else 0)
    send("FDSTORE=1\nFDNAME=linger\nFDPOLL=0", [ours.fileno()])
    barrier()
    # The supervisor is the last one that has it.
    for each in (tcp, client, ours):
        each.close()
    send("FDSTOREREMOVE=1\nFDNAME=linger")
    barrier()
    return peer


def in_child(action):
    pid = os.fork()
    if pid == 0:
        action()
        os._exit(0)
    os.waitpid(pid, 0)


def orphan():
    """Leaves a process without a parent, which ends; says when it has been reaped."""
    read, write = os.pipe()

    def middle():
        pid = os.fork()
        if pid == 0:
            os.write(write, str(os.getpid()).encode())
            os._exit(0)

    in_child(middle)
    pid = int(os.read(read, 20))
    while os.path.exists(f"/proc/{pid}"):
        time.sleep(0.001)


def foreign():
    in_child(lambda: send("FDSTORE=1\nFDNAME=evil", [0]))
    barrier()


# They never read.
PEERS = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, on_signal)
for of_server in OF_SERVER:
    if of_server in NAMES:
        send("FDSTOREREMOVE=1\nFDNAME=" + of_server)
blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
say(f"hello {os.getpid()} {STORED} {check()} {NOTIFY} {sorted(map(int, blocked))}")
signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))
for line in control.makefile():
    word, *words = line.split()
    if word == "store":
        say(f"{store(int(words[0]), int(words[1])):.3f}")
        continue
    if word == "remove":
        send("FDSTOREREMOVE=1\nFDNAME=" + name_of(int(words[0])))
    elif word == "ready":
        send("READY=1\nSTATUS=ready for the test")
    elif word == "long":
        for number in range(int(words[0])):
            send(f"FDSTORE=1\nFDNAME={number:0250}", [1])
    elif word == "linger":
        PEERS.extend([linger(False), linger(True)])
    elif word == "foreign":
        foreign()
    elif word == "orphan":
        orphan()
    elif word == "exit":
        sys.exit(int(words[0]))
    barrier()
    say("done")
