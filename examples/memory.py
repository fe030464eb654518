"""The memory of a QLoRA run, line by line, computed from a model's configuration. No weights are read.

    python examples/memory.py --model path/to/config.json --tokens 8192

The lines are those of `docs/memory.md`, which says where each formula comes from and which were measured.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from trl_qtarget import METHODS, PolicyFacts, PriorChoice, QTargetConfig, choose_prior


HALF = 2  # bytes of a bfloat16
FLOAT = 4
# Logits that the loss holds at a time on a GPU with 8 GiB free or more, unless `chunk_tokens` says otherwise.
CHUNK_BYTES = 1 << 29
BLOCK_ELEMENTS = 1 << 24  # of these, what it works on at a time on a GPU
NF4_BLOCK, SCALE_BLOCK = 64, 256  # weights per scale, and scales per scale of scales
STATE_BLOCK, SMALLEST_STATE = 256, 4096  # 8-bit AdamW: elements per scale; smaller parameters keep float32 states
# Bytes of a known token in a batch and in the loss: id and number, int32 and float32, as they come, moved by one
# position, and of the scored tokens, there with 64-bit ids too.
CACHED = 8 + 8 + 4 + 8 + 8
MASK, TEACHER = "attention mask (sdpa, packed rows)", "the teacher, NF4"

# Float32 buffers that the fused loss holds at its peak: of a chunk the logits of the policy and of the prior, and of a
# block those for what is made of them.
LOSS_BUFFERS = dict.fromkeys(METHODS, 3) | {
    **dict.fromkeys(("iw_sft", "psft", "asft_k3", "prift", "prift_mass", "tofu"), 4),
    **dict.fromkeys(("label_smoothing", "sft_kl", "asft", "gem", "distill", "distill_hybrid", "gift", "otr"), 5),
    **dict.fromkeys(("target_sft", "adaptive_sft"), 6),
    "lp_sft": 7.25,
    "mask_target": 8,
}
# The same of a loss on dense logits, `[N, V]` each: the policy's logits and `qtarget_loss` through autograd.
DENSE_BUFFERS = dict.fromkeys(METHODS, 6) | {
    **dict.fromkeys(("gem", "tofu", "rank_tuner", "trim_sft"), 7),
    **dict.fromkeys(("label_smoothing", "otr"), 8),
    **dict.fromkeys(("iw_sft", "psft", "asft_k3", "prift", "prift_mass"), 9),
    **dict.fromkeys(("sft_kl", "asft", "distill", "distill_hybrid", "target_sft", "adaptive_sft", "gift"), 10),
    **dict.fromkeys(("mask_target", "lp_sft"), 13),
}


@dataclass
class Shapes:
    """What the account needs of a model: how many elements each tensor has, and the widths inside a layer."""

    layers: int
    hidden: int
    intermediate: int
    queries: int
    keys: int
    vocabulary: int
    head_norms: bool
    linear: list[tuple[int, int]]
    kept: list[int]

    @classmethod
    def of(cls, config: PretrainedConfig) -> "Shapes":
        """Read from a model of this configuration that has shapes but no storage."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        head = model.get_output_embeddings()
        linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
        quantized = {id(module.weight) for module in linear}
        config = config.get_text_config()
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            queries=width * config.num_attention_heads,
            keys=width * config.num_key_value_heads,
            vocabulary=head.weight.size(0),
            head_norms=any(name.endswith("q_norm") for name, _ in model.named_modules()),
            linear=[tuple(module.weight.shape) for module in linear],
            kept=[value.numel() for value in model.parameters() if id(value) not in quantized],
        )


