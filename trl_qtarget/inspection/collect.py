"""Targets of real examples, by the very loss that trains toward them: no dense logits, whatever the vocabulary."""

import datetime
import importlib.metadata
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoProcessor, PreTrainedModel
from trl import SFTConfig

from ..loss.request import Observed
from ..priors.base import virtual_tokens
from ..priors.choice import PolicyFacts, PriorChoice, PriorKind, check_models, choose_prior
from ..priors.resolved import ResolvedTarget
from ..target.config import QTargetConfig, prior_itself
from ..target.token_target import TokenTarget
from ..training.trainer import QTargetSFTTrainer
from .guest import load_policy, no_trace, precision
from .summary import summarise
from .turns import assistant_tokens
from .words import vocabulary


# What shows policy and prior without a method: its target is the prior itself, or the policy where there is none.
_REFERENCE = prior_itself()
# Column that names an example; without one, examples have the numbers that they come in.
ROW_COLUMN = "inspected_row"
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
    model_name: str = "",
    dataset_name: str = "",
    progress: bool = True,
) -> dict[str, Any]:
    """What each method's target asks of a model, on every labelled token of some examples.

    Examples are prepared as the trainer prepares them, so what is shown is what would be trained. Nothing is trained.

    Args:
        model: the policy: a path, or a loaded model, perhaps with adapters. It is left as it is.
        dataset: the examples, in any format of TRL. They are named by their number, or by a column `ROW_COLUMN`.
        methods: `QTargetConfig`s, names of methods, or dicts of fields.
        ref_model: the prior of methods that use one: a path or a loaded model. None: the base under the adapters, if
            there are any; else the policy itself, as at the first step of a training.
        args: for `max_length`, `completion_only_loss` and what else decides what is labelled; None takes TRL's
            defaults with whole examples.
        processing_class: the tokenizer or processor; None loads the model's own.
        alternatives: tokens kept of each distribution: the label, then the policy's and the prior's favourites.
        title, model_name, dataset_name: for the page; a model is else named by its path.
        progress: whether to show a progress bar.

    Returns:
        The data of the page that `write_page` writes.

    Raises:
        ValueError: a method is wrong or named twice, there are no examples, or an argument is out of range.
    """
    configs = [QTargetConfig.coerce(method) for method in methods]
    check_request(configs, alternatives)
    dataset = numbered(dataset)
    name = model_name or (model if isinstance(model, str) else getattr(model.config, "_name_or_path", ""))
    with tempfile.TemporaryDirectory() as scratch, no_trace(model, ref_model):
        if isinstance(model, str):
            processing_class = processing_class or AutoProcessor.from_pretrained(model)
            model = load_policy(model)
        check_models(model, ref_model)
        policy = PolicyFacts.of(model)
        for config in configs:
            choose_prior(config, policy, ref_model)  # refuses what training refuses
        trainer = _trainer(model, dataset, configs, ref_model, args, processing_class, scratch)
        facts = {"title": title, "model": name, "dataset": dataset_name}
        given = {str(row[ROW_COLUMN]): row for row in dataset}
        return inspect_rows(trainer, trainer.train_dataset, configs, facts, alternatives, progress, given)


