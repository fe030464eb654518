"""A whole study on a tiny model: real trainings by the script behind `trl-qtarget sft`, in this process."""

import dataclasses
import json
import socket
from pathlib import Path

import optuna
import pytest
import tiny
import yaml
from optuna.trial import TrialState
from training import warm_model

from trl_qtarget import QTargetConfig
from trl_qtarget.cli import sft, tune
from trl_qtarget.tuning import report
from trl_qtarget.tuning.slots import ATTEMPTS, PLACE
from trl_qtarget.tuning.study import AGAIN, SCORES, SECONDS, Study


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tuning")
    warm_model().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    tiny.prompt_dataset(60).to_json(folder / "rows.jsonl")
    recipe = {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "rows.jsonl"),
        "dtype": "float32",
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 8,
        "max_steps": 6,
        "learning_rate": 0.01,
        "disable_tqdm": True,
        "methods": ["dft"],
        "metric": "eval_mean_token_accuracy",
        "trials": 2,
        "confirm_seeds": 2,
        "held_out": 24,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


class Killed(BaseException):
    """Stands for the death of a worker: nobody catches it, and nothing is written down after it."""


def study_of(folder: Path, name: str, *options: str, stop_after: int | None = None) -> Study:
    """A study whose trainings run in this process; a worker dies where it would start one more than `stop_after`."""
    words = ["--config", str(folder / "recipe.yaml"), "--output_dir", str(folder / name), *options]
    given, recipe = tune.parse(words)
    plan, started = tune.make_plan(given, recipe), []

    def launch(file, log, until) -> int:
        started.append(file)
        if stop_after is not None and len(started) > stop_after:
            raise Killed
        return sft.main(["--config", str(file)])

    plan = dataclasses.replace(plan, training=dataclasses.replace(plan.training, launch=launch))
    return Study(plan, tune._storage(given.storage, plan.folder), given.study_name)


def trials_of(study: Study) -> dict:
    found = {}
    for name in [each.name for each in study.plan.candidates]:
        for place, trial in study._slots[name].finished().items():
            found[name, place] = (trial.params, trial.value, trial.state, trial.intermediate_values)
    for name, trials in study.confirmed().items():
        found[name] = [trial.user_attrs[SCORES] for trial in trials]
    return found


@pytest.fixture(scope="module")
def whole(folder) -> Study:
    study = study_of(folder, "whole")
    study.work()
    return study


def test_runs_to_its_verdict(whole, folder, monkeypatch):
    """Equal trials of each method, the first as published; fresh trainings; a page, and a recipe that trains."""
    trials = {name: whole.search_trials(name) for name in ("sft", "dft")}
    assert {name: len(found) for name, found in trials.items()} == {"sft": 2, "dft": 2}
    for first, second in trials.values():
        assert first.params == {"learning_rate": 0.01} and first.state == TrialState.COMPLETE
        assert 1 in first.intermediate_values and first.value != first.intermediate_values[1]
        assert second.params == trials["sft"][1].params, "the same random places for all methods"
    rows = {name: set(map(str, whole.plan.sets.rows(name)["prompt"])) for name in ("train", "search", "confirm")}
    assert len(rows["search"]) == len(rows["confirm"]) >= 10
    assert not rows["search"] & rows["confirm"] and not rows["train"] & (rows["search"] | rows["confirm"])
    confirmed = whole.confirmed()
    assert set(confirmed) == {"sft", "dft", AGAIN}
    for found in confirmed.values():
        assert len(found) == 2 * whole.looks
        assert all(len(trial.user_attrs[SCORES]) == len(rows["confirm"]) for trial in found)
    # Another seed is another training.
    assert confirmed["sft"][0].user_attrs[SCORES] != confirmed[AGAIN][0].user_attrs[SCORES]
    said = report.write(whole)
    page, text = (folder / "whole" / "report.html").read_text(), (folder / "whole" / "report.md").read_text()
    assert said in text and "sft again" in page and page.count("data:image/png") == 2
    assert "over tuned sft" in said
    with monkeypatch.context() as patch:  # as where the budget was spent by then
        patch.setattr(whole, "search_trials", lambda name: trials[name][:1])
        said = report.sentence(whole, whole.verdict())
        assert "over sft" in said and said.endswith("nothing has been tuned.")
    # On all rows, to where the study is; the plain arguments are the user's.
    best = yaml.safe_load((folder / "whole" / "best.yaml").read_text())
    winner = whole.verdict().winner
    assert best["method"] == (winner.name if winner else "sft") and best["dataset_name"].endswith("rows.jsonl")
    assert sft.main(["--config", str(folder / "whole" / "best.yaml"), "--max_steps", "1"]) == 0
    assert QTargetConfig.from_pretrained(folder / "whole" / "final").method == best["method"]
    # Nothing of a finished trial but its numbers.
    assert not list((folder / "whole" / "search").rglob("*.safetensors"))


@pytest.mark.slow
def test_killed_it_ends_with_the_same_trials(whole, folder, monkeypatch):
    """In the middle of a trial, before another, and in the confirmation; taken up where it was."""
    monkeypatch.setattr("trl_qtarget.tuning.slots._me", lambda: [socket.gethostname(), 0, 0.0])
    for stop in (1, 2, 5):
        with pytest.raises(Killed):
            study_of(folder, "killed", stop_after=stop).work()
    study = study_of(folder, "killed")
    study.work()
    assert trials_of(study) == trials_of(whole)


