"""Logits of `-inf`, as of tokens that a model masks: they have probability zero, and nothing becomes NaN."""

import pytest
import torch

from trl_qtarget import METHODS, build_target, linear_qtarget_loss, qtarget_loss


N, V, H, MASKED = 7, 23, 5, slice(19, 23)


@pytest.mark.parametrize("which", ["policy", "prior", "both"])
@pytest.mark.parametrize("method", METHODS)
def test_masked_tokens(method, which):
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    hidden, weight, prior_hidden, prior_weight = random(N, H), random(V, H), random(N, H), random(V, H)
    labels = torch.randint(MASKED.start, (N,), generator=generator)
    mask = torch.zeros(V, dtype=torch.float64)
    mask[MASKED] = -torch.inf
    bias = mask if which != "prior" else torch.zeros_like(mask)
    prior_bias = mask if which != "policy" else torch.zeros_like(mask)
    weights = torch.rand(N, generator=generator, dtype=torch.float64)

    def gradients(loss: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss, inputs)

    hidden.requires_grad_()
    weight.requires_grad_()
    logits, prior_logits = hidden @ weight.T + bias, prior_hidden @ prior_weight.T + prior_bias
    dense = qtarget_loss(logits, labels, method, prior_logits=prior_logits, token_weights=weights)
    fused = linear_qtarget_loss(
        hidden,
        weight,
        labels,
        method,
        bias=bias,
        prior_hidden=prior_hidden,
        prior_weight=prior_weight,
        prior_bias=prior_bias,
        token_weights=weights,
    )
    target = build_target(logits.detach(), labels, method, prior_logits=prior_logits, token_weights=weights)

    # A target with mass on a token that the policy can never say is infinitely far; nothing can be learned from it.
    infinite = which == "policy" and method in ("label_smoothing", "sft_kl", "asft", "distill", "distill_hybrid")
    infinite |= which != "prior" and method == "label_smoothing"
    assert infinite or torch.isfinite(dense)
    assert torch.isfinite(target.probs).all()
    for exact, fast in zip(gradients(dense, hidden, weight), gradients(fused.loss, hidden, weight), strict=True):
        assert torch.isfinite(exact).all() and torch.isfinite(fast).all()
        # Both are float64; 1e-12 is what the other exactness tests reach.
        assert infinite or (exact - fast).norm() <= 1e-12 * exact.norm() + 1e-15
