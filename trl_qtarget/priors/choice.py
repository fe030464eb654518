"""Which prior a target has, and why: decided here, once, for trainer, model card, inspection and memory account.

`choose_prior` loads nothing and changes nothing. What it describes is made by `build.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from torch import nn
from transformers import PreTrainedModel

from ..target.config import QTargetConfig
from ..target.objective import Objective
from .base import base_model_of
from .shards import in_zero3


# Of PEFT's LoRA: what each puts into the adapter, it takes from the weights.
_INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class PriorKind(Enum):
    """Where the second distribution of a target comes from."""

    NONE = "none"
    """The target has no second distribution."""
    POLICY = "policy"
    """The policy's own detached distribution."""
    REFERENCE = "reference"
    """Another model: a reference model or a teacher."""
    ADAPTERS_OFF = "adapters_off"
    """The policy's own model without its PEFT adapters."""
    STARTING_COPY = "starting_copy"
    """A frozen copy of the starting weights."""
    LAGGED = "lagged"
    """The policy's own model with the weights of an earlier moment."""


_WORDS = {
    PriorKind.REFERENCE: "the reference model",
    PriorKind.ADAPTERS_OFF: "the base weights (adapters off)",
    PriorKind.STARTING_COPY: "the starting weights (a frozen copy)",
}


@dataclass(frozen=True)
class PolicyFacts:
    """What the choice asks of the policy, which may not be loaded yet.

    Attributes:
        adapters: the PEFT configurations by name; empty without PEFT.
        path: where the policy is loaded from; None for a loaded model.
        sharded: whether ZeRO-3 has sharded a loaded model.
    """

    adapters: Mapping[str, Any] = field(default_factory=dict)
    path: str | None = None
    sharded: bool = False

    @classmethod
    def of(cls, model: str | nn.Module, peft_config: Any = None) -> "PolicyFacts":
        """Of what a trainer is given: a path or a loaded model, and perhaps the configuration of an adapter."""
        new = {} if peft_config is None else {"default": peft_config}
        if isinstance(model, str):
            return cls(new, path=model)
        return cls((dict(model.peft_config) if is_peft_model(model) else {}) | new, sharded=in_zero3(model))


@dataclass(frozen=True)
class PriorChoice:
    """The prior of a run.

    Attributes:
        kind: where it comes from.
        objective: the objective that is trained toward, which knows whether it reads a prior.
        words: what it is, for log and model card; None where nothing but the policy runs.
        reference: the reference model, or the path that it is loaded from; only of the kind `REFERENCE`.
        reference_name: what the reference model is called; None if nothing names it.
        starting_path: where the starting weights can be loaded from, if a copy of them cannot be made.
        sync_steps, sync_decay: of a lagged prior.
        warnings: what the user should hear about this choice, once.
    """

    kind: PriorKind
    objective: Objective
    words: str | None = None
    reference: str | PreTrainedModel | None = None
    reference_name: str | None = None
    starting_path: str | None = None
    sync_steps: int | None = None
    sync_decay: float | None = None
    warnings: tuple[str, ...] = ()

    @property
    def title(self) -> str | None:
        """The words, with the reference model's name where it has one."""
        return f"{self.words} (`{self.reference_name}`)" if self.reference_name else self.words


def choose_prior(
    config: QTargetConfig, policy: PolicyFacts, reference: str | PreTrainedModel | None = None
) -> PriorChoice:
    """The prior that a configuration has with this policy and reference model.

    Args:
        config: the target.
        policy: what is known of the policy.
        reference: a reference model or teacher, a path of one, or None.

    Raises:
        ValueError: the target lacks the prior that it needs, or cannot have the one that it names.
    """
    objective = config.objective(has_prior=True)
    source, warnings = config.prior_source, []

    if reference is not None and (not objective.uses_prior or source == "lagged"):
        warnings.append(f"`ref_model` is not used by {config.label} and was left alone.")
        reference = None
    if not objective.uses_prior:
        kind = PriorKind.POLICY if config.prior == "policy" else PriorKind.NONE
        return PriorChoice(kind, objective, warnings=tuple(warnings))
    if source == "lagged":
        decay = config.prior_sync_decay
        average = f", moving average with decay {decay}" if decay else ""
        words = f"the policy's own weights, synced every {config.sync_steps} optimiser steps{average}"
        return PriorChoice(
            PriorKind.LAGGED,
            objective,
            words,
            sync_steps=config.sync_steps,
            sync_decay=decay,
            warnings=tuple(warnings),
        )
    if reference is not None:
        if config.prior == "base":
            warnings.append("`prior='base'` is overridden: the given `ref_model` is the prior.")
        kind, name = PriorKind.REFERENCE, _name_of(reference)
        return PriorChoice(kind, objective, _WORDS[kind], reference, name, warnings=tuple(warnings))
    if source == "model":
        raise ValueError(
            f"{config.label} needs a reference model and `ref_model` is None: pass a path or a loaded model, or "
            "choose `prior='base'` or `prior='lagged'`."
        )
    if policy.adapters:
        _check_base(policy.adapters)
        return PriorChoice(PriorKind.ADAPTERS_OFF, objective, _WORDS[PriorKind.ADAPTERS_OFF])
    if source == "base":
        if policy.sharded:
            raise ValueError(
                "`prior='base'` copies the starting weights, and ZeRO-3 has already sharded those of `model`: pass a "
                "path as `model`, or the path of the starting weights as `ref_model`."
            )
        kind = PriorKind.STARTING_COPY
        return PriorChoice(kind, objective, _WORDS[kind], starting_path=policy.path)
    warning = (
        f"{config.label}: no reference model and no PEFT base, so the prior is the policy's own distribution. Pass "
        "`ref_model`, or `prior='base'` for the starting weights; `prior='policy'` silences this."
    )
    return PriorChoice(PriorKind.POLICY, config.objective(has_prior=False), warnings=(warning,))


def check_models(model: Any, reference: Any) -> None:
    """Raise unless the reference model is a model, and not the one that is trained."""
    if not isinstance(reference, str | nn.Module | None):
        raise ValueError(f"`ref_model` must be a path or a loaded model, got `{type(reference).__name__}`.")
    models = [base_model_of(each) for each in (model, reference) if isinstance(each, nn.Module)]
    if len(models) == 2 and models[0] is models[1]:
        raise ValueError(
            "`ref_model` is the model being trained, so it would move with it: pass a second instance or a path, or "
            "`ref_model=None` with `prior='base'` for the starting weights."
        )


def _check_base(adapters: Mapping[str, Any]) -> None:
    """Raise where the weights under a PEFT adapter are not those of a model of their own."""
    for name, adapter in adapters.items():
        init = getattr(adapter, "init_lora_weights", True)
        if isinstance(init, str) and init.startswith(_INITS_THAT_CHANGE_THE_BASE):
            raise ValueError(
                f"`init_lora_weights={init!r}` of the adapter {name!r} moves a part of the base weights into the "
                "adapter, so the model without it is not the base model: pass the base model's path as `ref_model`, "
                "or choose another initialisation, or `prior='policy'`."
            )


def _name_of(reference: str | PreTrainedModel) -> str | None:
    """What a card calls the model: its id, or the last part of a local path."""
    name = reference if isinstance(reference, str) else getattr(reference.config, "_name_or_path", "")
    return (Path(name).name if Path(name).is_dir() else name) or None
