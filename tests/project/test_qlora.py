"""QLoRA on one card: the example runs with real NF4, and its account of memory is what a real step takes."""

import json
import shutil
import sys
from pathlib import Path

import pytest


pytest.importorskip("bitsandbytes")
sys.path += [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "examples")]

import memory
import qlora
import quantized
import tiny
import torch
from measured import with_numbers
from peft import PeftModel
from safetensors.torch import load_file
from training import check_equals_dense, trainable, worst
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from benchmarks.qlora import TensorMemory, blocks_of_cuda, measure, stored_bytes
from trl_qtarget import METHODS, QTargetConfig, TopKPrior, linear_qtarget_loss
from trl_qtarget.loss import chunks
from trl_qtarget.loss.kernels import plain
from trl_qtarget.priors.own import OwnPrior


ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    pairs = zip(tiny.sentences(40, 1, 6), tiny.sentences(40, 2), strict=True)
    file.write_text("".join(json.dumps({"prompt": prompt, "completion": f" {text}"}) + "\n" for prompt, text in pairs))
    return file


@pytest.fixture
def command(rows, tmp_path):
    """Arguments of a run of some steps on the tiny model."""

    def arguments(*more: str, steps: int = 2, output_dir: Path = tmp_path / "out") -> list[str]:
        given = ["--model", quantized.folder(), "--dataset", str(rows), "--output_dir", str(output_dir)]
        small = ["--max_length", "64", "--accumulation", "2", "--max_steps", str(steps), "--lora_rank", "4"]
        return [*given, *small, "--learning_rate", "0.01", "--method", "asft", *more]

    return arguments


# --- the example ---


def test_example_trains_the_adapters_alone(command, tmp_path):
    trainer = qlora.main(command("--chunk_tokens", "7"))
    model = trainer.model.get_base_model()
    layers = [module for module in model.model.modules() if hasattr(module, "base_layer")]
    assert len(layers) == 2 * 7 and all(layer.base_layer.weight.quant_state.nested for layer in layers)
    assert trainer.args.gradient_checkpointing and trainer.padding_free
    assert trainer.qtarget_config == QTargetConfig("asft", chunk_tokens=7)
    assert isinstance(trainer._prior, OwnPrior) and not trainer._prior.parts
    assert all("lora_" in name for name in trainable(trainer.model))

    untouched = quantized.quantized("nf4")
    for name, value in untouched.named_parameters():
        name = name if value.dtype.is_floating_point else name.replace(".weight", ".base_layer.weight")
        assert torch.equal(model.get_parameter(name), value)

    loaded = PeftModel.from_pretrained(untouched, tmp_path / "out", is_trainable=True)
    assert worst(trainable(loaded), trainable(trainer.model)) == 0
    assert all(value.any() for name, value in trainable(loaded).items())
    assert QTargetConfig.from_pretrained(tmp_path / "out") == trainer.resolved_target.config


def test_example_resumes(command, tmp_path):
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    qlora.main(command("--save_steps", "2", steps=4, output_dir=whole))
    shutil.copytree(whole / "checkpoint-2", rest / "checkpoint-2")
    trainer = qlora.main(command("--save_steps", "2", "--resume", steps=4, output_dir=rest))
    assert [line["step"] for line in trainer.state.log_history if "loss" in line] == [1, 2, 3, 4]
    assert trainer.state.global_step == 4 and not (rest / "checkpoint-1").exists()
    assert worst(load_file(rest / ADAPTER), load_file(whole / ADAPTER)) < 1e-6


def test_example_with_a_teacher_in_nf4(command):
    trainer = qlora.main(command("--method", "distill", "--ref_model", quantized.folder(12), steps=1))
    assert trainer._prior.causal_model.is_loaded_in_4bit


def test_example_names_a_missing_file():
    with pytest.raises(SystemExit, match=r"--dataset nowhere\.jsonl"):
        qlora.load_rows("nowhere.jsonl")


def test_base_prior_has_no_weights_of_its_own(command):
    def trainer_and_bytes(method: str):
        trainer = qlora.make_trainer(qlora.parse_arguments(command("--method", method)))
        modules = [value for value in vars(trainer._prior or trainer).values() if isinstance(value, torch.nn.Module)]
        assert all(module is trainer.model for module in modules)
        return trainer, stored_bytes(trainer.model.parameters())

    (_, without), (trainer, with_prior) = trainer_and_bytes("dft"), trainer_and_bytes("asft")
    assert with_prior == without
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    states = trainer._prior.states({name: value for name, value in batch.items() if name != "labels"})
    assert states.head().weight is trainer.model.get_output_embeddings().weight
    assert stored_bytes(trainer.model.parameters()) == without


def test_loss_and_gradients_equal_the_dense_ones(command):
    trainer = qlora.main(command())
    quantized.full_precision(trainer.model)

    def adapters_off(**inputs):
        with trainer.model.disable_adapter():
            return trainer.model(**inputs)

    check_equals_dense(trainer, adapters_off)


# --- the account ---


SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 448,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}


def llama(**sizes):
    return LlamaForCausalLM(LlamaConfig(**SIZES | sizes))


def qwen3(**sizes):
    return Qwen3ForCausalLM(Qwen3Config(**SIZES | {"head_dim": 32} | sizes))


