"""Time of whole training steps of the real trainers: full fine-tuning, LoRA and QLoRA, ours beside TRL's.

The model has the sizes of SmolLM2-135M (Llama, 30 layers, width 576, vocabulary 49,152, tied embeddings; `--model`
names others) with random weights: nothing is downloaded, and no value changes what a step costs. Every trainer is
built once, from the same seed, and gets the same random tokens, all of them scored. Then short `train()` calls
alternate between the trainers. A step runs from `on_step_begin` to `on_step_end`: forward, prior, loss, backward,
clipping, AdamW; fetching the batch is outside. The first step of every call is not counted.

`qtarget/target_sft` takes its prior from where the trainer finds one: the base weights under the adapters or, in full
fine-tuning, the policy itself. `qtarget/target_sft+reference` is given a reference model of the same sizes and format;
`qtarget/target_sft+cache` reads what the base has said from a cache of the form `top_k`, k = 64, made before.
TRL has no Target-SFT: the `trl_ratio` of both compares them with TRL's NLL, so it also holds the price of the forward
pass of their prior.

    python -m benchmarks.step
    python -m benchmarks.step --model tiny --batch 2 --tokens 16 --repeats 2 --output /tmp/step.csv
"""

import argparse
import gc
import importlib.util
import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import (
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from trl_qtarget import QTargetSFTTrainer
from trl_qtarget.target.config import prior_itself
from trl_qtarget.training.caching import Writer, write_cache

from .budget import Budget, rounds
from .common import (
    DTYPES,
    base_parser,
    finish_arguments,
    progress_bar,
    ratio,
    select,
    summary,
    synchronize,
    write_results,
)
from .models import MODELS


# Which of TRL's trainers each of ours is compared with.
_COUNTERPARTS = {
    "qtarget/target_sft": "trl/nll",
    "qtarget/target_sft+reference": "trl/nll",
    "qtarget/target_sft+cache": "trl/nll",
    "qtarget/dft": "trl/dft",
    "trl/dft": None,
    "trl/nll": None,
}
_REFERENCE, _CACHE = "+reference", "+cache"
_CACHED_TOKENS = 64
MODES = ("full", "lora", "qlora")
_LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}


@dataclass
class StepTimer(TrainerCallback):
    """Wall-clock time of every training step. Added last, so that it ends after all other callbacks."""

    device: str
    times: list[float] = field(default_factory=list)

    def on_step_begin(self, args, state, control, **kwargs):
        synchronize(self.device)
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize(self.device)
        self.times.append(time.perf_counter() - self._start)


def _model(mode: str, directory: str, arguments: argparse.Namespace) -> LlamaForCausalLM:
    """A model from the same seed each time, quantised to NF4 for QLoRA."""
    torch.manual_seed(0)
    config = LlamaConfig(**MODELS[arguments.model], tie_word_embeddings=True, pad_token_id=0, eos_token_id=1)
    dtype = DTYPES[arguments.dtype]

    def unquantised() -> LlamaForCausalLM:
        with torch.device(arguments.device):
            return LlamaForCausalLM(config).to(dtype)

    if mode != "qlora":
        return unquantised()
    folder = Path(directory) / "unquantised"  # Transformers quantises what it loads
    if not folder.is_dir():
        unquantised().save_pretrained(folder)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    place = {"": 0} if arguments.device == "cuda" else None
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=nf4, device_map=place)


def _tokenizer() -> PreTrainedTokenizerFast:
    """The trainers ask for one; the dataset holds token ids already."""
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def _dataset(arguments: argparse.Namespace) -> Dataset:
    generator = torch.Generator().manual_seed(1)
    size = (arguments.batch * arguments.steps, arguments.tokens)
    ids = torch.randint(3, MODELS[arguments.model]["vocab_size"], size, generator=generator)
    return Dataset.from_dict({"input_ids": ids.tolist()})


def build(name: str, mode: str, directory: str, arguments: argparse.Namespace) -> tuple[SFTTrainer, StepTimer]:
    """A trainer by the name of its provider, with a timer among its callbacks."""
    package, method = name.removesuffix(_REFERENCE).removesuffix(_CACHE).split("/")
    config = SFTConfig(
        output_dir=directory,
        per_device_train_batch_size=arguments.batch,
        max_length=arguments.tokens,
        max_steps=arguments.steps,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        gradient_checkpointing=arguments.gradient_checkpointing,
        bf16=arguments.dtype == "bf16",
        use_cpu=arguments.device == "cpu",
        dataloader_pin_memory=arguments.device == "cuda",
        loss_type=method if package == "trl" else "nll",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
        **({"optim": arguments.optim} if arguments.optim else {}),
    )
    lora = None
    if mode != "full":
        lora = LoraConfig(
            r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
        )
    data = {"train_dataset": _dataset(arguments), "processing_class": _tokenizer(), "peft_config": lora}
    trainer_class, target = SFTTrainer, {}
    if package == "qtarget":
        trainer_class, target = QTargetSFTTrainer, {"qtarget_config": method}
    if name.endswith(_REFERENCE):
        target["ref_model"] = _model(mode, directory, arguments)
    if name.endswith(_CACHE):
        target["prior_cache"] = str(_cache(mode, directory, config, data, arguments))
    trainer = trainer_class(_model(mode, directory, arguments), config, **data, **target)
    trainer.remove_callback(PrinterCallback)
    timer = StepTimer(arguments.device)
    trainer.add_callback(timer)
    return trainer, timer


