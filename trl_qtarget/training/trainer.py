"""`QTargetSFTTrainer`: TRL's SFTTrainer, trained toward a target that a `QTargetConfig` describes."""

import inspect
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, is_peft_model
from torch import Tensor
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, DataCollatorForVisionLanguageModeling

from ..loss.choice import check_kernel
from ..loss.head import NextTokens, QTargetOutput, TargetRequest, add_target_head
from ..priors.base import AdapterOffPrior, Prior, base_model_of
from ..priors.lagged import LaggedPrior, PriorCallback
from ..priors.reference import (
    check_base,
    check_reference,
    load_reference,
    reference_prior,
    starting_copy,
    uses_reference,
)
from ..priors.shards import in_zero3
from ..target.config import QTargetConfig
from .card import add_target, describe_prior
from .checkpoints import check_checkpoint, last_whole_checkpoint
from .data import (
    SEQUENCES_KEY,
    WEIGHTS_KEY,
    TokenColumnCollator,
    TokenColumns,
    check_batch,
    check_column,
    prepare_with_columns,
)
from .metrics import local_sums, target_means


logger = get_logger(__name__)

# Arguments of the policy's forward that a prior's backbone is not given.
_POLICY_ALONE = ("labels", "output_router_logits")


class QTargetSFTTrainer(SFTTrainer):
    """A drop-in `SFTTrainer` that trains toward an explicit target distribution (arXiv 2606.11189).

    Beside TRL's metrics it logs, as means over the labelled tokens: `target/nll`, the labels' plain negative
    log-likelihood, comparable between methods where the loss is not; `target/trust`, γ; `target/label_mass`, the
    probability that the target puts on the label; `target/kl`, KL(Q‖p); with a prior, `target/prior_agreement`, the
    share of labels that are its first choice.

    Args:
        model, args, ...: every argument of [`SFTTrainer`](https://huggingface.co/docs/trl/sft_trainer), in its order.
        qtarget_config (`QTargetConfig`, `str` or `dict`): the target; a method's name for its defaults. `None` is
            `"target_sft"`, or `"dft"` if `args.loss_type="dft"`.
        ref_model (`str` or `PreTrainedModel`): reference model or teacher, of the policy's vocabulary: the prior of
            every method that uses a frozen one. A path is loaded with `args.model_init_kwargs`, in the policy's dtype.

    Raises:
        ValueError: before any training step, if the target, the `SFTConfig`, the reference model or the dataset do not
            fit together.

    Examples:
        >>> trainer = QTargetSFTTrainer(
        ...     model="Qwen/Qwen3-1.7B", args=SFTConfig(), train_dataset=dataset, qtarget_config="asft"
        ... )
        >>> trainer.train()
    """

    _tag_names: ClassVar = ["trl", "sft", "trl-qtarget"]

    def __init__(
        self,
        model: "str | PreTrainedModel",
        args: SFTConfig | None = None,
        *sft_args: Any,
        qtarget_config: QTargetConfig | str | dict[str, Any] | None = None,
        ref_model: "str | PreTrainedModel | None" = None,
        **sft_kwargs: Any,
    ):
        given = inspect.signature(SFTTrainer.__init__).bind(self, model, args, *sft_args, **sft_kwargs).arguments
        self.qtarget_config = resolve_config(qtarget_config, args, given.get("compute_loss_func"))
        check_reference(self.qtarget_config, model, ref_model)
        self._token_columns = _token_columns(self.qtarget_config, given)
        self._model_path = model if isinstance(model, str) else None

        super().__init__(model, args, *sft_args, **sft_kwargs)

        _refuse_what_cannot_work(self.accelerator)
        check_kernel(self.qtarget_config.kernel, self.accelerator.device)
        # A subclass of TRL's collators is the user's own, and left alone.
        if self._token_columns and type(self.data_collator) is DataCollatorForVisionLanguageModeling:
            raise ValueError(
                "`token_weight_column` counts the tokens of a text, and the tokens of images are made in the data "
                "collator: pass a `data_collator` that returns `token_weights`, or a text dataset."
            )
        if self._token_columns and type(self.data_collator) is DataCollatorForLanguageModeling:
            self.data_collator = TokenColumnCollator.extending(self.data_collator, self._token_columns)
        add_target_head(base_model_of(self.model))
        self._prior = self._choose_prior(ref_model)
        self._prior_description = describe_prior(self._prior, ref_model)
        self._objective = self.qtarget_config.objective(has_prior=self._prior is not None)
        self._totals: dict[str, Tensor] = {}
        self._new_tokens: Tensor | int = 0

    def _choose_prior(self, ref_model: "str | PreTrainedModel | None") -> Prior | None:
        config = self.qtarget_config
        if ref_model is not None and not uses_reference(config):
            logger.warning(f"`ref_model` is not used by {config.label} and was left alone.")
            ref_model = None
        if ref_model is not None and config.prior == "base":
            logger.warning("`prior='base'` is overridden: the given `ref_model` is the prior.")
        prior = self._make_prior(ref_model)
        if prior is not None:
            self.add_callback(PriorCallback(prior))
            logger.info(f"{config.label}: the prior is {prior.description}.")
        elif config.prior == "auto" and config.objective(has_prior=True).uses_prior:
            logger.warning(
                f"{config.label}: no reference model and no PEFT base, so the prior is the policy's own distribution. "
                "Pass `ref_model`, or `prior='base'` for the starting weights; `prior='policy'` silences this."
            )
        return prior

    def _make_prior(self, ref_model: "str | PreTrainedModel | None") -> Prior | None:
        """The prior that the configuration names; None where it is the policy itself, or none is needed."""
        config = self.qtarget_config
        if not config.objective(has_prior=True).uses_prior:
            return None
        if isinstance(ref_model, str):
            ref_model = load_reference(ref_model, self.model, self.args, self.accelerator)
        if ref_model is not None:
            return reference_prior(ref_model, self.model, self.accelerator)
        if config.prior_source == "lagged":
            return LaggedPrior(self.model, lambda: self.model_wrapped, config.sync_steps, config.prior_sync_decay)
        if is_peft_model(self.model):
            check_base(self.model)
            return AdapterOffPrior(self.model)
        if config.prior_source == "base":
            if self._model_path is not None and in_zero3(self.model):  # sharded while it was loaded
                copy = load_reference(self._model_path, self.model, self.args, self.accelerator, same_model=True)
            else:
                copy = starting_copy(self.model, self.accelerator)
            return reference_prior(copy, self.model, self.accelerator, "the starting weights (a frozen copy)")
        return None

    # --- data ---

    def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
        if not self._token_columns:
            return super()._prepare_dataset(*args, **kwargs)
        return prepare_with_columns(super()._prepare_dataset, self._token_columns, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns = [*self._signature_columns, *self._token_columns.keys()]

    # --- loss ---

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        inputs["use_cache"] = False
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        with _explaining_truncated_images(self.args.max_length):
            request = self._request(inputs)
            outputs = model(**inputs, qtarget=request, num_items_in_batch=num_items_in_batch)
        loss = self._scaled(outputs, num_items_in_batch)
        self._record(outputs, inputs)
        if not return_outputs:
            return loss
        warnings.warn(
            "The logits that `compute_metrics` receives take an extra forward pass: the loss never builds them.",
            stacklevel=2,
        )
        with torch.no_grad():
            return loss, model(**{key: value for key, value in inputs.items() if key != "labels"})

    def _request(self, inputs: dict[str, Any]) -> TargetRequest:
        """What the loss needs beside the model's inputs; takes its own columns out of them."""
        weights, sequences = inputs.pop(WEIGHTS_KEY, None), inputs.pop(SEQUENCES_KEY, None)
        if self.qtarget_config.uses_token_weights:
            check_batch(WEIGHTS_KEY, weights, inputs["labels"], self.qtarget_config.label)
        if self._objective.trust.per_sequence:
            sequences = sequences_of(inputs) if sequences is None else sequences
            check_batch(SEQUENCES_KEY, sequences, inputs["labels"], self.qtarget_config.label)
        prior, next_tokens = None, NextTokens.of(inputs["labels"])
        if self._prior is not None:
            prior = self._prior.request({key: value for key, value in inputs.items() if key not in _POLICY_ALONE})
        config = self.qtarget_config
        return TargetRequest(
            self._objective, prior, weights, sequences, config.chunk_tokens, config.kernel, next_tokens=next_tokens
        )

    def _scaled(self, outputs: QTargetOutput, num_items_in_batch: Tensor | int | None) -> Tensor:
        """The loss as `Trainer` expects it, by TRL's rules for averaging over ranks and accumulation steps."""
        loss = outputs.loss
        # `num_items_in_batch` counts the tokens of every rank, and DDP averages the gradients over the ranks.
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        # The auxiliary loss is a mean of one micro-batch, so it is averaged over the accumulation steps.
        if self.aux_loss_enabled:
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
        return loss

    # --- metrics: sums over all ranks that stay on the device until they are logged ---

    def _record(self, outputs: QTargetOutput, inputs: Mapping[str, Any]) -> None:
        mode = "train" if self.model.training else "eval"
        sums = self.accelerator.gather(local_sums(outputs.tokens, inputs)[None]).sum(0)
        count = sums[0].clamp(min=1)
        self._metrics[mode]["entropy"].append(sums[2] / count)
        self._metrics[mode]["mean_token_accuracy"].append(sums[3] / count)
        if self.aux_loss_enabled:
            aux_loss = self.accelerator.gather(outputs.aux_loss.detach()[None]).mean()
            self._metrics[mode]["aux_loss"].append(aux_loss)
        self._totals[mode] = self._totals.get(mode, 0) + sums.double()
        if mode == "train":
            self._new_tokens = self._new_tokens + sums[1].long()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        metrics, totals = self._metrics[mode], self._totals.pop(mode, None)
        self._total_train_tokens += int(self._new_tokens) // self.get_tp_size()
        self._new_tokens = 0
        for key, values in metrics.items():
            metrics[key] = [value.item() if isinstance(value, Tensor) else value for value in values]
        if totals is not None:
            metrics["num_tokens"] = [self._total_train_tokens]
            for name, value in target_means(totals.tolist()).items():
                metrics[name] = [value]
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self._totals.pop("eval", None)  # `predict` adds to them and logs nothing
        return super().evaluate(*args, **kwargs)

    # --- checkpoints ---

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        *args: Any,
        allow_new_target: bool = False,
        **kwargs: Any,
    ) -> Any:
        """`Trainer.train`, which goes on from whole checkpoints only, and only toward their target.

        Args:
            resume_from_checkpoint (`str` or `bool`): a checkpoint; `True` is the last one in `args.output_dir` that
                was not interrupted while it was written.
            allow_new_target (`bool`, defaults to `False`): whether to resume although `qtarget_config` differs from
                the one that the checkpoint was trained toward.

        Raises:
            ValueError: the checkpoint does not exist, is not whole, or was trained toward another target.
        """
        if resume_from_checkpoint:
            if resume_from_checkpoint is True:
                resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
            check_checkpoint(resume_from_checkpoint, self.qtarget_config, allow_new_target)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self.qtarget_config.save_pretrained(output_dir or self.args.output_dir)
        if not _internal_call and output_dir in (None, self.args.output_dir):
            self.create_model_card()  # else only checkpoints and pushes would write one

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_target(Path(self.args.output_dir) / "README.md", self.qtarget_config, self._prior_description)
            # Beside the card, for whatever is pushed while training goes on.
            self.qtarget_config.save_pretrained(self.args.output_dir)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # PEFT reads adapters as float32, but those of a quantised model are trained in bfloat16: the run would go on
        # with other roundings than it began with, and need more memory.
        dtypes = {name: value.dtype for name, value in self.model.named_parameters() if value.requires_grad}
        super()._load_from_checkpoint(*args, **kwargs)
        for name, value in self.model.named_parameters():
            if value.dtype != dtypes.get(name, value.dtype):
                value.data = value.data.to(dtypes[name])

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._prior is not None:
            self._prior.save(output_dir, self.args.should_save)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # What follows marks the checkpoint as whole, so every rank has to be done.
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._prior is not None and checkpoint is not None and os.path.isdir(checkpoint):
            self._prior.load(checkpoint)


