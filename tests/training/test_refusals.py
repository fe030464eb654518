"""What does not fit together is refused before any training step, and the message names argument and remedy."""

import re

import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model
from training import REFUSES_AUX_LOSS, make_trainer, warm_model
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from trl_qtarget import QTargetConfig, QTargetSFTTrainer


def refused(message: str, *, method="asft", model=None, **arguments):
    """Making a trainer raises a ValueError that holds `message`."""
    with pytest.raises(ValueError, match=re.escape(message)):
        make_trainer(
            QTargetSFTTrainer, tiny.text_dataset(4), model or warm_model(), qtarget_config=method, **arguments
        )


# --- the target ---


def test_unknown_method_lists_the_known_ones():
    refused("`method='dpo'` is unknown. Known methods: sft, dft, beyond_log,", method="dpo")


def test_unknown_field_of_a_dict():
    refused("`qtarget_config` has unknown fields ['lambda']", method={"method": "asft", "lambda": 0.1})


def test_config_of_another_type():
    refused("`qtarget_config` must be a `QTargetConfig`, a method's name or a dict, got `int`.", method=3)


def test_unused_knob():
    refused(
        "`eta` is not used by `method='asft'`, whose knobs are: lam. Remove it.", method={"method": "asft", "eta": 1}
    )


def test_field_that_was_set_to_nonsense_later():
    config = QTargetConfig("asft")
    config.lam = -1.0
    refused("`lam=-1.0` is out of range: it must be a number >= 0.", method=config)


@pytest.mark.parametrize("name", ["asft", "psft", "iw_sft", "distill"])
def test_prior_needed_but_policy(name):
    message = f"`prior='policy'` leaves `method='{name}'` without the second distribution that it needs"
    refused(message, method={"method": name, "prior": "policy"})


def test_prior_for_a_method_without_one():
    refused("`prior='base'` is not used by `method='sft'`", method={"method": "sft", "prior": "base"})


# --- the reference model ---


@pytest.mark.parametrize("method", ["distill", "distill_hybrid", {"method": "asft", "prior": "model"}])
def test_reference_model_needed_but_none(method):
    refused("needs a reference model and `ref_model` is None: pass a path or a loaded model", method=method)


def test_reference_model_is_the_policy():
    model = warm_model()
    refused("`ref_model` is the model being trained, so it would move with it", model=model, ref_model=model)


def test_reference_model_is_inside_the_policy():
    policy = get_peft_model(warm_model(), LoraConfig(task_type="CAUSAL_LM"))
    message = "`ref_model` is the model being trained"
    refused(message, model=policy, ref_model=policy.get_base_model())
    refused(message, model=policy.get_base_model(), ref_model=policy)


def test_reference_model_is_the_policy_by_path_is_allowed(tmp_path):
    warm_model().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    path = str(tmp_path)
    trainer = make_trainer(
        QTargetSFTTrainer, tiny.text_dataset(4), path, qtarget_config="asft", ref_model=str(tmp_path / ".")
    )
    assert trainer._prior.causal_model is not trainer.model
    make_trainer(QTargetSFTTrainer, tiny.text_dataset(4), path, qtarget_config="asft", ref_model=path)  # one string


def test_reference_model_of_another_kind():
    refused("`ref_model` must be a path or a loaded model, got `int`", ref_model=3)


# --- PEFT ---


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_adapter_that_takes_from_the_base_is_no_base_prior(init):
    peft = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=init)
    refused(f"`init_lora_weights='{init}'` of the adapter 'default' moves a part of the base", peft_config=peft)
    data = tiny.text_dataset(4)
    make_trainer(
        QTargetSFTTrainer, data, warm_model(), qtarget_config="asft", ref_model=warm_model(), peft_config=peft
    )
    make_trainer(QTargetSFTTrainer, data, warm_model(), qtarget_config="psft", peft_config=peft)


