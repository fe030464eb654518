"""`QTargetSFTTrainer`: TRL's SFTTrainer, trained toward a target that a `QTargetConfig` describes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import trl
from accelerate.utils import DistributedType
from datasets import Dataset
from packaging.version import Version
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, DataCollatorForVisionLanguageModeling

from ..target.config import QTargetConfig
from .columns import TokenColumns
from .data import TokenColumnCollator, columns_for, is_packed, prepare_with_columns
from .mixin import QTargetMixin


# Before 1.14.2, TRL has one weight of the auxiliary loss for all classes of model, averages it otherwise, and loads a
# path with a device map on CPUs too.
_OLD_TRL = Version(trl.__version__) < Version("1.14.2")


class QTargetSFTTrainer(QTargetMixin, SFTTrainer):
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
    _loads_models = True

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
        if _OLD_TRL:
            _refuse_device_map_in_zero3(model, args)
        self._prepared: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # dataset -> whether it is packed
        super().__init__(
            model,
            args,
            *sft_args,
            qtarget_config=qtarget_config,
            ref_model=ref_model,
            prior_cache=prior_cache,
            **sft_kwargs,
        )

    def _collator_of_columns(self, collator: Any) -> Any:
        if type(collator) is DataCollatorForVisionLanguageModeling:
            self._refuse_columns_of_images()
        # A subclass of TRL's collators is the user's own, and left alone.
        if self._token_columns and type(collator) is DataCollatorForLanguageModeling:
            collator = TokenColumnCollator.extending(collator, self._token_columns)
            collator.reads_cache = self._split is None
        return collator

    def _refuse_columns_of_images(self) -> None:
        if self._split is not None:
            raise ValueError(
                "`sp_size` and `cp_size` split batches by tokens, and images are not made of tokens: set them to 1, "
                "or pass a text dataset."
            )
        if self.prior_choice.cache is not None:
            raise ValueError(
                "`prior_cache` is of the tokens of a text, and the tokens of images are made in the data collator: "
                "pass a `ref_model`, or a text dataset."
            )
        if self._token_columns:
            raise ValueError(
                "`token_weight_column` counts the tokens of a text, and the tokens of images are made in the data "
                "collator: pass a `data_collator` that returns `token_weights`, or a text dataset."
            )

    # --- data ---

    def _columns_for(self, given: Mapping[str, Any]) -> TokenColumns:
        return columns_for(self.qtarget_config, self.prior_choice, given)

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
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    # --- loss ---

    def _weight_of_aux_loss(self) -> float:
        if self.aux_loss_enabled and _OLD_TRL:
            raise ValueError(
                f"`router_aux_loss_coef` is another weight, of another mean, in TRL {trl.__version__}: set it to 0.0 "
                "to train without an auxiliary loss, or install `trl>=1.14.2`."
            )
        return self.router_aux_loss_coef if self.aux_loss_enabled else 0.0

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        with _explaining_truncated_images(self.args.max_length):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def _refuse_device_map_in_zero3(model: "str | PreTrainedModel", args: SFTConfig | None) -> None:
    if not is_deepspeed_zero3_enabled() or not isinstance(model, str) or args is None:
        return
    mapped = (args.model_init_kwargs or {}).get("device_map", "auto") is not None
    dropped = args.distributed_state.distributed_type in (DistributedType.MULTI_GPU, DistributedType.DEEPSPEED)
    if mapped and not dropped:
        raise ValueError(
            f"`model` is a path, which TRL {trl.__version__} loads with a `device_map`, and ZeRO-3 takes none: set "
            "`model_init_kwargs={'device_map': None}`, or install `trl>=1.14.2`."
        )


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
