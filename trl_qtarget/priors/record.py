"""Which prior a run has had, written into its checkpoints, so that another one is noticed when it goes on."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import replacing
from .choice import PriorChoice, PriorKind
from .shards import gather, share


RECORD_NAME = "qtarget_prior.json"

# Integers as wide as the numbers whose bits they hold.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SAMPLED = 1024


@dataclass(frozen=True)
class PriorRecord:
    """Where a prior comes from, and fingerprints of the weights that it never changes.

    Attributes:
        kind: the value of its `PriorKind`.
        title: what it is, in words.
        weights: fingerprints by the parameters' names.
    """

    kind: str
    title: str
    weights: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, choice: PriorChoice, weights: dict[str, str]) -> "PriorRecord":
        """Of the prior that was chosen, and the fingerprints of its weights."""
        if choice.cache is not None:
            weights = {"prior_cache": choice.cache.manifest.identity}
        return cls(choice.kind.value, choice.title or "the policy's own distribution", weights)

    def save(self, directory: str | os.PathLike) -> None:
        """Write it into a checkpoint."""
        with replacing(Path(directory) / RECORD_NAME) as file:
            Path(file).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "PriorRecord | None":
        """Of a checkpoint; None where none was written.

        Raises:
            ValueError: the file is not one that `save` has written.
        """
        path = Path(directory) / RECORD_NAME
        if not path.is_file():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"`resume_from_checkpoint`: {path} cannot be read ({error}).") from error

    def check_same(self, former: "PriorRecord", checkpoint: str | os.PathLike) -> None:
        """Raise unless a run with this prior may go on from a checkpoint that was written with the `former`.

        A weight that only one of them has fixed is compared by neither: it is trained in the other.
        """
        alone = {PriorKind.NONE.value, PriorKind.POLICY.value}  # nothing but the policy, by whatever name
        if {self.kind, former.kind} <= alone:
            return
        if self.kind != former.kind:
            why = f"it is {self.title}"
        else:
            others = [name for name, value in self.weights.items() if former.weights.get(name, value) != value]
            if not others and (not self.weights or not former.weights or self.weights.keys() & former.weights.keys()):
                return
            names = ", ".join(f"`{name}`" for name in others[:3])
            share = (
                f"{len(others)} of {len(self.weights)} weights, {names} …" if others else "no weight has the same name"
            )
            why = f"it is {self.title} with other weights ({share})"
        raise ValueError(
            f"the prior is not the one that {checkpoint} was trained with, {former.title}: {why}. Pass the same "
            "`ref_model`, or the same starting weights as `model`, or call "
            "`train(resume_from_checkpoint=..., allow_new_target=True)`."
        )


def fingerprints(parameters: Mapping[str, nn.Parameter], known: Mapping[str, str]) -> dict[str, str]:
    """A fingerprint of each parameter by its name, which is the same however it is sharded. Every rank has to call it.

    Left out are those that are nowhere (`meta`), and those whose bits bitsandbytes rearranges on a CPU.

    Args:
        parameters: the parameters, none of which a wrapper holds whole in the place of its shares.
        known: fingerprints that need not be computed again.
    """
    found = {}
    for name, parameter in parameters.items():
        rearranged = getattr(getattr(parameter, "quant_state", None), "packing_format_for_cpu", False)
        if not parameter.is_meta and not rearranged:
            found[name] = known[name] if name in known else _fingerprint(gather(parameter, share(parameter)))
    return found


def _fingerprint(whole: Tensor) -> str:
    """Of every bit by their sum as integers, and of a sample with its places."""
    bits = whole.detach().contiguous().view(-1)
    if bits.is_complex():
        bits = torch.view_as_real(bits).view(-1)
    bits = bits.view(_BITS[bits.element_size()])
    sample = bits[:: max(1, bits.numel() // _SAMPLED)]
    numbers: list[Any] = [str(whole.dtype), *whole.shape, bits.sum(dtype=torch.int64).item()]
    digest = hashlib.sha256(repr(numbers).encode())
    digest.update(repr(sample.tolist()).encode())
    return digest.hexdigest()[:16]
