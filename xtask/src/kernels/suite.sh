# The capture suite: every test by itself, with a limit, the kernel's complaints counted against it.

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
