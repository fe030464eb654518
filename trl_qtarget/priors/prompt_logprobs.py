"""A cache from what an inference engine has listed: the `prompt_logprobs` of vLLM.

An engine lists the k most probable tokens at every place of a prompt, and the prompt's own token where it is not among
them. All others together have the rest, one minus the sum of what is listed. That difference is all there is to know
it by, and it is only as exact as the engine's float32: see `rest_log_mass`.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import __version__
from ..loss.request import IGNORE_INDEX
from .store import Manifest, key_of, tokenizer_fingerprint
from .store_writer import SHARD_BYTES, Example, Unit, begin, units_of, write, write_card


# How far from one the listed float32 probabilities of a certain token may add up: a smaller rest is not known.
RESOLUTION = 2.0**-20


def write_prompt_logprobs(
    said: str | Path,
    directory: str | Path,
    processing_class: Any,
    name: str,
    vocabulary: int,
    k: int = 64,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> Manifest:
    """Write a cache of the form `top_k` from the `prompt_logprobs` of an engine, as vLLM has them.

    Args:
        said: a file of JSON lines, a request each, with `prompt_token_ids` (`[T]`) and `prompt_logprobs` (`[T]`: null
            for the first token, and for every other a mapping from token ids to `{"logprob": natural logarithm}` or
            to the number itself, of the model's own distribution at temperature 1). `labels` (`[T]`, -100 where
            there is none) may say which tokens are kept; all but the first are, where it is missing.
        directory: of the cache, new or one of the same model, to which it adds.
        processing_class: the policy's tokenizer, which has made the ids.
        name: of the engine's model; a cache is of one model.
        vocabulary: rows of the policy's head. The engine's model is conditioned on them: of a larger one the tokens
            beyond are left out, and the rest renormalised.
        k: tokens that are kept at every place; at least as many must be listed.
        shard_bytes: size of a shard.
        progress: whether to draw a progress bar.

    Raises:
        ValueError: a line is not of this form, lists too few tokens, or lists probabilities that are none.
    """
    said, directory = Path(said), Path(directory)
    if not said.is_file():
        raise ValueError(f"`prompt_logprobs`: there is no file {said}.")
    if not 1 <= k <= vocabulary:
        raise ValueError(f"`k={k}` must be from 1 to the vocabulary's {vocabulary}.")
    with open(said, "rb") as file:
        lines = _Lines(said, file, k, vocabulary)
        examples = lines.survey()
        manifest = Manifest(
            form="top_k",
            vocabulary=vocabulary,
            tokenizer=tokenizer_fingerprint(processing_class),
            prior="the model behind an engine",
            name=name,
            revision=None,
            dtype="float32",
            quantization=None,
            weights=hashlib.sha256(name.encode()).hexdigest()[:16],  # an engine shows no weights
            k=k,
            package=__version__,
        )
        units = units_of(examples, manifest, shard_bytes)
        begin(directory, manifest)
        with tqdm(total=sum(unit.rows for unit in units), unit="label", disable=not progress) as bar:
            write(directory, units, lines.of_unit, lambda unit: bar.update(unit.rows))
    write_card(directory, manifest)
    return manifest


@dataclass
class _Lines:
    """The requests of a file, found again by where their lines begin."""

    path: Path
    file: BinaryIO
    k: int
    vocabulary: int

    def survey(self) -> list[Example]:
        """The examples, whose `row` is where their line begins; every line is checked."""
        found, start = {}, 0
        for number, line in enumerate(self.file, 1):
            if line.strip():
                request = self._request(line, f"line {number}")
                ids, labels = request["prompt_token_ids"], request.get("labels")
                labels = ids if labels is None else labels
                positions = [at for at in range(1, len(labels)) if labels[at] != IGNORE_INDEX]
                for at in positions:
                    self._row(request, at, f"line {number}")
                if positions:
                    found.setdefault(key_of(ids), (start, set()))[1].update(positions)
            start += len(line)
        if not found:
            raise ValueError(f"`prompt_logprobs`: {self.path} has no request with a token to keep.")
        return [Example(key, row, tuple(sorted(positions))) for key, (row, positions) in found.items()]

    def of_unit(self, unit: Unit) -> Mapping[str, Tensor]:
        """The fields of a shard."""
        rows = list(self._rows_of(unit))
        ids, log_probs, of_label, of_rest = zip(*rows, strict=True)
        return {
            "ids": torch.tensor(ids, dtype=torch.int32),
            "log_probs": torch.tensor(log_probs, dtype=torch.float32),
            "label_log_probs": torch.tensor(of_label, dtype=torch.float32),
            "rest_log_mass": torch.tensor(of_rest, dtype=torch.float32),
        }

    def _rows_of(self, unit: Unit) -> Iterator[tuple[list[int], list[float], float, float]]:
        for example in unit.examples:
            self.file.seek(example.row)
            where = f"the line at byte {example.row}"
            request = self._request(self.file.readline(), where)
            for at in example.positions:
                yield self._row(request, at, where)

    def _request(self, line: bytes, where: str) -> Mapping[str, Any]:
        try:
            request = json.loads(line)
            ids, listed = request["prompt_token_ids"], request["prompt_logprobs"]
            labels = request.get("labels")
            of_one_length = len(ids) == len(listed) == len(ids if labels is None else labels)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._wrong(where, f"has no `prompt_token_ids` beside `prompt_logprobs` ({error!r})") from None
        if not of_one_length or not all(isinstance(token, int) for token in ids):
            raise self._wrong(
                where, "does not have one entry of `prompt_logprobs` (and of `labels`) for each token id"
            )
        return request

    def _row(self, request: Mapping[str, Any], at: int, where: str) -> tuple[list[int], list[float], float, float]:
        """Ids and log-probabilities of the k most probable tokens, the label's own, and that of all others."""
        listed, where = request["prompt_logprobs"][at], f"{where}, token {at}"
        try:
            numbers = {
                int(token): float(it["logprob"] if isinstance(it, Mapping) else it) for token, it in listed.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._wrong(where, f"does not map token ids to log-probabilities ({error!r})") from None
        label = request["prompt_token_ids"][at]
        if label not in numbers:
            raise self._wrong(where, f"does not list the prompt's own token, {label}")
        if any(math.isnan(value) or value > RESOLUTION for value in numbers.values()):
            raise self._wrong(where, "lists a probability above one, or none at all")
        if not 0 <= label < self.vocabulary:
            raise self._wrong(where, f"has the token {label}, and the policy has {self.vocabulary}")
        numbers = _conditioned(numbers, self.vocabulary)
        if len(numbers) < self.k:
            raise self._wrong(where, f"lists {len(numbers)} tokens, and `k` is {self.k}: ask the engine for more")
        # By probability, as the engine ranks them; of two equal ones the lower id, so that every run writes the same.
        ranked = sorted(numbers, key=lambda token: (-numbers[token], token))[: self.k]
        known = [numbers[token] for token in ranked]
        rest = rest_log_mass(known, self.vocabulary)
        if rest is None:
            raise self._wrong(where, f"lists probabilities that add up to {math.fsum(map(math.exp, known)):.6f}")
        return ranked, known, numbers[label], rest

    def _wrong(self, where: str, what: str) -> ValueError:
        return ValueError(f"`prompt_logprobs`: {self.path}, {where}, {what}.")


def _conditioned(numbers: dict[int, float], vocabulary: int) -> dict[int, float]:
    """Log-probabilities given that the token is one of the vocabulary."""
    inside = {token: value for token, value in numbers.items() if 0 <= token < vocabulary}
    if len(inside) == len(numbers):
        return numbers
    outside = math.fsum(math.exp(numbers[token]) for token in numbers.keys() - inside.keys())
    left = math.log1p(-outside) if outside < 1 else 0.0
    return {token: value - left for token, value in inside.items()}


def rest_log_mass(known: Sequence[float], vocabulary: int) -> float | None:
    """Log of the mass of all tokens but the k most probable, whose log-probabilities are `known[k]`, in falling order.

    It is 1 minus their sum where that is more than float32 can be wrong by (`RESOLUTION`). A smaller rest is only
    known to be small: it is taken for one token as probable as the last known one, at most `RESOLUTION`. It is never
    more than all others could have if each were as probable as the last known one; `-inf` where there are no others.

    Returns:
        None where the sum is above one by more than rounding.
    """
    others = vocabulary - len(known)
    rest = 1.0 - math.fsum(math.exp(value) for value in known)
    if rest < -RESOLUTION * max(1, len(known)) ** 0.5:
        return None
    if others == 0:
        return -math.inf
    last = math.exp(known[-1])
    if rest < RESOLUTION:
        rest = min(last, RESOLUTION)
    rest = min(rest, others * last)
    return math.log(rest) if rest > 0 else -math.inf
