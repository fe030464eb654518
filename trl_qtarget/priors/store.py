"""What a prior has said of a dataset, on disk: read, memory-mapped, by the content of an example.

    manifest.json            what has spoken (`Manifest`), written before anything else
    head.<sha>.safetensors   the LM head, of the form `hidden`
    <unit>-<sha>.safetensors a shard: whole or not there, named by its examples and by the SHA-256 of its bytes
        keys[E, 16]          of every example, a hash of its token ids
        starts[E + 1]        its rows are starts[e] to starts[e + 1]; a row is one labelled token
        positions[R]         the token's place in its example, from 1 on; rows of an example ascend
        ids[R, k], log_probs[R, k], label_log_probs[R], rest_log_mass[R]        of the form `top_k`
        hidden[R, H]                                                            of the form `hidden`

What is said of a token comes from the tokens before it. Labels that an example has elsewhere are not in the cache.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


MANIFEST = "manifest.json"
FORMS = ("hidden", "top_k")
# What is stored beside the examples' keys, in the order in which a batch carries it.
FIELDS = {"hidden": ("hidden",), "top_k": ("ids", "log_probs", "label_log_probs", "rest_log_mass")}
_VERSION = 1


def key_of(ids: Sequence[int]) -> bytes:
    """The key of an example: 16 bytes of a hash of its token ids."""
    return hashlib.blake2b(np.asarray(ids, dtype="<i8").tobytes(), digest_size=16).digest()


def tokenizer_fingerprint(processing: Any) -> str:
    """Of what each id means; the chat template is left out, for the ids say what it has made."""
    tokenizer = getattr(processing, "tokenizer", processing)
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Manifest:
    """What a cache holds, and of whom.

    Attributes:
        form: `"hidden"` or `"top_k"`.
        vocabulary: rows of the prior's head.
        tokenizer: fingerprint of the tokens' meaning.
        prior: what the prior is, in words.
        name, revision, dtype, quantization: of its model, as far as they are known.
        weights: fingerprint of its weights.
        k: tokens of the form `top_k`.
        width: of the hidden states, of the form `hidden`.
        logit_scale, logit_softcap: what the head does with its product, of the form `hidden`.
        package: the version that has written it.
        own_tokenizer: fingerprint of how the prior's own tokens become the policy's, where they are others. What
            cannot be carried over has NaN in the place of `rest_log_mass`, and nothing is known of that label.
    """

    form: str
    vocabulary: int
    tokenizer: str
    prior: str
    name: str | None
    revision: str | None
    dtype: str
    quantization: str | None
    weights: str
    k: int | None = None
    width: int | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    package: str = ""
    version: int = _VERSION
    own_tokenizer: str | None = None

    @property
    def identity(self) -> str:
        """A fingerprint of all that makes two caches say the same."""
        left_out = {"package"} if self.own_tokenizer else {"package", "own_tokenizer"}
        facts = {name: value for name, value in asdict(self).items() if name not in left_out}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def row_bytes(self) -> int:
        """Bytes of one labelled token."""
        of_form = 8 * self.k + 8 if self.form == "top_k" else self.width * getattr(torch, self.dtype).itemsize
        return of_form + 4

    @property
    def title(self) -> str:
        """What it is, for log and model card."""
        what = f"top_k, k={self.k}" if self.form == "top_k" else "hidden"
        return f"what {self.prior} has said, from a cache ({what})"

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def load(cls, directory: str | Path) -> "Manifest":
        """Of a cache.

        Raises:
            ValueError: there is none, or it is of another format.
        """
        path = Path(directory) / MANIFEST
        if not path.is_file():
            raise ValueError(
                f"`prior_cache`: {directory} is no cache, it has no {MANIFEST}: make one with `trl-qtarget cache`."
            )
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            found = facts.get("version")
            if found != _VERSION:
                raise ValueError(f"its format is {found}, and this version of the package reads {_VERSION}")
            return cls(**facts)
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"`prior_cache`: {path} cannot be read ({error}): make the cache again.") from None


class PriorCache:
    """A cache, open for reading; nothing of it is in memory but what is asked for.

    Args:
        directory: where it is.
        expected: the fingerprint that it had when it was first opened, for copies in other processes.

    Raises:
        ValueError: it is none, or has changed.
    """

    def __init__(self, directory: str | Path, expected: str | None = None):
        if not isinstance(directory, str | Path):
            raise ValueError(f"`prior_cache` must be the path of a folder, got `{type(directory).__name__}`.")
        self.directory = Path(directory)
        self.manifest = Manifest.load(directory)
        self.names = sorted(path.name for path in self.directory.glob("*-*.safetensors"))
        facts = "\n".join([self.manifest.identity, *self.names])
        self.fingerprint = hashlib.sha256(facts.encode()).hexdigest()[:16]
        if expected is not None and self.fingerprint != expected:
            raise ValueError(f"`prior_cache`: {directory} has changed while it was in use: start again.")
        self._shards = [_opened(self.directory / name) for name in self.names]
        self._places: dict[bytes, tuple[int, int, int]] = {}
        offset, offsets = 0, [0]
        for number, shard in enumerate(self._shards):
            keys, starts = shard["keys"].numpy(), shard["starts"].tolist()
            for row, (start, stop) in enumerate(pairwise(starts)):
                # Of an example that was cached twice, as with another `max_length`, where more of it is.
                key, known = keys[row].tobytes(), self._places.get(keys[row].tobytes(), (0, 0, 0))
                if stop - start > known[2] - known[1]:
                    self._places[key] = (number, start, stop)
            offset += starts[-1]
            offsets.append(offset)
        self._offsets = np.asarray(offsets)

    def __reduce__(self):
        return PriorCache, (str(self.directory), self.fingerprint)

    def __len__(self) -> int:
        """How many examples it has."""
        return len(self._places)

    @property
    def known_share(self) -> float:
        """The share of its rows, of the form `top_k`, of which something is known."""
        silent = [shard["rest_log_mass"].isnan() for shard in self._shards]
        return 1 - torch.cat(silent).double().mean().item() if silent else 0.0

    @property
    def head(self) -> Path:
        """Where the head of the form `hidden` is.

        Raises:
            ValueError: there is none.
        """
        found = heads_in(self.directory)
        if not found:
            raise ValueError(f"`prior_cache`: {self.directory} has no head: run `trl-qtarget cache` again.")
        return found[0]

    def check_sums(self) -> None:
        """Raise unless every file has the bytes that it was written with. It reads all of them."""
        names = [*self.names, *([self.head.name] if self.manifest.form == "hidden" else [])]
        for name in names:
            if _sha256(self.directory / name) != name.replace("-", ".").split(".")[1]:
                raise ValueError(
                    f"`prior_cache`: the file {name} of {self.directory} has other bytes than it was written with: "
                    "delete it, and run `trl-qtarget cache` again, which makes what is missing."
                )

    def places(self, ids: Sequence[int]) -> list[int]:
        """Of every token of an example the row that speaks of it; -1 where there is none."""
        places = [-1] * len(ids)
        number, start, stop = self._places.get(key_of(ids), (0, 0, 0))
        first = int(self._offsets[number])
        for row, position in enumerate(self._shards[number]["positions"][start:stop].tolist() if stop else ()):
            places[position] = first + start + row
        return places

    def read(self, places: Tensor) -> Tensor:
        """What is said of tokens at `places[...]`, as integers `[..., W]`; zeros where the place is negative.

        Of the form `top_k` int32: k ids, then the bits of k log-probabilities, of the label's and of the rest. Of
        `hidden` the bits of the states. As integers nothing on the way to the device takes them for numbers to round.
        """
        flat = places.reshape(-1).numpy()
        known = np.flatnonzero(flat >= 0)
        shards = np.searchsorted(self._offsets, flat[known], side="right") - 1
        out = None
        for number in np.unique(shards):
            at = known[shards == number]
            rows = torch.from_numpy(flat[at] - self._offsets[number])
            fields = [self._shards[number][name][rows] for name in FIELDS[self.manifest.form]]
            found = torch.cat([_bits(field if field.dim() == 2 else field[:, None]) for field in fields], dim=1)
            if out is None:
                out = found.new_zeros(len(flat), found.size(1))
            out[torch.from_numpy(at)] = found
        if out is None:  # a batch without a label
            out = self._empty(len(flat))
        return out.view(*places.shape, -1)

    def _empty(self, rows: int) -> Tensor:
        if self.manifest.form == "top_k":
            return torch.zeros(rows, 2 * self.manifest.k + 2, dtype=torch.int32)
        return _bits(torch.zeros(rows, self.manifest.width, dtype=getattr(torch, self.manifest.dtype)))


def heads_in(directory: Path) -> list[Path]:
    """Heads in the folder of a cache: one, or none yet."""
    return sorted(directory.glob("head.*.safetensors"))


def _bits(values: Tensor) -> Tensor:
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


def _opened(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, memory-mapped."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"`prior_cache`: {path} cannot be read ({error}): delete it, and run `trl-qtarget cache` again, which "
            "makes what is missing."
        ) from None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
