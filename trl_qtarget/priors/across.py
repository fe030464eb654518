"""What a teacher of another tokenizer says of the policy's tokens, where both have cut the same token out of a text.

A teacher reads the text of an example in its own tokens. Where one of them begins and ends with a label, what it said
there is about that label and its alternatives: each of its tokens is the policy's token of the same bytes, if there is
one. Everywhere else it has said nothing about the policy's tokens that could be carried over without a guess.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .tokens import Tokens


class Pieces:
    """The bytes that each id of a tokenizer stands for.

    Args:
        tokenizer: a fast one of bytes, as those of GPT-2, Llama 3, Qwen, DeepSeek and SmolLM2. Others write one
            character in several ways, or spaces that are not in the text.
        end: what to write for the token that ends a text, in the place of its own name.

    Raises:
        ValueError: it is of another kind.
    """

    def __init__(self, tokenizer: Any, end: str | None = None):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError("It has no fast tokenizer, which alone says what its tokens stand for.")
        if "ByteLevel" not in _kinds(json.loads(backend.to_str()).get("decoder")):
            raise ValueError("Its tokens are not bytes, as those of GPT-2, Llama 3 and Qwen are.")
        self.tokenizer, self._end = tokenizer, end

    @cached_property
    def _added(self) -> dict[int, str]:
        """Tokens that are text as they stand."""
        return {id: token.content for id, token in self.tokenizer.added_tokens_decoder.items()}

    @cached_property
    def special(self) -> set[int]:
        """Tokens that control, and are no text."""
        return Tokens(self.tokenizer).special

    @cached_property
    def by_id(self) -> dict[int, bytes]:
        """The bytes of every id."""
        found = {id: self._bytes_of(id, token) for id, token in Tokens(self.tokenizer).by_id.items()}
        if self._end is not None and self.tokenizer.eos_token_id is not None:
            found[self.tokenizer.eos_token_id] = self._end.encode()
        return found

    def _bytes_of(self, id: int, token: str) -> bytes:
        if id in self._added:
            return self._added[id].encode()
        return bytes(_BYTES[letter] for letter in token) if set(token) <= _BYTES.keys() else token.encode()

    def names(self) -> dict[tuple[bool, bytes], int]:
        """The id of some bytes, of text (False) and of control (True); of several the lowest."""
        return {(id in self.special, it): id for id, it in sorted(self.by_id.items(), reverse=True) if it}


def _kinds(decoder: Any) -> set[str]:
    if not isinstance(decoder, dict):
        return set()
    return {decoder.get("type", "")}.union(*map(_kinds, decoder.get("decoders", [])))


def _bytes_by_letter() -> dict[str, int]:
    """The letter that byte-level tokenizers write for each byte: itself where it can be seen, else one from 256 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _bytes_by_letter()


@dataclass(frozen=True)
class Reading:
    """An example as the teacher reads it.

    Attributes:
        ids: the teacher's tokens.
        places: by the place of one of the policy's tokens, the place among `ids` whose state predicts the same token.
    """

    ids: list[int]
    places: dict[int, int]


