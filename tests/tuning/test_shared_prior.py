"""A frozen prior runs once for all trials of a study, and they train as with the model beside the policy."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import yaml
from peft import LoraConfig
from training import other_model, warm_model

from trl_qtarget import QTargetConfig
from trl_qtarget.cli import cache, sft, tune
from trl_qtarget.priors.choice import PolicyFacts
from trl_qtarget.tuning.prior import CachingFailed, shared_prior
from trl_qtarget.tuning.space import Candidate


def candidate(name: str, **fields) -> Candidate:
    return Candidate(name, QTargetConfig(name, **fields), (1e-3, 1e-1), 1e-2)


CANDIDATES = [candidate(name) for name in ("sft", "dft", "psft", "asft", "target_sft")]


def shared(choice: str = "auto", recipe=None, adapters=("default",), candidates=CANDIDATES):
    facts = PolicyFacts(dict.fromkeys(adapters, LoraConfig()) if adapters else {})
    return shared_prior(choice, candidates, recipe or {}, facts, Path("study"), lambda *_: 1)


def test_which_candidates_have_a_prior_in_common():
    assert shared().used_by == {"asft", "target_sft"} and shared().form == "hidden"
    assert shared(adapters=()).used_by == {"asft"}  # target_sft guides itself
    assert shared(recipe={"ref_model_name_or_path": "teacher"}, adapters=()).used_by == {"asft", "target_sft"}
    assert shared("top_k").form == "top_k"
    assert shared(candidates=[candidate("asft", prior="start")]) is None  # starting adapters are not what is shared
    assert shared("none") is None and shared(candidates=CANDIDATES[:3]) is None
    assert shared(recipe={"prior_cache": "cache"}) is None
    assert shared(recipe={"accelerate_config": "zero3"}) is None
    assert shared("hidden", {"accelerate_config": "zero3"}).form == "hidden"
    with pytest.raises(ValueError, match="`cache_prior='all'` is unknown: choose one of auto, hidden, top_k, none"):
        shared("all")


def test_a_recipe_reads_the_cache_in_place_of_the_model():
    recipe = {"ref_model_name_or_path": "teacher", "ref_dtype": "float32", "method": "asft"}
    assert shared().recipe(recipe, "asft") == {"method": "asft", "prior_cache": str(Path("study/prior"))}
    assert shared().recipe(recipe, "psft") == recipe


def test_a_cache_that_fails_says_why(tmp_path):
    (tmp_path / "prior.log").write_text("trl-qtarget cache: `k=0` must be at least 1.\nbye\n")
    prior = shared_prior("auto", CANDIDATES, {}, PolicyFacts({"default": LoraConfig()}), tmp_path, lambda *_: 2)
    with pytest.raises(CachingFailed, match="exit status 2: trl-qtarget cache: `k=0` must be at least 1"):
        prior.ensure(lambda file: None)
    assert not (tmp_path / "prior" / "complete").exists()


def test_a_training_from_it_is_one_with_the_model(tmp_path, capsys):
    for name, model in (("policy", warm_model()), ("teacher", other_model())):
        model.save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    tiny.prompt_dataset(60).to_json(tmp_path / "rows.jsonl")
    recipe = {
        "model_name_or_path": str(tmp_path / "policy"),
        "ref_model_name_or_path": str(tmp_path / "teacher"),
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / "study"),
        "dtype": "float32",
        "report_to": "none",
        "gradient_checkpointing": False,
        "max_steps": 3,
        "logging_steps": 1,
        "methods": ["dft", "target_sft"],
        "metric": "eval_target/nll",
        "held_out": 24,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    plan = tune.make_plan(*tune.parse(["--config", str(tmp_path / "recipe.yaml")]))
    made = []

    def make(file: Path, folder: Path, form: str, log: Path) -> int:
        made.append(folder)
        return cache.main(["--config", str(file), "--form", form, "--output_dir", str(folder)])

    def train(file: Path, log: Path, until) -> int:
        return sft.main(["--config", str(file)])

    prior = replace(plan.training.prior, make=make)
    with_cache = replace(plan.training, launch=train, prior=prior)
    for _ in range(2):
        with_cache.ask_prior(plan.candidates, plan.seed)
    assert made == [tmp_path / "study" / "prior"]
    chosen = next(each for each in plan.candidates if each.name == "target_sft")

    def losses(training, folder: str) -> list[float]:
        capsys.readouterr()
        training.run("target_sft", chosen.options(chosen.defaults), tmp_path / folder, 0, 0, lambda: False)
        lines = capsys.readouterr().out.splitlines()
        return [float(json.loads(line.replace("'", '"'))["loss"]) for line in lines if line.startswith("{'loss'")]

    cached, live = losses(with_cache, "cached"), losses(replace(with_cache, prior=None), "live")
    assert len(live) == 3 and cached == pytest.approx(live, rel=1e-3)
