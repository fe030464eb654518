"""`QTargetConfig`: what is refused and how, what the defaults are, and the forms it is read from."""

import dataclasses
import json
import math
import os
import re

import pytest
import torch
from transformers import HfArgumentParser
from trl import TrlParser

from trl_qtarget import METHODS, QTargetConfig, qtarget_loss
from trl_qtarget.target.config import KERNELS, PRIORS
from trl_qtarget.target.config_file import CONFIG_NAME
from trl_qtarget.target.registry import KNOBS
from trl_qtarget.target.residual import RESIDUALS
from trl_qtarget.target.trust import TRUSTS


# The table of the design: knobs with their defaults, where the prior comes from, steps between two syncs.
DEFAULTS = {
    "sft": ({}, None),
    "dft": ({}, None),
    "beyond_log": ({"alpha": 1.0}, None),
    "profit": ({"tau": 0.1}, None),
    "eaft": ({"top_k": 20, "alpha": 1.0}, None),
    "iw_sft": ({"temperature": 1.0, "clip_max": 16.0}, "base"),
    "cft": ({}, None),
    "label_smoothing": ({"lam": 0.1}, None),
    "sft_kl": ({"lam": 0.1}, "base"),
    "asft": ({"lam": 0.05}, "base"),
    "asft_k3": ({"lam": 0.05}, "base"),
    "asft_k1": ({"lam": 0.05}, None),
    "psft": ({"epsilon": 0.28}, "lagged"),
    "gem": ({"beta": 0.7}, None),
    "infosft": ({"tau": 0.93}, None),
    "saft": ({"lam": 0.5}, None),
    "deft": ({}, None),
    "chord_phi": ({}, None),
    "trsft": ({"tau": 0.1}, None),
    "rank_tuner": ({}, None),
    "trim_sft": ({"beta": 1.5, "tau": 0.8}, None),
    "idft": ({"beta": 1.0}, None),
    "prift": ({}, "base"),
    "prift_mass": ({"tau": 0.5}, "base"),
    "gift": ({"beta": 20.0}, "base"),
    "mask_target": ({"lam": 1.0}, "base"),
    "lp_sft": ({"lam": 1.0, "top_k": 10, "temperature": 1.0}, "base"),
    "tofu": ({"alpha": 3.0, "beta": 0.8}, None),
    "otr": ({"temperature": 1.3, "beta": -0.1}, None),
    "distill": ({"temperature": 1.0}, "model"),
    "distill_hybrid": ({"lam": 0.5, "temperature": 1.0}, "model"),
    "target_sft": ({"eta": 0.5}, "auto"),
    "adaptive_sft": ({"alpha": "auto", "eta": 0.25}, "auto"),
}

# For every knob: a target that uses it, values at and inside the bounds, values outside of them.
FREE = {"method": None, "residual": "policy"}
UNIT = ([0, 0.3, 1, 1.0], [-0.01, 1.01, 7])
NON_NEGATIVE = ([0, 0.3, 50.0], [-1e-9, -3])
POSITIVE = ([1e-9, 0.3, 50], [0, 0.0, -1.0])
RANGES = {
    "eta": ({"method": "target_sft"}, *UNIT),
    "alpha": ({"method": "beyond_log"}, *NON_NEGATIVE),
    "alpha of eaft": ({"method": "eaft"}, *NON_NEGATIVE),
    "tau": ({"method": "profit"}, *UNIT),
    "lam": ({"method": "label_smoothing"}, *UNIT),
    "lam of distill_hybrid": ({"method": "distill_hybrid"}, *UNIT),
    "lam of sft_kl": ({"method": "sft_kl"}, *NON_NEGATIVE),
    "lam of asft": ({"method": "asft"}, *NON_NEGATIVE),
    "beta": ({"method": "gem"}, *POSITIVE),
    "epsilon": ({"method": "psft"}, *NON_NEGATIVE),
    "top_k": ({"method": "eaft"}, [2, 20, 100_000], [1, 0, -2, 2.0, 2.5]),
    "top_k of neighbors": ({"method": None, "trust": "one", "residual": "neighbors"}, [1, 5], [0, -1, 1.0]),
    "temperature": ({"method": "distill"}, *POSITIVE),
    "temperature of iw_sft": ({"method": "iw_sft"}, *POSITIVE),
    "temperature of neighbors": ({"method": None, "trust": "one", "residual": "neighbors"}, *POSITIVE),
    "clip_max": ({"method": "iw_sft"}, *POSITIVE),
}
NEVER = [math.nan, math.inf, -math.inf, True, "half", [1.0]]


