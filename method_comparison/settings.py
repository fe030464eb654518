"""What is compared: settings.yaml, read and checked. `quick.yaml` changes some of its values, for a run of minutes."""

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from trl_qtarget import QTargetConfig

from .demonstrations import KINDS
from .tasks import TASKS


HERE = Path(__file__).parent
REFERENCES = ("none", "base", "weak", "strong")
StudyKind = TypeVar("StudyKind", bound="Study")


@dataclass(frozen=True)
class Method:
    """One row of the tables: a target, and the knob that is tuned beside the learning rate.

    `needs` says what the target needs beyond the policy: "nothing", a "reference" (the untrained base, or a teacher
    where the setting has one), or a "teacher". A `replica` other than 0 means other demonstrations in another order: a
    method named twice shows how often the whole procedure finds a difference where there is none. With a `top_k` the
    reference runs once, and a cache of its so many most probable tokens is trained from. `only` names the settings
    that take the method; none: all that can. `tuned_as` is another method whose tuning it takes over.
    """

    name: str
    needs: str
    config: dict[str, Any]
    knob: str | None
    ladder: tuple[float, ...]
    default: float | None
    replica: int = 0
    top_k: int = 0
    only: tuple[str, ...] = ()
    tuned_as: str | None = None

    def target(self, knob: int, reference: str) -> dict[str, Any]:
        """Fields of the `QTargetConfig` with the knob at its `knob`-th value."""
        fields = dict(self.config)
        if self.knob:
            fields[self.knob] = self.ladder[knob]
        if self.needs != "nothing":
            fields["prior"] = "base" if reference == "base" else "model"
        return fields

    @property
    def is_candidate(self) -> bool:
        """Whether one would choose it: it is no method for the second time and no variant for a few settings."""
        return not self.replica and not self.only

    @property
    def original(self) -> str | None:
        """The published method that it trains with; None for a free combination."""
        return self.config.get("method")

    @property
    def start(self) -> int:
        """Index of the knob's default."""
        return self.ladder.index(self.default) if self.knob else 0


@dataclass(frozen=True)
class Setting:
    """A task, the demonstrations of it that a model is trained on, and the reference that methods may use."""

    name: str
    task: str
    kind: str
    share: float
    reference: str
    title: str
    # What accuracy on the other tasks weighs in the choice of a configuration.
    others_weight: float = 0.0

    def takes(self, method: Method) -> bool:
        """Whether the method can be compared in this setting.

        Distilling from the untrained base would only keep the base, so a teacher is asked for.
        """
        if method.only and self.name not in method.only:
            return False
        allowed = {"none": ("nothing",), "base": ("nothing", "reference")}
        return method.needs in allowed.get(self.reference, ("nothing", "reference", "teacher"))


@dataclass(frozen=True)
class Study:
    """All that decides the results, as read from the file; the sections are plain dictionaries."""

    model: dict[str, Any]
    pretraining: dict[str, Any]
    teachers: dict[str, Any]
    finetuning: dict[str, Any]
    tuning: dict[str, Any]
    test: dict[str, Any]
    chooser: dict[str, Any]
    methods: tuple[Method, ...]
    settings: tuple[Setting, ...]

    @property
    def fingerprint(self) -> str:
        """Changes with anything that decides a single run. Methods and settings may be added to a study."""
        which = ("chooser", "methods", "settings")
        parts = {name: value for name, value in asdict(self).items() if name not in which}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def common_methods(self) -> tuple[Method, ...]:
        """All but the variants that only some settings take: what tables and figures of all settings have."""
        return tuple(method for method in self.methods if not method.only)

    def method(self, name: str) -> Method:
        """The method of that name."""
        return next(method for method in self.methods if method.name == name)


def load(quick: bool = False) -> Study:
    """The study of settings.yaml, or its quick subset.

    Raises:
        ValueError: a setting or a method is not what it should be.
    """
    return read(HERE, quick)


def read(
    folder: Path, quick: bool = False, study: type[StudyKind] = Study, tasks: Collection[str] = tuple(TASKS)
) -> StudyKind:
    """A study of another folder's settings.yaml, or its quick subset.

    Args:
        study: what to make of it.
        tasks: names that a setting's `task` may have.

    Raises:
        ValueError: a setting or a method is not what it should be.
    """
    values = yaml.safe_load((folder / "settings.yaml").read_text(encoding="utf-8"))
    if quick:
        values = _merged(values, yaml.safe_load((folder / "quick.yaml").read_text(encoding="utf-8")))
    methods = tuple(_method(name, fields or {}) for name, fields in values.pop("methods").items() if fields != "out")
    by_name = {method.name: method for method in methods}
    found = values.pop("settings")
    for method in methods:
        _check_variant(method, by_name, found)
    settings = tuple(_setting(name, fields, tasks) for name, fields in found.items() if fields != "out")
    return study(methods=methods, settings=settings, **values)


def _check_variant(method: Method, methods: dict[str, Method], settings: Collection[str]) -> None:
    """What a method says of other methods, and of settings, of which a quick run may leave out some."""
    if unknown := [name for name in method.only if name not in settings]:
        raise ValueError(f"`only` of `{method.name}` names no setting: {', '.join(unknown)}.")
    if method.only and method.original not in methods:
        raise ValueError(f"`only` makes `{method.name}` a variant: its `config` must name a `method` of the study.")
    if method.tuned_as is None:
        return
    taken = methods.get(method.tuned_as)
    if taken is None or taken.ladder != method.ladder or taken.tuned_as:
        raise ValueError(
            f"`tuned_as={method.tuned_as!r}` of `{method.name}` must be a method with the same `ladder` and a tuning "
            "of its own, or the knob that is taken over would be another one."
        )


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    both = dict(values)
    for name, change in changes.items():
        old = values.get(name)
        both[name] = _merged(old, change) if isinstance(old, dict) and isinstance(change, dict) else change
    return both


def _method(name: str, fields: dict[str, Any]) -> Method:
    knob = fields.get("knob")
    config = fields.get("config", {"method": name})
    needs = fields.get("needs", "nothing")
    ladder = tuple(fields.get("ladder", (0,)))
    only, tuned_as = tuple(fields.get("only", ())), fields.get("tuned_as")
    rest = fields.get("replica", 0), fields.get("top_k", 0), only, tuned_as
    method = Method(name, needs, config, knob, ladder, fields.get("default"), *rest)
    if needs not in ("nothing", "reference", "teacher"):
        raise ValueError(f"`needs={needs!r}` of `{name}` must be 'nothing', 'reference' or 'teacher'.")
    if method.top_k and needs == "nothing":
        raise ValueError(f"`top_k` of `{name}` needs a reference to cache: set `needs`.")
    if knob and method.default not in method.ladder:
        raise ValueError(f"`default` of `{name}` must be a value of its `ladder`.")
    for number in range(len(method.ladder)):
        QTargetConfig(**method.target(number, "base"))  # says what is wrong with it
    return method


def _setting(name: str, fields: dict[str, Any], tasks: Collection[str] = tuple(TASKS)) -> Setting:
    setting = Setting(name, **fields)
    for field, value, known in (
        ("task", setting.task, tasks),
        ("kind", setting.kind, KINDS),
        ("reference", setting.reference, REFERENCES),
    ):
        if value not in known:
            raise ValueError(f"`{field}={value!r}` of the setting `{name}` is unknown: choose of {', '.join(known)}.")
    return setting