def _cache(mode: str, directory: str, config: SFTConfig, data: dict[str, Any], arguments: argparse.Namespace) -> Path:
    """A cache of what the model says before it is trained."""
    folder = Path(directory) / f"cache-{mode}"
    frozen = "start" if data["peft_config"] is None else "base"
    asked = prior_itself(frozen)
    trainer = QTargetSFTTrainer(_model(mode, directory, arguments), config, **data, qtarget_config=asked)
    write_cache(Writer(trainer, k=min(_CACHED_TOKENS, MODELS[arguments.model]["vocab_size"])), folder)
    return folder


def missing(mode: str) -> str | None:
    """Why a mode cannot run here; None if it can."""
    if mode == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    return None


def _check(losses: dict[str, float], dtype: str) -> None:
    """Raise unless ours and TRL's trainer of one objective start from the same loss."""
    for name, loss in losses.items():
        other = _COUNTERPARTS[name]
        if other is None or other not in losses or name.split("/")[1] != other.split("/")[1]:
            continue
        if not abs(loss - losses[other]) <= _LOSS_TOLERANCE[dtype] * abs(losses[other]):
            raise RuntimeError(f"{name} and {other} disagree in the loss of the first steps: {loss}, {losses[other]}.")


def _measure(
    names: list[str], mode: str, arguments: argparse.Namespace, progress: Any, limit: float
) -> dict[str, list[float]]:
    """Seconds of every counted step of every trainer, in the same order for all."""
    rng = random.Random(0)
    end = time.perf_counter() + limit
    with tempfile.TemporaryDirectory() as directory:
        trainers = {name: build(name, mode, directory, arguments) for name in names}
        losses = {}
        for number in rounds(2, 1 + arguments.repeats, end - time.perf_counter()):
            for name in rng.sample(names, len(names)):
                progress.set_postfix_str(name, refresh=False)
                trainer, timer = trainers[name]
                before = len(timer.times)
                gc.collect()
                result = trainer.train()
                if number == 0:  # warm-up: also where the optimiser's states come to be
                    losses[name] = result.training_loss
                    del timer.times[:]
                else:
                    del timer.times[before]  # the first step of a call finds the caches of another trainer
                progress.update()
        _check(losses, arguments.dtype)
    return {name: timer.times for name, (_, timer) in trainers.items()}


def _differences(arguments: argparse.Namespace) -> list[str]:
    """What else a step does otherwise, in words."""
    return ["checkpointing"] * arguments.gradient_checkpointing + [arguments.optim] * bool(arguments.optim)


def _rows(times: dict[str, list[float]], mode: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    sizes = MODELS[arguments.model]
    fixed = {
        "benchmark": "step",
        "mode": " ".join([mode, *_differences(arguments)]),
        "N": arguments.batch * arguments.tokens,
        "H": sizes["hidden_size"],
        "V": sizes["vocab_size"],
        "dtype": arguments.dtype,
        "metric": "seconds",
    }
    rows = []
    for name, values in times.items():
        trl_ratio = ratio(values, times.get(_COUNTERPARTS[name]))
        rows.append({**fixed, "provider": name, **summary(values), "trl_ratio": trl_ratio})
    return rows


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark and write its results."""
    parser = base_parser(__doc__, repeats=5)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--model", choices=list(MODELS), default="smollm2-135m", help="sizes of the model")
    parser.add_argument("--batch", type=int, default=2, help="sequences per step")
    parser.add_argument("--tokens", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--steps", type=int, default=3, help="steps per train() call; the first is not counted")
    parser.add_argument("--optim", help="an optimiser by the name that TrainingArguments has for it; None: AdamW")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations in backward")
    arguments = finish_arguments(parser.parse_args(argv), "step")
    if arguments.steps < 2:
        raise SystemExit("--steps must be at least 2: the first is not counted.")
    names = select(_COUNTERPARTS, arguments.providers)

    disable_progress_bars()  # ours counts the calls
    budget = Budget(arguments.budget, len(arguments.modes))
    with progress_bar(len(arguments.modes) * len(names) * (1 + arguments.repeats), "train()") as progress:
        for mode in arguments.modes:
            limit = budget.share(mode)
            reason = missing(mode)
            if reason is not None:
                print(f"{mode} is left out: {reason}.", flush=True)
            if limit == 0 or reason is not None:
                continue
            progress.set_description(mode)
            try:
                times = _measure(names, mode, arguments, progress, limit)
            except torch.OutOfMemoryError:
                print(f"\n{mode} is left out: not enough memory.", flush=True)
                times = {}
            write_results(arguments.output, _rows(times, mode, arguments), arguments.device)
            gc.collect()  # the trainers of one mode make room for those of the next
            if arguments.device == "cuda":
                torch.cuda.empty_cache()
    print(f"Results are in {arguments.output}.")


if __name__ == "__main__":
    main()