def refused(match: str, **options) -> None:
    with pytest.raises(ValueError, match=re.escape(match)):
        QTargetConfig(**options)


# --- names ---


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"`method='sfft'` is unknown: did you mean `sft`\? Known methods: ") as error:
        QTargetConfig("sfft")
    assert all(name in str(error.value) for name in METHODS)
    with pytest.raises(ValueError, match=r"`trust='faith'` is unknown. Known names: ") as error:
        QTargetConfig(None, trust="faith", residual="policy")
    assert all(name in str(error.value) for name in TRUSTS) and "register_trust" in str(error.value)
    with pytest.raises(ValueError, match=r"`residual='rest'` is unknown. Known names: ") as error:
        QTargetConfig(None, trust="one", residual="rest")
    assert all(name in str(error.value) for name in RESIDUALS) and "register_residual" in str(error.value)


@pytest.mark.parametrize("name", [["sft"], {"sft": 1}, 3, ("one",)], ids=str)
def test_names_of_another_type(name):
    refused(f"`method={name!r}` is no name: it must be a string, or None.", method=name)
    refused(f"`trust={name!r}` is no name: it must be a string", method=None, trust=name, residual="policy")
    refused(f"`residual={name!r}` is no name: it must be a string", method=None, trust="one", residual=name)


def test_a_free_combination_names_both_designs():
    message = "`method=None` asks for a free combination: set both `trust` and `residual`, or name a `method`."
    refused(message, method=None)
    refused(message, method=None, trust="one")
    refused(message, method="none", residual="policy")


@pytest.mark.parametrize("name", METHODS)
def test_a_method_fixes_its_designs(name):
    refused(f"`trust` is fixed by `method='{name}'`: remove it", method=name, trust="one")
    refused(f"`residual` is fixed by `method='{name}'`: remove it", method=name, residual="policy")
    refused(f"`trust` is fixed by `method='{name}'`", method=name, trust="one", residual="policy")


def test_none_may_be_spelt():
    for spelling in ("none", "None", None):
        config = QTargetConfig(spelling, trust="one", residual="policy")
        assert config.method is None and config.row is None


# --- knobs ---


def test_the_table_of_the_design():
    assert list(METHODS) == list(DEFAULTS)
    for name, (knobs, prior) in DEFAULTS.items():
        config = QTargetConfig(name)
        assert config.knobs == knobs, name
        assert METHODS[name].prior == prior and config.prior_source == (prior or "auto"), name
        assert all(getattr(config, knob) is None for knob in KNOBS)
    assert QTargetConfig().method == "target_sft"
    assert QTargetConfig("psft").sync_steps == 8 and QTargetConfig("sft_kl", prior="lagged").sync_steps == 8
    assert QTargetConfig("psft", prior_sync_steps=3).sync_steps == 3
    assert [name for name in METHODS if QTargetConfig(name).uses_token_weights] == ["cft"]


@pytest.mark.parametrize("name", METHODS)
def test_unused_knobs_are_refused(name):
    used = DEFAULTS[name][0]
    for knob in KNOBS:
        if knob not in used:
            known = ", ".join(used) or "none"
            message = f"`{knob}` is not used by `method='{name}'`, whose knobs are: {known}. Remove it."
            refused(message, method=name, **{knob: 1})