class Crossing:
    """From the policy's tokens to a teacher's, and back.

    Args:
        policy, teacher: their tokenizers. The token that ends a text is one to both, whatever it is called.
        rows: how many tokens the policy's head has.
        teacher_rows: how many the teacher's has.

    Raises:
        ValueError: what the tokens of one of them stand for is not known.
    """

    def __init__(self, policy: Any, teacher: Any, rows: int, teacher_rows: int):
        try:
            self.teacher = Pieces(teacher)
            ends = self.teacher.by_id.get(teacher.eos_token_id)
            self.policy = Pieces(policy, None if ends is None else ends.decode())
        except ValueError as error:
            raise ValueError(f"`own_tokens`: a tokenizer cannot be compared by its bytes. {error}") from None
        self.rows, self.teacher_rows = rows, teacher_rows
        ours = {name: id for name, id in self.policy.names().items() if id < rows}
        of_teacher = torch.full((max(teacher_rows, 1 + max(self.teacher.by_id)),), -1)
        for id, piece in self.teacher.by_id.items():
            if id < teacher_rows and (name := (id in self.teacher.special, piece)) in ours:
                of_teacher[id] = ours[name]
        theirs, own = teacher.eos_token_id, policy.eos_token_id
        if None not in (theirs, own) and theirs < teacher_rows and own < rows:
            of_teacher[of_teacher == own] = -1  # whatever else is called like it
            of_teacher[theirs] = own
        # The policy's token of each of the teacher's, -1 where it has none; and which of its tokens these are, `[V]`.
        self.of_teacher, self._ids = of_teacher, of_teacher.tolist()
        self.shared = torch.zeros(rows, dtype=torch.bool).index_fill_(0, of_teacher[of_teacher >= 0], True)
        bare, framed = (teacher("a", add_special_tokens=added)["input_ids"] for added in (False, True))
        self.prefix = framed[: framed.index(bare[0])] if bare and bare[0] in framed else []

    def read(self, ids: Sequence[int]) -> Reading:
        """How the teacher reads an example of the policy's `ids`; where its text is another, nothing is carried."""
        pieces = [self.policy.by_id.get(id, b"") for id in ids]
        policy = self.policy.tokenizer
        if ids and ids[0] == policy.bos_token_id != policy.eos_token_id:
            pieces[0] = b""  # the teacher begins a text in its own way
        text = b"".join(pieces)
        try:
            words = text.decode()
        except UnicodeDecodeError:
            return Reading([], {})
        theirs = self.teacher.tokenizer(words, add_special_tokens=False)["input_ids"]
        if max(theirs, default=0) >= self.teacher_rows:  # a token that the model itself has not
            return Reading([], {})
        read = [self.teacher.by_id.get(id, b"") for id in theirs]
        if b"".join(read) != text:
            return Reading([], {})
        our_ends, their_ends = list(accumulate(map(len, pieces))), list(accumulate(map(len, read)))
        # What is text to the policy must not control the teacher.
        controls = {end for end, id in zip(our_ends, ids, strict=True) if id in self.policy.special}
        if any(id in self.teacher.special and end not in controls for end, id in zip(their_ends, theirs, strict=True)):
            return Reading([], {})
        ends = {end: place for place, end in enumerate(their_ends) if read[place]}
        places, first = {}, len(self.prefix) - 1
        for place, end in enumerate(our_ends):
            found = ends.get(end)
            # The same bytes up to here, so the same token if one is the other's.
            if found is not None and self._ids[theirs[found]] == ids[place] and first + found >= 0:
                places[place] = first + found
        return Reading([*self.prefix, *theirs], places)

    @property
    def fingerprint(self) -> str:
        """Of what is carried over to what."""
        facts = self.of_teacher.numpy().tobytes() + str((self.prefix, self.policy.tokenizer.eos_token_id)).encode()
        return hashlib.sha256(facts).hexdigest()[:16]

    def carried(self, log_probs: Tensor, labels: Tensor, k: int) -> dict[str, Tensor]:
        """What a teacher's `log_probs[n, V of the teacher]` say of the policy's tokens.

        Args:
            log_probs: natural logarithms, of all the teacher's tokens.
            labels: `[n]`, the policy's tokens that the teacher has too at these places.
            k: how many of the policy's tokens are kept.

        Returns:
            `ids[n, k]`, `log_probs[n, k]`, `label_log_probs[n]` and `rest_log_mass[n]`: of the k most probable of the
            policy's tokens, of the label, and of all else that the teacher may say, whether the policy has it or not.
        """
        of_teacher = self.of_teacher[: log_probs.size(1)].to(log_probs.device)
        both = of_teacher >= 0
        # Several of the teacher's tokens may have the bytes of one of the policy's.
        mass = log_probs.new_zeros(len(log_probs), self.rows).index_add_(1, of_teacher[both], log_probs[:, both].exp())
        # What the teacher has no token for is never among them, however little probability the others have.
        top = mass.masked_fill(~self.shared.to(mass.device), -1.0).topk(k, dim=-1)
        kept = torch.zeros_like(mass, dtype=torch.bool).scatter_(1, top.indices, True)
        named = kept[:, of_teacher.clamp(min=0)] & both
        return {
            "ids": top.indices,
            "log_probs": top.values.log(),
            "label_log_probs": mass.gather(1, labels[:, None]).squeeze(1).log(),
            "rest_log_mass": log_probs.masked_fill(named, -torch.inf).logsumexp(-1),
        }
