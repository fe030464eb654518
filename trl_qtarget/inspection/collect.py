"""Targets of real examples, by the very loss that trains toward them: no dense logits, whatever the vocabulary."""

import datetime
import importlib.metadata
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from trl import SFTConfig

from ..config import QTargetConfig
from ..head import Observed
from ..methods import TokenTarget
from ..priors import inference
from ..trainer import QTargetSFTTrainer, sequences_of
from .summary import summarise


# What shows policy and prior without a method: its target is the prior itself, or the policy where there is none.
_REFERENCE = QTargetConfig(method=None, trust="zero", residual="prior")
_VERSIONS = ("trl-qtarget", "torch", "transformers", "trl")


def inspect_target(
    model: "str | PreTrainedModel",
    dataset: Dataset,
    methods: Sequence[Any] = ("target_sft",),
    *,
    ref_model: "str | PreTrainedModel | None" = None,
    args: SFTConfig | None = None,
    processing_class: Any = None,
    alternatives: int = 6,
    title: str = "What is it being taught?",
    dataset_name: str = "",
    progress: bool = True,
) -> dict[str, Any]:
    """What each method's target asks of a model, on every labelled token of some examples.

    Examples are prepared as the trainer prepares them, so what is shown is what would be trained. Nothing is trained.

    Args:
        model: the policy: a path, or a loaded model, perhaps with adapters.
        dataset: the examples, in any format of TRL.
        methods: `QTargetConfig`s, names of methods, or dicts of fields.
        ref_model: the prior of methods that use one: a path or a loaded model. None: the base under the adapters, if
            there are any; else the policy itself, as at the first step of a training.
        args: for `max_length`, `completion_only_loss` and what else decides what is labelled; None takes TRL's
            defaults with whole examples.
        processing_class: the tokenizer or processor; None loads the model's own.
        alternatives: tokens kept of each distribution: the label, then the policy's and the prior's favourites.
        title, dataset_name: for the page.
        progress: whether to show a progress bar.

    Returns:
        The data of the page that `write_page` writes.

    Raises:
        ValueError: a method is wrong or named twice, there are no examples, or an argument is out of range.
    """
    configs = [QTargetConfig.coerce(method) for method in methods]
    _check(configs, dataset, alternatives)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _trainer(model, dataset, configs, ref_model, args, processing_class, scratch)
        name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
        facts = {"title": title, "model": name, "dataset": dataset_name}
        return inspect_rows(trainer, trainer.train_dataset, configs, facts, alternatives, progress)


def inspect_rows(
    trainer: QTargetSFTTrainer,
    rows: Dataset,
    configs: Sequence[QTargetConfig],
    facts: dict[str, str],
    alternatives: int = 6,
    progress: bool = False,
) -> dict[str, Any]:
    """Inspect rows that a trainer has prepared, with its model as it is now and with its prior.

    Args:
        trainer: holds the model, the prior and the collator. Under several processes each of them calls this.
        rows: tokenised examples.
        configs: the targets to compare.
        facts: `title`, `model` and `dataset`, for the page.
        alternatives, progress: as in `inspect_target`.

    Raises:
        ValueError: no token is labelled.
    """
    found, seen = [], set()
    bar = tqdm(rows, desc="Inspecting", unit="example", disable=not progress)
    with inference(trainer.model):
        for number, row in enumerate(bar):
            example = _inspect(trainer, row, configs, alternatives)
            if example is not None:
                seen.update(example["tokens"], *example["alternatives"])
                found.append({"name": str(number), **example})
    if not found:
        raise ValueError("`dataset` has no labelled token: check its format, `max_length` and `completion_only_loss`.")
    reference = trainer._prior_description
    return {
        **facts,
        "reference": reference,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
        "vocabulary": _vocabulary(trainer.processing_class, seen),
        "methods": [_describe(config, reference) for config in configs],
        "examples": found,
        "summary": summarise(found, len(configs)),
    }


