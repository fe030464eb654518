"""`trl-qtarget inspect`: one file from a model and a dataset on disk."""

import json

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from training import warm_model

from trl_qtarget import cli
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
    return [*command, "--use_cpu", "--bf16", "False", "--dtype", "float32", "--output", str(output), *arguments]


def _data(page):
    text = page.read_text()
    start = text.index('id="data"')
    return json.loads(text[text.index(">", start) + 1 : text.index("</script>", start)])


def test_page_of_several_methods_with_a_teacher(folder, tmp_path, capsys):
    output, found = tmp_path / "new" / "page.html", tmp_path / "suspicious.jsonl"
    arguments = ["--methods", "dft", "asft:lam=0.2", "target_sft", "--examples", "4", "--suspicious", str(found)]
    teacher = ["--ref_model_name_or_path", str(folder / "teacher")]
    assert cli.main(_command(folder, output, *arguments, *teacher)) == 0
    assert "4 examples" in capsys.readouterr().out
    data = _data(output)
    assert [method["name"] for method in data["methods"]] == ["dft", "asft", "target_sft"]
    assert data["methods"][1]["knobs"] == {"lam": 0.2}
    assert data["reference"] == "the reference model (`teacher`)"
    rows = [json.loads(line) for line in found.read_text().splitlines()]
    assert len(rows) == sum(len(example["scored"]) for example in data["examples"])
    assert [row["suspicion"] for row in rows] == sorted((row["suspicion"] for row in rows), reverse=True)
    assert {row["method"] for row in rows} == {"dft"}


def test_adapter_is_inspected_against_its_base(folder, tmp_path):
    output = tmp_path / "page.html"
    assert cli.main(_command(folder, output, "--examples", "2", model="adapter")) == 0
    assert _data(output)["reference"] == "the base weights (adapters off)"


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
        (["--methods", "dft", "dft"], "names one target twice"),
    ],
)
def test_mistakes_are_refused(folder, tmp_path, capsys, arguments, message):
    output = tmp_path / "page.html"
    assert cli.main(_command(folder, output, *arguments)) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_suspicion_ranks_tokens_and_examples():
    dataset = tiny.prompt_dataset(6)
    data = inspect_target(warm_model(), dataset, ["dft"], processing_class=tiny.tokenizer(), progress=False)
    rows = suspicious_tokens(data)
    worst = rows[0]
    example = next(example for example in data["examples"] if example["name"] == worst["example"])
    place = example["scored"].index(worst["position"])
    assert example["methods"][0]["suspicion"][place] == worst["suspicion"] == max(row["suspicion"] for row in rows)
    favourites = dict(zip(example["p"][place][1:], example["alternatives"][place][1:], strict=True))
    assert worst["prior_favourite"] == data["vocabulary"][str(favourites[max(favourites)])]
    ranked = suspicious_examples(data)
    assert len(ranked) == 6 and ranked[0]["suspicion"] >= ranked[-1]["suspicion"]
    mine = sorted(next(e for e in data["examples"] if e["name"] == ranked[0]["example"])["methods"][0]["suspicion"])
    assert ranked[0]["suspicion"] == pytest.approx(sum(mine[-WORST:]) / WORST)
