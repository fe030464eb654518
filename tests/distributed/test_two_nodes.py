"""Two nodes, each with a launcher and a network of its own, give the one-process result."""

import sys
from pathlib import Path

import pytest
from cells import Cell, Result, run
from launch import accelerate_launch, script_arguments
from nodes import Node, run_nodes
from test_scale import check


CELLS = [Cell("dft"), Cell("asft", "base", True)]
CELLS_SCRIPT = str(Path(__file__).parents[1] / "support" / "cells.py")


@pytest.fixture(scope="module")
def truths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return {cell: run(cell, str(folder), processes=1) for cell in CELLS}


def with_torchrun(node: Node, folder: Path) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    return [*command, "--node_rank", str(node.rank), "--master_addr", node.head, "--master_port", str(node.port)]


def with_split_rows(node: Node, folder: Path) -> list[str]:
    return with_zero3(node, folder, pieces=2)


def with_zero3(node: Node, folder: Path, pieces: int = 1) -> list[str]:
    command = accelerate_launch(folder, stage=3, partition_everything=True, pieces=pieces)
    # Without `standard` DeepSpeed would start the other nodes itself, over ssh.
    command += ["--num_machines", "2", "--deepspeed_multinode_launcher", "standard"]
    command += ["--machine_rank", str(node.rank)]
    return [*command, "--main_process_ip", node.head, "--main_process_port", str(node.port)]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("backend", "launcher"),
    [("ddp", with_torchrun), ("zero3-partitioned", with_zero3), ("sp2-zero3", with_split_rows)],
)
def test_two_nodes_give_the_one_process_result(backend, launcher, nodes, truths, tmp_path):
    arguments = [CELLS_SCRIPT, *script_arguments(CELLS, tmp_path)]
    run_nodes(nodes, [[*launcher(node, tmp_path), *arguments] for node in nodes], tmp_path)
    for cell, truth in truths.items():
        check(Result.load(tmp_path / str(cell)), truth, cell, backend)
