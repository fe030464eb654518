"""`trl-qtarget inspect`: a page that shows what each method's target teaches, on your own examples."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser, get_quantization_config
from trl.trainer.utils import create_model_from_path

from ..inspection.collect import inspect_target
from ..inspection.render import write_page
from ..inspection.suspicious import suspicious_tokens, write_jsonl
from .options import check_known, read_method
from .sft import ReferenceArguments, init_kwargs, load_data, load_reference, split_of


@dataclass
class InspectArguments:
    """What to look at, and where to write it."""

    methods: list[str] = field(
        default_factory=lambda: ["target_sft"],
        metadata={
            "help": "Methods to compare, with knobs if wanted: dft asft:lam=0.03; or folders of a qtarget_config.json."
        },
    )
    examples: int = field(default=20, metadata={"help": "Number of examples, the first ones or, with a seed, random."})
    sample_seed: int | None = field(
        default=None, metadata={"help": "Seed of a random sample. None: the first examples."}
    )
    alternatives: int = field(
        default=6, metadata={"help": "Tokens shown beside each other: the label and favourites."}
    )
    output: str = field(default="inspection.html", metadata={"help": "The page, one file that opens from disk."})
    suspicious: str | None = field(
        default=None, metadata={"help": "JSONL file for every token by suspicion, for the first method."}
    )

    def __post_init__(self):
        if self.examples < 1:
            raise ValueError("`examples` must be at least 1.")


def main(arguments: Sequence[str]) -> int:
    """Inspect, and write the page.

    Raises:
        ValueError: an argument is wrong.
    """
    parser = TrlParser(
        (InspectArguments, ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig, ReferenceArguments),
        prog="trl-qtarget inspect",
    )
    *parsed, left = parser.parse_args_and_config(_with_output_dir(arguments), return_remaining_strings=True)
    wanted, script, training, model, mixture, reference = parsed
    check_known(left, [], parser._option_string_actions)
    if left:
        raise ValueError(f"`{left[0]}` belongs to no option: remove it.")
    if model.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is missing: name the model to inspect.")
    configs = [read_method(text) for text in wanted.methods]
    logging.basicConfig(format="%(message)s")
    logging.getLogger("trl_qtarget").setLevel(logging.INFO)

    training.model_init_kwargs = {**init_kwargs(model, training), **(training.model_init_kwargs or {})}
    rows = split_of(load_data(script, mixture), script.dataset_train_split, "dataset_train_split")
    if wanted.sample_seed is not None:
        rows = rows.shuffle(seed=wanted.sample_seed)
    if script.dataset_streaming:
        rows = Dataset.from_list(list(rows.take(wanted.examples)))
    else:
        rows = rows.select(range(min(wanted.examples, len(rows))))
    data = inspect_target(
        _load_policy(model, training),
        rows,
        configs,
        ref_model=load_reference(reference, training),
        args=training,
        alternatives=wanted.alternatives,
        dataset_name=script.dataset_name or ", ".join(each.path for each in mixture.datasets),
    )
    output = Path(wanted.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_page(data, output)
    if wanted.suspicious:
        write_jsonl(suspicious_tokens(data), Path(wanted.suspicious))
    tokens = sum(len(example["scored"]) for example in data["examples"])
    sys.stdout.write(f"{len(data['examples'])} examples, {tokens} labelled tokens: {output}\n")
    return 0


def _with_output_dir(arguments: Sequence[str]) -> list[str]:
    """`SFTConfig` wants a folder, to which nothing is written here."""
    return ["--output_dir", "unused", *arguments]


def _load_policy(model: ModelConfig, training: SFTConfig) -> Any:
    """The policy; one with adapters keeps them apart, for the base under them is a prior."""
    options = dict(training.model_init_kwargs)
    if (quantization := get_quantization_config(model)) is not None:
        options["quantization_config"] = quantization
    if (Path(model.model_name_or_path) / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM

        return AutoPeftModelForCausalLM.from_pretrained(model.model_name_or_path, **options)
    return create_model_from_path(model.model_name_or_path, **options)
