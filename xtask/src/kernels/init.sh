#!/bin/sh
# The guest's first process: mounts, does the job that the command line names, ends the machine.
# Lines that the host reads: "@test OUTCOME STARTED ENDED NAME" (guest uptime in seconds), "@done".
export PATH=/usr/bin:/sbin:/bin HOME=/root RUST_BACKTRACE=1
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
mount -t tmpfs run /run; mount -t tmpfs tmp /tmp; mkdir -p /run/netns
mount -t cgroup2 cgroup /sys/fs/cgroup
for module in veth tcp_diag bridge sch_ingress cls_bpf act_mirred nft_chain_nat nft_nat virtio_pci virtio_blk; do
    modprobe "$module" || echo "cannot load $module"
done
ip link set lo up
# The BIOS left a line without an end.
echo

job=$(sed -n 's/.*culvert\.job=\([a-z]*\).*/\1/p' /proc/cmdline)
. "/$job.sh"
echo "@done"
poweroff -f
