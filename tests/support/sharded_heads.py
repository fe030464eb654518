"""Gradients of the fused loss wherever a head may stand among shards: run by every rank of a job of two.

`torchrun --nproc_per_node 2 sharded_heads.py outcomes.json` calls every case of `CASES` and writes what it raised. The
truth is the loss of one process, from whole logits.
"""

import sys
from collections.abc import Callable
from functools import partial

import heads
import tiny
import torch
import torch.distributed as dist
from outcomes import write_outcomes
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from trl_qtarget import QTargetConfig, qtarget_loss
from trl_qtarget.loss.head import add_target_head, head_of
from trl_qtarget.loss.request import IGNORE_INDEX, PriorStates, Sealed, TargetRequest
from trl_qtarget.priors.base import base_model_of


# Sums of float32 in another order.
TOLERANCE = 1e-5
_ROWS, _LENGTH = 4, 9
_ZERO3 = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_force_ds_cpu_optimizer": False,
    "zero_allow_untested_optimizer": True,
}
Make = Callable[[], PreTrainedModel]


def _batch() -> tuple[Tensor, Tensor]:
    """Rows with very different numbers of labels, so that the ranks' gradients are not alike."""
    ids = torch.randint(5, 300, (_ROWS, _LENGTH), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[: _ROWS // 2, 3:] = IGNORE_INDEX
    return ids, labels


def _objective(teacher: nn.Module | None) -> QTargetConfig:
    return QTargetConfig("sft" if teacher is None else "distill_hybrid")


def _truth(model: nn.Module, teacher: nn.Module | None) -> tuple[float, dict[str, Tensor]]:
    ids, labels = _batch()

    def logits(model: nn.Module) -> Tensor:
        return model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)

    with torch.no_grad():
        prior = None if teacher is None else logits(teacher)
    loss = qtarget_loss(logits(model), labels[:, 1:].flatten(), _objective(teacher), prior_logits=prior)
    loss.backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return loss.item(), gradients


def _loss(model: nn.Module, teacher: nn.Module | None, rows: slice) -> Tensor:
    """Loss of some rows, as the trainer puts it together; the ranks' mean is the loss of all."""
    ids, labels = _batch()
    ids, count = ids[rows], (labels[:, 1:] != IGNORE_INDEX).sum().item()
    prior = None
    if teacher is not None:
        with torch.no_grad():
            states = teacher(input_ids=ids, final_hidden=True).last_hidden_state
        inside = base_model_of(getattr(teacher, "module", teacher))
        prior = lambda: PriorStates(states, partial(head_of, inside))  # noqa: E731
    request = Sealed(TargetRequest(_objective(teacher).objective(has_prior=teacher is not None), prior))
    items = count / dist.get_world_size()
    output = model(input_ids=ids, labels=labels[rows], qtarget=request, num_items_in_batch=items)
    return output.tokens.loss + output.loss.to(output.tokens.loss)


def _my_rows() -> list[slice]:
    share = _ROWS // dist.get_world_size()
    start = share * dist.get_rank()
    return [slice(row, row + 1) for row in range(start, start + share)]


def _check_loss(losses: list[Tensor], truth: float, tolerance: float) -> None:
    assert all(value.dtype == torch.float32 for value in losses)
    total = torch.stack([value.detach() for value in losses]).sum()
    dist.all_reduce(total)
    assert abs(total.item() / dist.get_world_size() - truth) < tolerance * truth


def _check_gradients(found: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == truth.keys(), found.keys() ^ truth.keys()
    seen = {name: value for name, value in truth.items() if value.abs().max() > 1e-7}
    # A single number, such as a scale, is a sum in which most cancels, and as much rounding is left as of the others.
    least = 1e-2 * max(value.abs().max() for value in seen.values())
    sizes = {name: value.abs().max().clamp(min=least) for name, value in seen.items()}
    errors = {name: ((found[name].float() - value).abs().max() / sizes[name]).item() for name, value in seen.items()}
    worst = max(errors, key=errors.get)
    assert errors[worst] < tolerance, f"{worst}: {errors[worst]:.1e}"


# --- where a head may stand under FSDP2 ---


def _layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith(("DecoderLayer", "BertLayer"))]


def _head(model: nn.Module) -> nn.Module:
    head = base_model_of(model).get_output_embeddings()
    return getattr(head, "modules_to_save", {"default": head})["default"]


def _in_the_root(model: nn.Module, **options) -> None:
    pass


def _alone(model: nn.Module, **options) -> None:
    fully_shard(_head(model), **options)


def _alone_and_kept(model: nn.Module, **options) -> None:
    fully_shard(_head(model), reshard_after_forward=False, **options)


def _its_wrapper(model: nn.Module, **options) -> None:
    fully_shard(base_model_of(model).get_output_embeddings(), **options)


def _with_the_norm(model: nn.Module, **options) -> None:
    """As Accelerate puts them."""
    fully_shard([base_model_of(model).model.norm, _head(model)], reshard_after_forward=False, **options)


def _with_embeddings(model: nn.Module, **options) -> None:
    """As Accelerate puts a tied head."""
    inner = base_model_of(model).model
    fully_shard([inner.norm, inner.embed_tokens, _head(model)], reshard_after_forward=False, **options)


def _with_the_last_layer(model: nn.Module, **options) -> None:
    fully_shard([_layers(model)[-1], _head(model)], **options)


def _in_an_enclosing_module(model: nn.Module, **options) -> None:
    """With the layers that BERT has between backbone and logits: whole only while that module runs."""
    fully_shard(model.cls, **options)


def fsdp2(
    make: Make, place: Callable[..., None], teacher: Make | None = None, **options: MixedPrecisionPolicy
) -> None:
    """The gradient of two micro-batches, and once more: a first pass may leave another state than it found."""
    loss, gradients = _truth(heads.build(make), teacher and heads.build(teacher, seed=5))
    model, teacher_model = heads.build(make), teacher and heads.build(teacher, seed=5)
    for each in filter(None, (model, teacher_model)):
        add_target_head(base_model_of(each))
        taken = place is _with_the_last_layer
        place(each, **options)
        for layer in _layers(each)[: -1 if taken else None]:
            fully_shard(layer, **options)
        fully_shard(each, **options)
    for _ in range(2):
        losses = []
        for number, rows in enumerate(_my_rows()):
            model.set_requires_gradient_sync(number == 1)
            losses.append(_loss(model, teacher_model, rows))
            losses[-1].backward()
        # What a bfloat16 pass gives: eight bits, through two layers.
        _check_loss(losses, loss, 2e-2 if options else TOLERANCE)
        found = {name: value.grad.full_tensor() for name, value in model.named_parameters() if value.grad is not None}
        _check_gradients(found, gradients, 5e-2 if options else TOLERANCE)
        model.zero_grad()


def zero3(make: Make, teacher: Make | None = None) -> None:
    """Gradients as DeepSpeed has reduced them; twice, as the first pass records the modules."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    loss, gradients = _truth(heads.build(make), teacher and heads.build(teacher, seed=5))
    models = (heads.build(make), teacher and heads.build(teacher, seed=5))
    alive = HfDeepSpeedConfig(_ZERO3)  # what tells transformers that ZeRO-3 is on
    engines = []
    for each in filter(None, models):
        add_target_head(base_model_of(each))
        optimizer = torch.optim.SGD((value for value in each.parameters() if value.requires_grad), lr=0.0)
        given = {"model": each, "optimizer": optimizer, "config": _ZERO3, "dist_init_required": False}
        engines.append(deepspeed.initialize(**given)[0])
    rows = slice(_my_rows()[0].start, _my_rows()[-1].stop)
    for _ in range(2):
        value = _loss(engines[0], engines[1] if teacher else None, rows)
        engines[0].backward(value)
        _check_loss([value], loss, TOLERANCE)
        parameters = dict(engines[0].module.named_parameters())
        _check_gradients({name: safe_get_full_grad(parameters[name]) for name in gradients}, gradients, TOLERANCE)
        engines[0].step()
    del alive


def _modules_to_save() -> nn.Module:
    lora = LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return get_peft_model(tiny.model(), lora)


def _tied() -> PreTrainedModel:
    return tiny.model(tie_word_embeddings=True)


def _untied(make: Make) -> Make:
    """With a weight of its own for the head's module."""

    def build() -> PreTrainedModel:
        model = make()
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach() * 0.9)
        return model

    return build


_BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.bfloat16)
CASES: dict[str, Callable[[], None]] = {
    **{
        f"fsdp2-llama{place.__name__}": partial(fsdp2, tiny.model, place)
        for place in (_in_the_root, _alone, _alone_and_kept, _with_the_norm, _with_the_last_layer)
    },
    "fsdp2-tied_in_the_root": partial(fsdp2, _tied, _in_the_root),
    "fsdp2-tied_with_embeddings": partial(fsdp2, _tied, _with_embeddings),
    "fsdp2-llava_alone": partial(fsdp2, _untied(heads.llava_over_cohere), _alone),
    "fsdp2-llava_in_the_root": partial(fsdp2, heads.llava_over_cohere, _in_the_root),
    "fsdp2-modernbert_alone": partial(fsdp2, _untied(heads.modernbert), _alone),
    "fsdp2-modernbert_in_the_root": partial(fsdp2, heads.modernbert, _in_the_root),
    "fsdp2-bert_in_an_enclosing_module": partial(fsdp2, _untied(heads.FITTING["bert"]), _in_an_enclosing_module),
    "fsdp2-modules_to_save_alone": partial(fsdp2, _modules_to_save, _alone),
    "fsdp2-modules_to_save_wrapper": partial(fsdp2, _modules_to_save, _its_wrapper),
    "fsdp2-modules_to_save_in_the_root": partial(fsdp2, _modules_to_save, _in_the_root),
    "fsdp2-teacher_alone": partial(fsdp2, _untied(heads.modernbert), _alone, teacher=_untied(heads.modernbert)),
    "fsdp2-teacher_of_more_rows": partial(fsdp2, tiny.model, _alone, teacher=partial(tiny.model, 5, vocab_size=448)),
    "fsdp2-bf16_alone": partial(fsdp2, tiny.model, _alone, mp_policy=_BF16),
    "fsdp2-bf16_in_the_root": partial(fsdp2, tiny.model, _in_the_root, mp_policy=_BF16),
    "zero3-llama": partial(zero3, tiny.model),
    "zero3-tied": partial(zero3, _tied),
    "zero3-modernbert": partial(zero3, heads.modernbert),
    "zero3-bert": partial(zero3, heads.FITTING["bert"]),
    "zero3-llava": partial(zero3, heads.llava_over_cohere),
    "zero3-inkling": partial(zero3, heads.inkling),
    "zero3-modules_to_save": partial(zero3, _modules_to_save),
    "zero3-teacher": partial(zero3, heads.modernbert, teacher=heads.modernbert),
    "zero3-teacher_of_more_rows": partial(zero3, tiny.model, teacher=partial(tiny.model, 5, vocab_size=448)),
    "zero3-teacher_of_fewer_rows": partial(zero3, tiny.model, teacher=partial(tiny.model, 5, vocab_size=301)),
}


if __name__ == "__main__":
    write_outcomes(CASES, *sys.argv[1:])
