#!/bin/sh
# The first process of a test machine. Makes what the tests need of a system, runs them, and turns
# the machine off. What it says goes to the second serial port, line by line: `lacks WORDS`,
# `tier NAME`, what the tests print, `ended NAME`, and at last `done`; what the kernel says stays
# on the first. From the kernel's command line come HIDE_BTF, FILTER and
# PICOMESH_TEST_SLOWNESS as variables.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TMPDIR=/tmp
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
mount -t cgroup2 cgroup2 /sys/fs/cgroup

while read -r module; do
    insmod "/modules/$module" || echo "insmod $module failed"
done </modules/order
ip link set lo up
# The kernel gives a first process 1,024; a hundred pods take more.
ulimit -n 65536
if [ -n "$HIDE_BTF" ]; then
    mount -t tmpfs none /sys/kernel/btf
fi

exec >/dev/ttyS1 2>&1
echo "kernel $(uname -r)"
[ -e /sys/kernel/btf/vmlinux ] || echo "lacks BTF"
[ -e /proc/net/if_inet6 ] || echo "lacks IPv6"

echo "tier bpf"
/tests/bpf --color never --test-threads 2 $FILTER
echo "ended bpf"

export PICOMESH_AGENT=/tests/picomesh-agent
echo "tier mesh"
while read -r test; do
    /tests/mesh --color never --exact "$test"
done </tests/smoke
echo "ended mesh"
echo "done"
# What was written must have left the port before the power does.
sleep 1
poweroff -f