def resolve_config(config: Any, args: SFTConfig | None, compute_loss_func: Any = None) -> QTargetConfig:
    """The target that the two configurations name together; contradictions are refused."""
    loss_type = getattr(args, "loss_type", None)
    if config is None and loss_type == "dft":
        config = "dft"
    config = QTargetConfig.coerce(config)
    if loss_type == "dft" and config.method != "dft":
        raise ValueError(
            f"`loss_type='dft'` in the `SFTConfig` contradicts `qtarget_config` ({config.label}): leave `loss_type` "
            "at its default, or set `method='dft'`."
        )
    if getattr(args, "label_smoothing_factor", 0):
        raise ValueError(
            "`label_smoothing_factor` in the `SFTConfig` would replace the target: set it to 0 and use "
            f"`QTargetConfig('label_smoothing', lam={args.label_smoothing_factor})`."
        )
    if compute_loss_func is not None:
        raise ValueError(
            "`compute_loss_func` would replace the target: remove it, or register your objective with "
            "`register_trust` and `register_residual`."
        )
    return config


def _token_columns(config: QTargetConfig, given: dict[str, Any]) -> TokenColumns:
    """The per-token columns that the target needs, checked against the datasets."""
    args, weights = given.get("args"), None
    if config.uses_token_weights:
        weights = config.token_weight_column or WEIGHTS_KEY
        datasets = {"train": given.get("train_dataset")}
        evaluation = given.get("eval_dataset")
        datasets |= evaluation if isinstance(evaluation, dict) else {"eval": evaluation}
        check_column(weights, {name: dataset for name, dataset in datasets.items() if dataset is not None})
    packed = bool(getattr(args, "packing", False) or getattr(args, "eval_packing", False))
    documents = packed and config.objective(has_prior=True).trust.per_sequence
    return TokenColumns(weights, documents)