def test_unused_knobs_of_a_free_combination_are_refused():
    message = "`eta` is not used by `trust='entropy'`, `residual='prior'`, whose knobs are: top_k, alpha, temperature."
    refused(message, method=None, trust="entropy", residual="prior", eta=0.5)
    refused("`lam` is not used by `trust='one'`, `residual='policy'`", **FREE, trust="one", lam=0.1)


@pytest.mark.parametrize("case", RANGES)
def test_ranges_of_the_knobs(case):
    target, inside, outside = RANGES[case]
    knob = case.split()[0]
    for value in inside:
        assert QTargetConfig(**target, **{knob: value}).knobs[knob] == value
    for value in [*outside, *NEVER]:
        refused(f"`{knob}={value!r}` is out of range: it must be ", **target, **{knob: value})


def test_ranges_are_told():
    refused("`eta=2` is out of range: it must be a number in [0, 1].", method="target_sft", eta=2)
    refused("`lam=-1` is out of range: it must be a number >= 0.", method="sft_kl", lam=-1)
    refused("`beta=0` is out of range: it must be a number > 0.", method="gem", beta=0)
    refused("`top_k=1` is out of range: it must be an integer >= 2.", method="eaft", top_k=1)


def test_every_knob_has_a_range_here():
    assert {case.split()[0] for case in RANGES} == set(KNOBS)


# --- other options ---


@pytest.mark.parametrize("prior", ["base", "model", "lagged"])
@pytest.mark.parametrize("name", [name for name, (_, prior) in DEFAULTS.items() if prior is None])
def test_a_prior_that_nothing_uses_is_refused(name, prior):
    refused(f"`prior='{prior}'` is not used by `method='{name}'`: leave it at 'auto'.", method=name, prior=prior)


@pytest.mark.parametrize("name", ["iw_sft", "sft_kl", "asft", "psft", "distill", "distill_hybrid"])
def test_a_method_with_a_prior_is_not_left_with_the_policy(name):
    message = f"`prior='policy'` leaves `method='{name}'` without the second distribution that it needs"
    refused(message, method=name, prior="policy")
    with pytest.raises(ValueError, match=re.escape(f"`method='{name}'` needs a prior and none is given: pass")):
        qtarget_loss(torch.zeros(2, 3), torch.tensor([0, 1]), name)


def test_priors_that_make_sense():
    for name in ("target_sft", "sft", "dft"):
        assert QTargetConfig(name, prior="policy").prior_source == "policy"
    for prior in PRIORS:
        assert QTargetConfig(prior=prior).prior_source == prior
        assert QTargetConfig(None, trust="importance", residual="guided", prior=prior).prior_source == prior
    refused("`prior='teacher'` is unknown: choose one of auto, policy, base, start, model, lagged.", prior="teacher")


def test_syncs_are_of_a_lagged_prior():
    for name, value in (("prior_sync_steps", 4), ("prior_sync_decay", 0.9)):
        message = f"`{name}` is only used by a lagged prior: remove it, or set `prior='lagged'`."
        for target in ({"method": "sft"}, {"method": "target_sft"}, {"method": "asft"}, {"method": "psft"}):
            if target["method"] == "psft":
                refused(message, **target, prior="base", **{name: value})
                assert getattr(QTargetConfig(**target, **{name: value}), name) == value
            else:
                refused(message, **target, **{name: value})
        assert getattr(QTargetConfig("asft", prior="lagged", **{name: value}), name) == value
    for value in (0, -1, 2.0, True):
        refused(
            f"`prior_sync_steps={value!r}` is out of range: it must be an integer >= 1",
            method="psft",
            prior_sync_steps=value,
        )
    for value in (-0.1, 1.5, math.nan):
        refused(f"`prior_sync_decay={value!r}` is out of range", method="psft", prior_sync_decay=value)
    refused("`prior_sync_decay=1` would never move the prior", method="psft", prior_sync_decay=1.0)
    assert QTargetConfig("psft", prior_sync_decay=0).prior_sync_decay == 0


