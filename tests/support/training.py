"""Short training runs on a CPU, and what they leave behind to compare."""

import copy
import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import tiny
import torch
import trl
from datasets import Dataset, IterableDataset
from packaging.version import Version
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback
from trl import SFTConfig, SFTTrainer

from trl_qtarget import QTargetSFTTrainer, qtarget_loss


OPTIMIZERS = {
    "sgd": {"optim": "sgd", "learning_rate": 0.5},
    # AdamW divides each gradient by its own size, so a gradient of 1e-9 that is all rounding would still move its
    # parameter by the whole learning rate. This epsilon makes the step proportional to the gradient below 1e-3.
    "adamw": {"optim": "adamw_torch", "learning_rate": 0.02, "adam_epsilon": 1e-3},
}


@functools.cache
def _warm_model(make: Callable[[], PreTrainedModel], steps: int) -> PreTrainedModel:
    model, tokenizer = make(), tiny.tokenizer()
    batch = tokenizer([text + "<eos>" for text in tiny.sentences(64, seed=7)], return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
    return model


def warm_model(make: Callable[[], PreTrainedModel] = tiny.model, steps: int = 20) -> PreTrainedModel:
    """A tiny model that has learned a little: labels of every probability, so no method's gradient vanishes."""
    return copy.deepcopy(_warm_model(make, steps)).eval()


def other_model() -> PreTrainedModel:
    """A model that has learned something else."""
    return warm_model(steps=12)


# Before 1.15, TRL's losses had no auxiliary loss in "dft", did not average it over accumulation steps, and scored
# prompt learning otherwise: there they are no truth to compare with.
TRL_BEFORE_1_15 = Version(trl.__version__) < Version("1.15")
# There, a mixture of experts is trained without its auxiliary loss or not at all.
REFUSES_AUX_LOSS = Version(trl.__version__) < Version("1.14.2")


def sft_config(output_dir: str | None = None, **options: Any) -> SFTConfig:
    """An SFTConfig for a tiny model on a CPU: float32, a log line per step, nothing on disk or screen."""
    defaults = {
        "output_dir": str(output_dir or tempfile.gettempdir()),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_length": 64,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **OPTIMIZERS["sgd"],
    }
    return SFTConfig(**defaults | options)


def make_trainer(
    cls: type[SFTTrainer],
    dataset: Dataset | IterableDataset,
    model: PreTrainedModel | str,
    *,
    steps: int = 3,
    optim: str = "sgd",
    options: dict[str, Any] | None = None,
    **arguments: Any,
) -> SFTTrainer:
    """A trainer of class `cls`; `options` go to the SFTConfig, `arguments` to the trainer."""
    args = sft_config(**{"max_steps": steps} | OPTIMIZERS[optim] | (options or {}))
    arguments.setdefault("processing_class", tiny.tokenizer())
    trainer = cls(model, args, train_dataset=dataset, **arguments)
    trainer.remove_callback(PrinterCallback)
    return trainer


@dataclass
class Run:
    """A finished training run: its log lines by kind, its trained weights and the values they started from."""

    trainer: SFTTrainer
    start: dict[str, Tensor] = field(repr=False)

    @property
    def steps(self) -> list[dict[str, float]]:
        return [line for line in self.trainer.state.log_history if "loss" in line]

    @property
    def evaluations(self) -> list[dict[str, float]]:
        return [line for line in self.trainer.state.log_history if "eval_loss" in line]

    @property
    def weights(self) -> dict[str, Tensor]:
        return trainable(self.trainer.model)

    def column(self, name: str) -> list[float]:
        return [line[name] for line in self.steps]

    def moved(self) -> bool:
        """Whether every trainable tensor is finite and has left its starting value."""
        return all(
            value.isfinite().all() and not torch.equal(value, self.start[name]) for name, value in self.weights.items()
        )


def trainable(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of every trainable parameter."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def train(cls: type[SFTTrainer], dataset: Dataset | IterableDataset, model: Any, **arguments: Any) -> Run:
    """Make a trainer (see `make_trainer`) and train it."""
    trainer = make_trainer(cls, dataset, model, **arguments)
    run = Run(trainer, trainable(trainer.model))
    trainer.train()
    return run


def train_target(method: Any, dataset: Dataset | IterableDataset | None = None, model: Any = None, **arguments) -> Run:
    """Train a tiny model toward a target; by default a Llama on language modelling."""
    dataset = tiny.text_dataset() if dataset is None else dataset
    model = warm_model() if model is None else model
    return train(QTargetSFTTrainer, dataset, model, qtarget_config=method, **arguments)


def first_batch(trainer: SFTTrainer) -> dict[str, Any]:
    return next(iter(trainer.get_train_dataloader()))


def batches(trainer: SFTTrainer, evaluation: bool = False) -> list[dict[str, Any]]:
    loader = trainer.get_eval_dataloader() if evaluation else trainer.get_train_dataloader()
    return list(loader)


def loss_and_gradients(trainer: SFTTrainer, batch: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    """Loss of one batch, as the trainer computes it in training, and the gradient of every trainable parameter."""
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    gradients = {name: value.grad.clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    trainer.model.zero_grad()
    return loss.item(), gradients


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Largest difference, relative to the largest entry of `truth`."""
    return ((value - truth).abs().max() / truth.abs().max().clamp(min=1e-30)).item()


def worst(values: dict[str, Tensor], truth: dict[str, Tensor], error: Callable = relative_error) -> float:
    """The worst error over all tensors; the names must be the same."""
    assert values.keys() == truth.keys()
    return max(error(values[name], truth[name]) for name in truth)


BATCH_COLUMNS_OF_THE_LOSS = ("labels", "token_weights", "sequence_ids")


def dense_loss(trainer: QTargetSFTTrainer, batch: dict[str, Any], prior: Callable | None = None) -> Tensor:
    """The loss that the trainer's configuration means for a batch: `qtarget_loss` on logits from ordinary forwards.

    One document per row; `prior` is the model that the prior should be, in evaluation mode.
    """
    inputs = {name: value for name, value in batch.items() if name not in BATCH_COLUMNS_OF_THE_LOSS}
    labels = batch["labels"]
    length = labels.size(1)

    def of_text(model: Callable) -> Tensor:  # without virtual tokens, and without what predicts past the end
        return model(**inputs).logits[:, -length:-1].flatten(0, 1)

    def per_token(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[:, 1:].flatten()

    with torch.no_grad():
        prior_logits = None if prior is None else of_text(prior)
    rows = torch.arange(len(labels))[:, None].expand_as(labels)
    logits = of_text(trainer.model)
    return qtarget_loss(
        logits,
        per_token(labels),
        trainer.qtarget_config,
        prior_logits=prior_logits,
        token_weights=per_token(batch.get("token_weights")),
        sequence_ids=per_token(rows),
        embeddings=trainer.model.get_output_embeddings().weight.detach()[: logits.size(-1)],
    )


# Two runs of the same operations, whose sums may still be taken in another order where memory is aligned otherwise.
SAME = 1e-6
# One loss in float32, once from logits and once fused.
DENSE_TOLERANCE = 1e-5
# The same in float64.
DENSE_TOLERANCE_DOUBLE = 1e-12


def check_equals_dense(trainer: QTargetSFTTrainer, prior: Callable | None = None, double: bool = False) -> None:
    """Loss and gradients of a batch, as the trainer computes them, equal those of `dense_loss`.

    `double`: in float64, in which the policy and `prior` stay, for a trainer whose prior is no model of its own. For
    a target that is nearly the policy: its gradients are differences of nearly equal numbers, of which float32 leaves
    four digits whichever way they are computed, and other ones on another kind of CPU.
    """
    batch = first_batch(trainer)
    if double:
        for model in (trainer.model, prior):
            model.double()
        batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    loss, gradients = loss_and_gradients(trainer, batch)
    truth = dense_loss(trainer, batch, prior)
    truth.backward()
    expected = {name: value.grad for name, value in trainer.model.named_parameters() if value.requires_grad}
    tolerance = DENSE_TOLERANCE_DOUBLE if double else DENSE_TOLERANCE
    assert abs(loss - truth.item()) <= tolerance * abs(truth.item())
    assert worst(gradients, expected) < tolerance
