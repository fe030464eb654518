"""An objective of your own in ten lines: trust a label the less, the more probable the policy finds another token.

python examples/own_objective.py --model Qwen/Qwen3-0.6B --dataset trl-lib/Capybara
"""

import argparse

from datasets import load_dataset
from trl import SFTConfig

from trl_qtarget import NonNegative, QTargetConfig, QTargetSFTTrainer, register_trust


@register_trust("relative")
def relative(tile, *, alpha: NonNegative = 1.0):
    """γ = (p_y / max_v p_v)^alpha."""
    return (tile.label_log_probs - tile.log_probs.amax(-1)).mul(alpha).exp()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Model to train: hub id or path.")
    parser.add_argument("--dataset", required=True, help="Hub id, or a .json or .jsonl file, in any format of TRL.")
    parser.add_argument("--output_dir", default="outputs/own-objective", help="Where the model goes.")
    parser.add_argument("--max_steps", type=int, default=100, help="Optimiser steps.")
    parser.add_argument("--use_cpu", action="store_true", help="Train on the CPU, in float32.")
    arguments = parser.parse_args()
    local = arguments.dataset.endswith((".json", ".jsonl"))
    source = {"path": "json", "data_files": arguments.dataset} if local else {"path": arguments.dataset}
    trainer = QTargetSFTTrainer(
        arguments.model,
        SFTConfig(
            output_dir=arguments.output_dir,
            max_steps=arguments.max_steps,
            use_cpu=arguments.use_cpu,
            bf16=not arguments.use_cpu,
            report_to="none",
        ),
        train_dataset=load_dataset(**source, split="train"),
        qtarget_config=QTargetConfig(method=None, trust="relative", residual="policy", alpha=0.5),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
