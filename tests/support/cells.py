"""One training run of the parity matrix, on any number of processes: `python cells.py cells.json results/`.

The same global batches reach every backend: rows are taken in order, and what a backend repeats to fill its last batch
is in the one-process run's dataset too.
"""

import json
import os
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import quantized
import tiny
import torch
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import AdaLoraConfig, LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import SequentialSampler
from training import sft_config, warm_model
from transformers import LlamaForCausalLM, PreTrainedModel, PrinterCallback, TrainerCallback, set_seed
from transformers.distributed import DistributedConfig

from trl_qtarget import QTargetConfig, QTargetSFTTrainer
from trl_qtarget.priors.shards import gather, in_zero3, share
from trl_qtarget.target.config import prior_itself
from trl_qtarget.training.caching import Writer, write_cache


GLOBAL_BATCH = 4
_ROWS = 22  # not a multiple of the batch
_REPEATED = -_ROWS % GLOBAL_BATCH
# Ranks that share a row, and how transformers shards models as it loads them.
_PIECES = int(os.environ.get("PARALLELISM_CONFIG_SP_SIZE", "1"))
_NATIVE: dict[str, int] = json.loads(os.environ.get("CELLS_DISTRIBUTED_CONFIG", "{}"))
_EVALUATED = ("target/nll", "target/trust", "target/label_mass", "entropy")
_LOGGED = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "target/nll", "target/trust", "target/label_mass")


class Stranger(LlamaForCausalLM):
    """A Llama whose class is in none of transformers' tables, and whose own loss takes no `num_items_in_batch`."""

    accepts_loss_kwargs = False

    @classmethod
    def of(cls, llama: LlamaForCausalLM) -> "Stranger":
        """One with the weights of a Llama."""
        model = cls(llama.config)
        model.load_state_dict(llama.state_dict())
        return model.eval()


@dataclass(frozen=True)
class Cell:
    """Which target, from which prior, trained in full or with LoRA; `options` go to the SFTConfig.

    `fills` says whether several processes repeat rows to fill the last batch, as they do without accumulation;
    `by_path`, whether the trainer loads the models itself, which ZeRO-3 then shards while they are loaded. `policy`
    and `reference` name the formats of `quantized.FORMATS` and are empty for unquantised models. `stranger` makes the
    policy a `Stranger`, `adalora` the adapter one that adds to the loss. `beside` is a part of the names of what is
    trained beside LoRA. `loaded`: the script loads the policy, which ZeRO-3 shards then. `other_class` makes the
    reference a mixture of experts. `cache`: its form, and then what the reference says is read from a cache, which
    `save_cache` has made; its truth is the reference itself. `head`: LoRA, and beside it the whole head is trained.
    `experts` makes the policy a mixture of experts, with its load-balancing loss.
    """

    method: str
    prior: str = "auto"
    peft: bool = False
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    name: str = ""
    fills: bool = True
    by_path: bool = False
    policy: str = ""
    reference: str = ""
    stranger: bool = False
    other_class: bool = False
    adalora: bool = False
    beside: str = ""
    loaded: bool = False
    cache: str = ""
    head: bool = False
    experts: bool = False

    def __str__(self) -> str:
        kind = "-lora" if self.peft else ""
        kind += f"-{self.beside}" if self.beside else ""
        return self.name or f"{self.method}-{self.prior}{kind}"


@dataclass
class Result:
    """What a run leaves behind: its log lines, its whole trained weights, and what a rank held of the prior."""

    logs: list[dict[str, float]]
    weights: dict[str, Tensor] = field(repr=False)
    facts: dict[str, Any]

    def save(self, path: Path) -> None:
        save_file(self.weights, path.with_suffix(".safetensors"))
        path.with_suffix(".json").write_text(json.dumps({"logs": self.logs, "facts": self.facts}))

    @classmethod
    def load(cls, path: Path) -> "Result":
        if path.with_suffix(".error").exists():
            raise RuntimeError(path.with_suffix(".error").read_text())
        values = json.loads(path.with_suffix(".json").read_text())
        return cls(values["logs"], load_file(path.with_suffix(".safetensors")), values["facts"])


def rows(repeated: int = 0) -> Dataset:
    """Texts of very different lengths; in rows 6 and 7, the batch of one rank, no token is predicted.

    Each token has a weight, for who looks at it.
    """
    texts = tiny.sentences(_ROWS, seed=3, longest=20)
    ids = tiny.tokenizer()([text + "<eos>" for text in texts])["input_ids"]
    # TRL drops a row without any label; the first token is a label that nothing comes before.
    labels = [[row[0]] + [-100] * (len(row) - 1) if number in (6, 7) else row for number, row in enumerate(ids)]
    order = [*range(_ROWS), *range(repeated)]
    columns = {"input_ids": ids, "labels": labels, "token_weights": [[(7 * t % 5) / 4 for t in row] for row in ids]}
    return Dataset.from_dict({name: [column[i] for i in order] for name, column in columns.items()})


