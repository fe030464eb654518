"""Designs by name: what `register_trust` and `register_residual` put on the shelf.

A design is a plain function whose keyword-only parameters are its knobs. The signature is the whole declaration: the
parameter's default is the knob's default and its annotation (`Unit`, `Positive`, ...) is the knob's range. So a user's
own function takes part in configuration files and error messages exactly like a built-in one.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Annotated, Any, get_type_hints

from .measured import Knowledge, Measured, exponent


# The numeric knobs that `QTargetConfig` has fields for. A design names its knobs from this list.
KNOBS = ("eta", "alpha", "tau", "lam", "beta", "epsilon", "top_k", "temperature", "clip_max")


@dataclass(frozen=True)
class Range:
    """Interval of allowed values; `open_low` and `open_high` exclude an end, `whole` asks for an integer."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    whole: bool = False
    open_high: bool = False

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        try:
            if not math.isfinite(value):
                return False
        except OverflowError:  # an integer that no float holds
            return False
        if self.whole and not isinstance(value, int):
            return False
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __and__(self, other: "Range") -> "Range":
        """The values that both ranges allow."""
        low, high = max(self.low, other.low), min(self.high, other.high)
        open_low = any(each.open_low for each in (self, other) if each.low == low)
        open_high = any(each.open_high for each in (self, other) if each.high == high)
        return Range(low, high, open_low, self.whole or other.whole, open_high)

    def __str__(self) -> str:
        kind = "an integer" if self.whole else "a number"
        if math.isfinite(self.high):
            ends = "(" if self.open_low else "[", ")" if self.open_high else "]"
            return f"{kind} in {ends[0]}{self.low:g}, {self.high:g}{ends[1]}"
        if math.isfinite(self.low):
            return f"{kind} {'>' if self.open_low else '>='} {self.low:g}"
        return f"{kind} that is finite"


Unit = Annotated[float, Range(0, 1)]
PositiveUnit = Annotated[float, Range(0, 1, open_low=True)]
MoreThanHalf = Annotated[float, Range(0.5, 1, open_low=True, open_high=True)]
Share = Annotated[float, Range(-1, 1)]
NonNegative = Annotated[float, Range(0)]
Exponent = Annotated[float, Range(0), Measured(exponent)]
Positive = Annotated[float, Range(0, open_low=True)]
Count = Annotated[int, Range(1, whole=True)]
AtLeastTwo = Annotated[int, Range(2, whole=True)]


@dataclass(frozen=True)
class Knob:
    """One tunable number of a design: its default, the values it may take, and what `"auto"` makes of the data."""

    default: float | str
    range: Range
    measured: Callable[[Knowledge], float] | None = None


# What a design may name as its `statistics`: properties of a tile.
TILE_STATISTICS = ("rank", "margin", "collision", "prior_mass_below")


def read_knobs(function: Callable) -> dict[str, Knob]:
    """Knobs of a function: its keyword-only parameters, with default and range; none that a `partial` has bound."""
    bound = function.keywords if isinstance(function, partial) else {}
    plain = function.func if isinstance(function, partial) else function
    knobs = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY or name in bound:
            continue
        called = getattr(plain, "__name__", type(plain).__name__)
        if name not in KNOBS:
            raise ValueError(
                f"`{name}` is not a knob that `QTargetConfig` has: name the keyword-only parameters of "
                f"`{called}` from {', '.join(KNOBS)}, or bind other values with `functools.partial`."
            )
        if parameter.default is inspect.Parameter.empty:
            raise ValueError(f"`{name}` of `{called}` has no default: give it one, e.g. `*, {name}=1.0`.")
        extras = _read_extras(plain, parameter)
        allowed = next((extra for extra in extras if isinstance(extra, Range)), Range())
        measured = next((extra.value for extra in extras if isinstance(extra, Measured)), None)
        knobs[name] = Knob(parameter.default, allowed, measured)
    return knobs


def _read_extras(function: Callable, parameter: inspect.Parameter) -> tuple[Any, ...]:
    """What the annotation of a knob holds beside its type; it may be a string."""
    # Only the knob's annotation is resolved: `from __future__ import annotations` makes strings of all of them, and
    # those of other parameters may name what is imported for type checkers alone.
    routine = inspect.unwrap(function if inspect.isroutine(function) else type(function).__call__)
    holder = SimpleNamespace(__annotations__={parameter.name: parameter.annotation})
    try:
        hints = get_type_hints(holder, getattr(routine, "__globals__", {}), include_extras=True)
    except Exception as error:  # a string may hold any expression
        raise ValueError(
            f"`{parameter.name}` of `{getattr(function, '__name__', type(function).__name__)}` has the annotation "
            f"{parameter.annotation!r}, which cannot be resolved ({error}): import its names at the top of the "
            "module, not under `TYPE_CHECKING` or inside a function."
        ) from None
    return getattr(hints[parameter.name], "__metadata__", ())


@dataclass(frozen=True)
class Design:
    """A trust or a residual on the shelf."""

    name: str
    function: Callable
    uses_prior: bool = False
    per_sequence: bool = False
    uses_token_weights: bool = False
    uses_embeddings: bool = False
    # Whether it gives exactly zero to so many tokens that it is worth finding out which.
    has_zeros: bool = False
    # Statistics of a tile that it reads (`TILE_STATISTICS`) and that are gathered only where they are asked for.
    statistics: tuple[str, ...] = ()
    # (knobs, prior_is_policy) -> whether this residual is the policy's own distribution with these settings
    is_policy: Callable[[dict[str, float], bool], bool] = field(default=lambda knobs, prior_is_policy: False)
    knobs: dict[str, Knob] = field(init=False)

    def __post_init__(self):
        unknown = [name for name in self.statistics if name not in TILE_STATISTICS]
        if unknown:
            raise ValueError(f"`statistics={unknown[0]!r}` is unknown: name some of {', '.join(TILE_STATISTICS)}.")
        object.__setattr__(self, "knobs", read_knobs(self.function))

    def __call__(self, tile: Any, knobs: dict[str, float]) -> Any:
        return self.function(tile, **{name: knobs[name] for name in self.knobs if name in knobs})

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]


class Shelf(dict[str, Design]):
    """All designs of one kind, by name; a look-up that fails says which names exist.

    `properties` are those that designs of this kind may declare.
    """

    def __init__(self, kind: str, properties: tuple[str, ...]):
        super().__init__()
        self.kind = kind
        self.properties = properties

    def find(self, name: str) -> Design:
        if not isinstance(name, str) or name not in self:
            raise ValueError(
                f"`{self.kind}={name!r}` is unknown. Known names: {', '.join(sorted(self))}. "
                f"Register your own with `register_{self.kind}` before the configuration is made."
            )
        return self[name]

    def register(self, name: str, function: Callable | None = None, **properties: Any) -> Callable:
        """Put `function` on the shelf; without it, return a decorator. A name is registered once."""
        if not isinstance(name, str) or not name:
            raise ValueError(f"`name` must be a non-empty string, got {name!r}.")
        unknown = [given for given in properties if given not in self.properties]
        if unknown:
            raise ValueError(
                f"`{unknown[0]}` is no property of a {self.kind}: `register_{self.kind}` takes "
                f"{', '.join(self.properties)}."
            )
        if function is None:
            return lambda decorated: self.register(name, decorated, **properties)
        if name in self and self[name].function is not function:
            raise ValueError(f"`{self.kind}={name!r}` is registered already: choose another name.")
        self[name] = Design(name, function, **properties)
        return function
