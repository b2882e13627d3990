# Helpers of the guest's workloads.

# say LINE: one whole line on the console, also when kernel messages are being written.
say() { printf '%s\n' "$*"; }

# fail REASON: the verdict, and off.
fail() {
    say "GUEST-FAIL $*"
    dmesg | tail -n 20
    sync &
    usleep 500000
    poweroff -f
    sleep 30
    exit 1
}

# disk N: the device of the N-th virtio disk, from 1.
disk() { printf '/dev/vd%s\n' "$(printf 'abcdefgh' | cut -c "$1")"; }

# now: milliseconds since boot, in steps of 10.
now() {
    read -r up idle </proc/uptime
    up="${up%.*}${up#*.}"
    # Drop leading zeros, which a shell would read as octal.
    up=${up#0}; up=${up#0}
    echo "$((up * 10))"
}

# io_errors: the kernel's complaints about a disk or a file system, if there are any.
io_errors() {
    dmesg | grep -E 'I/O error|critical (target|medium|space) error|blk_update_request|EXT4-fs (error|warning)|Remounting filesystem read-only|Aborting journal|is not a head|hung_task|blocked for more than'
}

# check_io_errors: fails when there are any.
check_io_errors() {
    errors=$(io_errors)
    [ -z "$errors" ] || fail "the kernel reports: $(printf '%s' "$errors" | head -n 1)"
}
