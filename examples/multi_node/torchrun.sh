#!/usr/bin/env bash
# One machine's part of a job, with plain torchrun (DDP). Run the same line on every machine, each with its NODE_RANK:
#
#   NODES=2 NODE_RANK=0 HEAD=10.0.0.1 bash torchrun.sh --model_name_or_path ... --dataset_name ... --output_dir ...
#
# HEAD is the address (IPv4, not a name) by which the others reach the machine with NODE_RANK=0. Variables with a
# default: PORT (any free one on the head), PROCESSES (per machine; a number, or `gpu` for one per GPU), JOB (a name),
# RESTARTS (how often a failed job starts again).
set -euo pipefail

: "${NODES:?how many machines}" "${NODE_RANK:?which machine this is, from 0}" "${HEAD:?address of machine 0}"

# The address by which the others reach this machine: the one it would itself call the head from. Else torchrun gives
# out the host name, which on many machines stands for 127.0.0.1, and the others wait for a machine that never answers.
address=$(python -c '
import socket, sys
caller = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
caller.connect((sys.argv[1], 1))  # sends nothing
print(caller.getsockname()[0])' "$HEAD")

# NCCL and gloo choose a network themselves. Where they choose wrong, name the interface of the address above:
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0

options=(
    --nnodes "$NODES"
    --nproc_per_node "${PROCESSES:-gpu}"
    # With c10d the machines agree on every start: when one fails, all restart together, and train.py resumes.
    --rdzv_backend c10d
    --rdzv_endpoint "$HEAD:${PORT:-29500}"
    --rdzv_id "${JOB:-qtarget}"
    # Said, not guessed: torchrun looks HEAD up among the addresses of this machine's host name.
    --rdzv_conf "is_host=$([ "$NODE_RANK" = 0 ] && echo true || echo false)"
    --local_addr "$address"
    --max_restarts "${RESTARTS:-3}"
)
# As a module of the `python` in use, so that a torchrun of another environment is not taken.
exec python -m torch.distributed.run "${options[@]}" "$(dirname "$0")/train.py" "$@"
