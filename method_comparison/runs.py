"""One run: fine-tune a base on demonstrations toward a target with `QTargetSFTTrainer`, then measure the model."""

import copy
import logging
import math
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import PreTrainedModel, PrinterCallback

from trl_qtarget import QTargetConfig, QTargetSFTTrainer
from trl_qtarget.target.config import prior_itself
from trl_qtarget.training.caching import Writer, write_cache

from .demonstrations import KINDS, demonstrations
from .evaluation import GREEDY, mean, solved_counts
from .models import arguments, load
from .settings import Method, Setting, Study
from .tasks import Problem, problems
from .text import as_dataset, tokenizer


# Problems of the demonstrations, of tuning and of the test come from seeds of their own as well as from splits.
TUNE, TEST = "tune", "test"


@dataclass(frozen=True)
class Run:
    """Everything that tells one run from another; equal runs have equal results.

    `reference` is "none" for a target that uses none, whatever its setting offers: such a run serves several settings.
    `target` holds the fields of the `QTargetConfig` (none: the untrained base is measured), `method` only the name.
    """

    phase: str
    task: str
    kind: str
    share: float
    reference: str
    method: str
    target: tuple[tuple[str, Any], ...]
    learning_rate: float
    seed: int
    replica: int = 0
    top_k: int = 0

    @property
    def key(self) -> str:
        """A name for it, by which its result is found again."""
        target = " ".join(f"{name}={value}" for name, value in self.target)
        data = f"{self.task} {self.kind} {self.share:g} {self.reference}"
        return f"{self.phase}{self.seed} | {data} | {self.method}: {target} | {self.learning_rate:.3g}"


def make_run(setting: Setting, method: Method, knob: int, learning_rate: float, phase: str, seed: int) -> Run:
    """The run of a method in a setting."""
    reference = "none" if method.needs == "nothing" else setting.reference
    target = tuple(method.target(knob, setting.reference).items())
    data = (setting.task, setting.kind, setting.share, reference)
    return Run(phase, *data, method.name, target, learning_rate, seed, method.replica, method.top_k)


def base_run(setting: Setting, phase: str, seed: int) -> Run:
    """The run that trains nothing: the untrained base, measured like all others."""
    return Run(phase, setting.task, "clean", 0.0, "none", "base", (), 0.0, seed)


def model_run(name: str, setting: Setting, seed: int) -> Run:
    """The run that measures a teacher."""
    return Run(TEST, setting.task, "clean", 0.0, name, "teacher", (), 0.0, seed)


def execute(run: Run, study: Study, models: Path) -> dict[str, Any]:
    """Train and measure. A model that diverged solves nothing.

    Returns:
        The run's fields and its results: `solved`, per temperature the number of right answers to each prompt;
        `others`, per other task the share of right answers, greedy and at temperature 1; `nll` (nats per token) and
        `entropy` on right solutions of the split's problems; `train_nll`, on the demonstrations in the last epoch.
    """
    started = time.perf_counter()
    logging.getLogger("trl_qtarget").setLevel(logging.ERROR)
    result: dict[str, Any] = {"key": run.key, **asdict(run), "target": dict(run.target)}
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _trainer(run, study, models, Path(scratch))
        if run.target:
            trainer.train()
            result["train_nll"] = _last_nll(trainer.state.log_history, study)
        result |= _measure(trainer, run, study)
    result["seconds"] = round(time.perf_counter() - started, 1)
    return result


