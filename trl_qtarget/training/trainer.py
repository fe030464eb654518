"""`QTargetSFTTrainer`: TRL's SFTTrainer, trained toward a target that a `QTargetConfig` describes."""

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, is_peft_model
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, DataCollatorForVisionLanguageModeling

from ..loss.body import inference
from ..loss.choice import check_kernel
from ..loss.head import add_target_head, check_head, vocabulary_of
from ..loss.request import IGNORE_INDEX, NextTokens, Observed, QTargetOutput, Sealed, TargetRequest
from ..priors.base import PriorCallback, base_model_of, virtual_tokens
from ..priors.build import build_prior
from ..priors.cached import ROWS_KEY
from ..priors.choice import PolicyFacts, PriorChoice, PriorKind, check_models, choose_prior
from ..priors.fit import check_kind
from ..priors.store import PriorCache
from ..target.config import QTargetConfig
from .data import (
    SEQUENCES_KEY,
    WEIGHTS_KEY,
    TokenColumnCollator,
    TokenColumns,
    check_batch,
    check_column,
    check_rows,
    count_scored,
    is_packed,
    prepare_with_columns,
    sequences_of,
)
from .knowledge import SettlingMixin
from .metrics import RunningMeans, judge_by_nll, local_sums
from .resolve import resolve_config
from .saving import CheckpointMixin


logger = get_logger(__name__)

# Under prompt learning. All others see the text alone.
_PRIORS_WITH_VIRTUAL_TOKENS = (PriorKind.NONE, PriorKind.POLICY, PriorKind.START, PriorKind.LAGGED)

# Arguments of the policy's forward that a prior's backbone is not given.
_POLICY_ALONE = ("labels", "shift_labels", "output_router_logits")


