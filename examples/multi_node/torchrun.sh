#!/usr/bin/env bash
# One machine's part of a job, with plain torchrun (DDP). Run the same line on every machine, each with its NODE_RANK:
#
#   NODES=2 NODE_RANK=0 HEAD=10.0.0.1 bash torchrun.sh --model_name_or_path ... --dataset_name ... --output_dir ...
#
# HEAD is an address of the machine with NODE_RANK=0 that all others reach. Variables with a default: PORT (any free one
# on the head), PROCESSES (per machine; a number, or `gpu` for as many as there are GPUs), JOB (a name).
set -euo pipefail

: "${NODES:?how many machines}" "${NODE_RANK:?which machine this is, from 0}" "${HEAD:?address of machine 0}"

# On some machines the host name stands for an address that the others do not reach. Then name the interface that they
# do reach: export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0

options=(
    --nnodes "$NODES"
    --nproc_per_node "${PROCESSES:-gpu}"
    # With c10d the machines agree on every start: when one fails, all restart together, and train.py resumes.
    --rdzv_backend c10d
    --rdzv_endpoint "$HEAD:${PORT:-29500}"
    --rdzv_id "${JOB:-qtarget}"
    # Said, not guessed: torchrun compares HEAD with this machine's host name, and finds no head if HEAD is an address
    # of another network, or two heads if host names are alike.
    --rdzv_conf "is_host=$([ "$NODE_RANK" = 0 ] && echo true || echo false)"
    --max_restarts "${RESTARTS:-3}"
)
# As a module of the `python` in use, so that a torchrun of another environment is not taken.
exec python -m torch.distributed.run "${options[@]}" "$(dirname "$0")/train.py" "$@"
