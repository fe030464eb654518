"""`QTargetConfig`: which target to train toward, as a flat dataclass."""

import math
import os
from collections.abc import Mapping
from dataclasses import KW_ONLY, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .config_file import read_fields, write_fields
from .measured import AUTO, Knowledge
from .methods import METHODS, find_method
from .objective import Designs, Method, Objective, designs_of, knobs_of, make_objective
from .registry import KNOBS, Range
from .shown import shown
from .top_k import TAILS


PRIORS = ("auto", "policy", "base", "start", "model", "lagged")
KERNELS = ("auto", "torch", "triton")

_NAMES = ("method", "trust", "residual", "scale")
# What torch can take: sizes and indices of 64 bits, and knobs that are multiplied in float32.
_LARGEST_SIZE = 2**63 - 1
_LARGEST_NUMBER = 3.4e38


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _knob(text: str) -> Any:
    return field(default=None, metadata={"help": text + " None takes the default of the method or design."})


@dataclass
class QTargetConfig:
    """The target distribution of supervised fine-tuning: a published method, or a trust and a residual of your choice.

    Parameters:
        method (`str` or `None`, defaults to `"target_sft"`): a name in `METHODS`; `None` for a free combination.
        trust, residual (`str`): the two designs of a free combination; only with `method=None`. `trust` may be a
            formula of a token's statistics, `"min(1, p / 0.1)"`.
        scale (`str`): a formula for what multiplies the gradient of a free combination; None is 1.
        eta, alpha, tau, lam, beta, epsilon, top_k, temperature, clip_max: the knobs. One left `None` takes the default
            of the method or design; one that the chosen target does not use is an error. `alpha="auto"` (trust
            `power`) is measured once by the trainer, on the training data, before the first step.
        prior (`str`, defaults to `"auto"`): where the prior comes from. `"auto"`: what the method names (for
            `target_sft` and free combinations: a given reference model, else the base weights under PEFT, else the
            policy itself). `"policy"`: the policy's own detached distribution. `"base"`: the weights under PEFT's
            adapters; without PEFT, the starting weights. `"start"`: the starting policy, its adapters included.
            `"model"`: the reference model given to the trainer. `"lagged"`: an earlier state of the policy.
        prior_sync_steps (`int`): a lagged prior follows the policy every so many optimiser steps (default 8).
        prior_sync_decay (`float` in [0, 1)): at a sync, keep this share of the lagged prior (an EMA); None copies.
        prior_tail (`"policy"` or `"uniform"`): how the tokens that a top-k cache does not name share their mass; None
            is as the policy does.
        token_weight_column (`str`): dataset column with one weight per token, for the trust `token_weights` (default
            `"token_weights"`).
        chunk_tokens (`int`): tokens scored at once by the fused loss; None chooses by vocabulary size.
        kernel (`"auto"`, `"torch"` or `"triton"`, defaults to `"auto"`): what works on the logits between the matrix
            products. `"auto"` is Triton on a GPU, after a check that it agrees with `"torch"` there, and `"torch"`
            elsewhere. All give the same numbers, up to rounding.

    Raises:
        ValueError: an unknown name, a knob that is unused or out of range, or options that contradict each other.

    Examples:
        >>> QTargetConfig("asft", lam=0.03)
        >>> QTargetConfig(method=None, trust="entropy", residual="guided", top_k=20, eta=0.3)
    """

    method: str | None = field(
        default="target_sft",
        metadata={
            "help": f"Published objective, or adaptive_sft, which is ours: {', '.join(METHODS)}; or 'none' for a free "
            "combination."
        },
    )
    _: KW_ONLY
    trust: str | None = field(
        default=None,
        metadata={
            "help": "Trust in the observed token, for a free combination (--method none): a name, or a formula such "
            "as 'min(1, p / 0.1)'."
        },
    )
    residual: str | None = field(
        default=None, metadata={"help": "Where the rest of the mass goes, for a free combination (--method none)."}
    )
    scale: str | None = field(
        default=None, metadata={"help": "Formula that multiplies the gradient of a free combination. None: 1."}
    )
    eta: float | None = _knob("Share of the prior in the guided residual, in [0, 1].")
    alpha: float | str | None = _knob(
        "Exponent of the trust, >= 0; 'auto' measures it before the first step, where the trust is 'power'."
    )
    tau: float | None = _knob("Probability threshold of the trust, in [0, 1].")
    lam: float | None = _knob("Weight of the residual (label smoothing, hybrid distillation) or of the KL anchor.")
    beta: float | None = _knob("Temperature of the sharpened policy in GEM, > 0.")
    epsilon: float | None = _knob("Upper clip of the probability ratio, >= 0.")
    top_k: int | None = _knob("Number of tokens in the top-k entropy, or of nearest neighbors.")
    temperature: float | None = _knob("Temperature of the prior, of the neighbors, or of the importance weight, > 0.")
    clip_max: float | None = _knob("Largest importance weight, > 0.")
    prior: str = field(
        default="auto",
        metadata={
            "help": "Where the prior comes from. 'base': the weights under PEFT's adapters. 'start': the starting "
            "policy, its adapters included; without PEFT the same.",
            "choices": list(PRIORS),
        },
    )
    prior_sync_steps: int | None = field(
        default=None, metadata={"help": "Optimiser steps between two syncs of a lagged prior. None: 8."}
    )
    prior_sync_decay: float | None = field(
        default=None, metadata={"help": "Share of the lagged prior kept at a sync (EMA), in [0, 1). None: copy."}
    )
    prior_tail: str | None = field(
        default=None,
        metadata={
            "help": "How the tokens that a top-k cache does not name share their mass. None: as the policy does.",
            "choices": list(TAILS),
        },
    )
    token_weight_column: str | None = field(
        default=None, metadata={"help": "Dataset column of per-token weights. None: 'token_weights'."}
    )
    chunk_tokens: int | None = field(
        default=None, metadata={"help": "Tokens scored at once by the fused loss. None: chosen by vocabulary size."}
    )
    kernel: str = field(
        default="auto",
        metadata={
            "help": "What works on the logits. 'auto': Triton on a GPU where it agrees with 'torch', else 'torch'.",
            "choices": list(KERNELS),
        },
    )

    def __post_init__(self):
        if isinstance(self.method, str) and self.method.lower() == "none":  # as a command line spells it
            self.method = None
        if isinstance(self.alpha, str):  # so does its parser with what may be a word
            self.alpha = _number(self.alpha)
        self._check_names()
        self._check_knobs()
        self._check_prior()
        self._check_choice("kernel", KERNELS)
        self._check_range("chunk_tokens", Range(1, whole=True))
        self._check_token_weight_column()

    # --- checks ---

    def _check_names(self) -> None:
        for name in _NAMES:
            value = getattr(self, name)
            if not isinstance(value, str | None):
                raise ValueError(f"`{name}={shown(value)}` is no name: it must be a string, or None.")
        if self.method is None:
            if self.trust is None or self.residual is None:
                raise ValueError(
                    "`method=None` asks for a free combination: set both `trust` and `residual`, or name a `method`."
                )
        else:
            find_method(self.method)
            for name in ("trust", "residual", "scale"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}` is fixed by `method={self.method!r}`: remove it, or set `method=None` for a free "
                        "combination."
                    )
        _ = self.designs  # raises for a name or a formula that is none

    def _check_knobs(self) -> None:
        used = knobs_of(self.row, self.designs)
        for name in KNOBS:
            value = getattr(self, name)
            if value is None:
                if name in used and used[name].default is None:
                    raise ValueError(
                        f"`{name}` has no value: {self.label} has it in a formula, which gives it no default. Set it."
                    )
                continue
            if name not in used:
                raise ValueError(
                    f"`{name}` is not used by {self.label}, whose knobs are: {', '.join(used) or 'none'}. Remove it."
                )
            left_open = isinstance(value, str) and value == AUTO
            if left_open and used[name].measured is None:
                raise ValueError(
                    f"`{name}='auto'` is not known to {self.label}, whose `{name}` is not measured: give a number."
                )
            if not left_open:
                self._check_range(name, used[name].range)

    def _check_prior(self) -> None:
        self._check_choice("prior", PRIORS)
        if self.prior_tail is not None:
            self._check_choice("prior_tail", TAILS)
        if not any(design.uses_prior for design in self.designs):
            if self.prior not in ("auto", "policy"):
                raise ValueError(f"`prior={self.prior!r}` is not used by {self.label}: leave it at 'auto'.")
        elif self.prior == "policy" and self.row is not None and self.row.prior != "auto":
            raise ValueError(
                f"`prior='policy'` leaves {self.label} without the second distribution that it needs: use 'base', "
                "'start', 'lagged', or 'model' with a reference model."
            )
        for name in ("prior_sync_steps", "prior_sync_decay"):
            if getattr(self, name) is not None and self.prior_source != "lagged":
                raise ValueError(f"`{name}` is only used by a lagged prior: remove it, or set `prior='lagged'`.")
        self._check_range("prior_sync_steps", Range(1, whole=True))
        self._check_range("prior_sync_decay", Range(0, 1))
        if self.prior_sync_decay == 1:
            raise ValueError("`prior_sync_decay=1` would never move the prior: choose a value in [0, 1).")

    def _check_token_weight_column(self) -> None:
        column = self.token_weight_column
        if column is None:
            return
        if not isinstance(column, str) or not column:
            raise ValueError(
                f"`token_weight_column={shown(column)}` is no name of a column: it must be a non-empty string."
            )
        if not self.uses_token_weights:
            raise ValueError(
                f"`token_weight_column` is not used by {self.label}: remove it, or choose `method='cft'` or "
                "`trust='token_weights'`."
            )

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"`{name}={shown(value)}` is unknown: choose one of {', '.join(choices)}.")

    def _check_range(self, name: str, allowed: Range) -> None:
        value = getattr(self, name)
        if value is None:
            return
        largest = _LARGEST_SIZE if allowed.whole else _LARGEST_NUMBER
        too_large = isinstance(value, int | float) and abs(value) > largest
        if too_large or value not in allowed:
            limit = f", of at most {largest} in size" if too_large and math.isinf(allowed.high) else ""
            raise ValueError(f"`{name}={shown(value)}` is out of range: it must be {allowed}{limit}.")

    # --- what the fields mean ---

    @property
    def row(self) -> Method | None:
        """The method's row in `METHODS`; None for a free combination."""
        return None if self.method is None else METHODS[self.method]

    @property
    def label(self) -> str:
        """How messages call this target."""
        if self.method:
            return f"`method={self.method!r}`"
        given = ("trust", "residual") if self.scale is None else ("trust", "residual", "scale")
        return ", ".join(f"`{name}={getattr(self, name)!r}`" for name in given)

    @property
    def designs(self) -> Designs:
        """Trust, residual and scale."""
        return designs_of(self.row, self.trust, self.residual, self.scale)

    @property
    def knobs(self) -> dict[str, float | str]:
        """Every knob of this target, with defaults filled in; `"auto"` where one is yet to be measured."""
        used = knobs_of(self.row, self.designs)
        given = {name: getattr(self, name) for name in used}
        return {name: used[name].default if value is None else value for name, value in given.items()}

    @property
    def open_knobs(self) -> tuple[str, ...]:
        """The knobs that are yet to be measured."""
        return tuple(name for name, value in self.knobs.items() if value == AUTO)

    def settled(self, knowledge: Knowledge) -> "QTargetConfig":
        """The same target with its open knobs at what was measured."""
        used = knobs_of(self.row, self.designs)
        return self.settled_as({name: used[name].measured(knowledge) for name in self.open_knobs})

    def settled_as(self, knobs: Mapping[str, Any]) -> "QTargetConfig":
        """The same target with its open knobs at the values that they have among `knobs`, if they are there."""
        return replace(self, **{name: knobs[name] for name in self.open_knobs if name in knobs})

    @property
    def prior_source(self) -> str:
        """`prior`, with "auto" replaced by what the method's row names."""
        if self.prior == "auto" and self.row is not None and self.row.prior is not None:
            return self.row.prior
        return self.prior

    @property
    def sync_steps(self) -> int:
        """Optimiser steps between two syncs of a lagged prior."""
        return self.prior_sync_steps or (self.row and self.row.prior_sync_steps) or 8

    @property
    def uses_token_weights(self) -> bool:
        """Whether the dataset has to bring a weight per token."""
        return any(design.uses_token_weights for design in self.designs)

    @property
    def target(self) -> dict[str, Any]:
        """All that decides the loss, with defaults filled in: equal for configurations that mean the same target."""
        lagged = self.prior_source == "lagged"
        return {
            "method": self.method,
            "trust": self.trust,
            "residual": self.residual,
            "scale": self.scale,
            **self.knobs,
            "prior": self.prior_source,
            "prior_sync_steps": self.sync_steps if lagged else None,
            "prior_sync_decay": (self.prior_sync_decay or 0.0) if lagged else None,
        }

    def objective(self, has_prior: bool, may_be_open: bool = False) -> Objective:
        """The objective with every knob set.

        Args:
            has_prior: whether a prior other than the policy itself is at hand.
            may_be_open: whether knobs may be open that are measured later; in the objective they are NaN until then.

        Raises:
            ValueError: the target needs a prior and there is none, or a knob is open.
        """
        for name in self.open_knobs:
            if not may_be_open:
                raise ValueError(
                    f"`{name}='auto'` of {self.label} is measured by a trainer on its training data: give a number."
                )
        own = self.prior_source == "policy" or (self.prior_source == "auto" and not has_prior)
        knobs = self.knobs | dict.fromkeys(self.open_knobs, math.nan)
        objective = make_objective(self.row, self.designs, knobs, own)
        if objective.uses_prior and not has_prior:
            raise ValueError(
                f"{self.label} needs a prior and none is given: pass `prior_logits` or `prior_hidden` (to the "
                "trainer: a `ref_model`, or `prior='base'`, 'start' or 'lagged')."
            )
        return objective

    # --- other forms ---

    @classmethod
    def coerce(cls, value: "QTargetConfig | str | dict[str, Any] | None") -> "QTargetConfig":
        """A configuration from what users write for one: a method's name, a dict of fields, None for the default."""
        if isinstance(value, cls):
            value.__post_init__()  # fields may have been set since it was made
            return value
        if value is None:
            return cls()
        if isinstance(value, str):
            return cls(value)
        if isinstance(value, dict):
            return cls._from_fields(value, "`qtarget_config`")
        raise ValueError(
            f"`qtarget_config` must be a `QTargetConfig`, a method's name or a dict, got `{type(value).__name__}`."
        )

    @classmethod
    def _from_fields(cls, values: dict[str, Any], origin: str) -> "QTargetConfig":
        known = {item.name for item in fields(cls)}
        unknown = sorted(shown(name) for name in values if name not in known)
        if unknown:
            raise ValueError(f"{origin} has unknown fields [{', '.join(unknown)}]: known are {sorted(known)}.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All fields that are set."""
        return {name: value for name, value in asdict(self).items() if value is not None or name == "method"}

    def save_pretrained(self, save_directory: str | os.PathLike, provenance: dict[str, Any] | None = None) -> None:
        """Write `qtarget_config.json` into a directory, which is made if it does not exist.

        Args:
            save_directory: the directory.
            provenance: what the file says beside the fields, under that name; it is not read again.
        """
        write_fields(self.to_dict(), Path(save_directory), provenance)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> "QTargetConfig":
        """Read what `save_pretrained` wrote; `directory` may also be the path of the file itself.

        Raises:
            ValueError: there is no such file, it is not JSON, names a field twice, or holds unknown or invalid fields.
                A design that you registered has to be registered again before its name is read.
        """
        values, path = read_fields(Path(directory))
        return cls._from_fields(values, f"`{path}`")


def prior_itself(prior: str = "auto") -> QTargetConfig:
    """A target that asks for nothing but the prior: what a cache stores, and what is shown beside other targets."""
    return QTargetConfig(method=None, trust="zero", residual="prior", prior=prior)
