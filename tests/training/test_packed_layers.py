"""4-bit layers as a CPU with AVX512-BF16 has them, on any; tests/project/test_qlora.py trains real ones."""

from types import SimpleNamespace

import pytest
import tiny
from training import make_trainer, warm_model

from trl_qtarget import QTargetSFTTrainer


def _model(packed: bool):
    model = warm_model()
    model.model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu = True
    model.model.layers[0].mlp.up_proj.weight.quant_state = SimpleNamespace(packing_format_for_cpu=packed)
    return model


def test_layers_are_not_packed_in_a_pass_in_evaluation_mode():
    model = _model(packed=False)
    make_trainer(QTargetSFTTrainer, tiny.text_dataset(), model, qtarget_config="dft")
    assert model.model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu is False


def test_packed_layers_are_refused():
    with pytest.raises(ValueError, match=r"packed the 4-bit weights of `model.layers.0.mlp.up_proj` for inference"):
        make_trainer(QTargetSFTTrainer, tiny.text_dataset(), _model(packed=True), qtarget_config="dft")
