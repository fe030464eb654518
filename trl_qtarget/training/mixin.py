"""`QTargetMixin`: any `transformers.Trainer`, trained toward a target that a `QTargetConfig` describes."""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from ..loss.body import inference
from ..loss.choice import check_kernel
from ..loss.head import add_target_head, check_head, vocabulary_of
from ..loss.request import IGNORE_INDEX, Observed, QTargetOutput, Sealed, TargetRequest, next_token
from ..priors.base import PriorCallback, base_model_of, virtual_tokens
from ..priors.build import build_prior
from ..priors.cached import ROWS_KEY
from ..priors.choice import PolicyFacts, PriorChoice, PriorKind, check_models, choose_prior
from ..priors.store import PriorCache
from ..target.config import QTargetConfig
from .batch import is_piece, take_columns
from .columns import WEIGHTS_KEY, TokenColumns, count_scored, labels_of, sequences_of
from .knowledge import SettlingMixin
from .metrics import RunningMeans, judge_by_nll, local_sums
from .quantized import keep_trainable
from .refusals import refuse_what_cannot_work
from .resolve import resolve_config
from .saving import CheckpointMixin
from .sequence import SplitMixin, split_sequences


logger = get_logger(__name__)

# Under prompt learning. All others see the text alone.
_PRIORS_WITH_VIRTUAL_TOKENS = (PriorKind.NONE, PriorKind.POLICY, PriorKind.START, PriorKind.LAGGED)

# Arguments of the policy's forward that a prior's backbone is not given.
_POLICY_ALONE = ("labels", "shift_labels", "output_router_logits")