class InOrder(QTargetSFTTrainer):
    """Takes the rows as they come, so that the global batches are the same on any number of processes."""

    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)


class _Watch(TrainerCallback):
    """Facts that only a running job can tell."""

    def __init__(self):
        self.facts: dict[str, Any] = {}
        self.trainer: QTargetSFTTrainer | None = None

    def on_step_end(self, args, state, control, **kwargs):
        offload = getattr(getattr(self.trainer.model_wrapped, "optimizer", None), "parameter_offload", None)
        if offload is not None:
            self.facts["trace_complete"] = offload.get_param_coordinator().is_complete_trace()
        prior = self.trainer._prior
        if hasattr(prior, "causal_model"):
            self.facts["prior_held"] = sum(share(value).numel() for value in prior.causal_model.parameters())
        if getattr(prior, "parts", None):
            self.facts["prior_held"] = sum(part.numel() for part in prior.parts.values())


def save_models(folder: Path) -> None:
    """Policy and reference as folders that a trainer can load, written once."""
    models = {"policy": warm_model(), "reference": warm_model(steps=12)}
    models |= {"experts": warm_model(tiny.moe_model), "other": warm_model(tiny.moe_model, steps=12)}
    for name, model in models.items():
        if not (folder / name).is_dir():
            model.save_pretrained(folder / name)


def save_cache(folder: Path, form: str) -> None:
    """What the reference model says of `rows`, all of it, beside the results of a job."""
    args = sft_config(str(folder / "unused"), max_length=None)
    trainer = QTargetSFTTrainer(
        warm_model(),
        args,
        train_dataset=rows(),
        processing_class=tiny.tokenizer(),
        qtarget_config=prior_itself(),
        ref_model=warm_model(steps=12),
    )
    write_cache(Writer(trainer, form, len(tiny.tokenizer())), folder / f"cache-{form}")