def test_kernel_chunk_tokens_and_token_weight_column():
    refused("`kernel='cuda'` is unknown: choose one of auto, torch, triton", kernel="cuda")
    for kernel in KERNELS:
        assert QTargetConfig(kernel=kernel).kernel == kernel
    help_of = {field.name: field.metadata.get("help", "") for field in dataclasses.fields(QTargetConfig)}
    assert "Triton on a GPU" in help_of["kernel"]
    for value in (0, -5, 1.0, "8", True):
        refused(f"`chunk_tokens={value!r}` is out of range: it must be an integer >= 1.", chunk_tokens=value)
    refused("`token_weight_column` is not used by `method='sft'`: remove it", method="sft", token_weight_column="w")
    assert QTargetConfig("cft", token_weight_column="w").token_weight_column == "w"
    free = QTargetConfig(None, trust="token_weights", residual="uniform", token_weight_column="w")
    assert free.uses_token_weights


# --- forms ---


def test_coerce():
    assert QTargetConfig.coerce(None) == QTargetConfig()
    assert QTargetConfig.coerce("asft") == QTargetConfig("asft")
    assert QTargetConfig.coerce({"method": "asft", "lam": 0.3}) == QTargetConfig("asft", lam=0.3)
    assert QTargetConfig.coerce({"eta": 0.3}) == QTargetConfig(eta=0.3)
    config = QTargetConfig("gem")
    assert QTargetConfig.coerce(config) is config
    config.beta = -1.0  # a field set afterwards is checked where the configuration is used
    with pytest.raises(ValueError, match=r"`beta=-1.0` is out of range"):
        QTargetConfig.coerce(config)
    with pytest.raises(ValueError, match=r"`qtarget_config` has unknown fields \['lambda', 'zeta'\]: known are "):
        QTargetConfig.coerce({"zeta": 1, "lambda": 2})
    for value in (3, ["sft"], QTargetConfig):
        with pytest.raises(ValueError, match="`qtarget_config` must be a `QTargetConfig`, a method's name or a dict"):
            QTargetConfig.coerce(value)


def test_only_the_method_is_positional():
    with pytest.raises(TypeError):
        QTargetConfig("asft", "one")


CONFIGS = [
    QTargetConfig(),
    *[QTargetConfig(name) for name in METHODS],
    QTargetConfig("psft", epsilon=0.2, prior_sync_steps=4, prior_sync_decay=0.9, chunk_tokens=7, kernel="torch"),
    QTargetConfig("cft", token_weight_column="critical"),
    QTargetConfig(None, trust="entropy", residual="guided", top_k=5, eta=0.3, prior="base"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.method or "free")
def test_saved_and_loaded(config, tmp_path):
    directory = tmp_path / "deep" / "run"
    config.save_pretrained(directory)
    assert QTargetConfig.from_pretrained(directory) == config
    assert QTargetConfig.from_pretrained(str(directory / CONFIG_NAME)) == config
    assert os.listdir(directory) == [CONFIG_NAME] == ["qtarget_config.json"]
    assert QTargetConfig.coerce(config.to_dict()) == config
    written = json.loads((directory / CONFIG_NAME).read_text())
    assert "method" in written and all(value is not None for name, value in written.items() if name != "method")


def test_what_a_file_says_beside_the_fields_is_not_read(tmp_path):
    config = QTargetConfig("asft", lam=0.5)
    config.save_pretrained(tmp_path, {"prior": "the base"})
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["provenance"] == {"prior": "the base"}
    assert QTargetConfig.from_pretrained(tmp_path) == config


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"`directory` has no `qtarget_config.json`: .* was not written by"):
        QTargetConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`directory` has no `qtarget_config.json`"):
        QTargetConfig.from_pretrained(tmp_path / "nowhere")
    QTargetConfig("asft", lam=0.5).save_pretrained(tmp_path)
    whole = (tmp_path / CONFIG_NAME).read_text()
    (tmp_path / CONFIG_NAME).write_text(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"is not valid JSON .*: write it again with `save_pretrained`"):
        QTargetConfig.from_pretrained(tmp_path)
    (tmp_path / CONFIG_NAME).write_text('{"method": "asft", "lamda": 0.5}')
    with pytest.raises(ValueError, match=r"qtarget_config.json` has unknown fields \['lamda'\]: known are "):
        QTargetConfig.from_pretrained(tmp_path)
    (tmp_path / CONFIG_NAME).write_text('{"method": "asft", "lam": -0.5}')
    with pytest.raises(ValueError, match=r"`lam=-0.5` is out of range"):
        QTargetConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ['["asft"]', '"asft"', "3", "null"])