class QTargetMixin(CheckpointMixin, SettlingMixin, SplitMixin):
    """A `transformers.Trainer` of any kind, trained toward an explicit target distribution (arXiv 2606.11189).

    It stands before the trainer among the bases and takes the place of its loss; data, optimiser and loop stay the
    trainer's. The model is a causal language model, and the data collator returns `input_ids` and `labels` `[B, T]`
    (−100 where nothing is to be learned), not shifted, with `attention_mask` or `position_ids`.

    It logs, as means over the labelled tokens: `target/nll`, the labels' plain negative log-likelihood, comparable
    between methods where the loss is not; `target/trust`, γ; `target/label_mass`, the probability that the target puts
    on the label; `target/kl`, KL(Q‖p); with a prior, `target/prior_agreement`, the share of labels that are its first
    choice; and, as TRL does, `entropy`, `mean_token_accuracy` and `num_tokens`.

    Args:
        model, args, ...: what the trainer takes, in its order.
        qtarget_config (`QTargetConfig`, `str` or `dict`): the target; a method's name for its defaults. `None` is
            `"target_sft"`.
        ref_model (`str` or `PreTrainedModel`): reference model or teacher, of the policy's tokenizer: the prior of
            every method that uses a frozen one. It may have more or fewer rows than the policy: it is then conditioned
            on the tokens that both have. A path is loaded in the policy's dtype; code of its repository is not run.
        prior_cache (`str`): a folder that `trl-qtarget cache` has written; only for `QTargetSFTTrainer`, which
            prepares the dataset.

    Raises:
        ValueError: before any training step, if the target, the training arguments, the models or the dataset do not
            fit together.
        TypeError: the class has its bases in another order.

    Examples:
        >>> class QTargetTrainer(QTargetMixin, Trainer):
        ...     pass
        >>> trainer = QTargetTrainer(model, TrainingArguments(), train_dataset=dataset, qtarget_config="asft")
        >>> trainer.train()
    """

    _loads_models = False  # whether the trainer takes a path

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        bases = cls.__mro__
        if Trainer in bases and bases.index(Trainer) < bases.index(QTargetMixin):
            raise TypeError(
                f"`QTargetMixin` stands after the trainer among the bases of `{cls.__name__}`, where it would change "
                f"nothing: write `class {cls.__name__}(QTargetMixin, ...)`."
            )

    def __init__(
        self,
        model: "str | PreTrainedModel | None" = None,
        args: Any = None,
        *trainer_args: Any,
        qtarget_config: QTargetConfig | str | dict[str, Any] | None = None,
        ref_model: "str | PreTrainedModel | None" = None,
        prior_cache: str | None = None,
        **trainer_kwargs: Any,
    ):
        given = _by_name(super().__init__, model, args, *trainer_args, **trainer_kwargs)
        if given.get("model_init") is not None:
            raise ValueError(
                "`model_init` makes another model when training begins, which the target knows nothing of: pass a "
                "`model`, and make a trainer of each trial."
            )
        if not isinstance(model, nn.Module) and not (self._loads_models and isinstance(model, str)):
            raise ValueError(
                f"`model` must be a loaded causal language model, got `{type(model).__name__}`: load it with "
                "`AutoModelForCausalLM.from_pretrained`."
            )
        self.qtarget_config = resolve_config(qtarget_config, args, given.get("compute_loss_func"))
        check_models(model, ref_model)
        self._policy_facts, self._ref_model = PolicyFacts.of(model, given.get("peft_config")), ref_model
        self._cache = None if prior_cache is None else PriorCache(prior_cache)
        self.prior_choice = self.prior_of(self.qtarget_config)
        if self.prior_choice.cache is not None:
            self.prior_choice.cache.check_sums()
        self._token_columns = self._columns_for(given)

        super().__init__(model, args, *trainer_args, **trainer_kwargs)

        self.loss_is_scaled_for_ga = None  # by what follows
        refuse_what_cannot_work(self)
        keep_trainable(self.model)
        self._split = split_sequences(self.accelerator, self.model, self.args, self.data_collator)
        self.data_collator = self._splittable(self._collator_of_columns(self.data_collator))
        if judge_by_nll(self.args, self.eval_dataset):
            logger.info(
                "The best checkpoint is the one with the lowest `eval_target/nll`; "
                "`metric_for_best_model='eval_loss'` would take the objective's own value."
            )
        check_kernel(self.qtarget_config.kernel, self.accelerator.device)
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
        for warning in self.prior_choice.warnings:
            logger.warning(warning)
        self._aux_weight = self._weight_of_aux_loss()
        self._running = {mode: RunningMeans(self._aux_weight != 0) for mode in ("train", "eval")}
        self._new_tokens: Tensor | int = 0
        self._all_tokens = 0
        self._evaluated_as = "eval"

    def prior_of(self, config: QTargetConfig) -> PriorChoice:
        """The prior that a target has with this trainer's policy and reference model.

        Raises:
            ValueError: the target lacks the prior that it needs, or cannot have the one that it names.
        """
        return choose_prior(config, self._policy_facts, self._ref_model, self._cache)

    @property
    def model_accepts_loss_kwargs(self) -> bool:
        """True: the loss takes `num_items_in_batch`, whatever a trainer finds, and sets here, of its model's own."""
        return True

    @model_accepts_loss_kwargs.setter
    def model_accepts_loss_kwargs(self, found: bool) -> None:
        pass

    # --- data ---

    def _columns_for(self, given: Mapping[str, Any]) -> TokenColumns:
        """The per-token columns of the datasets that the target needs, before the trainer is made of what is given."""
        if self.prior_choice.cache is not None:
            raise ValueError(
                "`prior_cache` is read by the content of the examples, which `QTargetSFTTrainer` looks up when it "
                "prepares them: use that trainer, or pass a `ref_model`."
            )
        config = self.qtarget_config
        return TokenColumns(config.token_weight_column or WEIGHTS_KEY if config.uses_token_weights else None)

    def _collator_of_columns(self, collator: Any) -> Any:
        """The data collator with what the target needs of it: here it is the user's own, and brings the columns."""
        return collator

    def prepare_rows(self, dataset: Dataset, name: str) -> Dataset:
        """Examples as the data collator takes them; here they are given so.

        Raises:
            ValueError: they are not tokenised.
        """
        if "input_ids" not in dataset.column_names:
            raise ValueError(
                f"`dataset` ({name}) has no `input_ids`: tokenise it as the training data is. Text and conversations "
                "are prepared by `QTargetSFTTrainer` alone."
            )
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns = [*self._signature_columns, *self._token_columns.keys()]

    # --- loss ---

    def _get_num_items_in_batch(self, batch_samples: list[Mapping[str, Any]], device: torch.device) -> Tensor | None:
        """How many labels a step scores: over its accumulation steps and, where it averages so, over all ranks.

        transformers counts what the model's own loss would score, and knows that by the name of the model's class.
        """
        if not batch_samples:
            return None
        count = sum(count_scored(batch, self._scores_first_label()) for batch in batch_samples).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            # Under tensor and context parallelism several ranks count the same batch.
            count = self.accelerator.gather(count).sum() // (self.get_tp_size() * self.get_cp_size())
        elif self._split is not None and is_piece(batch_samples[0]):
            count = self._split.group.total(count)
        return count

    def _scores_first_label(self) -> bool:
        """Whether something predicts the first token of a row: virtual tokens do, where the prior has them too."""
        return virtual_tokens(self.model) > 0 and self.prior_choice.kind in _PRIORS_WITH_VIRTUAL_TOKENS

    def _weight_of_aux_loss(self) -> float:
        """What the load-balancing loss of a mixture of experts counts, as the configuration says; 0 without one."""
        config = self.model.config.get_text_config()
        return getattr(config, "router_aux_loss_coef", 0.0) if getattr(config, "output_router_logits", False) else 0.0

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        inputs = dict(inputs, use_cache=False)  # the caller's batch stays as it is
        if self._aux_weight:
            inputs["output_router_logits"] = True
        self._settle(model)
        with self._passing(inputs):
            request, count = self.target_request(inputs), num_items_in_batch
            if count is None and request.group is not None:
                count = request.group.total(count_scored(inputs, False))
            outputs = model(**inputs, qtarget=Sealed(request), num_items_in_batch=count)
        loss = self._scaled(outputs, num_items_in_batch, request.group is not None)
        self._record(outputs, inputs)
        if not return_outputs:
            return loss
        warnings.warn(
            "The logits that `compute_metrics` receives take an extra forward pass: the loss never builds them.",
            stacklevel=2,
        )
        with torch.no_grad():
            return loss, model(**{key: value for key, value in inputs.items() if key != "labels"})

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """As TRL's: the mean over the labels of this batch, and logits only where they are asked for."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if prediction_loss_only:
                return self.compute_loss(model, inputs).detach(), None, None
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), outputs.logits, inputs["labels"]

    def target_request(self, inputs: dict[str, Any]) -> TargetRequest:
        """What the loss needs beside the model's inputs, from a batch as the data collator makes it.

        Takes the columns that are no inputs of the model out of the batch; a prior that needs a pass of its own has
        run when this returns.

        Raises:
            ValueError: the batch lacks labels or a column that the target reads, or it does not fit the labels.
        """
        objective = replace(self.prior_choice.objective, progress=self._progress())
        config, prior = self.qtarget_config, None
        columns = take_columns(
            inputs,
            config.label,
            vocabulary_of(base_model_of(self.model)),
            weights=config.uses_token_weights,
            sequences=objective.trust.per_sequence,
            cache=self.prior_choice.cache,
        )
        if self._prior is not None:
            prior = self._prior.request({key: value for key, value in inputs.items() if key not in _POLICY_ALONE})
        inputs.pop(ROWS_KEY, None)
        return TargetRequest(
            objective,
            prior,
            columns.weights,
            columns.sequences,
            config.chunk_tokens,
            config.kernel,
            next_tokens=columns.next_tokens,
            shifted=columns.shifted,
            group=self._group_of(inputs),
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
        if not (labels_of(inputs)[0, 1:] != IGNORE_INDEX).any():
            return None
        request = self.target_request(inputs)
        first, *others = observed
        sequences = sequences_of(inputs)
        request = replace(
            request,
            objective=first.objective,
            observer=first.observer,
            sequence_ids=next_token(sequences).view_as(sequences) if request.shifted else sequences,
            observed=others,
        )
        model = self.model_wrapped if self.is_in_train else self.model
        # Without gradients none is computed, and the loss itself is thrown away. In the precision of a training.
        with inference(self.model), self.accelerator.autocast():
            model(**inputs, qtarget=Sealed(request))
        return inputs

    def _scaled(self, outputs: QTargetOutput, num_items_in_batch: Tensor | int | None, in_pieces: bool) -> Tensor:
        """The loss as `Trainer` expects it, by TRL's rules for averaging over ranks and accumulation steps."""
        training, counted = self.model.training, num_items_in_batch is not None
        # Known to `Trainer` from its first step on: before, a loss is one of one step.
        steps = getattr(self, "current_gradient_accumulation_steps", 1) if training and counted else 1
        loss, of_model, aux_loss = outputs.tokens.loss, None, None
        if counted and self.args.average_tokens_across_devices:
            # It counts the tokens of every rank, and DDP averages the gradients over the ranks.
            ranks_of_batch = self.get_tp_size() * (self._split.size if in_pieces else 1)
            loss = loss * (self.accelerator.num_processes // ranks_of_batch)
        # Wrappers wait for a gradient of `outputs.loss`. PEFT's AdaLoRA and others add a term to it, in training only.
        # It is of one micro-batch, as the auxiliary loss is, so it is averaged over the accumulation steps.
        if training:
            of_model = outputs.loss.to(loss) / steps
        if self._aux_weight:
            aux_loss = self._aux_weight * outputs.aux_loss / steps
        if in_pieces:
            return self._split.loss(loss, of_model, aux_loss)
        return sum((term for term in (of_model, aux_loss) if term is not None), loss)

    # --- metrics: sums over all ranks that stay on the device until they are logged ---

    def _record(self, outputs: QTargetOutput, inputs: Mapping[str, Any]) -> None:
        mode = "train" if self.model.training else "eval"
        sums = self.accelerator.gather(local_sums(outputs.tokens, inputs)[None]).sum(0)
        aux_loss = None
        if self._aux_weight:
            aux_loss = self.accelerator.gather(outputs.aux_loss.detach()[None]).mean()
        self._running[mode].add(sums, aux_loss)
        if mode == "train":
            self._new_tokens = self._new_tokens + sums[1].long()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        self._all_tokens += int(self._new_tokens) // self.get_tp_size()
        self._new_tokens = 0
        means = self._running[mode].take()
        if means:
            means["num_tokens"] = self._all_tokens
        if mode == "eval":  # TRL gives its own metrics the same names in every evaluation set
            means = {
                f"{self._evaluated_as if name.startswith('target/') else 'eval'}_{name}": value
                for name, value in means.items()
            }
        logs.update(means)
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        self._running["eval"].clear()  # `predict` adds to them and logs nothing
        self._evaluated_as = metric_key_prefix
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)


def _by_name(init: Callable[..., None], model: Any, args: Any, *more: Any, **named: Any) -> dict[str, Any]:
    """What a trainer is given, by the names of its arguments; of one that hides them, what is given by name."""
    bound = inspect.signature(init).bind(model, args, *more, **named).arguments
    return {**bound, **named, "model": model, "args": args}
