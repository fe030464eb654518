"""`trl-qtarget inspect`: one file from a model and a dataset on disk."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from peft import LoraConfig, get_peft_model
from training import warm_model

from trl_qtarget import METHODS, QTargetConfig, cli
from trl_qtarget.inspection.collect import inspect_target
from trl_qtarget.inspection.suspicious import WORST, suspicious_examples, suspicious_tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    for name, steps in (("policy", 20), ("teacher", 30)):
        warm_model(steps=steps).save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    torch.manual_seed(0)
    adapted = get_peft_model(warm_model(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "policy")
    adapted.save_pretrained(folder / "adapter")
    tiny.tokenizer().save_pretrained(folder / "adapter")
    tiny.prompt_dataset(12).to_json(str(folder / "rows.jsonl"))
    return folder


def _command(folder, output, *arguments, model="policy"):
    command = ["inspect", "--model_name_or_path", str(folder / model), "--dataset_name", str(folder / "rows.jsonl")]
    return [*command, "--dtype", "float32", "--output", str(output), *arguments]


def _data(page):
    text = page.read_text()
    start = text.index('id="data"')
    return json.loads(text[text.index(">", start) + 1 : text.index("</script>", start)])


def test_page_of_several_methods_with_a_teacher(folder, tmp_path, capsys, caplog):
    output, found = tmp_path / "new" / "page.html", tmp_path / "other" / "suspicious.jsonl"
    arguments = ["--methods", "dft", "asft:lam=0.2", "target_sft", "--examples", "4", "--suspicious", str(found)]
    teacher = ["--ref_model_name_or_path", str(folder / "teacher")]
    with caplog.at_level(logging.INFO, "trl_qtarget"), caplog.at_level(logging.WARNING, "trl.trainer.sft_trainer"):
        assert cli.main(_command(folder, output, *arguments, *teacher)) == 0
    assert "4 examples" in capsys.readouterr().out
    # Neither of arguments that have done their work, nor of a target that is not trained toward.
    assert "model_init_kwargs" not in caplog.text and "Target: " not in caplog.text
    data = _data(output)
    assert [method["name"] for method in data["methods"]] == ["dft", "asft", "target_sft"]
    assert data["methods"][1]["knobs"] == {"lam": 0.2}
    assert data["reference"] == "the reference model (`teacher`)"
    rows = [json.loads(line) for line in found.read_text().splitlines()]
    assert len(rows) == sum(len(example["scored"]) for example in data["examples"])
    assert [row["suspicion"] for row in rows] == sorted((row["suspicion"] for row in rows), reverse=True)
    assert {row["method"] for row in rows} == {"target_sft"}, "the last one that has suspicion"


def test_map_of_all_methods(folder, tmp_path, capsys):
    drawn = ["--methods", "all", "--map", str(tmp_path / "map.svg"), "--examples", "3", "--alternatives", "2"]
    assert cli.main(_command(folder, tmp_path / "page.html", *drawn, model="adapter")) == 0
    assert (tmp_path / "map.svg").stat().st_size > 1000
    names = {method["name"] for method in _data(tmp_path / "page.html")["methods"]}
    # No weights in this data; the base under the adapters is every prior but a teacher.
    assert names == {name for name, row in METHODS.items() if row.prior != "model" and name != "cft"}
    assert "rank_tuner" in capsys.readouterr().out


def test_map_with_another_ending_is_refused_before_the_model_is_loaded(folder, tmp_path, capsys):
    command = _command(folder, tmp_path / "page.html", "--map", str(tmp_path / "map.gif"), model="nowhere")
    assert cli.main(command) == 2
    assert "must end in .png, .svg or .pdf" in capsys.readouterr().err


RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
ON_CPU = {"use_cpu": True, "bf16": False, "dtype": "float32"}


def _recipe(folder, tmp_path, **values):
    """A recipe with the models and the data of this folder."""
    values |= {**ON_CPU, "model_name_or_path": str(folder / "policy")}
    if "ref_model_name_or_path" in values:
        values["ref_model_name_or_path"] = str(folder / "teacher")
    if "datasets" in values:
        values["datasets"] = [{"path": str(folder / "rows.jsonl"), "split": "train"}]
    else:
        values["dataset_name"] = str(folder / "rows.jsonl")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    return str(file)


def _methods(page):
    return [(method["name"], method["knobs"]) for method in _data(page)["methods"]]


@pytest.mark.parametrize("name", ["drop_in", "full_zero3", "paper/numina_qwen3-1.7b"])
def test_recipes_of_trainings_are_inspected(name, folder, tmp_path):
    values = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    recipe, output = _recipe(folder, tmp_path, **values), tmp_path / "page.html"
    command = ["inspect", "--config", recipe, "--examples", "2", "--output", str(output)]
    assert cli.main(command) == 0
    target = QTargetConfig(**{key: values[key] for key in ("method", "eta", "prior") if key in values})
    assert _methods(output) == [(target.method, target.knobs)]
    data = _data(output)
    assert data["model"] == str(folder / "policy") and data["dataset"] == str(folder / "rows.jsonl")


@pytest.mark.parametrize(
    ("recipe", "arguments", "found"),
    [
        ({"method": "asft", "lam": 0.3}, [], [("asft", {"lam": 0.3})]),
        ({"method": "asft", "lam": 0.3}, ["--lam", "0.7"], [("asft", {"lam": 0.7})]),
        ({"method": "asft", "lam": 0.3}, ["--methods", "sft", "dft"], [("sft", {}), ("dft", {})]),
        ({"method": "asft", "methods": ["sft"]}, [], [("sft", {})]),
        ({"loss_type": "dft"}, [], [("dft", {})]),
        ({"loss_type": "dft"}, ["--methods", "sft"], [("sft", {})]),
        ({"accelerate_config": "zero3", "num_processes": 8}, ["--method", "sft"], [("sft", {})]),
    ],
)
def test_target_of_the_recipe_gives_way_to_methods(recipe, arguments, found, folder, tmp_path):
    output = tmp_path / "page.html"
    recipe = _recipe(folder, tmp_path, **recipe)
    assert cli.main(["inspect", "--config", recipe, "--examples", "1", "--output", str(output), *arguments]) == 0
    assert _methods(output) == found


def test_recipe_of_a_training_leaves_nothing_but_the_page(folder, tmp_path, monkeypatch):
    training = {
        "output_dir": "run",
        "eval_strategy": "steps",
        "logging_steps": 0.5,
        "save_strategy": "best",
        "load_best_model_at_end": True,
        "metric_for_best_model": "nll",
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "push_to_hub": True,
        "hub_model_id": "nobody/nothing",
        "report_to": "tensorboard",
        "packing": True,
        "padding_free": True,
        "deepspeed": "nowhere.json",
    }
    recipe = _recipe(folder, tmp_path, method="dft", **training)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert cli.main(["inspect", "--config", recipe, "--examples", "3"]) == 0
    assert [file.name for file in here.iterdir()] == ["inspection.html"]
    assert len(_data(here / "inspection.html")["examples"]) == 3


def test_streamed_mixture(folder, tmp_path):
    recipe, output = _recipe(folder, tmp_path, datasets=[], streaming=True, method="dft"), tmp_path / "page.html"
    assert cli.main(["inspect", "--config", recipe, "--examples", "3", "--output", str(output)]) == 0
    assert len(_data(output)["examples"]) == 3


def test_adapter_is_inspected_against_its_base(folder, tmp_path):
    output = tmp_path / "page.html"
    assert cli.main(_command(folder, output, "--examples", "2", model="adapter")) == 0
    data = _data(output)
    assert data["reference"] == "the base weights (adapters off)"
    assert data["model"] == str(folder / "adapter")


def test_adapter_brings_its_own_chat_template(folder, tmp_path):
    """Here it ends each turn twice; without a tokenizer in its folder, its base's is taken."""
    tiny.chat_dataset(3).to_json(str(tmp_path / "chats.jsonl"))
    own, bare = tmp_path / "own", tmp_path / "bare"
    shutil.copytree(folder / "adapter", own)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|im_end|><|im_end|>")
    tokenizer.save_pretrained(own)
    shutil.copytree(folder / "adapter", bare, ignore=shutil.ignore_patterns("token*", "chat*"))
    ends = []
    for model in (folder / "policy", own, bare):
        page = tmp_path / "page.html"
        chats = ["--dataset_name", str(tmp_path / "chats.jsonl"), "--examples", "3", "--methods", "dft"]
        assert cli.main(_command(folder, page, *chats, model=model)) == 0
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        ends.append([example["tokens"].count(end) for example in _data(page)["examples"]])
    assert ends == [[2, 2, 2], [4, 4, 4], [2, 2, 2]]