def _check(configs: list[QTargetConfig], dataset: Dataset, alternatives: int) -> None:
    if not configs:
        raise ValueError("`methods` is empty: name at least one.")
    if any(config in configs[:number] for number, config in enumerate(configs)):
        raise ValueError("`methods` names one target twice: remove it, or give it other knobs.")
    if len(dataset) == 0:
        raise ValueError("`dataset` is empty: give it at least one example.")
    if alternatives < 2:
        raise ValueError(f"`alternatives={alternatives}` must be at least 2: the label and one other token.")


def _trainer(
    model: Any,
    dataset: Dataset,
    configs: list[QTargetConfig],
    ref_model: Any,
    args: Any,
    processing: Any,
    scratch: str,
) -> QTargetSFTTrainer:
    """A trainer that prepares the examples and holds the prior; its own target takes in whatever any method needs."""
    if args is None:
        cuda = torch.cuda.is_available()
        args = SFTConfig(scratch, max_length=None, report_to="none", use_cpu=not cuda, bf16=False)
    else:
        args = replace(args, packing=False, report_to="none")
    weights = next((config for config in configs if config.uses_token_weights), None)
    has_reference = ref_model is not None or is_peft_model(model)
    target = QTargetConfig(
        method=None,
        trust="zero" if weights is None else "token_weights",
        residual="prior" if has_reference else "policy",
        token_weight_column=None if weights is None else weights.token_weight_column,
    )
    return QTargetSFTTrainer(
        model, args, train_dataset=dataset, processing_class=processing, qtarget_config=target, ref_model=ref_model
    )


# --- one example ---


@dataclass
class _Tokens:
    """What is known of the labelled tokens of one example, in their order; filled block by block."""

    count: int
    positions: list[int] = field(default_factory=list)
    values: dict[str, list] = field(default_factory=dict)

    def add(self, **columns: Tensor | list) -> None:
        for name, column in columns.items():
            self.values.setdefault(name, []).extend(column.tolist() if isinstance(column, Tensor) else column)


def _inspect(
    trainer: QTargetSFTTrainer, row: dict[str, Any], configs: Sequence[QTargetConfig], alternatives: int
) -> dict[str, Any] | None:
    """The data of one example; None if no token of it is labelled."""
    inputs = trainer._prepare_inputs(trainer.data_collator([row]))
    tokens = inputs["input_ids"][0].tolist()
    if not (inputs["labels"][0, 1:] != -100).any():
        return None
    base = trainer._request(inputs)
    base.sequence_ids = sequences_of(inputs)
    has_prior = base.prior is not None
    first, by_method, observed = _Tokens(alternatives), [], []
    for config in configs:
        objective = config.objective(has_prior=True)
        lagged = config.prior_source == "lagged" and trainer.qtarget_config.prior_source != "lagged"
        found = _Tokens(alternatives)
        # Without a prior the policy is its own, which is what `base` and `lagged` are at the first step.
        own = objective.uses_prior and (lagged or not has_prior)
        observed.append(Observed(objective, partial(_note_target, found, first), own))
        by_method.append(found.values)
    objective, observer = _REFERENCE.objective(has_prior), partial(_note_policy, first, has_prior)
    model = trainer.model_wrapped if trainer.is_in_train else trainer.model
    # Without gradients none is computed, and the loss itself is thrown away.
    model(**inputs, qtarget=replace(base, objective=objective, observer=observer, observed=observed))
    return {
        "tokens": tokens,
        "scored": [position + 1 for position in first.positions],  # a position predicts the next token
        "nll": first.values["nll"],
        "entropy": first.values["entropy"],
        "alternatives": first.values["ids"],
        "p": first.values["p"],
        "prior": first.values.get("prior"),
        "methods": by_method,
    }


def _rounded(values: Tensor) -> list:
    """Five significant digits: enough to look at, and half the size."""
    return (
        [_rounded(row) for row in values] if values.dim() > 1 else [float(f"{value:.5g}") for value in values.tolist()]
    )


