"""The script behind `trl-qtarget sft`: what it says of mistakes, and from which checkpoint it goes on."""

import json
from pathlib import Path

import pytest
import tiny
from training import warm_model

from trl_qtarget.cli import sft


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("script")
    warm_model().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    tiny.text_dataset().to_json(folder / "data.jsonl")
    return folder


def words(folder: Path, output: Path, **options) -> list[str]:
    options = {
        "model_name_or_path": folder / "model",
        "dataset_name": folder / "data.jsonl",
        "output_dir": output,
        "method": "sft",
        "dtype": "float32",
        "per_device_train_batch_size": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "max_steps": 4,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        **options,
    }
    return [text for name, value in options.items() if value is not None for text in (f"--{name}", str(value))]


def checkpoints(output: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in output.glob("checkpoint-*/trainer_state.json")}


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("run")
    assert sft.main(words(folder, output)) == 0
    return output


@pytest.mark.parametrize("word", ["true", "True", "TRUE"])
def test_true_is_the_last_whole_checkpoint(folder, run, word, capsys):
    before = checkpoints(run)
    (run / "checkpoint-9").mkdir(exist_ok=True)  # of an interrupted save
    assert sft.main(words(folder, run, max_steps=5, resume_from_checkpoint=word, save_strategy="no")) == 0
    assert checkpoints(run).items() >= before.items()
    losses = [line for line in capsys.readouterr().out.splitlines() if "'loss'" in line]
    assert len(losses) <= 1, "only the fifth step was trained"


def test_false_starts_from_the_beginning(folder, run, tmp_path):
    state = sft.make_parser().parse_args_and_config(words(folder, run, resume_from_checkpoint="False"))[1]
    config = sft.ResolvedTarget(sft.QTargetConfig("sft"), sft.QTargetConfig("sft"))
    assert sft.checkpoint_of(state, config) is None
    state.resume_from_checkpoint = True  # as YAML says it
    assert sft.checkpoint_of(state, config) == str(run / "checkpoint-4")
    for nothing in (None, False, ""):
        state.resume_from_checkpoint = nothing
        assert sft.checkpoint_of(state, config) is None
    state.resume_from_checkpoint = str(run / "checkpoint-2")
    assert sft.checkpoint_of(state, config) == str(run / "checkpoint-2")
    for wrong in ([1], {}, 3):
        state.resume_from_checkpoint = wrong or {"a": 1}
        with pytest.raises(ValueError, match="`resume_from_checkpoint` must be a folder, true or false"):
            sft.checkpoint_of(state, config)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"resume_from_checkpoint": "true"}, "`resume_from_checkpoint=True` finds no whole checkpoint"),
        ({"resume_from_checkpoint": "nowhere"}, "`resume_from_checkpoint` names no folder: nowhere does not exist"),
        ({"model_name_or_path": None}, "`model_name_or_path` is missing"),
        ({"dataset_name": None}, "`dataset_name` is missing"),
        ({"dataset_train_split": "trian"}, "`dataset_train_split='trian'` is no split"),
        ({"eval_strategy": "epoch"}, "`dataset_test_split='test'` is no split"),
        ({"test_split_size": 400}, "leaves nothing to train on"),
        ({"test_split_size": 0.5, "dataset_streaming": True}, "is a share of a stream"),
        ({"method": "distill"}, "needs a reference model"),
        ({"method": "sft", "lam": 0.3}, "`lam` is not used by"),
        ({"model_name_or_path": "./no/such/model"}, "`model_name_or_path`: there is no folder `./no/such/model` here"),
        ({"model_name_or_path": "outputs/modle"}, "`model_name_or_path`: there is no folder `outputs/modle` here"),
        ({"ref_model_name_or_path": "teacher"}, "`ref_model_name_or_path`: there is no folder `teacher` here"),
        ({"lam": "much"}, "`--lam`: invalid"),
    ],
    ids=str,
)
def test_mistakes_are_one_message_and_status_two(folder, tmp_path, capsys, options, why):
    assert sft.main(words(folder, tmp_path / "out", **options)) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trl-qtarget sft: ")]
    assert len(said) == 1 and why in said[0]


def test_error_of_the_training_itself_is_raised(folder, tmp_path, monkeypatch):
    """With its traceback: it is no mistake in an argument."""
    monkeypatch.setattr(sft.QTargetSFTTrainer, "training_step", lambda *_: (_ for _ in ()).throw(ValueError("deep")))
    with pytest.raises(ValueError, match="deep"):
        sft.main(words(folder, tmp_path / "out"))


def test_ranks_say_who_they_are(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert sft.main(words(folder, tmp_path / "out", lam="much")) == 2
    assert "trl-qtarget sft (rank 3): `--lam`: invalid" in capsys.readouterr().err


def test_stream_is_trained_and_evaluated(folder, tmp_path):
    output = tmp_path / "out"
    options = {"dataset_streaming": True, "test_split_size": 5, "eval_strategy": "steps", "eval_steps": 2}
    assert sft.main(words(folder, output, **options)) == 0
    history = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert [line["step"] for line in history if "eval_loss" in line] == [2, 4]