def test_sample_is_random_only_with_a_seed(folder, tmp_path):
    pages = []
    for number, seed in enumerate(([], ["--sample_seed", "3"], ["--sample_seed", "3"])):
        pages.append(tmp_path / f"{number}.html")
        assert cli.main(_command(folder, pages[-1], "--methods", "sft", "--examples", "3", *seed)) == 0
    first, *seeded = [[example["tokens"] for example in _data(page)["examples"]] for page in pages]
    assert seeded[0] == seeded[1] != first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "dtf"], "`method='dtf'` is unknown"),
        (["--exampels", "3"], "did you mean `--examples`"),
        (["--examples", "0"], "`examples` must be at least 1"),
        (["--dataset_name", "none.jsonl"], "does not exist"),
        (["--model_name_or_path", "nowhere", "--methods", "dft", "dft"], "names one target twice"),
        (["--model_name_or_path", "nowhere", "--alternatives", "1"], "`alternatives=1` must be at least 2"),
        (["--method", "asft", "--eta", "0.5"], "`eta` is not used by `method='asft'`"),
    ],
)
def test_mistakes_are_refused(folder, tmp_path, capsys, arguments, message):
    output = tmp_path / "page.html"
    assert cli.main(_command(folder, output, *arguments)) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_suspicion_ranks_tokens_and_examples():
    dataset = tiny.prompt_dataset(6)
    data = inspect_target(warm_model(), dataset, ["dft", "sft"], processing_class=tiny.tokenizer(), progress=False)
    rows = suspicious_tokens(data)
    worst = rows[0]
    example = next(example for example in data["examples"] if example["name"] == worst["example"])
    place = example["scored"].index(worst["position"])
    assert example["methods"][0]["suspicion"][place] == worst["suspicion"] == max(row["suspicion"] for row in rows)
    favourites = dict(zip(example["p"][place][1:], example["alternatives"][place][1:], strict=True))
    assert worst["preferred"] == data["vocabulary"][str(favourites[max(favourites)])]
    ranked = suspicious_examples(data)
    assert len(ranked) == 6 and ranked[0]["suspicion"] >= ranked[-1]["suspicion"]
    mine = sorted(next(e for e in data["examples"] if e["name"] == ranked[0]["example"])["methods"][0]["suspicion"])
    assert ranked[0]["suspicion"] == pytest.approx(sum(mine[-WORST:]) / WORST)
