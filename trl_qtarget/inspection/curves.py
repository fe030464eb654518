"""A method as a function of the label's probability: what its target asks for, and how hard it pulls."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..target.config import QTargetConfig
from ..target.dense import token_target


VOCABULARY = 1000


@dataclass(frozen=True)
class Curve:
    """Along `label_probs[n]`: γ, the target's mass on the label, and the gradient on its logit, `s (p_y - Q_y)`."""

    name: str
    label_probs: Tensor
    trust: Tensor
    label_mass: Tensor
    gradient: Tensor


def method_curves(configs: Sequence[QTargetConfig], prior_label_prob: float = 0.5, points: int = 201) -> list[Curve]:
    """The curves of several methods.

    The rest of the policy's mass lies evenly on all other tokens. So does the prior's, which gives the label the
    probability `prior_label_prob` throughout.

    Raises:
        ValueError: a method cannot be drawn as a function of one probability, or an argument is out of range.
    """
    if not 0 < prior_label_prob < 1:
        raise ValueError(f"`prior_label_prob={prior_label_prob}` must lie between 0 and 1.")
    probs = torch.linspace(0.001, 0.999, points, dtype=torch.float64)
    policy = _logits(probs)
    prior = _logits(torch.full_like(probs, prior_label_prob))
    labels = torch.zeros(points, dtype=torch.long)
    curves = []
    for config in configs:
        if config.uses_token_weights:
            raise ValueError(f"{config.label} follows the dataset's weights, not a probability: leave it out.")
        if config.residual == "neighbors":
            raise ValueError("`residual='neighbors'` depends on a model's embeddings: leave it out.")
        uses_prior = config.objective(has_prior=True).uses_prior
        # Each point is a sequence of its own, so that a trust per sequence is a function of its one token.
        _, target, _ = token_target(
            policy, labels, config, prior if uses_prior else None, sequence_ids=torch.arange(points)
        )
        mass = target.label_mass
        curves.append(Curve(_name(config), probs, target.trust, mass, target.scale * (probs - mass)))
    return curves


def _logits(label_probs: Tensor) -> Tensor:
    """`[n, V]` logits that give the first token these probabilities, and the others the rest in equal parts."""
    rest = ((1 - label_probs) / (VOCABULARY - 1)).log()[:, None].expand(-1, VOCABULARY - 1)
    return torch.cat([label_probs.log()[:, None], rest], dim=1)


def _name(config: QTargetConfig) -> str:
    knobs = {name: value for name, value in config.knobs.items() if getattr(config, name) is not None}
    text = ", ".join(f"{name}={value:g}" for name, value in knobs.items())
    return (config.method or f"{config.trust} + {config.residual}") + (f" ({text})" if text else "")
