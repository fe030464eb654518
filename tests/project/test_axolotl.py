"""The plugin, through axolotl's own command, in an environment of its own (`make test-axolotl` makes it).

Its losses are those of `QTargetSFTTrainer` on the same batches, from the same weights.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import tiny
import yaml
from training import warm_model


ROOT = Path(__file__).parents[2]
BIN = Path(os.environ.get("AXOLOTL_VENV", ROOT / ".venv-axolotl")) / "bin"
PLUGIN = "trl_qtarget.integrations.axolotl.QTargetPlugin"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BIN / "axolotl").is_file(), reason="no environment with axolotl: `make test-axolotl`"),
]

TRAINING = {"learning_rate": 0.01, "lr_scheduler": "constant", "max_steps": 4, "gradient_accumulation_steps": 2}
LORA = {"lora_r": 4, "lora_alpha": 16, "lora_dropout": 0.0, "lora_target_modules": ["q_proj", "v_proj"]}
CASES = {
    "padded": ({"method": "asft", "lam": 0.1, "prior": "base"}, {}),
    "packed": ({"method": "iw_sft", "prior": "base"}, {"sample_packing": True}),
    "lora": ({"method": "target_sft", "eta": 0.3}, {"adapter": "lora", **LORA}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("axolotl")
    warm_model().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    rows = tiny.chat_dataset(96)
    (folder / "chats.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def run(command: list[str]) -> subprocess.CompletedProcess:
    paths = [str(ROOT), str(ROOT / "tests" / "support")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "AXOLOTL_DO_NOT_TRACK": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def axolotl(folder: Path, name: str, **recipe) -> tuple[subprocess.CompletedProcess, Path]:
    """Train by axolotl's command; its output and its folder."""
    output = folder / name
    recipe = {
        "base_model": str(folder / "model"),
        "plugins": [PLUGIN, "axolotl_recorder.Recorder"],
        "datasets": [{"path": str(folder / "chats.jsonl"), "ds_type": "json", "type": "chat_template"}],
        "dataset_prepared_path": str(folder / f"prepared-{name}"),
        "output_dir": str(output),
        "sequence_len": 64,
        "micro_batch_size": 4,
        "optimizer": "adamw_torch",
        "attn_implementation": "eager",
        "use_cpu": True,
        "bf16": False,
        "tf32": False,
        "logging_steps": 1,
        "save_steps": 4,
        **TRAINING,
        **recipe,
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return run([str(BIN / "axolotl"), "train", str(file), "--launcher", "python"]), output


@pytest.mark.parametrize("name", CASES)
def test_trains_as_our_trainer_does(folder, name):
    target, recipe = CASES[name]
    done, output = axolotl(folder, name, qtarget=target, **recipe)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]

    lora = {"r": LORA["lora_r"], "lora_alpha": LORA["lora_alpha"], "target_modules": LORA["lora_target_modules"]}
    replay = {
        "folder": str(output),
        "model": str(folder / "model"),
        "lora": lora if recipe.get("adapter") else None,
        "qtarget": target,
        "options": {
            "learning_rate": TRAINING["learning_rate"],
            "lr_scheduler_type": TRAINING["lr_scheduler"],
            "max_steps": TRAINING["max_steps"],
            "gradient_accumulation_steps": TRAINING["gradient_accumulation_steps"],
        },
    }
    file = folder / f"replay-{name}.json"
    file.write_text(json.dumps(replay))
    again = run([str(BIN / "python"), str(ROOT / "tests" / "support" / "axolotl_replay.py"), str(file)])
    assert again.returncode == 0, again.stderr[-4000:]

    state = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())
    ours = [line for line in state["log_history"] if "loss" in line]
    truth = json.loads((output / "replayed.json").read_text())
    assert len(ours) == len(truth) == TRAINING["max_steps"]
    for line, true in zip(ours, truth, strict=True):
        for column in ("loss", "grad_norm", "target/nll", "target/trust", "num_tokens"):
            assert line[column] == pytest.approx(true[column], rel=1e-5), column
    saved = json.loads((output / "qtarget_config.json").read_text())
    assert saved["method"] == target["method"]
    assert "### Training target" in (output / "README.md").read_text()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({}, "the recipe has no `qtarget`"),
        ({"qtarget": {"method": "asft", "eta": 0.5}}, "`eta` is not used by `method='asft'`"),
        ({"qtarget": "sft", "use_eaft": True}, "`use_eaft` makes another loss than that of `qtarget`"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_refused_before_training(folder, recipe, message):
    done, output = axolotl(folder, "refused", **recipe)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
    assert not (output / "recorded.pt").exists()