def _note_policy(found: _Tokens, has_prior: bool, positions: Tensor, target: TokenTarget) -> None:
    """The policy's and the prior's probabilities of the tokens that are worth showing."""
    tile = target.tile
    prior = tile.prior_log_probs if has_prior else tile.log_probs
    ids = _alternatives(tile.labels, tile.log_probs, prior, found.count)
    found.positions += positions.tolist()
    found.add(
        ids=ids,
        nll=_rounded(target.nll),
        entropy=_rounded(tile.policy.entropy),
        p=_rounded(tile.log_probs.gather(1, ids).exp()),
    )
    if has_prior:
        found.add(prior=_rounded(prior.gather(1, ids).exp()))


def _alternatives(labels: Tensor, policy: Tensor, prior: Tensor, count: int) -> Tensor:
    """`[n, count]`: the label, then favourites of the policy and of the prior by turns."""
    count = min(count, policy.size(1))
    favourites = [distribution.topk(count, dim=-1).indices for distribution in (policy, prior)]
    turns = torch.stack(favourites, dim=2).flatten(1).tolist()
    rows = [list(dict.fromkeys([label, *turn]))[:count] for label, turn in zip(labels.tolist(), turns, strict=True)]
    return torch.tensor(rows, device=labels.device)


def _note_target(found: _Tokens, first: _Tokens, positions: Tensor, target: TokenTarget) -> None:
    """What the target asks for, at the alternatives that `first` has chosen, and what makes a step of it."""
    start = len(found.positions)
    found.positions += positions.tolist()
    labels = target.tile.labels[:, None]
    chosen = torch.tensor(first.values["ids"][start : len(found.positions)], device=labels.device)
    trust, policy = target.trust[:, None], target.tile.policy.probs
    probs = target.positive.probs - trust * target.negative.probs
    probs = probs.scatter_add(1, labels, trust)
    suspicion = _suspicion(probs, labels)
    # Of a step on the logits, Σ p (Q - p) s is what every token's probability gives to the others.
    drift = target.scale * torch.linalg.vecdot(policy, probs - policy)
    found.add(
        trust=_rounded(target.trust),
        scale=_rounded(target.scale),
        label_mass=_rounded(target.label_mass),
        suspicion=_rounded(suspicion),
        kl=[None if value != value else value for value in _rounded(target.kl)],
        drift=_rounded(drift),
        q=_rounded(probs.gather(1, chosen)),
    )


def _suspicion(target: Tensor, labels: Tensor) -> Tensor:
    """By how many nats the `target[n, V]` prefers another token to the label: `log max Q(v)/Q(y)`, at least 0.

    It is large where the label is distrusted and the residual is sure of another token. Unlike `1 - γ` it tells an
    unlikely label from an impossible one. Where Q is negative, as in `gem`, nothing is preferred.
    """
    smallest = torch.finfo(target.dtype).tiny
    rival = target.scatter(1, labels, 0.0).amax(1).clamp(min=smallest)
    label = target.gather(1, labels).squeeze(1).clamp(min=smallest)
    return (rival.log() - label.log()).clamp(min=0.0)


# --- words ---


def _describe(config: QTargetConfig, reference: str | None) -> dict[str, Any]:
    row = config.row
    uses = config.objective(has_prior=True).uses_prior
    if not uses:
        prior = None
    elif config.prior_source == "lagged":
        prior = "an earlier state of the policy; here the policy itself"
    else:
        prior = reference or "the policy itself"
    return {
        "name": config.method or f"{config.trust} + {config.residual}",
        "formula": row.loss if row else "CE(Q, p)",
        "knobs": config.knobs,
        "prior": prior,
        "arxiv": row.arxiv if row else None,
    }


def _vocabulary(processing_class: Any, ids: set[int]) -> dict[str, str]:
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    return {str(token): tokenizer.decode([token]) for token in sorted(ids)}
