#!/usr/bin/env bash
# Start one training on the nodes of any cluster: run the same line on each of them.
#   launch/multinode.sh [OPTIONS] -- FLAGS OF distcv.train
#   launch/multinode.sh --nodes 2 --node-rank 0 --head 10.0.0.1 -- --model resnet18   on 10.0.0.1
#   launch/multinode.sh --nodes 2 --node-rank 1 --head 10.0.0.1 -- --model resnet18   on the other
#   srun --ntasks-per-node=1 launch/multinode.sh -- --model resnet18                  under Slurm
#
#   --config FILE            launch file (launch/ddp.yaml)
#   --nodes N                NNODES, Slurm, or 1
#   --node-rank R            from 0 on, 0 on the head: NODE_RANK, Slurm, or 0
#   --head ADDRESS           name or address of the head: MASTER_ADDR, or Slurm's first node
#   --port P                 free on the head: MASTER_PORT, one made of Slurm's job id, or 29500
#   --processes-per-node K   the same on every node: NPROC_PER_NODE, Slurm's GPUs, the GPUs that
#                            torch sees, or 1
#   --max-restarts M         after a process fails, start all of them again, M times at most (0)
#   --module M               what is run on each (distcv.train; also distcv.doctor)
#
# The run folder must be shared by the nodes; the data need only be at the same path on each.
# SIGTERM, SIGUSR2 or Ctrl-C on one node stop the training on all: it saves, and the exit code is 75.