@contextmanager
def _explaining_truncated_images(max_length: int | None) -> Iterator[None]:
    """Name the remedy where a model says that `max_length` has cut off a part of an image's tokens."""
    try:
        yield
    except ValueError as error:
        if max_length is None or "Image features and image tokens do not match" not in str(error):
            raise
        raise ValueError(
            f"`max_length` ({max_length}) cuts off image tokens whose image is still there: raise it, or set it to "
            "None so that nothing is truncated."
        ) from error


def _refuse_what_cannot_work(accelerator: Accelerator) -> None:
    parallelism = accelerator.parallelism_config
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError(
            "`parallelism_config` splits sequences over ranks (context or sequence parallelism), which "
            "`QTargetSFTTrainer` does not support: set `cp_size` and `sp_size` to 1."
        )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError(
            "`fsdp_version=1` flattens the parameters of the LM head, which `QTargetSFTTrainer` reads by themselves: "
            "set `fsdp_version: 2` in the Accelerate configuration."
        )


def sequences_of(inputs: Mapping[str, Any]) -> Tensor:
    """Which document each token of a batch belongs to, `[B, T]`: one per row, but for padding-free batches."""
    if "attention_mask" not in inputs and "position_ids" in inputs:
        # The collator flattens rows into one, and starts each document at position 0.
        return (inputs["position_ids"] == 0).cumsum(-1)
    labels = inputs["labels"]
    return torch.arange(labels.size(0), device=labels.device)[:, None].expand_as(labels)