def nf4_bytes(elements: int) -> int:
    """Bytes of one NF4 weight with double quantisation: half a byte each, one per scale, and scales of the scales."""
    scales = -(-elements // NF4_BLOCK)
    tables = FLOAT * (16 + 256 + 1)  # the values of NF4, those of the 8-bit scales, and the scales' mean
    return -(-elements // 2) + scales + FLOAT * -(-scales // SCALE_BLOCK) + tables


def weight_bytes(shapes: Shapes) -> dict[str, int]:
    """Frozen weights: the linear layers in NF4; embeddings, head, norms and biases in bfloat16."""
    return {
        "linear layers, NF4": sum(nf4_bytes(rows * columns) for rows, columns in shapes.linear),
        "embeddings, head, norms, bfloat16": HALF * sum(shapes.kept),
    }


def adapter_bytes(shapes: Shapes, rank: int) -> dict[str, int]:
    """LoRA on every linear layer: weights and gradients in bfloat16 (TRL's dtype for them), and 8-bit AdamW."""
    sizes = [rank * width for shape in shapes.linear for width in shape]
    states = sum(2 * (size + FLOAT * -(-size // STATE_BLOCK)) for size in sizes if size >= SMALLEST_STATE)
    states += sum(2 * FLOAT * size for size in sizes if size < SMALLEST_STATE)
    return {
        "adapters": HALF * sum(sizes),
        "their gradients": HALF * sum(sizes),
        "8-bit AdamW": states,
    }


def layer_bytes(shapes: Shapes, tokens: int, rank: int) -> int:
    """One layer while its backward pass runs, at its peak in the MLP: everything the layer keeps, and what flows."""
    norms = 2 * FLOAT * shapes.hidden + 2 * HALF * shapes.hidden  # their inputs in float32, their outputs
    # Queries, output, keys and values; with a mask, sdpa gets the last two repeated for every query head.
    attention = HALF * 4 * shapes.queries
    if shapes.head_norms:
        attention += (FLOAT + HALF) * (shapes.queries + shapes.keys)
    mlp = HALF * 4 * shapes.intermediate  # gate, its SiLU, up, and their product
    adapters = HALF * 7 * rank
    flowing = HALF * 2 * shapes.intermediate  # gradients of two of them
    weight = HALF * max(rows * columns for rows, columns in shapes.linear)  # dequantised for its product
    mask = HALF * tokens**2  # as numbers
    return tokens * (norms + attention + mlp + adapters + flowing) + weight + mask


def loss_bytes(
    shapes: Shapes,
    tokens: int,
    method: str,
    prior: Shapes | None,
    chunk_tokens: int | None,
    cached_k: int | None = None,
) -> dict[str, int]:
    """The loss at its peak: logits of a chunk, what is made of a block, and what has the size of the hidden states.

    The prior's logits have the policy's rows, whatever number of them its own head has. With a prior of which a cache
    has the `cached_k` most probable tokens it is the loss of a method without a prior.
    """
    rows = 0
    if prior is not None and cached_k is not None:
        rows, prior, method = CACHED * cached_k * tokens, None, "dft"
    chunks = 1 if prior is None else 2
    most = min(chunk_tokens or CHUNK_BYTES // (chunks * FLOAT * shapes.vocabulary), tokens)
    chunk = -(-tokens // -(-tokens // most))
    block = min(BLOCK_ELEMENTS // shapes.vocabulary, chunk)
    hidden = tokens * shapes.hidden
    return {
        f"logits of one chunk ({chunk} tokens)": chunks * chunk * shapes.vocabulary * FLOAT,
        f"what is made of a block ({block} tokens)": (LOSS_BUFFERS[method] - chunks)
        * block
        * shapes.vocabulary
        * FLOAT,
        "hidden states, their gradient, last norm": hidden * (2 * HALF + FLOAT + FLOAT),
        "the prior's hidden states": 0 if prior is None else 2 * HALF * tokens * prior.hidden,
        "what the cache says of the prior": rows,
    }


@dataclass
class Account:
    """Bytes by line. The loss and a layer's backward pass do not overlap: only the larger one counts."""

    steady: dict[str, int]
    checkpoints: int
    layer: int
    loss: dict[str, int]
    teacher: int
    dense: int

    @property
    def total(self) -> int:
        return sum(self.steady.values()) + self.checkpoints + max(self.layer, sum(self.loss.values()))

    def lines(self) -> Iterator[tuple[str, int]]:
        yield from self.steady.items()
        yield "activations: input of every layer", self.checkpoints
        loss, layer = sum(self.loss.values()), self.layer
        yield "activations: one layer in backward" + (" (not at the peak)" if layer < loss else ""), layer
        for name, size in self.loss.items():
            yield f"loss: {name}" + (" (not at the peak)" if loss <= layer else ""), size
        yield "TOTAL of PyTorch's tensors", self.total
        if TEACHER not in self.steady:
            yield "besides, if there is one: a teacher of these sizes, NF4", self.teacher
        yield "instead of the loss's chunk: dense logits", self.dense


def prior_of(method: str, has_teacher: bool = False) -> PriorChoice:
    """The prior that a method has in `examples/qlora.py`, with a teacher where there is one or it asks for one."""
    teacher = "teacher" if has_teacher or METHODS[method].prior == "model" else None
    return choose_prior(QTargetConfig(method), PolicyFacts(adapters={"default": LoraConfig()}), teacher)


def account(
    config: PretrainedConfig,
    tokens: int = 8192,
    rank: int = 16,
    method: str = "target_sft",
    chunk_tokens: int | None = None,
    teacher: PretrainedConfig | None = None,
    cached_k: int | None = None,
) -> Account:
    """The account of `examples/qlora.py`; `tokens` is the batch size times the length of a row.

    A `teacher` is one of other sizes; without it, what a method needs one for is accounted with the policy's own.
    `cached_k`: of a `prior_cache` of the form `top_k`, in the place of either.
    """
    shapes = Shapes.of(config)
    choice = prior_of(method, teacher is not None)
    others = shapes if teacher is None else Shapes.of(teacher)
    prior = None
    if choice.objective.uses_prior:
        prior = others if choice.reference is not None else shapes
    weights, of_teacher = weight_bytes(shapes), sum(weight_bytes(others).values())
    beside = {TEACHER: of_teacher} if teacher is not None and choice.reference is not None else {}
    return Account(
        steady=weights | adapter_bytes(shapes, rank) | {MASK: tokens**2} | beside,
        checkpoints=HALF * shapes.layers * tokens * shapes.hidden,
        layer=layer_bytes(shapes, tokens, rank),
        loss=loss_bytes(shapes, tokens, method, prior, chunk_tokens, cached_k),
        teacher=of_teacher,
        dense=DENSE_BUFFERS[method] * tokens * shapes.vocabulary * FLOAT,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="Hub id, folder, or path of a config.json.")
    parser.add_argument("--ref_model", help="The same of a teacher with other sizes, in NF4.")
    parser.add_argument("--tokens", type=int, default=8192, help="Tokens in memory: batch size times length.")
    parser.add_argument("--lora_rank", type=int, default=16, help="Rank of the adapters.")
    parser.add_argument("--method", choices=list(METHODS), default="target_sft", help="Published objective.")
    parser.add_argument("--chunk_tokens", type=int, help="Tokens that the loss scores at a time. None: 64 Mi logits.")
    parser.add_argument("--cached_k", type=int, help="k of a `prior_cache` of the form 'top_k'. None: a live prior.")
    arguments = parser.parse_args()
    config, teacher = (
        name and AutoConfig.from_pretrained(Path(name) if Path(name).exists() else name)
        for name in (arguments.model, arguments.ref_model)
    )
    choices = (arguments.tokens, arguments.lora_rank, arguments.method, arguments.chunk_tokens, teacher)
    for name, size in account(config, *choices, arguments.cached_k).lines():
        print(f"{name:<62}{size / 1e9:>9.3f} GB")


if __name__ == "__main__":
    main()
