"""Knobs that are left to the data: which they are, and where a number is asked for."""

import math

import pytest
import torch
from transformers import HfArgumentParser

from trl_qtarget import QTargetConfig, build_target, register_trust
from trl_qtarget.priors.choice import PolicyFacts, choose_prior
from trl_qtarget.target.measured import Knowledge
from trl_qtarget.target.trust import TRUSTS


KNOWN, UNKNOWN = Knowledge(0.06, 256), Knowledge(1.95, 256)


def test_the_exponent_falls_from_one_with_what_is_unknown():
    config = QTargetConfig("adaptive_sft")
    assert config.settled(Knowledge(0.0, 1)).alpha == 1.0
    assert config.settled(KNOWN).alpha == pytest.approx(math.exp(-0.18))
    assert config.settled(UNKNOWN).alpha == pytest.approx(math.exp(-5.85))


def test_a_number_is_left_as_it_is():
    config = QTargetConfig("adaptive_sft", alpha=0.4)
    assert config.settled(KNOWN) == config == config.settled_as({"alpha": 0.9})


@pytest.mark.parametrize(
    "config",
    [
        QTargetConfig("beyond_log", alpha="auto"),
        QTargetConfig(method=None, trust="power", residual="uniform", alpha="auto"),
    ],
    ids=lambda config: config.label,
)
def test_every_target_with_this_trust_can_leave_it_open(config):
    assert config.open_knobs == ("alpha",)
    assert config.settled(KNOWN).knobs["alpha"] == pytest.approx(math.exp(-0.18))


def test_no_other_exponent_is_measured():
    for wrong in ({"method": "eaft"}, {"method": None, "trust": "p ** alpha", "residual": "policy"}):
        with pytest.raises(ValueError, match=r"`alpha='auto'` is not known to .*give a number"):
            QTargetConfig(alpha="auto", **wrong)
    for word in ("automatic", "nan", "-1"):
        with pytest.raises(ValueError, match=r"`alpha=.* is out of range: it must be a number >= 0"):
            QTargetConfig("beyond_log", alpha=word)
    with pytest.raises(ValueError, match="`eta='auto'` is not known"):
        QTargetConfig("target_sft", eta="auto")


def test_functions_of_logits_ask_for_a_number():
    with pytest.raises(ValueError, match=r"`alpha='auto'` of `method='adaptive_sft'` is measured by a trainer"):
        build_target(torch.zeros(2, 5), torch.zeros(2, dtype=torch.long), "adaptive_sft")


def test_an_open_knob_is_no_number_yet():
    objective = choose_prior(QTargetConfig("adaptive_sft"), PolicyFacts()).objective
    assert math.isnan(objective.knobs["alpha"])


def test_it_passes_through_files_and_command_lines(tmp_path):
    config = QTargetConfig("adaptive_sft", alpha="auto")
    config.save_pretrained(tmp_path)
    assert QTargetConfig.from_pretrained(tmp_path) == config
    parser = HfArgumentParser(QTargetConfig)
    for text, value in (("auto", "auto"), ("0.25", 0.25)):
        (parsed,) = parser.parse_args_into_dataclasses(["--method", "adaptive_sft", "--alpha", text])
        assert parsed.alpha == value


def test_a_registered_trust_measures_its_own_knob():
    from trl_qtarget import Exponent

    @register_trust("measured_for_this_test")
    def root(tile, *, alpha: Exponent = 0.5):
        return tile.label_probs**alpha

    try:
        config = QTargetConfig(method=None, trust="measured_for_this_test", residual="policy", alpha="auto")
        assert config.settled(KNOWN).alpha == pytest.approx(math.exp(-0.18))
    finally:
        del TRUSTS["measured_for_this_test"]
