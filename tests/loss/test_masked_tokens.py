"""Logits of `-inf`, as of tokens that a model masks: they have probability zero, and nothing becomes NaN."""

import pytest
import torch
from measured import CLOSED

from trl_qtarget import METHODS, QTargetConfig, build_target, linear_qtarget_loss, qtarget_loss


N, V, H, MASKED = 7, 23, 5, slice(19, 23)


@pytest.mark.parametrize("which", ["policy", "prior", "both"])
@pytest.mark.parametrize("method", CLOSED)
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
        return torch.autograd.grad(loss, inputs, retain_graph=True)

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

    # A target with mass on a token that the policy can never say is all but infinitely far, yet its gradient is
    # s (p - Q), as that of `cross_entropy` is in PyTorch.
    infinite = which == "policy" and METHODS[method].residual in ("uniform", "prior", "spared_prior", "spared_top")
    infinite &= method != "gift"  # all but e^-20 of its target is on the label
    infinite |= which != "prior" and method == "label_smoothing"
    assert (dense.abs() > 1e300) == infinite
    # Both are float64; 1e-12 is what the other exactness tests reach.
    assert (dense - fused.loss).abs() <= 1e-12 * dense.abs()
    assert torch.isfinite(target.probs).all()
    expected = target.scale[:, None] * (logits.detach().softmax(-1) - target.probs) / N
    (own,) = gradients(dense, logits)
    assert (own - expected).norm() <= 1e-12 * expected.norm() + 1e-15
    for exact, fast in zip(gradients(dense, hidden, weight), gradients(fused.loss, hidden, weight), strict=True):
        assert torch.isfinite(exact).all() and torch.isfinite(fast).all()
        assert (exact - fast).norm() <= 1e-12 * exact.norm() + 1e-15


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("method", ["sft", "dft", "psft", "cft"])
def test_a_masked_label(method, dtype):
    """A label that policy and prior both exclude: dense and fused loss agree, and the gradient is s (p - Q)."""
    bias = torch.tensor([0.3, -torch.inf, 1.0, 0.2], dtype=dtype, requires_grad=True)
    prior_bias = torch.tensor([0.1, -torch.inf, 0.4, 0.9], dtype=dtype)
    labels, zero, weight = torch.tensor([1, 0]), torch.zeros(2, 2, dtype=dtype), torch.zeros(4, 2, dtype=dtype)
    arguments = {"token_weights": torch.tensor([0.5, 1.0], dtype=dtype)}
    prior = {"prior_hidden": zero, "prior_weight": weight, "prior_bias": prior_bias}
    fused = linear_qtarget_loss(zero, weight, labels, method, bias=bias, **prior, **arguments)
    logits = bias.expand(2, 4)
    arguments["prior_logits"] = prior_bias.expand(2, 4)
    dense = qtarget_loss(logits, labels, method, reduction="none", **arguments)
    assert torch.allclose(dense, fused.token_loss, rtol=4 * torch.finfo(dtype).eps)
    target = build_target(logits, labels, method, **arguments)
    expected = (target.scale[:, None] * (logits.softmax(-1) - target.probs)).detach().mean(0)
    for loss in (dense.mean(), fused.loss):
        (gradient,) = torch.autograd.grad(loss, bias)
        assert torch.allclose(gradient, expected, rtol=0, atol=4 * torch.finfo(dtype).eps)
    trust = {"sft": 1.0, "dft": 0.0, "psft": 1.0, "cft": 0.5}[method]  # psft: 0/0, neither has moved
    assert fused.trust[0] == trust
    if method == "psft":
        assert dense[0] == -1
    if method == "sft":
        published = torch.nn.functional.cross_entropy(logits, labels)
        assert torch.allclose(torch.autograd.grad(published, bias)[0], expected)


@pytest.mark.parametrize("knob", [1e-2, 1e-4, 1e-9, 1e-40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("method", ["distill", "distill_hybrid", "gem"])
def test_masked_tokens_at_tiny_temperatures(method, dtype, knob):
    name = "beta" if method == "gem" else "temperature"
    logits = torch.tensor([[0.3, -torch.inf, 1.0, 0.2], [2.0, -torch.inf, -1.0, 2.5]], dtype=dtype)
    logits, prior_logits = logits.requires_grad_(), 30 * logits.detach().flip(0)
    labels = torch.tensor([0, 2])
    config = QTargetConfig(method, **{name: knob})
    loss = qtarget_loss(logits, labels, config, prior_logits=prior_logits)
    (gradient,) = torch.autograd.grad(loss, logits)
    # The sharpened distribution is its most probable token.
    sharp = torch.nn.functional.one_hot((logits if method == "gem" else prior_logits).argmax(-1), 4).to(dtype)
    target = build_target(logits, labels, config, prior_logits=prior_logits)
    label = torch.nn.functional.one_hot(labels, 4).to(dtype)
    p = logits.detach().softmax(-1)
    expected = {"gem": label + p - sharp, "distill": sharp, "distill_hybrid": (label + sharp) / 2}[method]
    assert loss.isfinite() and torch.allclose(target.probs, expected, atol=1e-6)
    assert torch.allclose(gradient, (p - expected) / 2, atol=1e-6)
