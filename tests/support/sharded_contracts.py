"""What the package relies on inside DeepSpeed, FSDP2 and Accelerate, and what ranks agree on: run by a job of two.

`torchrun --nproc_per_node 2 sharded_contracts.py outcomes.json` calls every function of `CONTRACTS` and writes what
each of them raised. `test_contract_sharded.py` reads it.
"""

import sys

import tiny
import torch
import torch.distributed as dist
from accelerate.utils import is_peft_model
from outcomes import write_outcomes
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from trl_qtarget.loss.head import gathered, head_of
from trl_qtarget.priors.shards import exchanged, gather, in_zero3, reshard, scatter, share, whole_shape


IDS = torch.tensor([[5, 6, 7, 8]])
_ZERO3 = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_force_ds_cpu_optimizer": False,
    "zero_allow_untested_optimizer": True,
}


def _zero3() -> tuple[nn.Module, nn.Module]:
    """A model, and DeepSpeed's engine around it."""
    import deepspeed

    model = tiny.model()
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=_ZERO3, dist_init_required=False
    )
    return model, engine


def _fsdp2() -> nn.Module:
    model = tiny.model()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False)
    return fully_shard(model)


@torch.no_grad()
def _logits(model: nn.Module) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


def _check_shares(model: nn.Module) -> None:
    for (name, value), truth in zip(model.named_parameters(), tiny.model().parameters(), strict=True):
        assert whole_shape(value) == truth.shape, name
        assert share(value).numel() < truth.numel(), name
        assert torch.equal(gather(value, share(value)), truth), name
        assert torch.equal(scatter(value, truth), share(value)), name


def _check_exchange(model: nn.Module, wrapped: nn.Module) -> None:
    """Other values for the time of a pass, also right after one that has left parameters whole."""
    other = tiny.model(seed=1)
    parts = {
        name: scatter(value, new)
        for (name, value), new in zip(model.named_parameters(), other.parameters(), strict=True)
    }
    before = _logits(wrapped)
    for _ in range(2):
        with exchanged(model, wrapped, parts):
            torch.testing.assert_close(_logits(wrapped), _logits(other))
        torch.testing.assert_close(_logits(wrapped), before)


def zero3_parameters_tell_their_shares():
    model, _ = _zero3()
    assert in_zero3(model) and not in_zero3(tiny.model())
    _check_shares(model)


def zero3_gathers_what_the_shares_hold():
    _check_exchange(*_zero3())


def zero3_cache_can_be_emptied():
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    model, engine = _zero3()
    _logits(engine)
    engine.optimizer.empty_partition_cache()
    assert all(value.ds_status == ZeroParamStatus.NOT_AVAILABLE for value in model.parameters())


def zero3_tells_whether_its_trace_is_complete():
    _, engine = _zero3()
    complete = []
    for _ in range(3):
        engine.backward(engine(IDS, labels=IDS, use_cache=False).loss)
        engine.step()
        complete.append(engine.optimizer.parameter_offload.get_param_coordinator().is_complete_trace())
    assert complete == [False, True, True]


def zero3_heads_are_whole_while_they_are_gathered():
    """One that two of them share once, and one that is whole already stays so."""
    model, _ = _zero3()
    head, truth = head_of(model), tiny.model().lm_head.weight
    assert model.lm_head.weight.numel() == 0
    with gathered(head, head) as wholes:
        assert all(torch.equal(whole.weight, truth) for whole in wholes)
        with gathered(head) as (inner,):
            assert torch.equal(inner.weight, truth)
        assert torch.equal(model.lm_head.weight, truth)
    assert model.lm_head.weight.numel() == 0


def fsdp2_parameters_tell_their_shares():
    model = _fsdp2()
    assert all(isinstance(value, DTensor) for value in model.parameters())
    _check_shares(model)


def fsdp2_gathers_what_the_shares_hold():
    model = _fsdp2()
    _check_exchange(model, model)


def fsdp2_reshard_takes_back_what_a_pass_has_left_whole():
    model = _fsdp2()
    _logits(model)
    assert not isinstance(model.lm_head.weight, DTensor)
    reshard(model)
    assert isinstance(model.lm_head.weight, DTensor)


def fsdp2_pass_without_its_head_can_be_repeated():
    """The fused loss never calls the module of the head, whose group is then completed by the root."""
    model = _fsdp2()
    expected = tiny.model().model(IDS, use_cache=False).last_hidden_state
    model.forward = lambda ids: model.model(ids, use_cache=False).last_hidden_state
    for grad in (True, False, True, False):
        with torch.set_grad_enabled(grad):
            hidden = model(IDS)
        torch.testing.assert_close(hidden, expected)
        if grad:
            hidden.sum().backward()


def accelerate_shards_a_reference_layer_by_layer():
    import fsdp2
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from training import make_trainer

    trainer = make_trainer(fsdp2.FSDP2, tiny.text_dataset(4), tiny.model(), qtarget_config="sft")
    model = fsdp2_prepare_model(trainer.accelerator, tiny.model(seed=3))
    assert not is_peft_model(model)
    assert all(isinstance(layer, FSDPModule) for layer in (model, *model.model.layers))
    assert all(isinstance(value, DTensor) for value in model.parameters())


def ranks_refuse_a_tokenizer_together():
    """What one of them finds and the other does not is refused by both: none is left waiting for the other."""
    from accelerate import PartialState

    from trl_qtarget.priors import tokens

    assert PartialState(cpu=True).num_processes == 2  # as a trainer's arguments make it

    def find(*_):
        if dist.get_rank() == 1:
            raise OSError("no such file")
        other = tiny.tokenizer()
        vocabulary = other.get_vocab()
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        other.get_vocab = lambda: vocabulary
        return other

    own, tokens.find_tokenizer = tokens.find_tokenizer, find
    try:
        tokens.check_tokens("teacher", tiny.tokenizer(), "teacher")
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    finally:
        tokens.find_tokenizer = own
    refusals = [None, None]
    dist.all_gather_object(refusals, refusal)
    assert refusals[0] == refusals[1] and "has another tokenizer than the policy" in refusals[0], refusals


CONTRACTS = [
    zero3_parameters_tell_their_shares,
    zero3_gathers_what_the_shares_hold,
    zero3_cache_can_be_emptied,
    zero3_tells_whether_its_trace_is_complete,
    zero3_heads_are_whole_while_they_are_gathered,
    fsdp2_parameters_tell_their_shares,
    fsdp2_gathers_what_the_shares_hold,
    fsdp2_reshard_takes_back_what_a_pass_has_left_whole,
    fsdp2_pass_without_its_head_can_be_repeated,
    accelerate_shards_a_reference_layer_by_layer,
    ranks_refuse_a_tokenizer_together,
]


if __name__ == "__main__":
    write_outcomes({contract.__name__: contract for contract in CONTRACTS}, *sys.argv[1:])
