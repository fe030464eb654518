"""The frozen prior of a study's trainings, run once: a cache of what it says of the training rows, which all read."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..priors.choice import PolicyFacts, PriorKind, choose_prior
from ..priors.store import FORMS
from .space import Candidate


logger = logging.getLogger("trl_qtarget")

# What a recipe says of a reference model; with a cache there is none.
_OF_THE_REFERENCE = "ref_"
# A frozen model that all trainings of a study have in common.
_SHARED = (PriorKind.REFERENCE, PriorKind.ADAPTERS_OFF, PriorKind.STARTING_COPY)
# Launches by which a process may hold a part of a model, which a cache is not made of.
_PARTED = ("accelerate_config", "config_file", "deepspeed", "fsdp", "use_deepspeed", "use_fsdp", "parallelism_config")
CHOICES = ("auto", *FORMS, "none")


class CachingFailed(Exception):
    """The cache could not be made; the message is the last of what was said."""


@dataclass(frozen=True)
class SharedPrior:
    """What several candidates need, and says the same to all of them.

    Attributes:
        folder: of the cache.
        form: of it.
        used_by: names of the candidates that read it.
        make: do as `trl-qtarget cache` does: with a recipe file, into a folder, in a form. Writes to the log file that
            it is given last, and returns a status.
    """

    folder: Path
    form: str
    used_by: frozenset[str]
    make: Callable[[Path, Path, str, Path], int] = field(compare=False)

    def recipe(self, recipe: dict[str, Any], name: str) -> dict[str, Any]:
        """The arguments of a candidate's training, which reads the cache in place of the model."""
        if name not in self.used_by:
            return recipe
        kept = {key: value for key, value in recipe.items() if not key.startswith(_OF_THE_REFERENCE)}
        return kept | {"prior_cache": str(self.folder)}

    def ensure(self, write_recipe: Callable[[Path], None]) -> None:
        """Make the cache, or what is missing of it; workers that come meanwhile make it together.

        Args:
            write_recipe: writes the recipe of a training of a candidate that reads it.

        Raises:
            CachingFailed: the command has ended with an error.
        """
        done = self.folder / "complete"
        if done.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        recipe, log = self.folder.with_suffix(".yaml"), self.folder.with_suffix(".log")
        write_recipe(recipe)
        logger.info(f"The prior runs once over the training rows, for all trials ({self.folder}, form {self.form}).")
        if status := self.make(recipe, self.folder, self.form, log):
            raise CachingFailed(
                f"`cache_prior`: {last_words(log, status)} (see {log}; `--cache_prior none` goes without)"
            )
        done.touch()


def shared_prior(
    choice: str,
    candidates: Iterable[Candidate],
    recipe: dict[str, Any],
    policy: PolicyFacts,
    folder: Path,
    make: Callable[[Path, Path, str, Path], int],
) -> SharedPrior | None:
    """The prior to cache, if any candidate has one that is frozen and it is not cached already.

    Args:
        choice: the form; `auto` is `hidden`, exact for every target, unless processes hold parts of the model.
        candidates: what is tuned.
        recipe: the study's.
        policy: what is trained.
        folder: of the study.
        make: see `SharedPrior`.

    Raises:
        ValueError: the choice is unknown.
    """
    if choice not in CHOICES:
        raise ValueError(f"`cache_prior={choice!r}` is unknown: choose one of {', '.join(CHOICES)}.")
    parted = choice == "auto" and any(recipe.get(name) for name in _PARTED)
    if choice == "none" or recipe.get("prior_cache") or parted:
        return None
    reference = recipe.get("ref_model_name_or_path")
    used_by = {each.name for each in candidates if choose_prior(each.config, policy, reference).kind in _SHARED}
    if not used_by:
        return None
    return SharedPrior(folder / "prior", "hidden" if choice == "auto" else choice, frozenset(used_by), make)


def last_words(log: Path, status: int) -> str:
    """The last error that a command has written, or else its last line."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    said = next((line for line in reversed(lines) if "Error" in line or line.startswith("trl-qtarget")), None)
    return f"exit status {status}: {(said or (lines or ['it said nothing'])[-1])[:300]}"
