"""The load-balancing loss of a mixture of experts, also of a batch whose sequences are split over ranks."""

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from .group import SequenceGroup


def load_balancing_loss(
    config: PretrainedConfig, router_logits: Any, attention_mask: Tensor | None, group: SequenceGroup | None = None
) -> Tensor:
    """E · Σ_i f_i P_i over a batch: f_i the share of expert i in the choices, P_i its mean probability.

    Args:
        config: the model's, of its text.
        router_logits: of each layer `[B·T, E]`.
        attention_mask: `[B, T]`; None counts every token.
        group: the ranks that share the sequences. Then value and gradient are as those of the whole batch: the value
            on every rank, of the gradient each rank's part.
    """
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    if group is None:
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        return load_balancing_loss_func(router_logits, experts, config.num_experts_per_tok, attention_mask)
    # It is no sum over tokens, but made of three: choices and probabilities of every expert, and tokens.
    sums = torch.zeros(2 * experts + 1, device=router_logits[0].device)
    for logits in router_logits:
        probs = logits.to(sums.device).softmax(-1)
        weights = probs.new_ones(len(probs)) if attention_mask is None else attention_mask.reshape(-1).to(probs)
        chosen = torch.zeros_like(probs).scatter_(1, probs.topk(config.num_experts_per_tok, dim=-1).indices, 1.0)
        of_layer = (weights @ chosen, (probs * weights[:, None]).float().sum(0), weights.sum()[None])
        sums = sums + torch.cat([value.float() for value in of_layer])
    chosen, probs, count = group.with_value_of_all(sums).split([experts, experts, 1])
    return (chosen * probs).sum() / count.squeeze() ** 2 * experts
