"""One trial: an ordinary `trl-qtarget sft` in a folder of its own, and what its model can do."""

import gc
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import SFTConfig

from ..files import replacing
from ..training.checkpoints import is_whole, last_whole_checkpoint
from .metrics import Metric, kl_to_base
from .prior import SharedPrior, last_words
from .space import Candidate


# Each intermediate evaluation comes after so many times as much training as the one before.
REDUCTION = 3
# Arguments of `trl-qtarget sft` that say what a study says itself.
DATA_ARGUMENTS = (
    "dataset_name",
    "dataset_config",
    "dataset_train_split",
    "dataset_test_split",
    "dataset_streaming",
    "datasets",
    "test_split_size",
    "streaming",
)
STUDY_ARGUMENTS = (
    "output_dir",
    "eval_strategy",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "save_only_model",
    "load_best_model_at_end",
    "metric_for_best_model",
    "resume_from_checkpoint",
    "push_to_hub",
    "run_name",
    "data_seed",
)


class TrainingFailed(Exception):
    """A training has ended with an error; the message is the last of what it said."""


# Train what a recipe file says; end it early once the condition holds. Returns the exit status. Writes to the log.
Launch = Callable[[Path, Path, Callable[[], bool]], int]


@dataclass(frozen=True)
class Training:
    """How the trainings of a study are done.

    Attributes:
        recipe: arguments of `trl-qtarget sft`, the same for all.
        train: file of the training rows.
        launch: what trains.
        rungs: intermediate evaluations.
        prior: what has been said once for all trainings, by name of the candidate; None: each runs its own.
    """

    recipe: dict[str, Any]
    train: Path
    launch: Launch = field(compare=False)
    rungs: int = 1
    prior: SharedPrior | None = None

    def options(self, options: dict[str, Any], folder: Path, seed: int, rungs: int) -> dict[str, Any]:
        """All arguments of one training."""
        kept = {name: value for name, value in self.recipe.items() if name not in (*DATA_ARGUMENTS, *STUDY_ARGUMENTS)}
        saving = {"save_strategy": "steps", "save_steps": REDUCTION**-rungs} if rungs else {"save_strategy": "no"}
        own = {
            "dataset_name": str(self.train),
            "output_dir": str(folder),
            "eval_strategy": "no",
            "seed": seed,
            **saving,
        }
        if last_whole_checkpoint(folder) is not None:
            own["resume_from_checkpoint"] = True
        return kept | options | own

    def ask_prior(self, candidates: Iterable[Candidate], seed: int) -> None:
        """Have the shared prior speak, unless it has.

        Raises:
            CachingFailed: it could not.
        """
        if self.prior is None:
            return
        reader = next(each for each in candidates if each.name in self.prior.used_by)
        folder = self.prior.folder.parent / "unused"  # the command has a folder of its own
        recipe = self.options(reader.options(reader.defaults), folder, seed, 0)
        self.prior.ensure(lambda file: _write(file, recipe))

    def run(
        self, name: str, options: dict[str, Any], folder: Path, seed: int, rungs: int, until: Callable[[], bool]
    ) -> None:
        """Train a candidate until a condition holds, or to the end; go on from what is in the folder.

        Raises:
            TrainingFailed: it ended by itself, with an error.
        """
        folder.mkdir(parents=True, exist_ok=True)
        file, log = folder / "recipe.yaml", folder / "log.txt"
        recipe = self.options(options, folder, seed, rungs)
        _write(file, recipe if self.prior is None else self.prior.recipe(recipe, name))
        status = self.launch(file, log, until)
        if status and not until():
            raise TrainingFailed(last_words(log, status))


def _write(file: Path, recipe: dict[str, Any]) -> None:
    with replacing(file) as unfinished:
        unfinished.write_text(yaml.safe_dump(recipe, sort_keys=True, allow_unicode=True), encoding="utf-8")


def rung_checkpoint(folder: Path, rung: int) -> Path | None:
    """The checkpoint of an intermediate evaluation; None if it is not there yet."""
    numbers = [int(path.name[11:]) for path in folder.glob("checkpoint-*") if re.fullmatch(r"\d+", path.name[11:])]
    if not numbers:
        return None
    found = folder / f"checkpoint-{min(numbers) * REDUCTION**rung}"
    return found if is_whole(found) else None


def load(folder: Path, training: SFTConfig, dtype: str | None) -> tuple[PreTrainedModel, Any]:
    """A trained model, or an adapter with its base, and its tokenizer, where they are evaluated."""
    on_gpu = torch.cuda.is_available() and not training.use_cpu
    wanted = dtype if dtype not in (None, "auto") else "bfloat16" if on_gpu else "float32"
    maker = AutoModelForCausalLM
    if (folder / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM as maker
    model = maker.from_pretrained(folder, dtype=getattr(torch, wanted), trust_remote_code=training.trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=training.trust_remote_code)
    return model.to("cuda" if on_gpu else "cpu").eval(), tokenizer


@dataclass(frozen=True)
class Evaluation:
    """How a model is measured.

    Attributes:
        metric: on the rows of a set.
        training: how rows become tokens, and where models run.
        dtype: of the weights; None is bfloat16 on a GPU, else float32.
        seed: of sampled answers, the same for all models.
        base: the model that all trainings start from.
        retained: held-out text on which the KL to the base is taken; None: it is not.
    """

    metric: Metric
    training: SFTConfig
    dtype: str | None
    seed: int
    base: str = ""
    retained: Dataset | None = None

    def scores(self, folder: Path, rows: Dataset) -> list[float]:
        """Of the model in a folder, larger is better."""
        with _loaded(folder, self) as (model, tokenizer):
            return self.metric.scores(model, tokenizer, rows, self.training, self.seed)

    def retention(self, folder: Path) -> float | None:
        """KL(base‖model) in nats per label of the retained text; None without one."""
        if self.retained is None:
            return None
        with _loaded(folder, self) as (model, tokenizer):
            base = AutoModelForCausalLM.from_pretrained(self.base, dtype=model.dtype).to(model.device)
            return kl_to_base(model, base, tokenizer, self.retained, self.training)


@contextmanager
def _loaded(folder: Path, how: Evaluation) -> Iterator[tuple[PreTrainedModel, Any]]:
    """A model for as long as it is needed, and its memory given back."""
    loaded = load(folder, how.training, how.dtype)
    try:
        yield loaded
    finally:
        del loaded
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Stopwatch:
    """Seconds of work, the earlier attempts' included."""

    def __init__(self, before: float = 0.0):
        self._before, self._start = before, time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the first attempt began, without the time between them."""
        return self._before + time.monotonic() - self._start


def clear(folder: Path, keep_model: bool) -> None:
    """Remove what a finished trial needs no more: its checkpoints, and unless asked to keep it the model."""
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)
    if not keep_model:
        for pattern in ("*.safetensors", "*.bin", "*.pt"):
            for path in folder.glob(pattern):
                path.unlink(missing_ok=True)
