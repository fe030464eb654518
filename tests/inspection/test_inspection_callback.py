"""Pages written while a model is trained: they show its target of that moment, and change nothing."""

import json

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig
from training import make_trainer, trainable, warm_model

from trl_qtarget import QTargetConfig, QTargetSFTTrainer
from trl_qtarget.inspection.callback import InspectionCallback


def _data(page):
    text = page.read_text()
    start = text.index('id="data"')
    return json.loads(text[text.index(">", start) + 1 : text.index("</script>", start)])


def _train(tmp_path, config, watch, **arguments):
    options = {"output_dir": str(tmp_path), "max_length": 32, "packing": True}
    torch.manual_seed(0)
    trainer = make_trainer(
        QTargetSFTTrainer,
        tiny.text_dataset(),
        warm_model(),
        steps=4,
        options=options,
        qtarget_config=config,
        **arguments,
    )
    if watch:
        trainer.add_callback(InspectionCallback(trainer, tiny.text_dataset(2, seed=9), every=2))
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        (QTargetConfig("target_sft", prior="base"), {}),
        (QTargetConfig("psft", prior_sync_steps=3), {}),
        (QTargetConfig("target_sft"), {"peft_config": LoraConfig(target_modules=["q_proj"], lora_dropout=0.1)}),
    ],
    ids=["base", "lagged", "peft"],
)
def test_pages_follow_the_training_and_change_nothing(tmp_path, config, arguments):
    watched = _train(tmp_path / "watched", config, True, **arguments)
    plain = _train(tmp_path / "plain", config, False, **arguments)
    for name, weight in trainable(plain.model).items():
        assert torch.equal(weight, trainable(watched.model)[name]), name
    pages = sorted((tmp_path / "watched" / "inspections").iterdir())
    assert [page.name for page in pages] == ["step-000000.html", "step-000002.html", "step-000004.html"]
    first, _, last = (_data(page) for page in pages)
    assert first["title"] == "Step 0" and len(first["examples"]) == 2, "not packed"
    assert first["examples"][0]["tokens"] == last["examples"][0]["tokens"]
    assert first["examples"][0]["p"] != last["examples"][0]["p"], "the policy has moved"


def test_lagged_prior_of_the_training_is_shown(tmp_path):
    """Right after a sync the ratio is 1; after two steps it is not."""
    _train(tmp_path, QTargetConfig("psft", prior_sync_steps=4, epsilon=10.0), True)
    pages = sorted((tmp_path / "inspections").iterdir())
    trusts = [_data(page)["examples"][0]["methods"][0]["trust"] for page in pages]
    assert trusts[0] == pytest.approx([1.0] * len(trusts[0]))
    assert trusts[1] != pytest.approx([1.0] * len(trusts[1]), rel=1e-3)
    assert trusts[2] == pytest.approx([1.0] * len(trusts[2])), "synced after the fourth step"


def test_mistakes_are_refused():
    trainer = make_trainer(QTargetSFTTrainer, tiny.text_dataset(), warm_model(), qtarget_config="dft")
    with pytest.raises(ValueError, match="`every=0`"):
        InspectionCallback(trainer, tiny.text_dataset(1), every=0)
    with pytest.raises(ValueError, match="`dataset` is empty"):
        InspectionCallback(trainer, Dataset.from_dict({"text": []}), every=1)
