#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# usage: prepare.sh TREE
# Prepares the namespaces of the tests of libvirt: an /etc, /var/lib, /var/log and /var/cache of their own, the files of this
# project, which are below TREE/run/installed and TREE/etc, and libvirt's user.
set -eu
mkdir /run/etc
cp -a /etc/. /run/etc
rm -rf /run/etc/libvirt /run/etc/ivshmem-server
cp -r "$1"/etc/. /run/etc
mkdir /run/etc/libvirt
# The file has libvirt's defaults, except for what would reach the machine outside of these namespaces: the kernel's
# AppArmor or SELinux, and hugetlbfs.
cat >/run/etc/libvirt/qemu.conf <<EOF
security_driver = "none"
hugetlbfs_mount = []
EOF
mount --bind /run/etc /etc
for directory in /var/lib /var/log /var/cache; do mount -t tmpfs none "$directory"; done
# As Debian's package libvirt-daemon-system makes them.
mkdir -p /var/lib/libvirt /var/log/libvirt/qemu
systemd-sysusers --inline 'g kvm -' 'g libvirt-qemu -' 'u libvirt-qemu -:kvm "Libvirt Qemu" /var/lib/libvirt' \
    'm libvirt-qemu libvirt-qemu'
# libvirt's user may use KVM on a usual host. Where it may not, libvirt 9.0 probes QEMU again at each step, for 10 s.
if [ -c /dev/kvm ]; then
    cp -a /dev/kvm /run/kvm
    chown root:kvm /run/kvm
    chmod 660 /run/kvm
    mount --bind /run/kvm /dev/kvm
fi

cp -r "$1"/run/installed /run
systemd-sysusers /run/installed/lib/sysusers.d/ivshmem-server.conf
systemctl daemon-reload
systemctl restart systemd-journald
systemctl start libvirtd
