"""`trl-qtarget inspect`: a page that shows what each method's target teaches, on your own examples."""

import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.commands.launch import launch_command_parser
from datasets import IterableDataset
from transformers import AutoProcessor, PreTrainedModel
from trl import ModelConfig, SFTConfig, get_quantization_config

from ..inspection.collect import check_request, inspect_target, numbered
from ..inspection.figures import check_path
from ..inspection.guest import load_policy
from ..inspection.map import draw_map, table
from ..inspection.render import write_page
from ..inspection.suspicious import suspicious_tokens, write_jsonl
from ..priors.choice import PolicyFacts, check_models, choose_prior
from ..target.config import QTargetConfig
from ..target.methods import METHODS
from ..training.resolve import resolve_config
from .data import check_format, load_data, split_of
from .device import ON_CPU
from .errors import check_installed
from .models import check_extras, check_named, init_kwargs, load_reference
from .options import check_known, read_method
from .recipe import Parser, separated
from .sft import RECIPE, target_of


logger = logging.getLogger(__name__)

# Instead of names of methods.
ALL = "all"
# What a recipe may say of its training, and `SFTConfig` would refuse or load. `inspect_target` sees to the rest.
_NO_TRAINING = {
    "output_dir": tempfile.gettempdir(),  # there has to be one; nothing is written to it
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": "False",
    "lr_scheduler_type": "linear",
    "deepspeed": "",
}


