"""A method or free combination with every knob set: what the dense and the fused loss both evaluate."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import NamedTuple

from torch import Tensor

from .formula import Formula, is_formula
from .registry import Design, Knob, read_knobs
from .residual import RESIDUALS
from .tile import LabelStatistics, Measure, Tile
from .token_target import TokenTarget, parts_of
from .trust import TRUSTS
from .values import cross_entropy, unit_scale


@dataclass(frozen=True, kw_only=True)
class Method:
    """One published objective: names of its trust and residual, scale, loss value, knobs, prior, source and group."""

    trust: str
    residual: str = "policy"
    scale: Callable[..., Tensor] = unit_scale
    value: Callable[..., Tensor] = cross_entropy
    knobs: dict[str, float | str] = field(default_factory=dict)
    prior: str | None = None
    prior_sync_steps: int | None = None
    loss: str
    source: str
    arxiv: str | None = None
    group: str = "re-weighting"


def _check_shape(kind: str, design: Design, result: Tensor, like: Tensor) -> None:
    # Only a user's own design can fail this; without it, broadcasting would train toward something else in silence.
    if result.shape != like.shape:
        raise ValueError(
            f"`{kind}={design.name!r}` returned shape {list(result.shape)}, not {list(like.shape)}: "
            "a trust returns one number per token, a residual one log-probability per token and vocabulary entry."
        )


@dataclass(frozen=True)
class Objective:
    """A method or free combination with every knob set: what the dense and the fused loss both evaluate."""

    trust: Design
    residual: Design
    scale: Design
    value: Callable[[TokenTarget], Tensor]
    knobs: dict[str, float]
    prior_is_policy: bool
    progress: float = 1.0  # share of the training that is done, for what follows a schedule

    @property
    def uses_prior(self) -> bool:
        """Whether the logits of another distribution than the policy's own are needed."""
        return not self.prior_is_policy and any(design.uses_prior for design in self.designs)

    @property
    def statistics(self) -> frozenset[str]:
        """Statistics of a tile that trust and scale ask for beside those of every target."""
        return frozenset(self.trust.statistics) | frozenset(self.scale.statistics)

    @property
    def has_zeros(self) -> bool:
        """Whether many tokens may have no gradient at all, as where nothing but the policy is beside a trust of 0."""
        return self.residual.name == "policy" and (self.trust.has_zeros or self.scale.has_zeros)

    @property
    def designs(self) -> "Designs":
        """Trust, residual and scale."""
        return Designs(self.trust, self.residual, self.scale)

    def token_trust(self, tile: Tile | LabelStatistics) -> Tensor:
        """γ of the tokens of a tile, or of all tokens for a per-sequence trust."""
        tile.progress = self.progress
        trust = self.trust(tile, self.knobs).to(tile.label_log_probs.dtype)
        _check_shape("trust", self.trust, trust, tile.label_log_probs)
        return trust

    def target(self, tile: Tile, trust: Tensor | None = None) -> TokenTarget:
        """The target for a tile; `trust[n]` is given for a per-sequence trust, which was computed beforehand."""
        tile.progress = self.progress
        parts = parts_of(self.residual(tile, self.knobs))
        if trust is None:
            trust = self.token_trust(tile)
        measured = tuple(part._replace(measure=self._measure(tile, part.measure)) for part in parts)
        scale = self.scale(tile, self.knobs).to(trust.dtype)
        _check_shape("scale", self.scale, scale, tile.label_log_probs)
        return TokenTarget(tile, trust, scale, measured)

    def _measure(self, tile: Tile, residual: Measure | Tensor) -> Measure:
        if isinstance(residual, Measure):
            return residual
        _check_shape("residual", self.residual, residual, tile.log_probs)
        return tile.policy if residual is tile.log_probs else tile.measure(residual)


class Designs(NamedTuple):
    """What a target is made of."""

    trust: Design
    residual: Design
    scale: Design


def designs_of(method: Method | None, trust: str | None, residual: str | None, scale: str | None = None) -> Designs:
    """Of a method, or of a free combination by names and formulas.

    Raises:
        ValueError: a name is unknown, or a formula is none.
    """
    if method is not None:
        return Designs(TRUSTS.find(method.trust), RESIDUALS.find(method.residual), Design("scale", method.scale))
    found = formula_design("trust", trust) if is_formula(trust) and trust not in TRUSTS else TRUSTS.find(trust)
    scaled = Design("scale", unit_scale) if scale is None else formula_design("scale", scale)
    return Designs(found, RESIDUALS.find(residual), scaled)


@cache
def formula_design(argument: str, text: str) -> Design:
    """The design that a formula is; `argument` is what messages call it."""
    formula = Formula(text, argument)
    return Design(
        text,
        formula,
        uses_prior=formula.uses_prior,
        uses_token_weights=formula.uses_token_weights,
        statistics=formula.statistics,
        has_zeros=formula.has_zeros,
    )


def knobs_of(method: Method | None, designs: Designs) -> dict[str, Knob]:
    """The knobs of a method (only those of its row) or of a free combination (all of its designs).

    A knob that two designs share has one value, which has to suit both; the trust's default comes first. A formula
    gives its knobs no default.
    """
    declared: dict[str, Knob] = {}
    functions = [design.function for design in designs] + ([method.value] if method else [])
    for function in functions:
        for name, knob in read_knobs(function).items():
            first = declared.setdefault(name, knob)
            allowed = first.range & knob.range
            defaults = [default for default in (first.default, knob.default) if default in allowed]
            measured = first.measured or knob.measured
            declared[name] = Knob(defaults[0] if defaults else first.default, allowed, measured)
    if method is None:
        return declared
    return {name: replace(declared[name], default=default) for name, default in method.knobs.items()}


def make_objective(
    method: Method | None, designs: Designs, knobs: dict[str, float], prior_is_policy: bool
) -> Objective:
    """Bind a row or a free combination to its knobs.

    A residual that equals the policy with these settings (guided with eta = 0, or guided by the policy itself) becomes
    the residual `policy`: the same gradient, without a second model's logits.
    """
    trust, residual, scale = designs
    if residual.is_policy(knobs, prior_is_policy):
        residual = RESIDUALS["policy"]
    value = method.value if method else cross_entropy
    bound = {name: knobs[name] for name in read_knobs(value) if name in knobs}
    return Objective(trust, residual, scale, partial(value, **bound), knobs, prior_is_policy)
