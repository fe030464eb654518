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
from ..target.split import plan_of
from .base import base_model_of
from .fit import check_kind
from .shards import is_sharded
from .store import PriorCache


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
    START = "start"
    """The policy's own model with the weights that it started from, those of its PEFT adapters included."""
    LAGGED = "lagged"
    """The policy's own model with the weights of an earlier moment."""
    CACHED = "cached"
    """What another model has said before, read from a cache."""


_WORDS = {
    PriorKind.REFERENCE: "the reference model",
    PriorKind.ADAPTERS_OFF: "the base weights (adapters off)",
    PriorKind.STARTING_COPY: "the starting weights (a frozen copy)",
    PriorKind.START: "the starting policy (the starting values of what is trained)",
}


@dataclass(frozen=True)
class PolicyFacts:
    """What the choice asks of the policy, which may not be loaded yet.

    Attributes:
        adapters: the PEFT configurations by name; empty without PEFT.
        path: where the policy is loaded from; None for a loaded model.
        sharded: whether a loaded model is in shards, of ZeRO-3 or of transformers' `DistributedConfig`.
        may_be_trained: whether adapters came with a loaded model, and so may have been trained already.
    """

    adapters: Mapping[str, Any] = field(default_factory=dict)
    path: str | None = None
    sharded: bool = False
    may_be_trained: bool = False

    @classmethod
    def of(cls, model: str | nn.Module, peft_config: Any = None) -> "PolicyFacts":
        """Of what a trainer is given: a path or a loaded model, and perhaps the configuration of an adapter."""
        new = {} if peft_config is None else {"default": peft_config}
        if isinstance(model, str):
            return cls(new, path=model)
        given = dict(model.peft_config) if is_peft_model(model) else {}
        return cls(given | new, sharded=is_sharded(model), may_be_trained=bool(given))


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
        cache: what the prior has said before; only of the kind `CACHED`.
        sync_steps, sync_decay: of a lagged prior.
        warnings: what the user should hear about this choice, once.
        warning_if_trained: what the user should hear if the adapters have been trained already.
    """

    kind: PriorKind
    objective: Objective
    words: str | None = None
    reference: str | PreTrainedModel | None = None
    reference_name: str | None = None
    starting_path: str | None = None
    cache: PriorCache | None = None
    sync_steps: int | None = None
    sync_decay: float | None = None
    warnings: tuple[str, ...] = ()
    warning_if_trained: str | None = None

    @property
    def title(self) -> str | None:
        """The words, with the reference model's name where it has one."""
        return f"{self.words} (`{self.reference_name}`)" if self.reference_name else self.words


def choose_prior(
    config: QTargetConfig,
    policy: PolicyFacts,
    reference: str | PreTrainedModel | None = None,
    cache: PriorCache | None = None,
) -> PriorChoice:
    """The prior that a configuration has with this policy and reference model.

    Args:
        config: the target.
        policy: what is known of the policy.
        reference: a reference model or teacher, a path of one, or None.
        cache: what a prior has said before, or None.

    Raises:
        ValueError: the target lacks the prior that it needs, or cannot have the one that it names.
    """
    objective = config.objective(has_prior=True, may_be_open=True)
    source, warnings = config.prior_source, []

    if reference is not None and (not objective.uses_prior or source == "lagged"):
        warnings.append(f"`ref_model` is not used by {config.label} and was left alone.")
        reference = None
    if cache is not None and reference is not None:
        raise ValueError("`prior_cache` and `ref_model` are two priors: pass one of them.")
    if cache is not None and (not objective.uses_prior or source == "lagged"):
        warnings.append(f"`prior_cache` is not used by {config.label} and was left alone.")
        cache = None
    if config.prior_tail is not None and (cache is None or cache.manifest.form != "top_k"):
        raise ValueError(
            "`prior_tail` says how the rest of a cache of the form 'top_k' is shared, and there is none that is used: "
            "remove it, or pass such a cache as `prior_cache`."
        )
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
    if cache is not None:
        if cache.manifest.form == "top_k":
            plan_of(objective)  # raises where it is not enough
        if config.prior in ("base", "start"):
            warnings.append(f"`prior={config.prior!r}` is overridden: the given `prior_cache` is the prior.")
        return PriorChoice(PriorKind.CACHED, objective, cache.manifest.title, cache=cache, warnings=tuple(warnings))
    if reference is not None:
        if config.prior in ("base", "start"):
            warnings.append(f"`prior={config.prior!r}` is overridden: the given `ref_model` is the prior.")
        kind, name = PriorKind.REFERENCE, name_of(reference)
        return PriorChoice(kind, objective, _WORDS[kind], reference, name, warnings=tuple(warnings))
    if source == "model":
        raise ValueError(
            f"{config.label} needs a reference model and `ref_model` is None: pass a path or a loaded model, or "
            "choose `prior='base'`, `prior='start'` or `prior='lagged'`."
        )
    if policy.adapters and source != "start":
        _check_base(policy.adapters)
        kind, warning = PriorKind.ADAPTERS_OFF, None
        if policy.may_be_trained and config.prior == "auto":
            warning = (
                f"The adapters of `model` have been trained already, and the prior of {config.label} is the model "
                "without them, not the policy that training starts from. Say which is meant: `prior='start'` is the "
                "starting policy, its adapters included; `prior='base'` the weights under them, and silences this."
            )
        return PriorChoice(kind, objective, _WORDS[kind], warning_if_trained=warning)
    if source in ("base", "start"):
        # Weights in shards cannot be copied as a model of their own.
        kind = PriorKind.START if policy.adapters or policy.sharded else PriorKind.STARTING_COPY
        return PriorChoice(kind, objective, _WORDS[kind], starting_path=policy.path)
    warning = (
        f"{config.label}: no reference model and no PEFT base, so the prior is the policy's own distribution. Pass "
        "`ref_model`, or `prior='base'` for the starting weights; `prior='policy'` silences this."
    )
    return PriorChoice(PriorKind.POLICY, config.objective(has_prior=False, may_be_open=True), warnings=(warning,))


def check_models(model: Any, reference: Any) -> None:
    """Raise unless the reference model is a model, and not the one that is trained."""
    if not isinstance(reference, str | nn.Module | None):
        raise ValueError(f"`ref_model` must be a path or a loaded model, got `{type(reference).__name__}`.")
    for name, each in {"model": model, "ref_model": reference}.items():
        if isinstance(each, nn.Module):
            check_kind(name, each)
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
                "adapter, so the model without it is not the base model: set `prior='start'` for the policy as it "
                "starts, or pass the base model's path as `ref_model`, or choose another initialisation, or "
                "`prior='policy'`."
            )


def name_of(reference: str | PreTrainedModel) -> str | None:
    """What a card calls the model: its id on the hub, or the last part of a local path, be it one of long ago."""
    name = reference if isinstance(reference, str) else getattr(reference.config, "_name_or_path", "")
    local = Path(name).is_dir() or name.startswith((".", "~", "/")) or name.count("/") > 1 or "\\" in name
    return (name.replace("\\", "/").rstrip("/").rpartition("/")[2] if local else name) or None