@dataclass
class InspectArguments:
    """What to look at, and where to write it."""

    methods: list[str] | None = field(
        default=None,
        metadata={
            "help": "Methods to compare, with knobs if wanted: dft asft:lam=0.03; or folders of a configuration. "
            "`all`: every published one that this model and data can have. None: the target of the recipe, or of "
            "`--method` and its knobs."
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
    map: str | None = field(
        default=None,
        metadata={"help": "Figure (.png, .svg, .pdf) of where the methods stand, and which are near twins."},
    )
    suspicious: str | None = field(
        default=None,
        metadata={
            "help": "JSONL file for every token by suspicion, for the last method that has any; of conversations that "
            "are labelled as a whole, assistant turns come first."
        },
    )
    suspicious_assistant_only: bool = field(
        default=False,
        metadata={"help": "Leave system and user text, and the template's tokens, out of the list of `suspicious`."},
    )

    def __post_init__(self):
        if self.examples < 1:
            raise ValueError("`examples` must be at least 1.")
        if self.suspicious_assistant_only and self.suspicious is None:
            raise ValueError("`suspicious_assistant_only` is of the list of `suspicious`: name its file.")


def main(arguments: Sequence[str]) -> int:
    """Inspect, and write the page.

    Raises:
        ValueError: an argument is wrong.
    """
    arguments = separated(arguments)
    parser = Parser((InspectArguments, *RECIPE), prog="trl-qtarget inspect")
    # To look at a few examples, a machine without an accelerator will do.
    fixed = _NO_TRAINING if torch.accelerator.is_available() else _NO_TRAINING | ON_CPU
    no_training = [word for name, value in fixed.items() for word in (f"--{name}", value)]
    *parsed, of_config, left = parser.parse_args_and_config(
        [*arguments, *no_training], return_remaining_strings=True, separate_remaining_strings=True
    )
    wanted, script, training, model, mixture, target, reference, _ = parsed
    launcher = [*launch_command_parser()._option_string_actions, "--accelerate_config"]
    check_known(of_config, launcher, parser._option_string_actions)
    check_known(left, [], parser._option_string_actions)
    if left:
        raise ValueError(f"`{left[0]}` belongs to no option: remove it.")
    if reference.prior_cache is not None:
        raise ValueError("`prior_cache` is read in training alone: name the model, with `ref_model_name_or_path`.")
    check_extras(model, reference)
    every = wanted.methods == [ALL]
    if wanted.methods is None:
        configs = [resolve_config(target_of(arguments, target), training)]
    else:
        configs = [QTargetConfig("sft")] if every else [read_method(text) for text in wanted.methods]
    check_request(configs, wanted.alternatives)
    if wanted.map:
        check_path(Path(wanted.map))
        check_installed("matplotlib", "plot", "map")
    check_named(model, reference, training.model_init_kwargs, "inspect")
    training.loss_type = "nll"  # `dft` is a target, which is among the methods by now if it is wanted
    logging.basicConfig(format="%(message)s")
    logging.getLogger("trl_qtarget").setLevel(logging.INFO)

    data_name = ", ".join(each.path for each in mixture.datasets) or script.dataset_name
    training.model_init_kwargs = {**init_kwargs(model, training), **(training.model_init_kwargs or {})}
    dataset = load_data(script, mixture)
    check_format(dataset, training)
    rows = split_of(dataset, script.dataset_train_split, "dataset_train_split")
    stream = isinstance(rows, IterableDataset)
    rows = rows if stream else numbered(rows)
    if wanted.sample_seed is not None:
        rows = rows.shuffle(seed=wanted.sample_seed)
    rows = rows.take(wanted.examples) if stream else rows.select(range(min(wanted.examples, len(rows))))
    policy, ref_model = _load_policy(model, training), load_reference(reference, training)
    training.model_init_kwargs = None  # which have done their work, and TRL would say that it ignores them
    if every:
        configs = _all_of(policy, ref_model)
    data = inspect_target(
        policy,
        rows,
        configs,
        ref_model=ref_model,
        args=training,
        processing_class=_load_processing(model, training),
        alternatives=wanted.alternatives,
        model_name=model.model_name_or_path,
        dataset_name=data_name,
    )
    output = Path(wanted.output)
    write_page(data, output)
    if wanted.map:
        sys.stdout.write(table(draw_map(data, configs, Path(wanted.map))))
    if wanted.suspicious:
        rows = suspicious_tokens(data, assistant_only=wanted.suspicious_assistant_only)
        write_jsonl(rows, Path(wanted.suspicious))
        sys.stdout.write(_of_list(rows, wanted.suspicious))
    tokens = sum(len(example["scored"]) for example in data["examples"])
    sys.stdout.write(f"{len(data['examples'])} examples, {tokens} labelled tokens: {output}\n")
    return 0


def _of_list(rows: list[dict[str, Any]], file: str) -> str:
    """What the list of suspicious labels is, in one line."""
    text = f"Suspicious labels by `{rows[0]['method']}`" if rows else "No labels of an assistant's turn"
    others = sum(row["assistant"] is False for row in rows)
    if others:
        text += f", assistant turns first ({len(rows) - others}), then what is not theirs ({others})"
    return f"{text}: {file}\n"


def _all_of(policy: PreTrainedModel, ref_model: Any) -> list[QTargetConfig]:
    """The published objectives that this policy, with this reference or none, can be trained toward."""
    check_models(policy, ref_model)
    facts, configs = PolicyFacts.of(policy), []
    for name in METHODS:
        config = QTargetConfig(name)
        if config.uses_token_weights:  # which this data need not have
            continue
        try:
            choose_prior(config, facts, ref_model)
        except ValueError as error:
            logger.info(f"Left out is {name}: {error}")
        else:
            configs.append(config)
    return configs


def _load_policy(model: ModelConfig, training: SFTConfig) -> Any:
    options = dict(training.model_init_kwargs)
    if (quantization := get_quantization_config(model)) is not None:
        options["quantization_config"] = quantization
    return load_policy(model.model_name_or_path, **options)


def _load_processing(model: ModelConfig, training: SFTConfig) -> Any:
    """Tokenizer or processor; None for adapters without one, which take their base's."""
    folder = Path(model.model_name_or_path)
    if (folder / "adapter_config.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        return None
    return AutoProcessor.from_pretrained(
        model.model_name_or_path, revision=model.model_revision, trust_remote_code=training.trust_remote_code
    )
