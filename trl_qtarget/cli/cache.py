"""`trl-qtarget cache`: run a teacher, or the base, once over a dataset, and keep what it says of every label."""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from accelerate.commands.launch import launch_command_parser
from transformers import AutoConfig, AutoTokenizer

from ..priors.prompt_logprobs import write_prompt_logprobs
from ..priors.store import FORMS
from ..priors.tokens import find_tokenizer
from ..target.config import QTargetConfig, prior_itself
from ..training.caching import Writer, write_cache
from ..training.caching_across import WriterAcross, say_share
from ..training.data import kept_by_truncation
from .device import cpu_words
from .errors import say
from .models import ReferenceArguments, check_named, load_reference
from .options import check_known, refuse
from .recipe import Parser, names_given, separated
from .sft import NO_GPU, RECIPE, make_trainer


@dataclass
class CacheArguments:
    """What is kept."""

    form: str = field(
        default="top_k",
        metadata={
            "help": "'top_k': the k most probable tokens. 'hidden': the final hidden states, exact for every target.",
            "choices": list(FORMS),
        },
    )
    k: int = field(default=64, metadata={"help": "Tokens of the form 'top_k'."})
    own_tokens: bool = field(
        default=False,
        metadata={
            "help": "The teacher has another tokenizer, and reads the text in its own tokens: what it says is kept "
            "where both have the same token. Of the form 'top_k'."
        },
    )
    prompt_logprobs: str | None = field(
        default=None,
        metadata={
            "help": "In place of a dataset: what an engine such as vLLM has listed, as JSON lines. No model runs; "
            "beside it stand both models, output_dir and k, on the command line."
        },
    )


def main(arguments: Sequence[str]) -> int:
    """Make a cache, or what is missing of one. Processes with the same arguments do it together.

    Raises:
        ValueError: an argument is wrong.
    """
    arguments = separated(arguments)
    if any(item.partition("=")[0] == "--prompt_logprobs" for item in arguments):
        return _convert(arguments)
    if on_cpu := cpu_words(names_given(arguments)):
        arguments = [*arguments, *on_cpu]
        say("cache", NO_GPU)
    parser = Parser((CacheArguments, *RECIPE), prog="trl-qtarget cache")
    *parsed, of_config, left = parser.parse_args_and_config(
        [*arguments, "--deepspeed", ""], return_remaining_strings=True, separate_remaining_strings=True
    )
    wanted, script, training, model, mixture, target, reference, _ = parsed
    launcher = [*launch_command_parser()._option_string_actions, "--accelerate_config"]
    check_known(of_config, launcher, parser._option_string_actions)
    check_known(left, [], parser._option_string_actions)
    if left:
        raise ValueError(f"`{left[0]}` belongs to no option: remove it.")
    if wanted.prompt_logprobs is not None:
        raise ValueError("`prompt_logprobs` stands in no recipe: name it on the command line.")
    if not any(item.partition("=")[0] == "--output_dir" for item in arguments):
        raise ValueError(
            "`--output_dir` is missing: name the folder of the cache, which is another one than that of the training."
        )
    if wanted.own_tokens and (reference.ref_model_name_or_path is None or wanted.form != "top_k"):
        raise ValueError("`own_tokens` are of a `ref_model_name_or_path`, and of the form `top_k`: give both.")
    check_named(model, reference, training.model_init_kwargs)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("trl_qtarget").setLevel(logging.INFO)

    kept = kept_by_truncation(training, training.packing)
    # The whole text is what an example is found by, however long a piece of it is read here or trained on.
    training.max_length, training.packing, training.eval_packing, training.shuffle_dataset = None, False, False, False
    training.padding_free, training.loss_type = False, "nll"
    if wanted.own_tokens:  # the trainer only prepares the dataset
        trainer = make_trainer(script, training, model, mixture, QTargetConfig("sft"), ReferenceArguments())
        teacher = load_reference(reference, training)
        tokenizer = find_tokenizer(teacher, training.model_init_kwargs)
        writer = WriterAcross(trainer, teacher, tokenizer, wanted.k)
    else:
        # The target only asks for the prior itself. Of a policy that is not trained, the start is the model as it is.
        frozen = "base" if model.use_peft and target.prior != "start" else "start"
        prior = frozen if reference.ref_model_name_or_path is None else "auto"
        asked = prior_itself(prior)
        trainer = make_trainer(script, training, model, mixture, asked, replace(reference, prior_cache=None))
        writer = Writer(trainer, wanted.form, wanted.k)
    write_cache(writer, training.output_dir, kept)
    if wanted.own_tokens:
        say_share(training.output_dir)
    sys.stdout.write(f"{training.output_dir} has what {writer.manifest.prior} says of the dataset.\n")
    return 0


def _convert(arguments: Sequence[str]) -> int:
    """Make a cache of what an engine has listed; no model runs."""
    parser = argparse.ArgumentParser("trl-qtarget cache", allow_abbrev=False)
    parser.add_argument("--prompt_logprobs", required=True, help="Requests of an engine such as vLLM, as JSON lines.")
    parser.add_argument("--model_name_or_path", required=True, help="The policy: its tokenizer and vocabulary.")
    parser.add_argument("--ref_model_name_or_path", required=True, help="The engine's model, which is not loaded.")
    parser.add_argument("--output_dir", required=True, help="The folder of the cache.")
    parser.add_argument("--k", type=int, default=CacheArguments.k, help="Tokens that are kept at every place.")
    parser.error = refuse
    wanted = parser.parse_args(arguments)
    vocabulary = AutoConfig.from_pretrained(wanted.model_name_or_path).get_text_config().vocab_size
    tokenizer, teacher = AutoTokenizer.from_pretrained(wanted.model_name_or_path), wanted.ref_model_name_or_path
    manifest = write_prompt_logprobs(
        wanted.prompt_logprobs, wanted.output_dir, tokenizer, teacher, vocabulary, wanted.k
    )
    sys.stdout.write(f"{wanted.output_dir} has what {manifest.prior} says of the dataset.\n")
    return 0
