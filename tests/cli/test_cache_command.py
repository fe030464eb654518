"""`trl-qtarget cache`, then `trl-qtarget sft --prior_cache`: the same run as with the model beside the policy."""

import json
from pathlib import Path

import pytest
import tiny
from training import other_model, warm_model

from trl_qtarget.cli import main, sft


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cache_command")
    for name, model in (("policy", warm_model()), ("teacher", other_model())):
        model.save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    tiny.prompt_dataset(16).to_json(folder / "data.jsonl")
    (folder / "recipe.yaml").write_text(
        f"model_name_or_path: {folder / 'policy'}\ndataset_name: {folder / 'data.jsonl'}\n"
        "method: target_sft\ndtype: float32\nmax_steps: 3\nper_device_train_batch_size: 4\nlogging_steps: 1\n"
        "max_length: 20\npacking: true\nuse_cpu: true\nbf16: false\nreport_to: none\nsave_strategy: 'no'\n"
        f"output_dir: {folder / 'unused'}\nnum_processes: 1\n"
    )
    return folder


def losses(output: Path, words: list[str], capsys) -> list[float]:
    capsys.readouterr()
    assert sft.main([*words, "--output_dir", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    return [float(json.loads(line.replace("'", '"'))["loss"]) for line in lines if line.startswith("{'loss'")]


def test_a_cached_teacher_trains_as_the_teacher(folder, tmp_path, capsys, logged):
    recipe, teacher = ["--config", str(folder / "recipe.yaml")], str(folder / "teacher")
    size = ["--form", "top_k", "--k", str(len(tiny.tokenizer()))]
    assert (
        main(["cache", *recipe, "--ref_model_name_or_path", teacher, *size, "--output_dir", str(tmp_path / "c")]) == 0
    )
    assert any("labelled tokens" in message and "GB in 1 shards" in message for message in logged())
    assert not (folder / "unused").exists()
    card = (tmp_path / "c" / "README.md").read_text()
    assert card.startswith("---\n") and "the reference model (`teacher`)" in card
    live = losses(tmp_path / "live", [*recipe, "--ref_model_name_or_path", teacher], capsys)
    cached = losses(tmp_path / "cached", [*recipe, "--prior_cache", str(tmp_path / "c")], capsys)
    assert len(live) == 3 and cached == pytest.approx(live, rel=1e-3)


def test_without_a_reference_it_is_the_base(folder, tmp_path, capsys):
    words = ["--config", str(folder / "recipe.yaml"), "--form", "hidden", "--output_dir", str(tmp_path / "base")]
    assert main(["cache", *words]) == 0
    manifest = json.loads((tmp_path / "base" / "manifest.json").read_text())
    assert manifest["form"] == "hidden" and manifest["name"].endswith("policy") and manifest["dtype"] == "float32"


def test_mistakes_are_named(folder, tmp_path, capsys):
    recipe = ["--config", str(folder / "recipe.yaml")]
    for words, message in (
        (recipe, "`--output_dir` is missing"),
        ([*recipe, "--output_dir", str(tmp_path), "--k", "0"], "`k=0` must be from 1"),
        ([*recipe, "--output_dir", str(tmp_path), "--forn", "top_k"], "--forn"),
    ):
        assert main(["cache", *words]) == 2
        assert message in capsys.readouterr().err