def inspect_rows(
    trainer: QTargetSFTTrainer,
    rows: Dataset,
    configs: Sequence[QTargetConfig],
    facts: dict[str, str],
    alternatives: int = 6,
    progress: bool = False,
    given: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Inspect rows that a trainer has prepared, with its model as it is now and with its prior.

    Args:
        trainer: holds the model, the prior and the collator. Under several processes each of them calls this.
        rows: tokenised examples.
        configs: the targets to compare.
        facts: `title`, `model` and `dataset`, for the page.
        alternatives, progress: as in `inspect_target`.
        given: the examples before their preparation, by name: from conversations it is found which labels are of the
            assistant's turns, where others are labelled too.

    Raises:
        ValueError: no token is labelled, or the policy gives NaN.
    """
    configs = [trainer.settled(config) for config in configs]
    choices = [trainer.prior_of(config) for config in configs]
    found, seen = [], set()
    bar = tqdm(rows, desc="Inspecting", unit="example", disable=not progress)
    for number, row in enumerate(bar):
        example = _inspect(trainer, {name: row[name] for name in row if name != ROW_COLUMN}, choices, alternatives)
        if example is not None:
            preferred = (method["preferred"] for method in example["methods"])
            seen.update(example["tokens"], *example["alternatives"], *preferred)
            name = str(row.get(ROW_COLUMN, number))
            found.append({"name": name, **example, "assistant": _of_assistant(trainer, given, name, example)})
    if not found:
        raise ValueError("`dataset` has no labelled token: check its format, `max_length` and `completion_only_loss`.")
    titles = _titles(configs)
    equals = equal_targets(found, len(configs))
    return {
        **facts,
        "reference": trainer.prior_choice.title,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
        "vocabulary": vocabulary(trainer.processing_class, seen),
        "methods": [
            _describe(config, title, choice, trainer.prior_choice)
            | {"equals": None if equals[number] is None else titles[equals[number]]}
            for number, (config, title, choice) in enumerate(zip(configs, titles, choices, strict=True))
        ],
        "examples": found,
        "summary": summarise(found, len(configs)),
    }


def _of_assistant(
    trainer: QTargetSFTTrainer, given: Mapping[str, Mapping[str, Any]] | None, name: str, example: dict[str, Any]
) -> list[bool] | None:
    """For each labelled token, whether it is of an assistant's turn; None where all are, or it is not known."""
    if given is None or name not in given:
        return None
    mask = assistant_tokens(trainer.processing_class, given[name], example["tokens"])
    labelled = None if mask is None else [mask[position] for position in example["scored"]]
    return None if labelled is None or all(labelled) else labelled


def equal_targets(examples: list[dict[str, Any]], methods: int) -> list[int | None]:
    """For each method the first one before it that asks for the same on every labelled token; None without one."""
    same = ("trust", "scale", "label_mass", "kl", "moved", "q")
    shown = [[[example["methods"][m][name] for name in same] for example in examples] for m in range(methods)]
    return [next((other for other in range(m) if shown[other] == shown[m]), None) for m in range(methods)]


def check_request(configs: Sequence[QTargetConfig], alternatives: int) -> None:
    """Raise unless there are targets to compare, each once, and enough alternatives to compare them by."""
    if not configs:
        raise ValueError("`methods` is empty: name at least one.")
    if any(config in configs[:number] for number, config in enumerate(configs)):
        raise ValueError("`methods` names one target twice: remove it, or give it other knobs.")
    columns = {config.token_weight_column for config in configs if config.uses_token_weights}
    if len(columns) > 1:
        raise ValueError("`methods` read weights from different columns: inspect them one at a time.")
    if alternatives < 2:
        raise ValueError(f"`alternatives={alternatives}` must be at least 2: the label and one other token.")


def numbered(dataset: Dataset | IterableDataset) -> Dataset:
    """The examples with the number of each in a column, which stays with it when others are dropped.

    Raises:
        ValueError: there are none.
    """
    if isinstance(dataset, IterableDataset):
        dataset = Dataset.from_list(list(dataset))
    if len(dataset) == 0:
        raise ValueError("`dataset` is empty: give it at least one example.")
    if ROW_COLUMN in dataset.column_names:
        return dataset
    return dataset.add_column(ROW_COLUMN, list(range(len(dataset))))


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
        args = SFTConfig(scratch, max_length=None, use_cpu=not torch.cuda.is_available(), **precision())
    # Nothing is trained, evaluated, saved or pushed, whatever a recipe says.
    args = replace(
        args,
        output_dir=scratch,
        packing=False,
        padding_free=False,
        eval_strategy="no",
        load_best_model_at_end=False,
        push_to_hub=False,
        report_to="none",
    )
    for name in ("gradient_checkpointing", "activation_checkpointing"):  # the older and the newer word for it
        if hasattr(args, name):
            setattr(args, name, False)
    weights = next((config for config in configs if config.uses_token_weights), None)
    target = QTargetConfig(
        method=None,
        trust="zero" if weights is None else "token_weights",
        residual="prior" if _has_prior(model, ref_model) else "policy",
        token_weight_column=None if weights is None else weights.token_weight_column,
    )
    return QTargetSFTTrainer(
        model, args, train_dataset=dataset, processing_class=processing, qtarget_config=target, ref_model=ref_model
    )


def _has_prior(model: PreTrainedModel, ref_model: Any) -> bool:
    """Whether there is another distribution to show beside the policy's, also for targets that do not read it."""
    try:
        return choose_prior(_REFERENCE, PolicyFacts.of(model), ref_model).objective.uses_prior
    except ValueError:  # adapters whose base is no model of its own
        return False


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
    trainer: QTargetSFTTrainer, row: dict[str, Any], choices: Sequence[PriorChoice], alternatives: int
) -> dict[str, Any] | None:
    """The data of one example; None if no token of it is labelled."""
    has_prior = trainer.prior_choice.objective.uses_prior
    first, by_method = _Tokens(alternatives), []
    observed = [Observed(_REFERENCE.objective(has_prior), partial(_note_policy, first, has_prior))]
    for choice in choices:
        found = _Tokens(alternatives)
        # The policy itself stands in for the starting weights and for an earlier state, as at the first step.
        own = choice.objective.uses_prior and choice.kind is not trainer.prior_choice.kind
        observed.append(Observed(choice.objective, partial(_note_target, found, first), own))
        by_method.append(found.values)
    inputs = trainer.observe(row, observed)
    if inputs is None:
        return None
    tokens = inputs["input_ids"][0].tolist()
    if "attention_mask" in inputs:
        tokens = tokens[: int(inputs["attention_mask"][0].sum())]  # of `pad_to_multiple_of`
    if any(math.isnan(value) for value in first.values["nll"]):
        raise ValueError("`model` gives NaN: there is nothing to show of it.")
    # A position predicts the next token; virtual tokens stand before the text.
    scored = [position + 1 - virtual_tokens(trainer.model) for position in first.positions]
    if any(tokens[place] != ids[0] for place, ids in zip(scored, first.values["ids"], strict=True)):
        raise RuntimeError("The labels are not the tokens that follow them: this collator shifts them in its own way.")
    return {
        "tokens": tokens,
        "scored": scored,
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
    policy, probs = target.tile.policy.probs, target.probs()
    suspicion, preferred = _suspicion(probs, labels)
    # Of a step on the logits, Σ p (Q - p) s is what every token's probability gives to the others.
    drift = target.scale * torch.linalg.vecdot(policy, probs - policy)
    moved = target.scale.abs() * (probs - policy).abs_().sum(-1) / 2
    found.add(
        trust=_rounded(target.trust),
        scale=_rounded(target.scale),
        label_mass=_rounded(target.label_mass),
        suspicion=_rounded(suspicion),
        preferred=preferred,
        kl=[None if value != value else value for value in _rounded(target.kl)],
        drift=_rounded(drift),
        moved=_rounded(moved),
        q=_rounded(probs.gather(1, chosen)),
    )


def _suspicion(target: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """By how many nats the `target[n, V]` prefers another token to the label, `log max Q(v)/Q(y)`, and which one.

    At least 0, and large where the label is distrusted and the residual is sure of another token. Unlike `1 - γ` it
    tells an unlikely label from an impossible one. Where Q is negative, as in `gem`, nothing is preferred.
    """
    smallest = torch.finfo(target.dtype).tiny
    rival, preferred = target.scatter(1, labels, -math.inf).max(1)
    label = target.gather(1, labels).squeeze(1).clamp(min=smallest)
    return (rival.clamp(min=smallest).log() - label.log()).clamp(min=0.0), preferred


# --- words ---


def _name(config: QTargetConfig) -> str:
    return config.method or f"{config.trust} + {config.residual}"


def _titles(configs: Sequence[QTargetConfig]) -> list[str]:
    """One method may be compared with itself at other knobs or priors: then these are part of its title."""
    names = [_name(config) for config in configs]
    titles = []
    for config, name in zip(configs, names, strict=True):
        details = [f"{knob}={value:g}" for knob, value in config.knobs.items()]
        details += [f"prior={config.prior}"] if config.prior != "auto" else []
        titles.append(" ".join([name, *details]) if names.count(name) > 1 else name)
    return titles


def _describe(config: QTargetConfig, title: str, choice: PriorChoice, running: PriorChoice) -> dict[str, Any]:
    """What the page says of a target, whose prior is that of `choice`; `running` is the one that runs."""
    target = ResolvedTarget.of(config, choice)
    row = target.config.row
    if choice.kind is PriorKind.NONE:
        prior = None
    elif choice.kind is running.kind:
        prior = choice.title or "the policy itself"
    elif choice.kind is PriorKind.LAGGED:
        prior = "an earlier state of the policy; here the policy itself"
    else:
        prior = "the policy itself"
    return {
        "name": _name(config),
        "title": title,
        "trained": target.config.label if target.became_another else None,
        "formula": row.loss if row else "CE(Q, p)",
        "knobs": target.config.knobs,
        "prior": prior,
        "arxiv": row.arxiv if row else None,
    }