def _trainer(run: Run, study: Study, models: Path, scratch: Path) -> QTargetSFTTrainer:
    options = study.finetuning
    base = "base0" if run.phase == TUNE else f"base{run.seed}"
    name = run.reference if run.method == "teacher" else base
    target = dict(run.target) or {"method": "sft"}
    # 1000 apart: what one seed decides (problems, noise, order) has nothing in common with what another does.
    data_seed = 1000 * (run.seed + 1) + (500 if run.phase == TUNE else 0) + 100 * run.replica
    pairs, _ = demonstrations(
        problems(run.task, options["demonstrations"], "train", data_seed), run.kind, run.share, data_seed
    )
    shared = {"train_dataset": as_dataset(pairs), "processing_class": tokenizer()}
    reference = load(models, run.reference) if target.get("prior") == "model" else None
    prior = {"ref_model": reference}
    if run.top_k:
        rows = shared | {"eval_dataset": _right_solutions(_asked(run, study), run.seed)}
        prior = {"prior_cache": str(_cache(reference, scratch / "cache", run.top_k, rows))}
    trainer = QTargetSFTTrainer(
        str(models / name),
        arguments(
            scratch,
            num_train_epochs=options["epochs"],
            per_device_train_batch_size=options["batch_size"],
            per_device_eval_batch_size=256,
            learning_rate=run.learning_rate or 1.0,
            warmup_steps=options["warmup_steps"],
            logging_steps=_steps_per_epoch(options),
            seed=data_seed,
            model_init_kwargs={"dtype": "float32"},
        ),
        qtarget_config=QTargetConfig(**target),
        **shared,
        **prior,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _cache(reference: PreTrainedModel, folder: Path, k: int, rows: dict[str, Any]) -> Path:
    """What a reference says of all that is trained on or measured with, its k most probable tokens."""
    options = arguments(folder / "unused", per_device_eval_batch_size=256, model_init_kwargs={"dtype": "float32"})
    policy = copy.deepcopy(reference)
    trainer = QTargetSFTTrainer(policy, options, qtarget_config=prior_itself(), ref_model=reference, **rows)
    write_cache(Writer(trainer, k=k), folder)
    return folder


def _steps_per_epoch(options: dict[str, Any]) -> int:
    return math.ceil(options["demonstrations"] / options["batch_size"])


def _last_nll(history: list[dict[str, Any]], study: Study) -> float:
    return round([entry["target/nll"] for entry in history if "target/nll" in entry][-1], 4)


def _measure(trainer: QTargetSFTTrainer, run: Run, study: Study) -> dict[str, Any]:
    options = _measuring(run, study)
    forgetting = others(run, study)
    model, seed = trainer.model, run.seed
    asked = _asked(run, study)
    scores = trainer.evaluate(_right_solutions(asked, seed))
    results: dict[str, Any] = {
        "nll": round(scores["eval_target/nll"], 4),
        "entropy": round(scores["eval_entropy"], 4),
        "solved": {},
        "others": {},
    }
    if not math.isfinite(scores["eval_target/nll"]):
        results["solved"] = {f"{temperature:g}": [0] * len(asked) for temperature in options["temperatures"]}
        results["others"] = {task: [0.0, 0.0] for task in forgetting}
        return results
    longest = study.test["max_new_tokens"]
    for temperature in options["temperatures"]:
        counts = solved_counts(model, asked, temperature, options["samples"], longest, seed)
        results["solved"][f"{temperature:g}"] = counts
    for task in forgetting:
        results["others"][task] = _share_solved(model, task, run, options, longest)
    return results


def _measuring(run: Run, study: Study) -> dict[str, Any]:
    return study.tuning if run.phase == TUNE else study.test


def _asked(run: Run, study: Study) -> list[Problem]:
    return problems(run.task, _measuring(run, study)["prompts"], run.phase, run.seed, distinct=True)


def _right_solutions(asked: list[Problem], seed: int) -> datasets.Dataset:
    clean, _ = demonstrations(asked, "clean", 0.0, seed)
    return as_dataset(clean)


def others(run: Run, study: Study) -> list[str]:
    """The tasks of pretraining that a run is not trained on: what it may forget.

    Tuning looks at them only where a setting of this task gives them a weight.
    """
    weighed = any(setting.others_weight and setting.task == run.task for setting in study.settings)
    if run.phase == TUNE and not weighed:
        return []
    return [name for name in study.pretraining["mixture"] if name != run.task]


def _share_solved(model: PreTrainedModel, task: str, run: Run, options: dict[str, Any], longest: int) -> list[float]:
    asked: list[Problem] = problems(task, options["other_prompts"], run.phase, run.seed, distinct=True)
    samples = options["other_samples"]
    greedy = mean(solved_counts(model, asked, GREEDY, 1, longest, run.seed))
    sampled = mean(solved_counts(model, asked, 1.0, samples, longest, run.seed)) / samples
    return [round(greedy, 4), round(sampled, 4)]


def score(result: dict[str, Any], setting: Setting, study: Study) -> float:
    """What tuning maximises: the mean of greedy accuracy and Average@k at temperature 1.

    Either alone would favour some methods: temperature 1 rewards sharpness, greedy decoding does not see it. Settings
    that ask about forgetting give the other tasks a weight.
    """
    samples = study.tuning["samples"]
    own = (mean(result["solved"]["0"]) + mean(result["solved"]["1"]) / samples) / 2
    rest = mean([value for pair in result["others"].values() for value in pair]) if result["others"] else 0.0
    return (1 - setting.others_weight) * own + setting.others_weight * rest


def check(study: Study) -> None:
    """Refuse what would fail in the middle of a study.

    Raises:
        ValueError: a number of the settings does not fit the others.
    """
    for phase in ("tuning", "test"):
        temperatures = getattr(study, phase)["temperatures"]
        if not {0.0, 1.0} <= set(temperatures):
            raise ValueError(f"`temperatures` of `{phase}` must contain 0 (greedy) and 1: they decide the tuning.")
    for setting in study.settings:
        if setting.kind not in KINDS:
            raise ValueError(f"`kind={setting.kind!r}` is unknown: choose one of {', '.join(KINDS)}.")
        if setting.reference in ("weak", "strong") and setting.reference not in study.teachers:
            raise ValueError(f"`teachers` has no `{setting.reference}`, which the setting `{setting.name}` asks for.")


def quiet(threads: int = 1) -> None:
    """For a worker: so many threads, and nothing on the screen, which belongs to the progress bar."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
