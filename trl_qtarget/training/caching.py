"""The cache of a prior, made: its model runs once over what a trainer has prepared."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .. import __version__
from ..gemm import Head
from ..loss.body import inference
from ..loss.head import gathered, vocabulary_of
from ..loss.read_top_k import read_top_k
from ..loss.request import IGNORE_INDEX, PriorStates
from ..priors.base import Prior, base_model_of
from ..priors.record import fingerprints
from ..priors.store import FORMS, Manifest, heads_in, key_of, tokenizer_fingerprint
from ..priors.store_writer import (
    SHARD_BYTES,
    Example,
    Unit,
    begin,
    is_there,
    units_of,
    write,
    write_card,
    write_tensors,
)
from ..priors.tokens import tokenizer_of
from .trainer import QTargetSFTTrainer


logger = get_logger(__name__)


def write_cache(
    writer: "Writer", directory: str | Path, kept: slice = slice(None), shard_bytes: int = SHARD_BYTES
) -> None:
    """Cache what a prior says of every label of a trainer's datasets.

    Processes that are given the same do it together. What is there already is left, so that a run that was killed goes
    on, and a second dataset adds to the first.

    Args:
        writer: asks the prior, about datasets that are neither truncated nor packed.
        directory: of the cache.
        kept: the tokens of an example that its model reads.
        shard_bytes: size of a shard.

    Raises:
        ValueError: `directory` holds another cache or has no room for this one.
    """
    directory, rows = Path(directory), list(_rows_of(writer.trainer))
    examples = _examples(rows, kept)
    units = units_of(examples, writer.manifest, shard_bytes)
    left = sum(unit.rows for unit in units if not is_there(directory, unit)) * writer.manifest.row_bytes
    total = sum(unit.rows for unit in units)
    logger.info(
        f"{len(examples)} examples with {total} labelled tokens, {writer.manifest.row_bytes} bytes each: "
        f"{total * writer.manifest.row_bytes / 1e9:.3f} GB in {len(units)} shards, of which {left / 1e9:.3f} GB are "
        "to be written."
    )
    existing = next(folder for folder in (directory, *directory.absolute().parents) if folder.exists())
    if (free := shutil.disk_usage(existing).free) < left:
        raise ValueError(
            f"`output_dir`: {directory} has {free / 1e9:.3f} GB free and needs {left / 1e9:.3f} GB: choose another "
            "folder, or a smaller `k`."
        )
    begin(directory, writer.manifest)
    if writer.manifest.form == "hidden" and not heads_in(directory):
        writer.save_head(directory)
    bar = tqdm(total=total, unit="label", disable=writer.trainer.args.disable_tqdm)
    with bar:
        write(directory, units, lambda unit: writer.say(unit, rows), lambda unit: bar.update(unit.rows))
    write_card(directory, writer.manifest)


def _rows_of(trainer: QTargetSFTTrainer) -> Iterator[Dataset]:
    evaluation = trainer.eval_dataset
    for dataset in (trainer.train_dataset, *(evaluation.values() if isinstance(evaluation, dict) else [evaluation])):
        if dataset is None:
            continue
        if not isinstance(dataset, Dataset):
            raise ValueError("`train_dataset` is a stream, and a cache is of examples that can be counted: load it.")
        yield dataset


def _examples(datasets: list[Dataset], kept: slice) -> list[Example]:
    """Every example once, with the labels that it has anywhere, in the order of the datasets."""
    found: dict[bytes, tuple[int, set[int]]] = {}
    row = 0
    for dataset in datasets:
        for example in dataset.select_columns(["input_ids", "labels"]):
            ids, labels = example["input_ids"], example["labels"]
            positions = [at for at in range(len(ids))[kept] if at > 0 and labels[at] != IGNORE_INDEX]
            if positions:
                found.setdefault(key_of(ids), (row, set()))[1].update(positions)
            row += 1
    return [Example(key, row, tuple(sorted(positions))) for key, (row, positions) in found.items()]


class Writer:
    """Asks a trainer's prior.

    Args:
        trainer: holds the prior and the datasets.
        form: `"top_k"`, or `"hidden"` for the final hidden states.
        k: tokens of the form `top_k`.

    Raises:
        ValueError: there is no prior, it cannot be cached, or an argument is out of range.
    """

    def __init__(self, trainer: QTargetSFTTrainer, form: str = "top_k", k: int = 64):
        if form not in FORMS:
            raise ValueError(f"`form={form!r}` is unknown: choose one of {', '.join(FORMS)}.")
        if trainer._prior is None:
            raise ValueError("There is no prior to cache: pass a `ref_model`, or `prior='base'`.")
        self._ask(trainer, trainer._prior, trainer.processing_class)
        states = self._states([[0, 0]])
        # The k most probable are those of the tokens that both have, as with the model beside the policy.
        with gathered(states.head()) as (head,):
            self.manifest = self._manifest(form, k, states, head.first(self.rows) if form == "top_k" else head)

    def _ask(self, trainer: QTargetSFTTrainer, prior: Prior, processing_class: Any) -> None:
        """Take the prior, and the tokenizer whose ids it reads."""
        if trainer.accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            raise ValueError(
                "A cache is made by processes that do not wait for each other, so none may hold a part of the model: "
                "launch without DeepSpeed and FSDP. A model that one device cannot hold is split with `device_map: "
                "auto`."
            )
        self.trainer, self.prior = trainer, prior
        trainer.model.requires_grad_(False)  # else the policy's own prior would keep a copy of what is trained
        pad = tokenizer_of(processing_class).pad_token_id
        self.collate = DataCollatorForLanguageModeling(pad_token_id=pad or 0)
        self.rows = vocabulary_of(base_model_of(trainer.model))

    def _manifest(self, form: str, k: int, states: PriorStates, head: Head) -> Manifest:
        model = getattr(self.prior, "causal_model", None) or base_model_of(self.trainer.model)
        if not 1 <= k <= len(head.weight):
            raise ValueError(f"`k={k}` must be from 1 to the vocabulary's {len(head.weight)}.")
        quantization = getattr(model.config, "quantization_config", None)
        quantization = quantization.to_dict() if hasattr(quantization, "to_dict") else quantization
        weights = fingerprints(self.prior.fixed_parameters(), {})
        of_form = (
            {"k": k}
            if form == "top_k"
            else {
                "width": states.hidden.size(-1),
                "logit_scale": head.logit_scale,
                "logit_softcap": head.logit_softcap,
            }
        )
        return Manifest(
            form=form,
            vocabulary=len(head.weight),
            tokenizer=tokenizer_fingerprint(self.trainer.processing_class),
            prior=self.trainer.prior_choice.title,
            name=getattr(model.config, "_name_or_path", None) or None,
            revision=getattr(model.config, "_commit_hash", None),
            dtype=str(states.hidden.dtype if form == "hidden" else model.dtype).removeprefix("torch."),
            quantization=None if quantization is None else json.dumps(quantization, sort_keys=True, default=str),
            weights=hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()[:16],
            package=__version__,
            **of_form,
        )

    @torch.no_grad()
    def _states(self, ids: list[list[int]]) -> PriorStates:
        batch = self.collate([{"input_ids": each, "labels": each} for each in ids])
        batch = {name: value for name, value in batch.items() if name != "labels"}
        inputs = dict(self.trainer._prepare_inputs(batch), use_cache=False)
        with inference(self.trainer.model), self.trainer.accelerator.autocast():
            states = self.prior.states(inputs)
        if states.hidden.shape[:2] != inputs["input_ids"].shape:
            raise ValueError(
                "`peft_config` puts virtual tokens before the text, which a cache has no place for: cache the base "
                "(`prior: base`), or a `ref_model`."
            )
        return states

    def save_head(self, directory: Path) -> None:
        with gathered(self._states([[0, 0]]).head()) as (head,):
            given = {"weight": head.weight, "bias": head.bias}
            tensors = {name: it.detach().cpu().contiguous() for name, it in given.items() if it is not None}
        write_tensors(directory, "head.", tensors)

    def say(self, unit: Unit, datasets: list[Dataset]) -> Mapping[str, Tensor]:
        """What the prior says of a unit's rows. Rows of about one length are asked for together."""
        order = sorted(range(len(unit.examples)), key=lambda index: (unit.examples[index].positions[-1], index))
        size, said = self.trainer.args.per_device_eval_batch_size, {}
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            for index, found in zip(
                chosen, self._of_batch([unit.examples[index] for index in chosen], datasets), strict=True
            ):
                said[index] = found
        parts = [said[index] for index in range(len(order))]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _of_batch(self, examples: list[Example], datasets: list[Dataset]) -> list[Mapping[str, Tensor]]:
        whole = [row_of(datasets, example.row)["input_ids"] for example in examples]
        # A label is predicted by the tokens before it, so the last one need not be read.
        states = self._states([ids[: example.positions[-1]] for ids, example in zip(whole, examples, strict=True)])
        hidden = [states.hidden[row, [at - 1 for at in it.positions]] for row, it in enumerate(examples)]
        counts = [len(example.positions) for example in examples]
        if self.manifest.form == "hidden":
            return [{"hidden": values.cpu()} for values in hidden]
        labels = [ids[at] for ids, example in zip(whole, examples, strict=True) for at in example.positions]
        device = states.hidden.device
        with gathered(states.head(), device=device) as (head,):
            head = head.first(self.rows)
            known = read_top_k(torch.cat(hidden), head, torch.tensor(labels, device=device), self.manifest.k)
        fields = {
            "ids": known.ids.int(),
            "log_probs": known.log_probs.float(),
            "label_log_probs": known.label_log_probs.float(),
            "rest_log_mass": known.rest_log_mass.float(),
        }
        split = {name: value.cpu().split(counts) for name, value in fields.items()}
        return [{name: values[row] for name, values in split.items()} for row in range(len(examples))]


def row_of(datasets: list[Dataset], row: int) -> Mapping[str, Any]:
    for dataset in datasets:
        if row < len(dataset):
            return dataset[row]
        row -= len(dataset)
    raise IndexError(row)
