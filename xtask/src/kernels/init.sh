#!/bin/sh
# The guest's first process: mounts, runs every test by itself, says how each went, ends the machine.
# Lines that the host reads: "@test OUTCOME STARTED ENDED NAME" (guest uptime in seconds), "@done".
export PATH=/usr/bin:/sbin:/bin HOME=/root RUST_BACKTRACE=1
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
mount -t tmpfs run /run; mount -t tmpfs tmp /tmp; mkdir -p /run/netns
mount -t cgroup2 cgroup /sys/fs/cgroup
for module in veth bridge sch_ingress cls_bpf; do
    modprobe "$module" || echo "cannot load $module"
done
ip link set lo up
# The BIOS left a line without an end.
echo

# How much slower than the host emulation is, where a test has a limit of time.
export CULVERT_SLOW_MACHINE=6
CULVERT_EXPECTED_GUARD=$(sed -n 's/.*culvert\.guard=\([a-z]*\).*/\1/p' /proc/cmdline)
export CULVERT_EXPECTED_GUARD

for suite in /suites/*; do
    for test in $("$suite" --list --format terse | sed -n 's/: test$//p'); do
        dmesg -c > /dev/null
        read -r started rest < /proc/uptime
        outcome=ok
        timeout -k 5 120 "$suite" --exact "$test" --test-threads=1 --nocapture \
            > /tmp/output 2>&1 || outcome=FAILED
        read -r ended rest < /proc/uptime
        dmesg > /tmp/dmesg
        grep -qE 'BUG:|WARNING:|Oops|Call Trace' /tmp/dmesg && outcome=FAILED
        if [ $outcome = FAILED ]; then
            tail -n 60 /tmp/output
            tail -n 40 /tmp/dmesg
        fi
        echo "@test $outcome $started $ended $test"
    done
done
echo "@done"
poweroff -f
