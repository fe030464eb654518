"""The target that a run is really trained toward: what was asked for, with its prior and every knob filled in."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .. import __version__
from ..target.config import QTargetConfig
from ..target.methods import METHODS
from ..target.objective import designs_of, knobs_of
from ..target.shown import number
from .choice import PriorChoice, PriorKind


@dataclass(frozen=True)
class ResolvedTarget:
    """What card, saved configuration, log, trackers and inspection say of a target.

    Attributes:
        config: the target with every knob set and `prior` as it was found. Where nothing but the policy runs, as for
            `target_sft` without a reference model or adapters, it is the method that this is: `dft`.
        requested: the target as it was asked for.
        prior: what the prior is, in words; None where nothing but the policy runs.
        prior_name: what the reference model is called, without local folders; None if nothing names it.
    """

    config: QTargetConfig
    requested: QTargetConfig
    prior: str | None = None
    prior_name: str | None = None

    @classmethod
    def of(cls, requested: QTargetConfig, choice: PriorChoice) -> "ResolvedTarget":
        """Of a configuration and the prior that was chosen for it."""
        config = requested
        if not choice.objective.uses_prior:
            config = _without_prior(requested, choice)
        elif choice.kind is PriorKind.REFERENCE:
            config = replace(requested, prior="model")
        elif choice.kind is PriorKind.ADAPTERS_OFF:
            config = replace(requested, prior="base")
        else:
            config = replace(requested, prior=requested.prior_source)
        if config.prior == "lagged":
            config = replace(config, prior_sync_steps=config.sync_steps)
        config = replace(config, **config.knobs)
        return cls(config, requested, choice.words, choice.reference_name)

    def settled_as(self, knobs: Mapping[str, Any]) -> "ResolvedTarget":
        """The same with open knobs (`"auto"`) at the values that they have among `knobs`, if they are there."""
        config, requested = self.config.settled_as(knobs), self.requested.settled_as(knobs)
        return replace(self, config=config, requested=requested)

    @property
    def prior_title(self) -> str | None:
        """The prior in words, with the reference model's name where it has one."""
        return f"{self.prior} (`{self.prior_name}`)" if self.prior_name else self.prior

    @property
    def became_another(self) -> bool:
        """Whether the target asked for is, with the prior at hand, one of another name."""
        names = ("method", "trust", "residual")
        return any(getattr(self.config, name) != getattr(self.requested, name) for name in names)

    @property
    def line(self) -> str:
        """All of it in one line, for a log."""
        knobs = ", ".join(f"{name}={number(value)}" for name, value in self.config.knobs.items())
        asked = f" (asked for: {self.requested.label})" if self.became_another else ""
        words = [f"{self.config.label}{asked}", *([knobs] if knobs else [])]
        words.append(f"the prior is {self.prior_title}" if self.prior else "no prior")
        return f"Target: {'; '.join(words)}; trl-qtarget {__version__}."

    @property
    def provenance(self) -> dict[str, Any]:
        """What a saved configuration says beside its fields."""
        asked = {"requested": self.requested.to_dict()} if self.became_another else {}
        return {**asked, "prior": self.prior, "prior_name": self.prior_name, "trl_qtarget": __version__}

    def facts(self) -> dict[str, Any]:
        """Flat and by full names, for the run configuration of trackers."""
        config, lagged = self.config, self.config.prior_source == "lagged"
        found = {"method": config.method or "none"}
        found |= {name: getattr(config, name) for name in ("trust", "residual", "scale") if getattr(config, name)}
        found |= config.knobs | {"prior": self.prior or "none"}
        found |= {"prior_name": self.prior_name} if self.prior_name else {}
        if lagged:
            found |= {"prior_sync_steps": config.sync_steps, "prior_sync_decay": config.prior_sync_decay or 0.0}
        if config.uses_token_weights:
            found["token_weight_column"] = config.token_weight_column or "token_weights"
        return {f"qtarget_{name}": value for name, value in {**found, "version": __version__}.items()}


def _without_prior(requested: QTargetConfig, choice: PriorChoice) -> QTargetConfig:
    """The target where the policy is alone, by the name that it then has."""
    names = _names_without_prior(requested, choice.objective.residual.name)
    # A trust may still read a prior, which is the policy itself.
    designs = designs_of(METHODS.get(names["method"]), names["trust"], names["residual"], names["scale"])
    fields = names | {"prior": "policy" if any(design.uses_prior for design in designs) else "auto"}
    if any(design.uses_token_weights for design in designs):
        fields["token_weight_column"] = requested.token_weight_column
    known = knobs_of(METHODS.get(names["method"]), designs)
    fields |= {name: value for name, value in requested.knobs.items() if name in known}
    return QTargetConfig(**fields, chunk_tokens=requested.chunk_tokens, kernel=requested.kernel)


def _names_without_prior(requested: QTargetConfig, residual: str) -> dict[str, Any]:
    names = {name: getattr(requested, name) for name in ("method", "trust", "residual", "scale")}
    if residual == requested.designs.residual.name:
        return names
    row = requested.row
    if row is None:
        return names | {"residual": residual}
    wanted = (row.trust, residual, row.scale, row.value)
    same = (name for name, each in METHODS.items() if (each.trust, each.residual, each.scale, each.value) == wanted)
    return names | {"method": next(same, requested.method)}
