"""`method="sft"` trains as SFTTrainer does under every option of an `SFTConfig` that changes how a step is made."""

import pytest
import tiny
import torch
from test_parity import Case, check_same_logs, run
from thinned import thinned
from training import warm_model
from trl import SFTTrainer

from trl_qtarget import QTargetSFTTrainer


TEMPLATE = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"

# Of every group of options one that could reach the loss, its count of tokens, its precision or the order of rows.
OPTIONS = {
    "neftune": {"neftune_noise_alpha": 5.0},
    "checkpointing-reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "checkpointing-selective": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"every_n_layers": 2},
    },
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "bf16": {"bf16": True},
    "bf16_evaluation": {"bf16_full_eval": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    "adafactor": {"optim": "adafactor", "learning_rate": 1e-3},
    "warmup-decay-clipping": {"warmup_steps": 3, "weight_decay": 0.1, "max_grad_norm": 0.05},
    "cosine": {"lr_scheduler_type": "cosine"},
    "workers": {"dataloader_num_workers": 1, "dataset_num_proc": 2},
    "by_length": {"train_sampling_strategy": "group_by_length"},
    "incomplete_batches": {"dataloader_drop_last": True, "per_device_train_batch_size": 5},
    "truncated": {"max_length": 8},
    "truncated_from_the_start": {"max_length": 8, "truncation_mode": "keep_end"},
    "padded_to_a_multiple": {"pad_to_multiple_of": 16},
    "all_columns": {"remove_unused_columns": False},
    "evaluated_first": {"eval_on_start": True, "eval_accumulation_steps": 1},
    "counts_input_tokens": {"include_num_input_tokens_seen": True},
    "epochs": {"max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 5},
    "router_coefficient": {"router_aux_loss_coef": 0.1, "gradient_accumulation_steps": 2},
    "seed": {"seed": 7, "data_seed": 3, "shuffle_dataset": True},
    "chat_template": {"chat_template_path": "template"},
}
QUICK = ("neftune", "checkpointing-selective", "bf16", "by_length", "epochs", "chat_template")
# Products of bfloat16: two ways to add them up differ in their last digit.
ROUGH = ("bf16", "bf16_evaluation")


@pytest.mark.parametrize("name", thinned(OPTIONS, lambda name: name in QUICK))
def test_option(name, tmp_path):
    options = dict(OPTIONS[name])
    if name == "chat_template":
        options["chat_template_path"] = str(tmp_path / "template.jinja")
        (tmp_path / "template.jinja").write_text(TEMPLATE)
    dataset = tiny.chat_dataset if name == "chat_template" else tiny.text_dataset
    make = tiny.moe_model if name == "router_coefficient" else tiny.model
    case = Case(dataset, lambda: warm_model(make), options)
    theirs = run(SFTTrainer, case, "sgd", {})
    ours = run(QTargetSFTTrainer, case, "sgd", {}, qtarget_config="sft")
    if name in ROUGH:
        for mine, other in ((ours.steps, theirs.steps), (ours.evaluations, theirs.evaluations)):
            losses = [[line.get("loss", line.get("eval_loss")) for line in lines] for lines in (mine, other)]
            assert losses[0] == pytest.approx(losses[1], rel=0.01)
        return
    check_same_logs(ours.steps, theirs.steps, ("loss", "mean_token_accuracy", "grad_norm", "num_tokens"))
    check_same_logs(ours.evaluations, theirs.evaluations, ("eval_loss", "eval_num_tokens"))
    assert theirs.moved()
    for key, truth in theirs.weights.items():
        assert torch.allclose(ours.weights[key], truth, rtol=1e-4, atol=1e-5), key