@pytest.mark.parametrize("method", ["sft", "asft"])
def test_adapter_on_the_head(method):
    peft = LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    refused("`lm_head`", method=method, peft_config=peft)
    refused("`lm_head`", method=method, peft_config=peft, options={"loss_type": "nll"})


def test_adapter_on_the_head_of_a_reference_model():
    peft = LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
    teacher = get_peft_model(warm_model(), peft)
    refused("pass `ref_model.merge_and_unload()`", method="distill", ref_model=teacher)
    make_trainer(
        QTargetSFTTrainer,
        tiny.text_dataset(4),
        warm_model(),
        qtarget_config="distill",
        ref_model=teacher.merge_and_unload(),
    )


# --- the SFTConfig ---


@pytest.mark.parametrize("method", ["sft", "asft", None])
def test_loss_type_dft_with_another_method(method):
    config = QTargetConfig() if method is None else method
    refused(
        "`loss_type='dft'` in the `SFTConfig` contradicts `qtarget_config`",
        method=config,
        options={"loss_type": "dft"},
    )


def test_label_smoothing_factor():
    refused(
        "`label_smoothing_factor` in the `SFTConfig` would replace the target: set it to 0 and use "
        "`QTargetConfig('label_smoothing', lam=0.2)`.",
        options={"label_smoothing_factor": 0.2},
    )


def test_compute_loss_func():
    def own_loss(outputs, labels, num_items_in_batch=None):
        return torch.zeros(())

    refused("`compute_loss_func` would replace the target", compute_loss_func=own_loss)


def test_compute_loss_func_by_position():
    with pytest.raises(ValueError, match="`compute_loss_func` would replace the target"):
        QTargetSFTTrainer(warm_model(), None, None, tiny.text_dataset(4), None, tiny.tokenizer(), print)


@pytest.fixture
def accelerator_state():
    """Accelerate's state is one for all accelerators, so what a test writes into it is taken out again."""
    yield
    AcceleratorState._reset_state(reset_partial_state=False)


def refused_on(message: str, change) -> None:
    class OnOtherMachines(QTargetSFTTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            change(self.accelerator.state)

    with pytest.raises(ValueError, match=message):
        make_trainer(OnOtherMachines, tiny.text_dataset(4), warm_model(), qtarget_config="sft")


def test_fsdp_version_1(accelerator_state):
    def fsdp1(state):
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=1)

    refused_on("set `fsdp_version: 2` in the Accelerate configuration", fsdp1)


# --- batches ---


def test_collator_without_mask_or_positions():
    def collate(examples):
        ids = torch.tensor([example["input_ids"][:3] for example in examples])
        return {"input_ids": ids, "labels": ids}

    trainer = make_trainer(
        QTargetSFTTrainer, tiny.text_dataset(4), warm_model(), qtarget_config="sft", data_collator=collate
    )
    with pytest.raises(ValueError, match="`data_collator` must return `attention_mask` or `position_ids`"):
        trainer.train()


# --- an old TRL ---


@pytest.mark.skipif(not REFUSES_AUX_LOSS, reason="this TRL has the auxiliary loss that is ours")
def test_auxiliary_loss_of_an_old_trl():
    refused("`router_aux_loss_coef` is another weight, of another mean, in TRL 1.", model=warm_model(tiny.moe_model))
    options = {"router_aux_loss_coef": 0.0}
    data = tiny.text_dataset(4)
    make_trainer(QTargetSFTTrainer, data, warm_model(tiny.moe_model), qtarget_config="sft", options=options)


@pytest.mark.skipif(not REFUSES_AUX_LOSS, reason="this TRL loads a path without a device map on CPUs")
def test_device_map_of_an_old_trl_in_zero3(tmp_path):
    pytest.importorskip("deepspeed")
    warm_model().save_pretrained(tmp_path)
    alive = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})  # what tells transformers that ZeRO-3 is on
    refused("loads with a `device_map`, and ZeRO-3 takes none", model=str(tmp_path))
    del alive
