# Helpers shared by the scripts. Sourced, never run:  . "$(dirname "$0")/lib.sh"
#
# A script that sources this gets: `say`, `warn`, `die`, need_packages, and a ledger of the processes it started, which
# is emptied (by pid, last one first) when the script ends, however it ends.

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
LOCKSTEP=${LOCKSTEP:-$REPO/target/release/lockstep}
SCRIPT=${0##*/}

say()  { printf '%s\n' "$*"; }
warn() { printf '%s: %s\n' "$SCRIPT" "$*" >&2; }
die()  { warn "$*"; exit 1; }

# --- packages -----------------------------------------------------------------------------------------------------

# as_root COMMAND...: runs it as root, by sudo when we are not root; fails when neither is possible.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null 2>&1; then
        sudo "$@"
    else
        return 127
    fi
}

# need_packages PACKAGE...: installs those that are missing, and touches nothing when none is.
need_packages() {
    local missing=() package
    for package in "$@"; do
        # ${Status} reads "install ok installed"; a package that was removed is still known to dpkg.
        if ! dpkg-query -W -f='${Status}\n' "$package" 2>/dev/null | grep -q ' installed$'; then
            missing+=("$package")
        fi
    done
    [ ${#missing[@]} -eq 0 ] && return 0
    command -v apt-get >/dev/null 2>&1 ||
        die "these Debian packages are missing: ${missing[*]}. This machine has no apt-get; install what they contain by its own means."
    if [ "$(id -u)" -ne 0 ] && ! command -v sudo >/dev/null 2>&1; then
        die "these Debian packages are missing: ${missing[*]}. Run as root: apt-get install -y --no-install-recommends ${missing[*]}"
    fi
    say "installing ${missing[*]}"
    # An update may fail for one broken third-party source and still leave Debian's lists usable: the install decides.
    as_root env DEBIAN_FRONTEND=noninteractive apt-get update -qq </dev/null >/dev/null ||
        warn "apt-get update reported an error; going on with the package lists there are"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" </dev/null >/dev/null ||
        die "apt-get could not install ${missing[*]} (its message is above). Install them and run this again."
}

# What `cargo build` needs beyond Rust: a linker, and the C compiler that builds SQLite.
need_toolchain() {
    local cargo_home=${CARGO_HOME:-${HOME:-/root}/.cargo}
    if ! command -v cargo >/dev/null 2>&1 && [ -x "$cargo_home/bin/cargo" ]; then
        PATH=$cargo_home/bin:$PATH
    fi
    command -v cargo >/dev/null 2>&1 ||
        die "cargo is not on the PATH. Install Rust (https://rustup.rs), open a new shell and run this again."
    command -v cc >/dev/null 2>&1 || need_packages gcc libc6-dev
}

# --- processes ----------------------------------------------------------------------------------------------------

STARTED=()      # pids this script started and has not stopped yet
LEFTOVERS=()    # files and directories to remove at the end
KEEP_ON_FAILURE=no  # yes: a failed run leaves LEFTOVERS in place and says where they are

# start LOG COMMAND...: runs it in the background with output in LOG, remembers it; the pid is in $PID.
start() {
    local log=$1
    shift
    "$@" </dev/null >>"$log" 2>&1 &
    PID=$!
    STARTED+=("$PID")
}

alive() { kill -0 "$1" 2>/dev/null; }

# forget PID: it is no longer ours to stop.
forget() {
    local kept=() pid
    for pid in "${STARTED[@]}"; do
        [ "$pid" = "$1" ] || kept+=("$pid")
    done
    STARTED=("${kept[@]}")
}

# kill_hard PID: SIGKILL, as a machine that loses power; returns when the process is gone.
kill_hard() {
    kill -KILL "$1" 2>/dev/null || true
    wait "$1" 2>/dev/null || true
    forget "$1"
}

# stop PID [SECONDS]: SIGTERM, then SIGKILL when it has not ended in time. Fails when it had to be killed or ended non-zero.
stop() {
    local pid=$1 tenths=$((${2:-10} * 10)) status=0
    kill -TERM "$pid" 2>/dev/null || true
    while alive "$pid" && [ "$tenths" -gt 0 ]; do
        sleep 0.1
        tenths=$((tenths - 1))
    done
    if alive "$pid"; then
        warn "process $pid did not end ${2:-10} s after SIGTERM; killing it"
        kill -KILL "$pid" 2>/dev/null || true
    fi
    wait "$pid" 2>/dev/null || status=$?
    forget "$pid"
    return "$status"
}

# on_exit: a script calls this once, before it starts anything.
on_exit() {
    trap cleanup EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
}

# cleanup: the EXIT trap that on_exit sets.
cleanup() {
    local status=$? index
    trap - EXIT INT TERM
    for ((index = ${#STARTED[@]} - 1; index >= 0; index--)); do
        kill -TERM "${STARTED[index]}" 2>/dev/null || true
    done
    for ((index = ${#STARTED[@]} - 1; index >= 0; index--)); do
        stop "${STARTED[index]}" 5 2>/dev/null || true
    done
    if [ "$status" -ne 0 ] && [ "$KEEP_ON_FAILURE" = yes ] && [ ${#LEFTOVERS[@]} -gt 0 ]; then
        warn "logs and data are left in ${LEFTOVERS[*]}"
    elif [ ${#LEFTOVERS[@]} -gt 0 ]; then
        rm -rf "${LEFTOVERS[@]}"
    fi
    exit "$status"
}

# wait_for SECONDS WHAT COMMAND...: until COMMAND succeeds; otherwise says that WHAT did not happen, and fails.
wait_for() {
    local seconds=$1 what=$2 deadline
    shift 2
    deadline=$((SECONDS + seconds))
    until "$@" >/dev/null 2>&1; do
        if [ "$SECONDS" -ge "$deadline" ]; then
            warn "gave up after $seconds s waiting for $what"
            return 1
        fi
        sleep 0.1
    done
}

# wait_for_from PID LOG SECONDS WHAT COMMAND...: as wait_for, but fails at once, showing the log, when PID ends first.
wait_for_from() {
    local pid=$1 log=$2 seconds=$3 what=$4 deadline
    shift 4
    deadline=$((SECONDS + seconds))
    until "$@" >/dev/null 2>&1; do
        if ! alive "$pid"; then
            warn "a process ended while this script was waiting for $what. The end of its log $log:"
            tail -n 15 "$log" >&2
            return 1
        fi
        if [ "$SECONDS" -ge "$deadline" ]; then
            warn "gave up after $seconds s waiting for $what. The end of the log $log:"
            tail -n 15 "$log" >&2
            return 1
        fi
        sleep 0.1
    done
}

# port_taken ADDRESS PORT: somebody listens there, or on every address.
port_taken() {
    (exec 3<>"/dev/tcp/$1/$2") 2>/dev/null
}

# need_free_port ADDRESS PORT FOR-WHAT
need_free_port() {
    if port_taken "$1" "$2"; then
        die "$1:$2 is in use, and $3 needs it. Find the process with 'ss -ltnp sport = :$2', stop it and run this again."
    fi
}

# --- a cluster on this machine ------------------------------------------------------------------------------------
#
# Node N of a cluster in directory DIR: 127.0.0.N, replication port 5703, HTTP port 5705, DIR/nN/{data,run}, DIR/nN.log.

NODE_PIDS=()    # by node number

# need_cluster_ports N: the ports of nodes 1..N are free.
need_cluster_ports() {
    local n
    for ((n = 1; n <= $1; n++)); do
        need_free_port "127.0.0.$n" 5703 "node n$n (replication)"
        need_free_port "127.0.0.$n" 5705 "node n$n (HTTP)"
    done
}

# start_node DIR N [DATA-DIR] [EXTRA-ARGUMENT...]: starts node nN and waits until its API answers.
start_node() {
    local dir=$1 n=$2 data=${3:-$1/n$2/data}
    shift 2
    [ $# -gt 0 ] && shift
    mkdir -p "$data" "$dir/n$n/run"
    start "$dir/n$n.log" env RUST_LOG="${RUST_LOG:-info}" "$LOCKSTEP" node --name "n$n" \
        --listen "127.0.0.$n:5703" --http "127.0.0.$n:5705" \
        --data-dir "$data" --run-dir "$dir/n$n/run" --registry "sqlite:$dir/registry.db" "$@"
    NODE_PIDS[n]=$PID
    wait_for_from "$PID" "$dir/n$n.log" 20 "node n$n to answer on $dir/n$n/run/api.sock" node_ls "$dir" "$n" ||
        die "node n$n did not start"
}

# ctl DIR N ARGUMENT...: the lockstep command line, talking to node N of the cluster in DIR.
ctl() {
    local dir=$1 n=$2
    shift 2
    "$LOCKSTEP" --host "unix:$dir/n$n/run/api.sock" "$@" </dev/null
}

node_ls() { ctl "$1" "$2" node ls; }
