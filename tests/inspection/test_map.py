"""The map of objectives: where each stands, by hand-made numbers and by those of a model."""

import math

import pytest
import tiny
from training import sft_config, warm_model

from trl_qtarget import METHODS, QTargetConfig, inspect_target
from trl_qtarget.inspection.map import draw_map, places, table


def data_of(label_probs, **methods):
    """An inspection of one example, from (trust, scale, label mass, moved) per token and method."""
    columns = ("trust", "scale", "label_mass", "moved")
    return {
        "model": "m",
        "dataset": "d",
        "methods": [{"title": title} for title in methods],
        "examples": [
            {
                "p": [[p, 1 - p] for p in label_probs],
                "methods": [dict(zip(columns, zip(*tokens, strict=True), strict=True)) for tokens in methods.values()],
            }
        ],
    }


def test_numbers_by_hand():
    data = data_of(
        [0.25, 0.75],
        sft=[(1.0, 1.0, 1.0, 0.75), (1.0, 1.0, 1.0, 0.25)],
        profit=[(0.0, 1.0, 0.25, 0.0), (1.0, 1.0, 1.0, 0.25)],
        distill=[(0.0, 1.0, 0.45, 0.4), (0.0, 1.0, 0.55, 0.4)],
    )
    sft, profit, distill = places(data, [QTargetConfig(name) for name in ("sft", "profit", "distill")])
    assert (sft.trust, sft.to_label, sft.zeros, sft.group) == (1.0, 1.0, 0.0, "re-weighting")
    assert sft.learns_at == pytest.approx(0.75 * 0.25 + 0.25 * 0.75)
    assert (profit.trust, profit.to_label, profit.zeros, profit.learns_at) == (0.5, 1.0, 0.5, 0.75)
    assert distill.to_label == pytest.approx(0.0) and distill.group == "distilling"
    # Pulls (0.75, 0.25), (0, 0.25), (0.2, -0.2).
    assert sft.twin == "distill" and sft.likeness == pytest.approx(0.5 / math.sqrt(2) / math.hypot(0.75, 0.25))
    assert profit.twin == "sft"


def test_what_has_no_gradient_has_no_place():
    data = data_of([0.5], profit=[(0.0, 1.0, 0.5, 0.0)], sft=[(1.0, 1.0, 1.0, 0.5)])
    profit, sft = places(data, [QTargetConfig("profit"), QTargetConfig("sft")])
    assert math.isnan(profit.learns_at) and profit.twin is None and profit.zeros == 1.0 and sft.twin is None


def test_map_of_a_model(tmp_path):
    configs = [QTargetConfig(name) for name in METHODS if name != "cft"]
    configs.append(QTargetConfig(method=None, trust="p ** 2", residual="uniform"))
    data = inspect_target(
        warm_model(),
        tiny.prompt_dataset(3),
        configs,
        ref_model=warm_model(steps=30),
        processing_class=tiny.tokenizer(),
        args=sft_config(),
        progress=False,
    )
    found = {place.title: place for place in draw_map(data, configs, tmp_path / "map.svg")}
    assert (tmp_path / "map.svg").read_bytes().startswith(b"<?xml")
    assert set(found) == {method["title"] for method in data["methods"]}
    for place in found.values():
        # All of what a re-weighting moves goes to the label; rounding to five digits is seen.
        if place.group == "re-weighting" and place.title != "asft_k1":
            assert place.to_label == pytest.approx(1.0, abs=1e-3)
        assert 0 <= place.learns_at <= 1 and -1.001 <= place.to_label <= 1.001
    assert found["label_smoothing"].to_label < 1 and found["distill"].trust == 0
    assert found["dft"].learns_at > found["sft"].learns_at  # of what it moves, more is known
    lines = table(list(found.values())).splitlines()
    assert len(lines) == len(configs) + 1 and lines[1].startswith("asft_k1")
    for title, place in found.items():
        (line,) = [line for line in lines if line.startswith(f"{title} ") and line[: line.index("  ")] == title]
        assert f"{place.trust:.2f}" in line and f"{place.to_label:.2f}" in line and f"{place.twin} (" in line
    draw_map(data, configs, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "map.svg").read_bytes()