def test_interrupted_it_gives_the_trial_back(folder):
    """Ctrl-C: the next worker need not find out that nobody is there, nor wait."""
    study = study_of(folder, "interrupted", "--rungs", "0")

    def launch(file: Path, log: Path, until) -> int:
        raise KeyboardInterrupt

    study.plan = dataclasses.replace(study.plan, training=dataclasses.replace(study.plan.training, launch=launch))
    with pytest.raises(KeyboardInterrupt):
        study.work()
    (left,) = study._slots["sft"].trials()
    assert left.state == TrialState.WAITING and left.user_attrs[PLACE] == 0 and left.user_attrs[SECONDS] > 0
    again = study._slots["sft"].take(1)
    assert again.user_attrs[PLACE] == 0 and again.user_attrs[ATTEMPTS] == 2


def test_settings_belong_to_a_study(whole, folder):
    with pytest.raises(ValueError, match="`trials` is not that of the study"):
        study_of(folder, "whole", "--trials", "3")
    (folder / "other.jsonl").write_text((folder / "rows.jsonl").read_text().replace("the ", "a "))
    with pytest.raises(ValueError, match="the data have changed"):
        study_of(folder, "whole", "--dataset_name", str(folder / "other.jsonl"))


def test_failed_trials_are_told_and_the_others_go_on(folder):
    study = study_of(folder, "failing", "--rungs", "0", "--trials", "1", "--max_steps", "2")
    launch = study.plan.training.launch

    def failing(file: Path, log: Path, until) -> int:
        if "dft-000" in str(file):
            log.write_text("Traceback ...\nRuntimeError: out of memory\n")
            return 1
        return launch(file, log, until)

    study.plan = dataclasses.replace(study.plan, training=dataclasses.replace(study.plan.training, launch=failing))
    with pytest.raises(ValueError, match=r"no trial of another method has succeeded: .*out of memory"):
        study.work()
    assert study.best("sft") is not None


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--metric", "eval_loss"], "`metric='eval_loss'` is each objective's own value"),
        (["--metric", "speed"], "`metric='speed'` is unknown"),
        (["--metric", "nowhere:score"], "`metric='nowhere:score'` cannot be imported"),
        (["--methods", "sft"], "nothing beside `sft`"),
        (["--methods", "dtf"], "`method='dtf'` is unknown"),
        (["--method", "dft"], "`method` is what is looked for"),
        (["--budget", "soon"], "`budget='soon'` is no time"),
        (["--held_out", "60"], "`held_out=60` of 60 training rows"),
        (["--confirm_seeds", "1"], "`confirm_seeds=1` must be at least 2"),
        (["--learning_rates", "1", "0.1"], "`learning_rates` 1 0.1"),
        (["--no_such", "1"], "`--no_such` is no option"),
        (["--methods", "distill"], "reference model"),
    ],
)
def test_mistakes_are_said_before_anything_is_trained(folder, options, why):
    with pytest.raises(ValueError, match=why):
        study_of(folder, "wrong", *options)
    assert not (folder / "wrong" / "search").exists()


def test_budget_is_kept(folder):
    """A round begins only where it fits beside the confirmation; with time left the better methods get more."""
    study = study_of(folder, "budget", "--budget", "1h")
    for name in ("sft", "dft"):
        for value in (0.5, 0.6):
            trial = study._slots[name].take(2)
            study._slots[name].study.sampler = optuna.samplers.RandomSampler(0)
            study._candidate(name).suggest(trial)
            trial.set_user_attr("seconds", 300.0)
            study._slots[name].study.tell(trial, value)
    # 1200 s are spent; a confirmation takes 300 · 2 · 4 = 2400 s: nothing is left.
    assert study._another_round([["sft", "dft"]]) is None
    study.plan = dataclasses.replace(study.plan, budget=1.5 * 3600)
    assert study._another_round([["sft", "dft"]]) == ["sft", "dft"]
    assert study._another_round([["sft", "dft"]] * 2) == ["sft", "dft"]
    study.plan = dataclasses.replace(study.plan, budget=None)
    assert study._another_round([["sft", "dft"]] * 2) is None


def test_seconds_of_a_budget():
    assert [tune.seconds_of(text) for text in ("6h", "90m", "1h30m", "45s", "0.5h")] == [21600, 5400, 5400, 45, 1800]
    assert tune.seconds_of(None) is None


def test_command_line_and_recipe_are_one(tmp_path):
    (tmp_path / "recipe.yaml").write_text("max_steps: 5\ntrials: 3\nmethods: [dft, asft]\nlearning_rate: 1e-4\n")
    words = ["--config", str(tmp_path / "recipe.yaml"), "--max_steps=7", "--methods", "psft", "--use_cpu"]
    given, recipe = tune.parse([*words, "--save_strategy", "no", "--num_processes", "2"])
    assert given.trials == 3 and given.methods == ["psft"]
    assert recipe == {
        "max_steps": 7,
        "learning_rate": "1e-4",
        "use_cpu": True,
        "save_strategy": "no",
        "num_processes": "2",
    }
    json.dumps(recipe)


def test_workers_on_the_cpu_share_its_cores(monkeypatch):
    started = []

    class Process:
        pid = 0

        def __init__(self, command, env, stdout):
            started.append(env.get("OMP_NUM_THREADS"))

        def wait(self):
            return 0

    monkeypatch.setattr(tune.subprocess, "Popen", Process)
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert tune._share([], 3) == 0 and started == ["2"] * 3
    monkeypatch.setenv("OMP_NUM_THREADS", "5")  # as the user has said
    assert tune._share([], 2) == 0 and started[3:] == ["5"] * 2
