"""What is compared on the real model: settings.yaml of this folder, and `quick.yaml`, which changes some of it."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

from .. import settings
from ..runs import check
from .tasks import TASKS


HERE = Path(__file__).parent


@dataclass(frozen=True)
class RealStudy(settings.Study):
    """A study of one real model, which methods, settings and seeds of the test may be added to."""

    @property
    def fingerprint(self) -> str:
        """Changes with anything that decides a single run."""
        parts = {name: dict(getattr(self, name)) for name in ("model", "finetuning", "tuning", "test")}
        del parts["test"]["seeds"]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def load(quick: bool = False, seeds: int | None = None) -> RealStudy:
    """The study of settings.yaml, or its quick subset.

    Args:
        seeds: how many fresh ones the best rate is tested on; None: those of the file.

    Raises:
        ValueError: a setting, a method or the number of seeds is not what it should be.
    """
    study = settings.read(HERE, quick, RealStudy, TASKS)
    check(study)
    if seeds is None:
        return study
    if seeds < 2:
        raise ValueError(f"`seeds={seeds}` must be at least 2: one training says nothing of chance.")
    return replace(study, test=study.test | {"seeds": list(range(1, seeds + 1))})