def make(cell: Cell, output_dir: str, processes: int, trainer_class: type = InOrder) -> QTargetSFTTrainer:
    """The trainer of a cell; one process gets the rows that more would repeat."""
    peft = None
    if cell.peft:
        saved = ["lm_head"] if cell.head else None
        peft = LoraConfig(
            r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", modules_to_save=saved
        )
    if cell.adalora:
        peft = AdaLoraConfig(init_r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", total_step=6)
    policy, reference = _models(cell)
    loaders = processes // _NATIVE.get("tp_size", 1)  # that give rows of their own, even if several ranks share each
    data_ranks = loaders // _PIECES
    options = {
        "per_device_train_batch_size": GLOBAL_BATCH // data_ranks,
        "per_device_eval_batch_size": GLOBAL_BATCH // loaders,
        "num_train_epochs": 1,
        "max_steps": -1,
        "learning_rate": 0.2,
        "seed": 0,
    }
    config = QTargetConfig(cell.method, prior=cell.prior, prior_sync_steps=2 if cell.prior == "lagged" else None)
    if cell.by_path or (_NATIVE and not cell.loaded):
        folder = Path(output_dir).parent
        save_models(folder)
        policy = str(folder / ("experts" if cell.experts else "policy"))
        reference = reference and str(folder / ("other" if cell.other_class else "reference"))
    options |= cell.options
    if processes > 1 and "gradient_accumulation_steps" in options:  # of two ranks with data of their own
        options["gradient_accumulation_steps"] *= 2 // data_ranks
    if _NATIVE and not cell.loaded:
        options["model_init_kwargs"] = {"distributed_config": DistributedConfig(**_NATIVE)}
    if _PIECES > 1:  # what DeepSpeed splits rows for
        options["model_init_kwargs"] = {"attn_implementation": "sdpa"} if cell.by_path else None
        options["pad_to_multiple_of"] = 48  # gloo gathers rows of one length alone
        for model in (policy, reference):
            if isinstance(model, PreTrainedModel):
                model.set_attn_implementation("sdpa")
    args = sft_config(output_dir, **options)
    if cell.loaded:  # after the configuration, which tells transformers that ZeRO-3 is on
        save_models(Path(output_dir).parent)
        given = {"distributed_config": DistributedConfig(**_NATIVE)} if _NATIVE else {}
        folder = Path(output_dir).parent / "policy"
        policy = type(policy).from_pretrained(folder, attn_implementation="sdpa" if _PIECES > 1 else "eager", **given)
    set_seed(0)  # LoRA's start is drawn before some versions of TRL seed
    trainer = trainer_class(
        policy,
        args,
        train_dataset=rows(_REPEATED if loaders == 1 and cell.fills else 0),
        eval_dataset=rows(_REPEATED),
        processing_class=tiny.tokenizer(),
        qtarget_config=config,
        ref_model=None if cell.cache else reference,
        prior_cache=str(Path(output_dir).parent / f"cache-{cell.cache}") if cell.cache else None,
        peft_config=peft,
    )
    trainer.remove_callback(PrinterCallback)
    if cell.beside:
        for name, value in trainer.model.named_parameters():
            value.requires_grad_(value.requires_grad or cell.beside in name)
    if cell.policy:
        quantized.full_precision(trainer.model)
    return trainer


def _models(cell: Cell) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """The policy and the reference model of a cell."""
    plain = quantized.plain if cell.policy or cell.reference else warm_model
    policy = quantized.quantized(cell.policy) if cell.policy else plain()
    if cell.experts:
        policy = warm_model(tiny.moe_model)
    if cell.stranger:
        policy = Stranger.of(policy)
    if cell.prior != "model":
        return policy, None
    if cell.other_class:
        return policy, warm_model(tiny.moe_model, steps=12)
    return policy, quantized.quantized(cell.reference, steps=12) if cell.reference else plain(steps=12)


def result_of(trainer: QTargetSFTTrainer, facts: dict[str, Any] | None = None) -> Result:
    """What a trained trainer leaves behind. Every rank has to call it."""
    history = trainer.state.log_history
    logs = [{name: line[name] for name in _LOGGED} for line in history if "loss" in line]
    logs += [{name: line[f"eval_{name}"] for name in _EVALUATED} for line in history if "eval_loss" in line]
    trained = ((name, value) for name, value in trainer.model.named_parameters() if value.requires_grad)
    weights = {name: gather(value, share(value)).cpu().clone() for name, value in trained}
    return Result(logs, weights, facts or {})


def _forget_pieces() -> None:
    """DeepSpeed splits rows for one policy a process; each cell has one of its own."""
    import deepspeed.runtime.sequence_parallel.parallel_state_sp as state
    from deepspeed.utils import groups
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    state._release_sequence_parallel_groups()
    groups.mpu = None
    ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa_attention_forward


def run(cell: Cell, output_dir: str, processes: int, trainer_class: type = InOrder) -> Result:
    """Train a cell in this process, or in this rank of several, and evaluate it."""
    AcceleratorState._reset_state(reset_partial_state=False)
    if _PIECES > 1:
        _forget_pieces()
    trainer = make(cell, output_dir, processes, trainer_class)
    watch = _Watch()
    watch.trainer = trainer
    watch.facts["sharded_at_load"] = in_zero3(trainer.model)
    trainer.add_callback(watch)
    trainer.train()
    trainer.evaluate()
    saved = sorted(Path(output_dir).glob("checkpoint-*/qtarget_prior.safetensors"))
    if saved and trainer.args.save_strategy != "no":
        # One number that no two sets of weights have in common.
        numbers = torch.cat([value.double().flatten() for _, value in sorted(load_file(saved[-1]).items())])
        watch.facts["prior_saved"] = (numbers * torch.arange(len(numbers)).cos()).sum().item()
    if cell.method == "adaptive_sft":
        watch.facts["alpha"] = trainer.qtarget_config.alpha
    return result_of(trainer, watch.facts)


def begin_job() -> None:
    """What Accelerate does for GPUs alone: begin DeepSpeed's groups, and allow tensor parallelism."""
    if _PIECES > 1:
        import deepspeed

        deepspeed.init_distributed("gloo")
    if "tp_size" in _NATIVE:
        ParallelismConfig._validate_accelerator = lambda self, accelerator: None


def main(cells_file: str, results: str, trainer_class: type = InOrder) -> None:
    """Run the cells of a file, as every rank does; rank 0 writes what came out."""
    folder, rank, processes = Path(results), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    begin_job()
    for values in json.loads(Path(cells_file).read_text()):
        cell = Cell(**values)
        path = folder / str(cell)
        try:
            result = run(cell, str(folder / "out"), processes, trainer_class)
            if rank == 0:
                result.save(path)
        except Exception:
            with path.with_suffix(".error").open("a") as file:
                file.write(f"rank {rank}: {traceback.format_exc()}\n")
            raise


if __name__ == "__main__":
    main(*sys.argv[1:])