class QTargetSFTTrainer(CheckpointMixin, SettlingMixin, SFTTrainer):
    """A drop-in `SFTTrainer` that trains toward an explicit target distribution (arXiv 2606.11189).

    Beside TRL's metrics it logs, as means over the labelled tokens: `target/nll`, the labels' plain negative
    log-likelihood, comparable between methods where the loss is not; `target/trust`, γ; `target/label_mass`, the
    probability that the target puts on the label; `target/kl`, KL(Q‖p); with a prior, `target/prior_agreement`, the
    share of labels that are its first choice.

    Args:
        model, args, ...: every argument of [`SFTTrainer`](https://huggingface.co/docs/trl/sft_trainer), in its order.
        qtarget_config (`QTargetConfig`, `str` or `dict`): the target; a method's name for its defaults. `None` is
            `"target_sft"`, or `"dft"` if `args.loss_type="dft"`.
        ref_model (`str` or `PreTrainedModel`): reference model or teacher, of the policy's tokenizer: the prior of
            every method that uses a frozen one. It may have more or fewer rows than the policy: it is then conditioned
            on the tokens that both have. A path is loaded in the policy's dtype and with those of
            `args.model_init_kwargs` that say nothing of which model it is; code of its repository is not run.
        prior_cache (`str`): a folder that `trl-qtarget cache` has written: what a prior has said of these examples, in
            its place. No second model is loaded.

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
        prior_cache: str | None = None,
        **sft_kwargs: Any,
    ):
        given = inspect.signature(SFTTrainer.__init__).bind(self, model, args, *sft_args, **sft_kwargs).arguments
        self.qtarget_config = resolve_config(qtarget_config, args, given.get("compute_loss_func"))
        check_models(model, ref_model)
        self._policy_facts, self._ref_model = PolicyFacts.of(model, given.get("peft_config")), ref_model
        self._cache = None if prior_cache is None else PriorCache(prior_cache)
        self.prior_choice = self.prior_of(self.qtarget_config)
        if self.prior_choice.cache is not None:
            self.prior_choice.cache.check_sums()
        self._token_columns = _token_columns(self.qtarget_config, self.prior_choice, given)
        self._prepared: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # dataset -> whether it is packed

        super().__init__(model, args, *sft_args, **sft_kwargs)

        # The loss is this package's and takes `num_items_in_batch`, whatever the model's class says of its own.
        self.model_accepts_loss_kwargs = True
        _refuse_what_cannot_work(self.accelerator, self.model)
        if judge_by_nll(self.args, self.eval_dataset):
            logger.info(
                "The best checkpoint is the one with the lowest `eval_target/nll`; "
                "`metric_for_best_model='eval_loss'` would take the objective's own value."
            )
        check_kernel(self.qtarget_config.kernel, self.accelerator.device)
        if self.prior_choice.cache is not None and type(self.data_collator) is DataCollatorForVisionLanguageModeling:
            raise ValueError(
                "`prior_cache` is of the tokens of a text, and the tokens of images are made in the data collator: "
                "pass a `ref_model`, or a text dataset."
            )
        if self._token_columns and type(self.data_collator) is DataCollatorForVisionLanguageModeling:
            raise ValueError(
                "`token_weight_column` counts the tokens of a text, and the tokens of images are made in the data "
                "collator: pass a `data_collator` that returns `token_weights`, or a text dataset."
            )
        # A subclass of TRL's collators is the user's own, and left alone.
        if self._token_columns and type(self.data_collator) is DataCollatorForLanguageModeling:
            self.data_collator = TokenColumnCollator.extending(self.data_collator, self._token_columns)
        add_target_head(base_model_of(self.model))
        # With those two the weights are not in place yet, and the first pass does it.
        if self.accelerator.distributed_type not in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            check_head(base_model_of(self.model))
        self._prior = build_prior(
            self.prior_choice,
            self.model,
            lambda: self.model_wrapped,
            self.args,
            self.accelerator,
            self.processing_class,
            self.qtarget_config.prior_tail,
        )
        if self._prior is not None:
            self.add_callback(PriorCallback(self._prior))
        self._announce_target()
        self._running = {mode: RunningMeans(self.aux_loss_enabled) for mode in ("train", "eval")}
        self._new_tokens: Tensor | int = 0
        self._evaluated_as = "eval"

    def prior_of(self, config: QTargetConfig) -> PriorChoice:
        """The prior that a target has with this trainer's policy and reference model.

        Raises:
            ValueError: the target lacks the prior that it needs, or cannot have the one that it names.
        """
        return choose_prior(config, self._policy_facts, self._ref_model, self._cache)

    def _announce_target(self) -> None:
        for warning in self.prior_choice.warnings:
            logger.warning(warning)
        logger.info(self.resolved_target.line)

    # --- data ---

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: SFTConfig, packing: bool, *more: Any) -> Any:
        if self._prepared.get(dataset) == packing:
            return dataset
        given = (dataset, processing_class, args, packing, *more)
        if self._token_columns:
            prepared = prepare_with_columns(super()._prepare_dataset, self._token_columns, *given)
        else:
            prepared = super()._prepare_dataset(*given)
        self._prepared[prepared] = packing
        return prepared

    def prepare_rows(self, dataset: Dataset, name: str) -> Dataset:
        """Examples in any format of TRL, prepared as the training data is, but not packed."""
        return self._prepare_dataset(dataset, self.processing_class, self.args, False, self._formatting_func, name)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns = [*self._signature_columns, *self._token_columns.keys()]

    # --- loss ---

    def _get_num_items_in_batch(self, batch_samples: list[Mapping[str, Any]], device: torch.device) -> Tensor | None:
        """How many labels a step scores: over its accumulation steps and, as TRL averages, over all ranks.

        transformers counts what the model's own loss would score, and knows that by the name of the model's class.
        """
        if not batch_samples:
            return None
        count = sum(count_scored(batch, self._scores_first_label()) for batch in batch_samples).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            # Under tensor parallelism several ranks count the same batch.
            count = self.accelerator.gather(count).sum() // self.get_tp_size()
        return count

    def _scores_first_label(self) -> bool:
        """Whether something predicts the first token of a row: virtual tokens do, where the prior has them too."""
        return virtual_tokens(self.model) > 0 and self.prior_choice.kind in _PRIORS_WITH_VIRTUAL_TOKENS

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        inputs = dict(inputs, use_cache=False)  # the caller's batch stays as it is
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        with _explaining_truncated_images(self.args.max_length):
            self._settle(model)
            request = self.target_request(inputs)
            outputs = model(**inputs, qtarget=Sealed(request), num_items_in_batch=num_items_in_batch)
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

    def target_request(self, inputs: dict[str, Any]) -> TargetRequest:
        """What the loss needs beside the model's inputs, from a batch as the data collator makes it.

        Takes the columns that are no inputs of the model out of the batch; a prior that needs a pass of its own has
        run when this returns.

        Raises:
            ValueError: the batch lacks a column that the target reads, or it does not fit the labels.
        """
        objective = replace(self.prior_choice.objective, progress=self._progress())
        weights, sequences = inputs.pop(WEIGHTS_KEY, None), inputs.pop(SEQUENCES_KEY, None)
        if self.qtarget_config.uses_token_weights:
            check_batch(WEIGHTS_KEY, weights, inputs["labels"], self.qtarget_config.label)
        if objective.trust.per_sequence:
            sequences = sequences_of(inputs) if sequences is None else sequences
            check_batch(SEQUENCES_KEY, sequences, inputs["labels"], self.qtarget_config.label)
        prior, next_tokens = None, NextTokens.of(inputs["labels"], vocabulary_of(base_model_of(self.model)))
        if self.prior_choice.cache is not None:
            check_rows(inputs.get(ROWS_KEY), inputs["labels"], self.qtarget_config.label)
        if self._prior is not None:
            prior = self._prior.request({key: value for key, value in inputs.items() if key not in _POLICY_ALONE})
        inputs.pop(ROWS_KEY, None)
        config = self.qtarget_config
        return TargetRequest(
            objective, prior, weights, sequences, config.chunk_tokens, config.kernel, next_tokens=next_tokens
        )

    def _progress(self) -> float:
        """The share of the training that is done; 1 where nothing is being trained."""
        steps = self.state.max_steps if self.is_in_train else 0
        return min(self.state.global_step / steps, 1.0) if steps > 0 else 1.0

    def observe(self, row: dict[str, Any], observed: Sequence[Observed]) -> dict[str, Any] | None:
        """Show what targets ask for in one example, by the very loss that trains toward them. Nothing is trained.

        Args:
            row: a tokenised example, as `prepare_rows` returns them.
            observed: the targets, and for each what is called with every block of its tokens.

        Returns:
            The batch `[1, T]` that was made of the example; None if no token of it is labelled.
        """
        inputs = self._prepare_inputs(self.data_collator([row]))
        if not (inputs["labels"][0, 1:] != IGNORE_INDEX).any():
            return None
        request = self.target_request(inputs)
        first, *others = observed
        request = replace(
            request,
            objective=first.objective,
            observer=first.observer,
            sequence_ids=sequences_of(inputs),
            observed=others,
        )
        model = self.model_wrapped if self.is_in_train else self.model
        # Without gradients none is computed, and the loss itself is thrown away. In the precision of a training.
        with inference(self.model), self.accelerator.autocast():
            model(**inputs, qtarget=Sealed(request))
        return inputs

    def _scaled(self, outputs: QTargetOutput, num_items_in_batch: Tensor | int | None) -> Tensor:
        """The loss as `Trainer` expects it, by TRL's rules for averaging over ranks and accumulation steps."""
        training, counted = self.model.training, num_items_in_batch is not None
        # Known to `Trainer` from its first step on: before, a loss is one of one step.
        steps = getattr(self, "current_gradient_accumulation_steps", 1) if training and counted else 1
        loss = outputs.tokens.loss
        if counted and self.args.average_tokens_across_devices:
            # It counts the tokens of every rank, and DDP averages the gradients over the ranks.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        # Wrappers wait for a gradient of `outputs.loss`. PEFT's AdaLoRA and others add a term to it, in training only.
        # It is of one micro-batch, as the auxiliary loss is, so it is averaged over the accumulation steps.
        if training:
            loss = loss + outputs.loss.to(loss) / steps
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
        return loss

    # --- metrics: sums over all ranks that stay on the device until they are logged ---

    def _record(self, outputs: QTargetOutput, inputs: Mapping[str, Any]) -> None:
        mode = "train" if self.model.training else "eval"
        sums = self.accelerator.gather(local_sums(outputs.tokens, inputs)[None]).sum(0)
        aux_loss = None
        if self.aux_loss_enabled:
            aux_loss = self.accelerator.gather(outputs.aux_loss.detach()[None]).mean()
        self._running[mode].add(sums, aux_loss)
        if mode == "train":
            self._new_tokens = self._new_tokens + sums[1].long()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        self._total_train_tokens += int(self._new_tokens) // self.get_tp_size()
        self._new_tokens = 0
        means = self._running[mode].take()
        if means:
            means["num_tokens"] = self._total_train_tokens
        if mode == "eval":  # TRL gives the metrics of every evaluation set the same names
            own = {name: means.pop(name) for name in list(means) if name.startswith("target/")}
            logs.update({f"{self._evaluated_as}_{name}": value for name, value in own.items()})
        self._metrics[mode].update({name: [value] for name, value in means.items()})
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        if isinstance(eval_dataset, dict):  # TRL would prepare each of them twice
            results = (
                self.evaluate(dataset, ignore_keys, f"{metric_key_prefix}_{name}")
                for name, dataset in eval_dataset.items()
            )
            return {name: value for result in results for name, value in result.items()}
        if is_packed(eval_dataset):
            self._prepared[eval_dataset] = True
        self._running["eval"].clear()  # `predict` adds to them and logs nothing
        self._evaluated_as = metric_key_prefix
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)


def _token_columns(config: QTargetConfig, choice: PriorChoice, given: dict[str, Any]) -> TokenColumns:
    """The per-token columns that the target needs, checked against the datasets."""
    args, weights = given.get("args"), None
    if config.uses_token_weights:
        weights = config.token_weight_column or WEIGHTS_KEY
        datasets = {"train": given.get("train_dataset")}
        evaluation = given.get("eval_dataset")
        datasets |= evaluation if isinstance(evaluation, dict) else {"eval": evaluation}
        check_column(weights, {name: dataset for name, dataset in datasets.items() if dataset is not None})
    packed = bool(getattr(args, "packing", False) or getattr(args, "eval_packing", False))
    documents = packed and choice.objective.trust.per_sequence
    return TokenColumns(weights, documents, choice.cache)


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


def _refuse_what_cannot_work(accelerator: Accelerator, model: nn.Module) -> None:
    check_kind("model", model)
    if is_peft_model(model) and model.active_peft_config.peft_type == "CPT":
        raise ValueError(
            "`peft_config` is of CPT, which computes a loss of its own from the logits, in the place of the target: "
            "use another method of prompt learning."
        )
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
