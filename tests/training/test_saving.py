"""What a trained model takes along: a card that names its target, its configuration, and no need of this package."""

import subprocess
import sys

import pytest
import tiny
import torch
from peft import LoraConfig
from training import make_trainer

from trl_qtarget import METHODS, PolicyFacts, QTargetConfig, QTargetSFTTrainer, choose_prior
from trl_qtarget.priors.resolved import ResolvedTarget
from trl_qtarget.training.card import add_target, target_section


CODE = """
import sys
sys.modules["trl_qtarget"] = None  # an import of it fails
import torch
from {module} import {loader}
model = {loader}.from_pretrained({path!r}).eval()
torch.save(model(torch.arange(4, 20)[None]).logits.detach(), {path!r} + "/logits.pt")
"""


def resolved(config: QTargetConfig, prior: str | None = None, name: str | None = None) -> ResolvedTarget:
    return ResolvedTarget(config, config, prior, name)


@pytest.mark.parametrize("name", METHODS)
def test_card_names_method_formula_configuration_and_papers(name):
    row, config = METHODS[name], QTargetConfig(name)
    text = target_section(resolved(config))
    assert f"`{name}`" in text and row.loss in text and "arXiv 2606.11189" in text
    assert f'"method": "{name}"' in text
    assert row.arxiv is None or f"https://arxiv.org/abs/{row.arxiv}" in text
    assert text.count("2606.11189)](") == 1


def test_card_of_a_free_combination():
    config = QTargetConfig(method=None, trust="entropy", residual="guided", top_k=7)
    text = target_section(resolved(config, "the base weights"))
    assert (
        "Trust `entropy` with residual `guided`" in text
        and '"top_k": 7' in text
        and "Prior: the base weights." in text
    )


def test_card_goes_before_the_versions_or_to_the_end(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("# A model\n\n### Framework versions\n\n- TRL: 1\n")
    add_target(card, resolved(QTargetConfig("dft")))
    text = card.read_text()
    assert text.index("# A model") < text.index("### Training target") < text.index("### Framework versions")
    card.write_text("# Another\n")
    add_target(card, resolved(QTargetConfig("dft")))
    assert card.read_text().startswith("# Another\n\n### Training target")


@pytest.mark.parametrize("peft", [False, True])
def test_saving_once_writes_the_card(tmp_path, peft):
    trainer = make_trainer(
        QTargetSFTTrainer,
        tiny.text_dataset(),
        tiny.model(),
        options={"output_dir": str(tmp_path), "save_strategy": "no"},
        peft_config=LoraConfig(target_modules=["q_proj"]) if peft else None,
        qtarget_config="dft",
    )
    trainer.save_model()
    assert (tmp_path / "README.md").read_text().count("### Training target") == 1
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert QTargetConfig.from_pretrained(tmp_path / "elsewhere").method == "dft"


@pytest.mark.parametrize("peft", [pytest.param(False, marks=pytest.mark.slow), True])
def test_trained_model_loads_without_this_package(tmp_path, peft):
    base = tmp_path / "base"
    tiny.model().save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    output = tmp_path / "out"
    options = {"save_strategy": "steps", "save_steps": 1, "model_init_kwargs": {"dtype": "float32"}}
    trainer = make_trainer(
        QTargetSFTTrainer,
        tiny.text_dataset(),
        str(base),
        steps=2,
        options={"output_dir": str(output), **options},
        peft_config=LoraConfig(target_modules=["q_proj"]) if peft else None,
        qtarget_config=QTargetConfig("target_sft", eta=0.3, prior="base"),
    )
    trainer.train()
    trainer.save_model()
    for folder in (output, output / "checkpoint-2"):
        assert QTargetConfig.from_pretrained(folder) == QTargetConfig("target_sft", eta=0.3, prior="base")
    card = (output / "README.md").read_text()
    assert card.count("### Training target") == 1
    assert '"eta": 0.3' in card and "trl-qtarget" in card.split("---")[1], "the tag stands in the card's header"
    assert "Prior: the base weights (adapters off)" in card if peft else "Prior: the starting weights" in card
    module, loader = ("peft", "AutoPeftModelForCausalLM") if peft else ("transformers", "AutoModelForCausalLM")
    code = CODE.format(module=module, loader=loader, path=str(output))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        wanted = trainer.model.eval()(torch.arange(4, 20)[None]).logits
    torch.testing.assert_close(torch.load(output / "logits.pt"), wanted)


def test_prior_is_named_without_paths(tmp_path):
    tiny.model().save_pretrained(tmp_path / "teacher")
    policy, config = PolicyFacts(), QTargetConfig("distill")
    found = choose_prior(config, policy, str(tmp_path / "teacher")).title
    assert found == "the reference model (`teacher`)"
    assert choose_prior(config, policy, "hub/teacher").title.endswith("(`hub/teacher`)")
    assert choose_prior(config, policy, tiny.model(1)).title == "the reference model"
    assert choose_prior(QTargetConfig("sft"), policy).title is None


def test_metrics_reach_tensorboard_as_one_group(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))
    options = {"output_dir": str(tmp_path), "report_to": "tensorboard"}
    make_trainer(QTargetSFTTrainer, tiny.text_dataset(), tiny.model(), options=options, qtarget_config="dft").train()
    events = EventAccumulator(str(tmp_path)).Reload()
    found = {tag.removeprefix("train/target/") for tag in events.Tags()["scalars"] if "target/" in tag}
    assert found == {"nll", "trust", "label_mass", "kl"}
