"""Tokens whose gradient is exactly zero: they are not multiplied back into hidden states and head.

A trust of zero beside the policy's own distribution leaves `s γ (p - δ) = 0`: a critical-token mask, a threshold, a
clipped ratio. Two of the three products of such a token add zeros, and leaving them out changes no more than the order
in which the others are summed.
"""

import torch
from torch import Tensor

from ..target.objective import Objective
from ..target.token_target import TokenTarget


# On an accelerator, the share of zeros from which on the products saved are worth waiting for the statistics and
# moving the rest together.
_WORTHWHILE = 1 / 8


def tokens_that_pull(target: TokenTarget) -> Tensor:
    """Whether each token has a gradient, `[n]` (bool); it has one where its own numbers are NaN."""
    terms, of_label = target.gradient
    pulls = (of_label != 0) | target.nll.isnan()
    for _, coefficient in terms:
        pulls |= coefficient != 0
    return pulls


class ZeroSearch:
    """Finds, block after block of one call, the tokens that have a gradient.

    On a CPU it costs next to nothing and is always done. An accelerator has to be waited for: there it is done for
    trusts that say they give zeros (`has_zeros`), and no longer in a call whose first chunk has hardly any.
    """

    def __init__(self, objective: Objective, device: torch.device):
        self._waits = device.type != "cpu"
        self._looks = objective.has_zeros or not self._waits

    def rows(self, target: TokenTarget) -> Tensor | None:
        """Rows of a block whose tokens have a gradient, `[m]` in ascending order; None for all of them."""
        if not self._looks:
            return None
        tokens = len(target.trust)
        rows = tokens_that_pull(target).nonzero().squeeze(1)
        if self._waits and tokens - len(rows) < _WORTHWHILE * tokens:
            self._looks = False
            return None
        return None if len(rows) == tokens else rows
