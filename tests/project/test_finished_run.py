"""A run that is done, started again: nothing is trained, and the model that is saved is the finished one."""

import json
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from thinned import one_of_each, thinned
from training import OPTIMIZERS, make_trainer, warm_model

from trl_qtarget import QTargetSFTTrainer
from trl_qtarget.cli import sft


sys.path.append(str(Path(__file__).parents[2] / "examples" / "multi_node"))

import train as example


# Six batches an epoch: the end lies inside of an epoch, at its end, and after several.
ENDS = [3, 6, 8]


@pytest.fixture
def folder(tmp_path):
    warm_model().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    tiny.text_dataset().to_json(tmp_path / "data.jsonl")
    return tmp_path


def words(folder: Path, **options) -> list[str]:
    options = {
        "model_name_or_path": folder / "model",
        "dataset_name": folder / "data.jsonl",
        "output_dir": folder / "out",
        "method": "psft",
        "dtype": "float32",
        "per_device_train_batch_size": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        **OPTIMIZERS["adamw"],
        **options,
    }
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def by_example(folder: Path, again: bool, monkeypatch, **options) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", *words(folder, **options)])
    example.main()


def by_command(folder: Path, again: bool, monkeypatch, **options) -> None:
    more = ["--resume_from_checkpoint", "true"] if again else []
    assert sft.main([*words(folder, **options), *more]) == 0


def found_in(folder: Path) -> tuple[dict[str, int], list[int]]:
    """When each checkpoint's state was written, and the steps that the last one knows."""
    states = {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("out/checkpoint-*/trainer_state.json")}
    last = max(states, key=lambda name: int(name.split("-")[1]))
    history = json.loads((folder / "out" / last / "trainer_state.json").read_text())["log_history"]
    return states, [line["step"] for line in history if "loss" in line]


_RUNS = [(run, steps) for run in (by_example, by_command) for steps in ENDS]


@pytest.mark.parametrize(("run", "steps"), thinned(_RUNS, lambda *pair: pair in one_of_each(_RUNS)))
def test_finished_run_is_not_trained_on(folder, run, steps, monkeypatch):
    run(folder, False, monkeypatch, max_steps=steps)
    found, model = found_in(folder), load_file(folder / "out" / "model.safetensors")
    assert found[1] == list(range(1, steps + 1))
    (folder / "out" / "model.safetensors").unlink()  # as if killed between the last checkpoint and the model
    for _ in range(2):
        run(folder, True, monkeypatch, max_steps=steps)
        assert found_in(folder) == found
        again = load_file(folder / "out" / "model.safetensors")
        assert all(torch.equal(value, model[name]) for name, value in again.items())


@pytest.mark.parametrize("run", [by_example, by_command])
def test_more_steps_go_on_and_fewer_do_not(folder, run, monkeypatch):
    run(folder, False, monkeypatch, max_steps=3)
    before = found_in(folder)
    run(folder, True, monkeypatch, max_steps=2)
    assert found_in(folder) == before
    run(folder, True, monkeypatch, max_steps=5)
    assert found_in(folder)[1] == [1, 2, 3, 4, 5]


def test_finished_epochs(folder, monkeypatch):
    by_example(folder, False, monkeypatch, num_train_epochs=2)
    found = found_in(folder)
    by_example(folder, True, monkeypatch, num_train_epochs=2)
    assert found_in(folder) == found and found[1] == list(range(1, 13))


def test_what_a_finished_run_returns(tmp_path):
    """The trainer itself; also with the best model at the end, which is not the last."""
    options = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps"}
    options |= {"eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    options |= {"greater_is_better": False}

    def trainer() -> QTargetSFTTrainer:
        data = tiny.text_dataset()
        return make_trainer(QTargetSFTTrainer, data, warm_model(), eval_dataset=data, steps=3, options=options)

    first, again = trainer(), trainer()
    first.train()
    best = first.state.best_model_checkpoint
    assert not best.endswith("checkpoint-3"), "else it would show nothing"
    output = again.train(resume_from_checkpoint=True)
    assert output.global_step == 3 and not again.is_in_train
    assert again.state.best_model_checkpoint == best
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, first.model.state_dict()[name])
