"""A method or free combination with every knob set: what the dense and the fused loss both evaluate."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from .registry import Design, Knob, read_knobs
from .residual import RESIDUALS
from .tile import LabelStatistics, Measure, Tile
from .token_target import TokenTarget, parts_of
from .trust import TRUSTS
from .values import cross_entropy, unit_scale


@dataclass(frozen=True, kw_only=True)
class Method:
    """One published objective: names of its trust and residual, scale, loss value, knobs, prior and source."""

    trust: str
    residual: str = "policy"
    scale: Callable[..., Tensor] = unit_scale
    value: Callable[..., Tensor] = cross_entropy
    knobs: dict[str, float] = field(default_factory=dict)
    prior: str | None = None
    prior_sync_steps: int | None = None
    loss: str
    source: str
    arxiv: str | None = None


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
    scale: Callable[[Tile], Tensor]
    value: Callable[[TokenTarget], Tensor]
    knobs: dict[str, float]
    prior_is_policy: bool
    progress: float = 1.0

    @property
    def uses_prior(self) -> bool:
        """Whether the logits of another distribution than the policy's own are needed."""
        return not self.prior_is_policy and (self.trust.uses_prior or self.residual.uses_prior)

    def token_trust(self, tile: Tile | LabelStatistics) -> Tensor:
        """γ of the tokens of a tile, or of all tokens for a per-sequence trust."""
        tile.progress = self.progress
        trust = self.trust(tile, self.knobs).to(tile.label_log_probs.dtype)
        _check_shape("trust", self.trust, trust, tile.label_log_probs)
        return trust

    def target(self, tile: Tile, trust: Tensor | None = None) -> TokenTarget:
        """The target for a tile; `trust[n]` is given for a per-sequence trust, which was computed beforehand."""
        parts = parts_of(self.residual(tile, self.knobs))
        if trust is None:
            trust = self.token_trust(tile)
        measured = tuple(part._replace(measure=self._measure(tile, part.measure)) for part in parts)
        return TokenTarget(tile, trust, self.scale(tile), measured)

    def _measure(self, tile: Tile, residual: Measure | Tensor) -> Measure:
        if isinstance(residual, Measure):
            return residual
        _check_shape("residual", self.residual, residual, tile.log_probs)
        return tile.policy if residual is tile.log_probs else tile.measure(residual)


def knobs_of(method: Method | None, trust: Design, residual: Design) -> dict[str, Knob]:
    """The knobs of a method (only those of its row) or of a free combination (all of its two designs).

    A knob that two designs share has one value, which has to suit both; the trust's default comes first.
    """
    declared: dict[str, Knob] = {}
    functions = [trust.function, residual.function] + ([method.scale, method.value] if method else [])
    for function in functions:
        for name, knob in read_knobs(function).items():
            first = declared.setdefault(name, knob)
            allowed = first.range & knob.range
            defaults = [default for default in (first.default, knob.default) if default in allowed]
            declared[name] = Knob(defaults[0] if defaults else first.default, allowed)
    if method is None:
        return declared
    return {name: Knob(default, declared[name].range) for name, default in method.knobs.items()}


def designs_of(method: Method | None, trust: str | None, residual: str | None) -> tuple[Design, Design]:
    """Trust and residual of a method, or of a free combination by name."""
    return TRUSTS.find(method.trust if method else trust), RESIDUALS.find(method.residual if method else residual)


def make_objective(
    method: Method | None, trust: Design, residual: Design, knobs: dict[str, float], prior_is_policy: bool
) -> Objective:
    """Bind a row or a free combination to its knobs.

    A residual that equals the policy with these settings (guided with eta = 0, or guided by the policy itself) becomes
    the residual `policy`: the same gradient, without a second model's logits.
    """
    if residual.is_policy(knobs, prior_is_policy):
        residual = RESIDUALS["policy"]

    def bind(function: Callable) -> Callable:
        return partial(function, **{name: knobs[name] for name in read_knobs(function) if name in knobs})

    return Objective(
        trust=trust,
        residual=residual,
        scale=bind(method.scale if method else unit_scale),
        value=bind(method.value if method else cross_entropy),
        knobs=knobs,
        prior_is_policy=prior_is_policy,
    )
