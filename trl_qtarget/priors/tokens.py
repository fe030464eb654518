"""What the policy's token ids mean to a reference model: the same tokens, or none that it has.

A reference model gets the policy's ids and gives probabilities to them. So both must mean the same by an id; how many
rows their tables have is another matter, which the loss takes care of.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from ..loss.head import vocabulary_of
from .base import base_model_of
from .shards import whole_shape


logger = get_logger(__name__)

# Letters and capitals, numbers, white space of code, other scripts, and what falls apart into bytes.
PROBES = (
    "The quick brown fox doesn't jump over 13 lazy dogs.",
    "In 2024, 1234567 × 3.14159 ≈ 3,881,500; e-mail: a_b@example.org",
    "def f(x):\n    if x:\n\treturn  x\n\n\n    # done\r\n",
    "Größe, naïve, Straße. Привет, мир! 你好，世界。 こんにちは مرحبا",
    "🙂 👍🏽 ∑√π ﷽ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
)
_OWN_TOKENS = (
    "or have this one say once, in its own tokens, what can be carried over: `trl-qtarget cache --own_tokens true`."
)
# Where files come from. All else that loads a policy says which model it is.
OF_FETCHING = ("cache_dir", "token", "proxies", "local_files_only")


class Tokens:
    """The tokens of a tokenizer: which one each id is, and which of them control and are no text."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    @cached_property
    def by_id(self) -> dict[int, str]:
        return {id: token for token, id in self.tokenizer.get_vocab().items()}

    @cached_property
    def special(self) -> set[int]:
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        return {id for id, token in added.items() if token.special} | set(self.tokenizer.all_special_ids)

    def splits(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def tokenizer_of(processing_class: Any) -> Any:
    """The tokenizer inside a processor, or the tokenizer itself; None for what tells no vocabulary."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    return tokenizer if hasattr(tokenizer, "get_vocab") else None


def find_tokenizer(reference: str | nn.Module, options: Mapping[str, Any] | None = None) -> Any:
    """The tokenizer of a reference model, by its path or by the name that a loaded one came from.

    Args:
        reference: a path or hub id, or a loaded model, perhaps under PEFT.
        options: those that load the policy; of them, where files come from. No code of a repository is run.

    Raises:
        OSError: there is none.
    """
    shared = {name: value for name, value in (options or {}).items() if name in OF_FETCHING}
    problem: Exception = OSError("its name is not known")
    for name, revision in _sources(reference):
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False, **shared)
        except Exception as error:  # files that are not there or not whole, a class that is not known, no network
            problem = error
            continue
        # transformers makes an empty one of a configuration without a tokenizer's files.
        if set(Tokens(tokenizer).by_id) - Tokens(tokenizer).special:
            return tokenizer
        problem = OSError(f"{name} has no files of one")
    raise OSError(str(problem).strip().partition("\n")[0]) from problem


def _sources(reference: str | nn.Module) -> Iterator[tuple[str, str]]:
    """Names that a tokenizer may be found by, with the revision."""
    if isinstance(reference, str):
        yield reference, "main"
        if (Path(reference) / "adapter_config.json").is_file():
            from peft import PeftConfig  # not needed by anything else

            base = PeftConfig.from_pretrained(reference).base_model_name_or_path
            if base:
                yield base, "main"
        return
    model = base_model_of(reference)
    if getattr(model, "name_or_path", ""):
        yield model.name_or_path, getattr(model.config, "_commit_hash", None) or "main"


@dataclass
class Findings:
    """What is said of two tokenizers: a refusal, warnings, and what is only worth knowing."""

    refusal: str | None = None
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def compare_tokenizers(policy: Any, reference: Any, name: str) -> Findings:
    """Whether two tokenizers mean the same by the ids that both know, and split text alike.

    Control tokens are no text and may differ; so may tokens that only one of them knows.

    Args:
        policy, reference: the tokenizers.
        name: what messages call the reference model.
    """
    ours, theirs, found = Tokens(policy), Tokens(reference), Findings()
    other = [id for id in sorted(ours.by_id.keys() & theirs.by_id.keys()) if ours.by_id[id] != theirs.by_id[id]]
    special = [id for id in other if id in ours.special or id in theirs.special]
    ordinary = [id for id in other if id not in ours.special and id not in theirs.special]
    if ordinary:
        id, more = ordinary[0], len(ordinary) - 1
        found.refusal = (
            f"{name} has another tokenizer than the policy: id {id} is {theirs.by_id[id]!r} to it and "
            f"{ours.by_id[id]!r} to the policy" + (f", and {more} more differ" if more else "") + ". A prior must "
            f"mean the same by every id: choose a reference model that shares the policy's tokenizer, {_OWN_TOKENS}"
        )
        return found
    for text in PROBES:
        pair = ours.splits(text), theirs.splits(text)
        if pair[0] != pair[1]:
            here, there = _first_difference(ours, pair[0], theirs, pair[1])
            found.refusal = (
                f"{name} splits text otherwise than the policy: in {text!r} it has the token {there!r} where the "
                f"policy has {here!r}. Give both one tokenizer (`processing_class`), choose another reference model, "
                f"{_OWN_TOKENS}"
            )
            return found
    if special:
        id = special[0]
        found.warnings.append(
            f"{name} means something else by {_count(special, 'control token')} of the policy: id {id} is "
            f"{theirs.by_id[id]!r} to it and {ours.by_id[id]!r} to the policy. It reads the policy's text all the "
            "same."
        )
    templates = [getattr(each, "chat_template", None) for each in (policy, reference)]
    if all(templates) and templates[0] != templates[1]:
        found.notes.append(f"{name} has another chat template than the policy, whose it reads.")
    return found


def _first_difference(ours: Tokens, mine: list[int], theirs: Tokens, other: list[int]) -> tuple[str | None, ...]:
    """The first tokens of two splits of a text that differ; None for one that has ended."""
    place = next((n for n, pair in enumerate(zip(mine, other, strict=False)) if pair[0] != pair[1]), None)
    place = min(len(mine), len(other)) if place is None else place
    pairs = ((ours, mine), (theirs, other))
    return tuple(tokens.by_id.get(ids[place]) if place < len(ids) else None for tokens, ids in pairs)


def _count(found: list[Any], what: str) -> str:
    return f"{len(found)} {what}{'s' if len(found) > 1 else ''}"


def check_tokens(
    reference: str | nn.Module, processing_class: Any, name: str | None, options: Mapping[str, Any] | None = None
) -> None:
    """Raise where a reference model means other tokens by the policy's ids. Every rank of a job calls it.

    What cannot be checked, as one of the tokenizers is not found, is said in the log.

    Args:
        reference: the reference model, or the path of one.
        processing_class: the policy's tokenizer or processor.
        name: what the reference model is called; None if nothing names it.
        options: those that load the policy.

    Raises:
        ValueError: the tokenizers differ. On every rank.
    """
    title = f"`ref_model` ({name})" if name else "`ref_model`"
    found = Findings()
    if PartialState().is_main_process:  # files that one rank reads and another does not must not part them
        found = _findings(title, tokenizer_of(processing_class), lambda: find_tokenizer(reference, options))
    found = broadcast_object_list([found])[0]
    if found.refusal is not None:
        raise ValueError(found.refusal)
    for warning in found.warnings:
        logger.warning(warning)
    for note in found.notes:
        logger.info(note)


def _findings(title: str, ours: Any, find: Callable[[], Any]) -> Findings:
    unchecked = f"Whether {title} means the policy's tokens by its ids is not checked, and taken for granted: "
    if ours is None:
        return Findings(warnings=[unchecked + "the policy's tokenizer is not known (`processing_class`)."])
    try:
        theirs = find()
    except Exception as error:
        return Findings(warnings=[f"{unchecked}its tokenizer is not found ({error})."])
    try:
        return compare_tokenizers(ours, theirs, title)
    except Exception as error:  # a tokenizer of a user's own may do anything; the other ranks are waiting
        problem = f"{type(error).__name__}: {error}"
        return Findings(warnings=[f"{unchecked}the tokenizers cannot be compared ({problem})."])


class ReadableIds:
    """The policy's ids as a model with fewer embeddings reads them: its end of text where it has none.

    Args:
        model: the model that reads.
        policy: the model whose ids they are.
        processing_class: the policy's tokenizer or processor.

    Raises:
        ValueError: there may be ids without an embedding, and no token is known to read in their place.
    """

    def __init__(self, model: PreTrainedModel, policy: PreTrainedModel, processing_class: Any):
        self.tokenizer = tokenizer_of(processing_class)
        self.rows, of_policy = map(_embeddings, (model, policy))
        self.stand_in: int | None = None
        if of_policy > self.rows:
            known = (id for id in _ends_of_text(model, self.tokenizer) if id < self.rows)
            self.stand_in = next(known, None)
            if self.stand_in is None:
                raise ValueError(
                    f"`ref_model` has {self.rows} embeddings, the policy {of_policy}, and no token to read in the "
                    "place of those that it lacks: set `eos_token_id` in its configuration."
                )

    def of(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Inputs whose `input_ids` the model has embeddings for."""
        if self.stand_in is None:
            return inputs
        ids = inputs["input_ids"]
        return {**inputs, "input_ids": ids.masked_fill(ids >= self.rows, self.stand_in)}

    def announce(self, model: PreTrainedModel) -> None:
        """Say once which of the policy's tokens the model has no row for."""
        tokens = {} if self.tokenizer is None else Tokens(self.tokenizer).by_id
        missing = sorted(id for id in tokens if id >= min(self.rows, vocabulary_of(model)))
        if not missing:
            return
        names = ", ".join(repr(tokens[id]) for id in missing[:3]) + (", …" if missing[3:] else "")
        reads = "" if self.stand_in is None else f", and reads its token {self.stand_in} in their place"
        logger.warning(
            f"`ref_model` has no row for {_count(missing, 'token')} of the policy ({names}): it gives them no "
            f"probability{reads}."
        )


def _embeddings(model: PreTrainedModel) -> int:
    """How many ids a model reads; of a class that does not tell, as many as it has logits of."""
    try:
        return whole_shape(model.get_input_embeddings().weight)[0]
    except (NotImplementedError, AttributeError):
        return vocabulary_of(model)


def _ends_of_text(model: PreTrainedModel, tokenizer: Any) -> Iterator[int]:
    """Tokens that end or begin a text, by the model's configuration and by the tokenizer that it shares."""
    for source in (model.config.get_text_config(), tokenizer):
        for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
            ids = getattr(source, name, None)
            ids = ids if isinstance(ids, list | tuple) else [ids]
            yield from (id for id in ids if isinstance(id, int) and id >= 0)
