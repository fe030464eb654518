#!/usr/bin/env bash
# One machine's part of a job, with plain torchrun (DDP). Run the same line on every machine, each with its NODE_RANK:
#
#   NODES=2 NODE_RANK=0 HEAD=10.0.0.1 bash torchrun.sh --model_name_or_path ... --dataset_name ... --output_dir ...
#
# HEAD is the name or address by which every machine reaches the one with NODE_RANK=0. Variables with a default: PORT
# (any that is free on the head) and PROCESSES (on this machine: a number, or `gpu` for one per GPU).
#
# After a failure run the line again on every machine: train.py goes on from the last checkpoint.
set -euo pipefail

: "${NODES:?how many machines}" "${NODE_RANK:?which machine this is, from 0}" "${HEAD:?address of machine 0}"

# NCCL and gloo choose a network by themselves, perhaps one that the other machines are not in. Then name the interface:
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0

options=(
    --nnodes "$NODES"
    --node_rank "$NODE_RANK"
    --nproc_per_node "${PROCESSES:-gpu}"
    # All machines meet at this address. It is given, not looked up: on many machines the host name stands for
    # 127.0.0.1, and torchrun's `c10d` rendezvous would send the others there.
    --master_addr "$HEAD"
    --master_port "${PORT:-29500}"
)
# As a module of the `python` in use, so that a torchrun of another environment is not taken.
exec python -m torch.distributed.run "${options[@]}" "$(dirname "$0")/train.py" "$@"