def test_a_file_that_holds_something_else(content, tmp_path):
    (tmp_path / CONFIG_NAME).write_text(content)
    with pytest.raises(ValueError, match=CONFIG_NAME):
        QTargetConfig.from_pretrained(tmp_path)


def test_a_save_that_fails_leaves_the_old_file(tmp_path):
    QTargetConfig("asft", lam=0.5).save_pretrained(tmp_path)
    config = QTargetConfig("gem")
    config.beta = object()  # cannot be written as JSON
    with pytest.raises(TypeError):
        config.save_pretrained(tmp_path)
    assert QTargetConfig.from_pretrained(tmp_path) == QTargetConfig("asft", lam=0.5)


def test_command_line():
    parse = HfArgumentParser(QTargetConfig).parse_args_into_dataclasses
    assert parse([]) == (QTargetConfig(),)
    assert parse(["--method", "asft", "--lam", "0.03", "--prior", "base"]) == (
        QTargetConfig("asft", lam=0.03, prior="base"),
    )
    free = ["--method", "none", "--trust", "entropy", "--residual", "guided", "--top_k", "7", "--eta", "0.3"]
    assert parse(free) == (QTargetConfig(None, trust="entropy", residual="guided", top_k=7, eta=0.3),)
    every = ["--method", "psft", "--epsilon", "0.1", "--prior_sync_steps", "4", "--prior_sync_decay", "0.5"]
    (config,) = parse([*every, "--chunk_tokens", "64", "--kernel", "torch"])
    assert config == QTargetConfig(
        "psft", epsilon=0.1, prior_sync_steps=4, prior_sync_decay=0.5, chunk_tokens=64, kernel="torch"
    )
    with pytest.raises(ValueError, match="`eta` is not used by `method='sft'`"):
        parse(["--method", "sft", "--eta", "0.3"])
    with pytest.raises(SystemExit):
        parse(["--prior", "teacher"])
    help_text = HfArgumentParser(QTargetConfig).format_help()
    for name in METHODS:
        assert name in help_text


def test_command_line_from_dict_and_yaml(tmp_path):
    (config,) = HfArgumentParser(QTargetConfig).parse_dict({"method": "gem", "beta": 0.5})
    assert config == QTargetConfig("gem", beta=0.5)
    path = tmp_path / "run.yaml"
    path.write_text("method: none\ntrust: entropy\nresidual: guided\neta: 0.3\ntop_k: 5\nprior: base\n")
    (config,) = TrlParser(QTargetConfig).parse_args_and_config(["--config", str(path)])
    assert config == QTargetConfig(None, trust="entropy", residual="guided", eta=0.3, top_k=5, prior="base")
    (config,) = TrlParser(QTargetConfig).parse_args_and_config(["--config", str(path), "--eta", "0.9"])
    assert config.eta == 0.9
    path.write_text("method: asft\nlam: 0.03\n")
    assert TrlParser(QTargetConfig).parse_args_and_config(["--config", str(path)]) == (
        QTargetConfig("asft", lam=0.03),
    )
    path.write_text("method: null\ntrust: one\nresidual: policy\n")
    (config,) = TrlParser(QTargetConfig).parse_args_and_config(["--config", str(path)])
    assert config == QTargetConfig(None, trust="one", residual="policy")
