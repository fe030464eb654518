"""Train with `QTargetSFTTrainer` on the batches that `axolotl_recorder.py` has written down.

`python axolotl_replay.py run.json` reads what to do and writes the log lines of the steps to `replayed.json` in the
run's folder.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from trl_qtarget import QTargetSFTTrainer


def main() -> None:
    run = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(run["folder"])
    recorded = torch.load(folder / "recorded.pt")
    model = AutoModelForCausalLM.from_pretrained(run["model"], dtype="float32", attn_implementation="eager")
    if run["lora"]:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **run["lora"]))
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert parameters.keys() == recorded["start"].keys()
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(recorded["start"][name])
    batches = recorded["batches"]
    trainer = QTargetSFTTrainer(
        model,
        SFTConfig(
            str(folder / "replay"),
            per_device_train_batch_size=1,  # a batch is an example here
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
            train_sampling_strategy="sequential",
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            **run["options"],
        ),
        train_dataset=Dataset.from_dict({"number": list(range(len(batches)))}),
        data_collator=lambda rows: dict(batches[rows[0]["number"]]),
        processing_class=AutoTokenizer.from_pretrained(run["model"]),
        qtarget_config=run["qtarget"],
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    (folder / "replayed.json").write_text(json.dumps(lines))


if __name__ == "__main__":
    main()
