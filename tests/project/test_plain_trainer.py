"""The example of transformers' own `Trainer`, run where TRL is not installed, and what the package says there."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from training import SAME, warm_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from trl_qtarget import QTargetSFTTrainer


ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "plain_trainer.py"

# An import of TRL fails, as where it is not installed.
WITHOUT_TRL = """
import runpy, sys
sys.modules["trl"] = None
sys.path.insert(0, {root!r})
sys.argv = {command!r}
runpy.run_path({example!r}, run_name="__main__")
import trl_qtarget
for name in ("QTargetSFTTrainer", "inspect_target"):
    try:
        getattr(trl_qtarget, name)
    except ImportError as error:
        print(error)
"""


def test_example_trains_without_trl_as_the_trainer_of_trl_does(tmp_path):
    model, data, output = tmp_path / "model", tmp_path / "pairs.jsonl", tmp_path / "out"
    warm_model().save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    data.write_text("\n".join(json.dumps(row) for row in tiny.prompt_dataset(16)))
    command = ["plain_trainer.py", "--model", str(model), "--dataset", str(data), "--output_dir", str(output)]
    command += ["--method", "asft", "--ref_model", str(model), "--max_steps", "4", "--batch_size", "4", "--use_cpu"]
    code = WITHOUT_TRL.format(root=str(ROOT), command=[*command, "--learning_rate", "0.01"], example=str(EXAMPLE))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("QTargetSFTTrainer", "inspect_target"):
        assert f"`{name}` needs TRL, which is not installed: `pip install trl`." in done.stdout
    assert json.loads((output / "qtarget_config.json").read_text())["method"] == "asft"

    example = runpy.run_path(str(EXAMPLE))
    rows = tiny.prompt_dataset(16).map(
        example["tokenised"], fn_kwargs={"tokenizer": AutoTokenizer.from_pretrained(model), "longest": 1024}
    )
    trainer = QTargetSFTTrainer(
        AutoModelForCausalLM.from_pretrained(model),
        SFTConfig(
            str(tmp_path / "theirs"),
            max_steps=4,
            learning_rate=0.01,
            per_device_train_batch_size=4,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            report_to="none",
        ),
        train_dataset=rows.select_columns(["input_ids", "labels"]),
        qtarget_config="asft",
        ref_model=str(model),
    )
    trainer.train()
    state = json.loads((output / "trainer_state.json").read_text())
    ours, theirs = (
        [[line[name] for name in ("loss", "grad_norm", "target/nll")] for line in log if "loss" in line]
        for log in (state["log_history"], trainer.state.log_history)
    )
    assert len(ours) == 4
    for line, truth in zip(ours, theirs, strict=True):
        assert line == pytest.approx(truth, rel=SAME)