@pytest.mark.parametrize(
    ("make", "sizes"),
    [
        (llama, {}),
        pytest.param(llama, {"vocab_size": 8192}, marks=pytest.mark.slow),
        pytest.param(llama, {"tie_word_embeddings": True}, marks=pytest.mark.slow),
        (qwen3, {}),
    ],
    ids=["llama", "large-vocabulary", "tied", "qwen3"],
)
def test_account_is_what_a_step_takes(make, sizes, tmp_path):
    make(**sizes).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    lines = measure(str(tmp_path), tokens=512)
    for name in ("linear layers, NF4", "embeddings, head, norms, bfloat16", "adapters", "their gradients"):
        measured, computed = lines.pop(name)
        assert computed == pytest.approx(measured, rel=0.01), name
    assert len(lines) == 2
    for name, (measured, computed) in lines.items():
        assert computed == pytest.approx(measured, rel=0.05), name


def peak_of_the_loss(method, N, V):
    """Bytes at the peak of the loss, with blocks as on CUDA; and how many chunks of logits it holds."""
    H = 16
    hidden, weight, labels = torch.randn(N, H, requires_grad=True), torch.randn(V, H), torch.randint(0, V, (N,))
    prior = {"prior_hidden": torch.randn(N, H), "prior_weight": torch.randn(V, H)}
    config = with_numbers(method)
    uses_prior = config.objective(has_prior=True).uses_prior
    given = (prior if uses_prior else {}) | ({"token_weights": torch.rand(N)} if method == "cft" else {})
    with blocks_of_cuda(), TensorMemory() as tensors:
        linear_qtarget_loss(hidden, weight, labels, config, **given)
    return tensors.peak, 2 if uses_prior else 1


@pytest.mark.parametrize("method", METHODS)
def test_buffers_of_the_loss(method):
    N, V = 128, 4096
    peak, _ = peak_of_the_loss(method, N, V)
    assert peak / (N * V * 4) == pytest.approx(memory.LOSS_BUFFERS[method], rel=0.02)


def test_a_top_k_prior_takes_what_a_method_without_a_prior_does():
    N, V, H, k = 128, 4096, 16, 8
    hidden, weight, labels = torch.randn(N, H, requires_grad=True), torch.randn(V, H), torch.randint(0, V, (N,))
    known = torch.randn(N, V).log_softmax(-1).topk(k)
    numbers = known.values[:, 0].clone()
    prior = TopKPrior(known.indices, known.values, numbers, numbers)
    linear_qtarget_loss(hidden, weight, labels, "target_sft", prior_top_k=prior)  # what is made once a process
    with blocks_of_cuda(), TensorMemory() as tensors:
        linear_qtarget_loss(hidden, weight, labels, "target_sft", prior_top_k=prior)
    assert tensors.peak / (N * V * 4) == pytest.approx(memory.LOSS_BUFFERS["dft"], rel=0.04)
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1, vocab_size=V)
    cached, live = (sum(memory.account(config, 512, cached_k=k).loss.values()) for k in (k, None))
    without = sum(memory.account(config, 512, method="dft").loss.values())
    assert cached == without + memory.CACHED * k * 512 < live


@pytest.mark.parametrize("method", METHODS)
def test_what_is_made_of_logits_is_made_block_by_block(method, monkeypatch):
    N, V, block = 128, 4096, 16
    monkeypatch.setattr(plain, "DEFAULT_BLOCK_ELEMENTS", block * V)
    peak, whole = peak_of_the_loss(method, N, V)
    made = memory.LOSS_BUFFERS[method] - whole
    assert peak / (V * 4) == pytest.approx(whole * N + made * block, rel=0.03)


def test_account_knows_the_sizes_of_the_loss():
    sizes = (chunks.MOST_CUDA_BYTES, plain.DEFAULT_BLOCK_ELEMENTS)
    assert (memory.CHUNK_BYTES, memory.BLOCK_ELEMENTS) == sizes
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1, vocab_size=128256)
    chunk, block, *_ = memory.account(config, tokens=8192).loss.values()
    assert (chunk, block) == (2 * 512 * 128256 * 4, 4 * 130 * 128256 * 4)


def test_account_of_a_teacher_of_other_sizes():
    policy, teacher = (
        LlamaConfig(hidden_size=width, intermediate_size=128, num_hidden_layers=1, vocab_size=rows)
        for width, rows in ((64, 151936), (128, 152064))
    )
    alone, beside = (memory.account(policy, method="distill", teacher=each) for each in (None, teacher))
    weights = sum(memory.weight_bytes(memory.Shapes.of(teacher)).values())
    assert beside.steady == alone.steady | {memory.TEACHER: weights}
    states = "the prior's hidden states"
    assert beside.loss == alone.loss | {states: 2 * alone.loss[states]}  # of logits, as many as the policy has rows
    assert "besides" not in "".join(name for name, _ in beside.lines())
    assert memory.account(policy, method="sft", teacher=teacher).steady == memory.account(policy, method="sft").steady


def test_account_of_8_billion_parameters():
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    config = LlamaConfig(num_attention_heads=32, num_key_value_heads=8, **sizes)
    account = memory.account(config)
    assert sum(rows * columns for rows, columns in memory.Shapes.of(config).linear) == 6_979_321_856
    assert 10.4e9 < account.total < 10.6e9
    assert account.dense > 24e9
