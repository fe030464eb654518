"""`examples/multi_node`: its scripts train on two nodes and resume, Accelerate understands its configurations."""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from launch import environment
from nodes import loopback_nodes, run_nodes
from safetensors.torch import load_file
from training import TRL_BEFORE_1_15, warm_model
from trl import ModelConfig, SFTConfig, TrlParser

from trl_qtarget import QTargetConfig


EXAMPLE = Path(__file__).parents[2] / "examples" / "multi_node"
# What `trl-qtarget sft --accelerate_config` knows by name.
CONFIGS = [Path(__file__).parents[2] / "trl_qtarget" / "cli" / "sequence_parallel.yaml"]


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    """Arguments of `train.py`: a model, a reference model and data from disk, and a checkpoint every other step."""
    for name, model in {"model": warm_model(), "reference": warm_model(steps=12)}.items():
        model.save_pretrained(tmp_path / name)
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    tiny.text_dataset().to_json(tmp_path / "data.jsonl")
    options = {
        "model_name_or_path": tmp_path / "model",
        "ref_model": tmp_path / "reference",
        "dataset_name": tmp_path / "data.jsonl",
        "output_dir": tmp_path / "out",
        "method": "asft",
        "learning_rate": 0.02,
        "per_device_train_batch_size": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
    }
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def variables(tmp_path: Path) -> dict[str, str]:
    """Of the environment: this test's Python, no network, and a cache of its own."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {"PATH": path, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}


def steps_of(checkpoint: Path) -> list[int]:
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [line["step"] for line in history if "loss" in line]


def moved(tmp_path: Path) -> bool:
    """Whether every tensor of the trained model is finite and another one than at the start."""
    start, trained = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    assert start.keys() == trained.keys()
    return all(
        value.isfinite().all() and not torch.equal(value.float(), start[name]) for name, value in trained.items()
    )


@pytest.mark.skipif(TRL_BEFORE_1_15, reason="the transformers of its time reads an optimiser to 'cpu:0', and fails")
@pytest.mark.slow
def test_torchrun_on_two_nodes_trains_and_resumes(nodes, arguments, tmp_path):
    def start(*more: str) -> str:
        command = ["bash", str(EXAMPLE / "torchrun.sh"), *arguments, *more]
        jobs = [
            ["env", f"NODE_RANK={node.rank}", f"HEAD={node.head}", f"PORT={node.port}", *command] for node in nodes
        ]
        return "".join(run_nodes(nodes, jobs, tmp_path, NODES="2", PROCESSES="1", **variables(tmp_path)))

    output = start("--max_steps", "2")
    assert output.count("Starting from the beginning") == 1
    assert "the prior is the reference model" in output
    # What a job leaves behind that is interrupted while it writes a checkpoint.
    (tmp_path / "out" / "checkpoint-3").mkdir()
    assert f"Resuming from {tmp_path}/out/checkpoint-2" in start("--max_steps", "4")
    assert steps_of(tmp_path / "out" / "checkpoint-4") == [1, 2, 3, 4]
    assert moved(tmp_path)


@pytest.fixture
def slurm(tmp_path):
    """The environment of a job of two nodes, with an `srun` that starts both here, on loopback."""
    commands = tmp_path / "bin"
    commands.mkdir()

    def command(name: str, text: str) -> None:
        (commands / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (commands / name).chmod(0o755)

    command("scontrol", f'if [ "$1" = show ]; then echo localhost; else echo "$@" > {tmp_path}/asked; fi')
    command(
        "srun",
        'while [[ $1 == -* ]]; do shift; done\nSLURM_NODEID=0 "$@" & SLURM_NODEID=1 "$@" & wait -n && wait -n',
    )
    own = variables(tmp_path)
    return own | {
        "PATH": os.pathsep.join([str(commands), own["PATH"]]),
        "SLURM_SUBMIT_DIR": str(EXAMPLE),
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_JOB_ID": str(loopback_nodes()[0].port),
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
    }


@pytest.mark.distributed
def test_slurm_script_trains_with_zero3(slurm, arguments, tmp_path):
    command = ["bash", str(EXAMPLE / "slurm.sbatch"), *arguments, "--max_steps", "2"]
    [output] = run_nodes(loopback_nodes()[:1], [command], tmp_path, **slurm)
    assert "the prior is the reference model" in output
    shards = list((tmp_path / "out" / "checkpoint-2").glob("global_step2/*optim_states.pt"))
    assert len(shards) == 2
    assert moved(tmp_path)


def test_slurm_script_requeues_its_job_before_the_time_is_up(slurm, tmp_path):
    (tmp_path / "bin" / "srun").write_text(f"#!/usr/bin/env bash\ntouch {tmp_path}/running; sleep 5\n")
    job = subprocess.Popen(["bash", str(EXAMPLE / "slurm.sbatch")], env=environment() | slurm)
    while not (tmp_path / "running").exists():
        assert job.poll() is None
        time.sleep(0.05)
    time.sleep(0.2)  # until the script waits
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 0
    assert (tmp_path / "asked").read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n"


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sbatch"])
def test_script_is_valid_bash(script):
    subprocess.run(["bash", "-n", str(EXAMPLE / script)], check=True)


def validated(file: str) -> Namespace:
    """What `accelerate launch` makes of a configuration, on the second of two machines."""
    assert load_config_from_file(str(EXAMPLE / file)).mixed_precision == "bf16"
    of_the_job = (
        "--num_machines 2 --num_processes 16 --machine_rank 1 --main_process_ip head --main_process_port 29500"
    )
    parser = launch_command_parser()
    given = parser.parse_args(["--config_file", str(EXAMPLE / file), *of_the_job.split(), "train.py"])
    result, _, _ = _validate_launch_command(given)
    assert (result.num_machines, result.num_processes, result.machine_rank) == (2, 16, 1)
    assert result.mixed_precision == "bf16"
    return result


def test_zero3_configuration():
    result = validated("zero3.yaml")
    assert result.use_deepspeed
    assert result.zero_stage == 3
    assert result.deepspeed_multinode_launcher == "standard"


@pytest.mark.parametrize("file", ["sequence_parallel.yaml", *CONFIGS])
def test_sequence_parallel_configuration(file):
    result = validated(file)
    assert result.use_deepspeed and result.use_parallelism_config
    assert result.zero_stage == 3
    assert (result.parallelism_config_sp_size, result.parallelism_config_sp_backend) == (8, "deepspeed")
    assert result.parallelism_config_sp_attn_implementation == "flash_attention_2"


def test_long_context_recipe_is_one_of_its_script(tmp_path):
    """Its arguments are understood, and its attention is the one that the configuration splits rows for."""
    recipe = yaml.safe_load((EXAMPLE / "long_context.yaml").read_text())
    parser = TrlParser((SFTConfig, QTargetConfig, ModelConfig))
    options = recipe | {"output_dir": str(tmp_path), "use_cpu": True}
    training, target, model = parser.parse_dict(options)
    assert (training.max_length, training.per_device_train_batch_size, target.method) == (262144, 1, "target_sft")
    assert model.attn_implementation == validated("sequence_parallel.yaml").parallelism_config_sp_attn_implementation


def test_fsdp2_configuration():
    result = validated("fsdp2.yaml")
    assert result.use_fsdp
    assert result.fsdp_version == 2
    assert result.fsdp_auto_wrap_policy == "TRANSFORMER_BASED_WRAP"