set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 2
}

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
config=$root/launch/ddp.yaml nodes='' node_rank='' head='' port='' processes_per_node='' max_restarts=0
module=distcv.train
while (($#)) && [[ $1 != -- ]]; do
    case $1 in
        -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
        --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
        --config | --nodes | --node-rank | --head | --port | --processes-per-node | --max-restarts | --module)
            (($# > 1)) || fail "$1 needs a value"
            name=${1#--}
            printf -v "${name//-/_}" %s "$2"
            shift 2
            ;;
        *) fail "unknown option $1: flags of distcv.train come after --" ;;
    esac
done
(($#)) && shift

# Whole numbers from $2 to $3; no leading zeros, which bash takes for octal.
check() {
    local value=${!1} name=${1//_/-}
    if ! [[ $value =~ ^(0|[1-9][0-9]{0,8})$ ]] || ((value < $2 || value > $3)); then
        fail "--$name is '$value': set it to a whole number from $2 to $3"
    fi
}

if [[ -z ${VIRTUAL_ENV:-} && -x $root/.venv/bin/accelerate ]]; then
    PATH=$root/.venv/bin:$PATH
fi
command -v accelerate >/dev/null || fail "accelerate is not on the PATH: activate its environment"
if [[ ! -f $config ]]; then
    [[ -f $root/$config ]] || fail "--config: there is no file $config"
    config=$root/$config
fi

nodes=${nodes:-${NNODES:-${SLURM_NNODES:-1}}}
check nodes 1 100000
node_rank=${node_rank:-${NODE_RANK:-${SLURM_NODEID:-0}}}
check node_rank 0 $((nodes - 1))
processes_per_node=${processes_per_node:-${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}}
if [[ -z $processes_per_node ]]; then
    processes_per_node=$(python3 -c 'import torch; print(max(1, torch.cuda.device_count()))')
fi
check processes_per_node 1 10000
check max_restarts 0 1000000
port=${port:-${MASTER_PORT:-}}

options=(--config_file "$config" --num_machines "$nodes" --machine_rank "$node_rank"
    --num_processes $((nodes * processes_per_node)) --max_restarts "$max_restarts")
if ((nodes == 1)); then
    port=${port:-0} # any free one
    check port 0 65535
else
    head=${head:-${MASTER_ADDR:-}}
    if [[ -z $head && -n ${SLURM_JOB_NODELIST:-} ]]; then
        # A step may have fewer nodes than its job, and node ranks are those of the step.
        hosts=$(scontrol show hostnames "${SLURM_STEP_NODELIST:-$SLURM_JOB_NODELIST}") || hosts=''
        head=${hosts%%$'\n'*}
    fi
    [[ -n $head ]] || fail "--head is missing: set it to the address of the node of rank 0"
    # Different for each job, and none that Linux gives out by itself (from 32768 on).
    port=${port:-$((${SLURM_JOB_ID:-0} ? 20000 + ${SLURM_JOB_ID:-0} % 12000 : 29500))}
    check port 1 65535

    # Gloo listens at the address of the machine's own name, often 127.0.1.1, and NCCL at the first
    # interface that it likes. The right one is that by which this node reaches the head, or, on a
    # head that calls itself 127.0.1.1, the rest of the world.
    found=$(
        python3 - "$head" <<'PYTHON'
import contextlib, ipaddress, psutil, socket, sys

def own_address(host):
    family, *_, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect(target)  # sends nothing
        return sock.getsockname()[0]

with contextlib.suppress(OSError):
    address = own_address(sys.argv[1])
    named = sys.argv[1] not in ("localhost", "127.0.0.1", "::1")
    if named and ipaddress.ip_address(address).is_loopback:
        address = own_address("198.51.100.1")
    for interface, held in psutil.net_if_addrs().items():
        if address in (one.address for one in held):
            print(interface, address)
PYTHON
    ) || found=''
    read -r interface address <<<"$found" || true
    if [[ -n $interface ]]; then
        export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}
        export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-=$interface} # = means no other such as eth10
    fi

    options+=(--main_process_ip "$head")
    if ((max_restarts > 0)); then
        # torchrun's c10d tells every node of a restart; its static way lets each find out. What it
        # would guess wrongly is told: who listens, and this node's address. Nodes that were told
        # don't count a restart, so its number can't tell old addresses from new: each start gets a
        # store of its own.
        options+=(--rdzv_backend c10d --rdzv_conf "is_host=$((node_rank == 0)),read_timeout=600")
        export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
        [[ -z $address ]] || export PET_LOCAL_ADDR=${PET_LOCAL_ADDR:-$address}
    fi
fi

if ((nodes > 1)) && [[ $module == distcv.doctor ]]; then
    # Not by the launcher, which would itself wait for the nodes that are to be named, and name none.
    if grep -q '^use_cpu: *true' "$config"; then
        export ACCELERATE_USE_CPU=true
    fi
    export MASTER_ADDR=$head MASTER_PORT=$port
    export LOCAL_WORLD_SIZE=$processes_per_node WORLD_SIZE=$((nodes * processes_per_node))
    started=() code=0
    trap 'kill $(jobs -p)' TERM INT
    for ((local_rank = 0; local_rank < processes_per_node; local_rank++)); do
        LOCAL_RANK=$local_rank RANK=$((node_rank * processes_per_node + local_rank)) \
            python3 -m "$module" "$@" &
        started+=("$!")
    done
    for each in "${started[@]}"; do
        wait "$each" || code=$?
    done
    wait # a signal breaks off the one above
    exit "$code"
fi
if ((nodes > 1)); then
    # The launcher says nothing while it waits for nodes, and in the end only how many came.
    echo "node $node_rank of $nodes: waiting for the others at $head:$port (if nothing follows, run" \
        "--module distcv.doctor and no flags on all nodes: it names those that are missing)" >&2
fi

# A stop is asked for by a file. The launcher doesn't hear of it: it would break off the processes,
# and restart those that leave with 75.
if [[ -z ${DISTCV_STOP_FILE:-} ]]; then
    DISTCV_STOP_FILE=$(mktemp -u)
    trap 'rm -f "$DISTCV_STOP_FILE"' EXIT
fi
export DISTCV_STOP_FILE
export PET_SIGNALS_TO_HANDLE=SIGHUP,SIGQUIT # torchrun's
trap 'interrupted=1; : >>"$DISTCV_STOP_FILE"' TERM INT USR2
(
    trap '' TERM INT USR2
    exec python3 "$root/launch/accelerate_launch.py" "${options[@]}" --main_process_port "$port" \
        -m "$module" "$@"
) &
launcher=$!
while true; do
    interrupted='' code=0
    wait "$launcher" || code=$?
    [[ -n $interrupted ]] || break
    # While it waits for other nodes, it has no process yet that would see the file.
    if ! python3 -c 'import psutil, sys; sys.exit(not psutil.Process(int(sys.argv[1])).children())' \
        "$launcher" 2>/dev/null; then
        code=0
        kill -KILL "$launcher" || true
        { wait "$launcher" || code=$?; } 2>/dev/null
        ((code < 128)) || exit 75
        break
    fi
done
if ((code == 0)) && [[ -s $DISTCV_STOP_FILE ]]; then
    exit 75
fi
exit "$code"
