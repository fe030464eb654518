"""Identities between methods, and laws that hold for every input."""

import pytest
import torch
from formulas import FORMULAS
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import IGNORE, Problem, make_problem, relative_error

from trl_qtarget import QTargetConfig, build_target, linear_qtarget_loss, qtarget_loss


# Two orders of the same float64 operations, as in test_exactness.
TOLERANCE = 1e-12
FLOOR = 1e-2

problems = st.builds(
    make_problem,
    tokens=st.integers(2, 23),
    vocabulary=st.integers(2, 47),
    width=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    bias=st.just(True),
    head=st.sampled_from(["plain", "scaled", "capped"]),
)
names = st.sampled_from(sorted(FORMULAS))
# Targets that take mass from another distribution than they give it to.
SIGNED = {"gem", "tofu", "otr", "mask_target", "lp_sft"}
laws = settings(max_examples=40, deadline=None, derandomize=True)


def evaluate(problem: Problem, config, prior: bool = True) -> dict[str, torch.Tensor]:
    """Losses per token and gradients, dense and fused."""
    arguments = problem.dense_arguments(prior)
    logits = problem.logits().detach().requires_grad_()
    losses = qtarget_loss(logits, problem.labels, config, reduction="none", **arguments)
    leaves = problem.leaves()
    output = linear_qtarget_loss(
        *leaves[:2], problem.labels, config, bias=leaves[2], **problem.linear_arguments(prior)
    )
    gradients = torch.autograd.grad(output.loss, leaves)
    return {
        "dense value": losses.detach(),
        "fused value": output.token_loss,
        "dense gradient": torch.autograd.grad(losses.sum(), logits)[0],
        "hidden": gradients[0],
        "weight": gradients[1],
        "bias": gradients[2],
    }


def assert_same(one: dict, other: dict, value: bool = True, tolerance: float = TOLERANCE) -> None:
    for name, expected in other.items():
        if value or "value" not in name:
            assert relative_error(one[name], expected, FLOOR) < tolerance, name


def lagging(problem: Problem) -> Problem:
    """The same problem with a prior that is the policy, as right after a sync."""
    problem.prior_hidden, problem.prior_weight, problem.prior_bias = problem.hidden, problem.weight, problem.bias
    own = {name: value for name, value in problem.head.items() if not name.startswith("prior_")}
    problem.head = {**own, **{f"prior_{name}": value for name, value in own.items()}}
    return problem


# --- identities between methods ---

# (one, other, whether the values agree as well)
IDENTITIES = {
    "target_sft eta=0 is dft": (QTargetConfig("target_sft", eta=0.0), "dft", True),
    "target_sft prior=policy is dft": (QTargetConfig("target_sft", prior="policy"), "dft", True),
    "beyond_log alpha=1 is dft": (QTargetConfig("beyond_log", alpha=1.0), "dft", False),
    "beyond_log alpha=0 is sft": (QTargetConfig("beyond_log", alpha=0.0), "sft", True),
    "gem beta=1 is sft": (QTargetConfig("gem", beta=1.0), "sft", False),
    "asft lam=0 is dft": (QTargetConfig("asft", lam=0.0), "dft", True),
    "sft_kl lam=0 is sft": (QTargetConfig("sft_kl", lam=0.0), "sft", True),
    "label_smoothing lam=0 is sft": (QTargetConfig("label_smoothing", lam=0.0), "sft", True),
    "profit tau=0 is sft": (QTargetConfig("profit", tau=0.0), "sft", True),
    "eaft alpha=0 is sft": (QTargetConfig("eaft", alpha=0.0), "sft", True),
    "distill_hybrid lam=0 is sft": (QTargetConfig("distill_hybrid", lam=0.0), "sft", True),
    "distill_hybrid lam=1 is distill": (QTargetConfig("distill_hybrid", lam=1.0), "distill", False),
    "tofu alpha=0 is gem": (QTargetConfig("tofu", alpha=0.0, beta=0.8), QTargetConfig("gem", beta=0.8), False),
    "tofu alpha=0 beta=1 is sft": (QTargetConfig("tofu", alpha=0.0, beta=1.0), "sft", True),
    "saft lam=1 is dft": (QTargetConfig("saft", lam=1.0), "dft", True),
    "saft lam=0 is sft": (QTargetConfig("saft", lam=0.0), "sft", True),
    "mask_target lam=0 is sft": (QTargetConfig("mask_target", lam=0.0), "sft", True),
    "lp_sft lam=0 is sft": (QTargetConfig("lp_sft", lam=0.0), "sft", True),
    "lp_sft of the whole vocabulary is mask_target": (QTargetConfig("lp_sft", top_k=10_000), "mask_target", False),
    "asft_k3 lam=0 is dft": (QTargetConfig("asft_k3", lam=0.0), "dft", True),
    "asft_k1 lam=0 is dft": (QTargetConfig("asft_k1", lam=0.0), "dft", True),
    "trsft tau=1 is dft": (QTargetConfig("trsft", tau=1.0), "dft", True),
    "prift_mass tau=0 is sft": (QTargetConfig("prift_mass", tau=0.0), "sft", True),
    "otr beta=0 temperature=1 is dft": (QTargetConfig("otr", beta=0.0, temperature=1.0), "dft", True),
}


@pytest.mark.parametrize("beta", [-0.1, 0.4])
def test_otr_at_temperature_one_is_a_share_of_dft(beta):
    problem = make_problem(13, 37, 6, 1)
    found, dft = evaluate(problem, QTargetConfig("otr", beta=beta, temperature=1.0)), evaluate(problem, "dft")
    assert_same(found, {name: (1 - beta) * value for name, value in dft.items()}, value=False)


def test_saft_is_asft_s_trust_made_larger():
    problem, lam = make_problem(13, 37, 6, 1), 0.25 / 0.75
    larger = QTargetConfig(method=None, trust="probability_anchor", residual="policy", scale="1 + lam", lam=lam)
    assert_same(evaluate(problem, larger), evaluate(problem, QTargetConfig("saft", lam=0.25)))


def test_gift_tends_to_distill_and_to_sft():
    problem = make_problem(13, 37, 6, 1)
    assert_same(evaluate(problem, QTargetConfig("gift", beta=1e-9)), evaluate(problem, "distill"), tolerance=1e-8)
    assert_same(evaluate(problem, QTargetConfig("gift", beta=200.0)), evaluate(problem, "sft"))


@pytest.mark.parametrize("identity", IDENTITIES)
@pytest.mark.parametrize("head", ["plain", "capped"])
def test_identity(identity, head):
    one, other, value = IDENTITIES[identity]
    for shape in [(1, 11, 5, 0), (13, 37, 6, 1), (29, 101, 17, 2)]:
        problem = make_problem(*shape, head=head)
        assert_same(evaluate(problem, one), evaluate(problem, other), value)


# (method, what it is when its prior is the policy, whether the values agree as well)
SYNCED = {
    "psft": ("sft", False),
    "iw_sft": ("sft", True),
    "target_sft": ("dft", False),
    "prift": ("dft", True),
    "asft_k3": ("dft", True),
    "mask_target": ("sft", True),
}


@pytest.mark.parametrize("name", SYNCED)
@pytest.mark.parametrize("head", ["plain", "scaled", "capped"])
def test_identity_right_after_a_sync(name, head):
    other, value = SYNCED[name]
    for shape in [(1, 11, 5, 0), (13, 37, 6, 1), (29, 101, 17, 2)]:
        problem = lagging(make_problem(*shape, head=head))
        assert_same(evaluate(problem, name), evaluate(problem, other), value)


def test_psft_right_after_a_sync_reports_ratio_one():
    problem = lagging(make_problem(13, 37, 6, 3))
    result = evaluate(problem, "psft")
    for name in ("dense value", "fused value"):
        assert ((result[name] + 1)[problem.scored].abs() < 1e-13).all()


@pytest.mark.parametrize("trust", ["one", "probability", "entropy"])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_guided_by_the_policy_is_the_policy(trust, eta):
    problem = lagging(make_problem(13, 37, 6, 4))
    guided = QTargetConfig(method=None, trust=trust, residual="guided", eta=eta)
    policy = QTargetConfig(method=None, trust=trust, residual="policy")
    expected = evaluate(problem, policy)
    # The policy's logits handed over as a prior: the value has CE(sg[p], p) more than the policy's.
    assert_same(evaluate(problem, guided), expected, value=False)
    assert_same(evaluate(problem, guided, prior=False), expected)
    own = QTargetConfig(method=None, trust=trust, residual="guided", eta=eta, prior="policy")
    assert_same(evaluate(make_problem(13, 37, 6, 4), own), evaluate(make_problem(13, 37, 6, 4), policy))


def test_methods_are_points_of_the_design_space():
    pairs = {
        "sft": {"trust": "one", "residual": "uniform"},
        "dft": {"trust": "probability", "residual": "policy"},
        "profit": {"trust": "threshold", "residual": "policy"},
        "eaft": {"trust": "entropy", "residual": "policy"},
        "iw_sft": {"trust": "importance", "residual": "policy"},
        "cft": {"trust": "token_weights", "residual": "policy"},
        "label_smoothing": {"trust": "constant", "residual": "uniform"},
        "gem": {"trust": "one", "residual": "sharpened"},
        "distill": {"trust": "zero", "residual": "prior"},
        "target_sft": {"trust": "probability", "residual": "guided"},
    }
    problem = make_problem(13, 37, 6, 5)
    numbers = {"alpha": 0.3, "eta": 0.25}
    measured = QTargetConfig(method=None, trust="power", residual="guided", **numbers)
    adaptive = evaluate(problem, QTargetConfig("adaptive_sft", **numbers))
    assert_same(evaluate(problem, measured), adaptive, tolerance=1e-14)
    for name, designs in pairs.items():
        free = QTargetConfig(method=None, **designs)
        assert_same(evaluate(problem, free), evaluate(problem, name), tolerance=1e-14)


def test_beyond_log_tends_to_the_nll():
    problem = make_problem(13, 37, 6, 6)
    expected = evaluate(problem, "sft")
    for alpha in (1e-3, 1e-6, 1e-9, 1e-12):
        # (1 - p^alpha)/alpha = NLL (1 - alpha NLL/2 + ...), and p^alpha = 1 - alpha NLL + ..., NLL below 100 here.
        difference = evaluate(problem, QTargetConfig("beyond_log", alpha=alpha))
        assert_same(difference, expected, tolerance=100 * alpha + TOLERANCE)


# --- laws for all inputs ---


@laws
@given(problems, names)
def test_target_rows_sum_to_one(problem, name):
    target = build_target(problem.logits(), problem.labels, name, **problem.dense_arguments())
    # Trust reaches 16 in iw_sft; a row sums numbers of that size.
    assert ((target.probs.sum(-1) - 1).abs() < 1e-12 * target.probs.abs().sum(-1)).all()
    assert (target.scale >= 0).all() and (target.scale[~problem.scored] == 0).all()


@laws
@given(problems, names)
def test_gradient_rows_sum_to_zero_over_the_vocabulary(problem, name):
    logits = problem.logits().detach().requires_grad_()
    loss = qtarget_loss(logits, problem.labels, name, reduction="sum", **problem.dense_arguments())
    (gradient,) = torch.autograd.grad(loss, logits)
    target = build_target(logits, problem.labels, name, **problem.dense_arguments())
    size = target.scale * (1 + target.probs.abs().sum(-1))
    assert (gradient.sum(-1).abs() <= TOLERANCE * size).all()
    if "logit_softcap" not in problem.head:  # then d loss / d bias is scale · the column sums
        leaves = problem.leaves()
        output = linear_qtarget_loss(*leaves[:2], problem.labels, name, bias=leaves[2], **problem.linear_arguments())
        (bias,) = torch.autograd.grad(output.loss, leaves[2:])
        assert abs(bias.sum().item()) <= TOLERANCE * (1 + size.max().item())


@laws
@given(problems, names, st.integers(0, 2**31))
def test_a_constant_added_to_a_row_of_logits_changes_nothing(problem, name, seed):
    generator = torch.Generator().manual_seed(seed)
    arguments = problem.dense_arguments()
    shifts = 10 * torch.randn(2, len(problem.labels), 1, generator=generator, dtype=torch.float64)
    plain = qtarget_loss(problem.logits(), problem.labels, name, reduction="none", **arguments)
    target = build_target(problem.logits(), problem.labels, name, **arguments)
    arguments["prior_logits"] = arguments["prior_logits"] + shifts[1]
    logits = problem.logits() + shifts[0]
    shifted = build_target(logits, problem.labels, name, **arguments)
    # The sum z + c, with c up to 50, is itself rounded.
    assert relative_error(shifted.probs, target.probs) < 10 * TOLERANCE
    assert relative_error(shifted.scale, target.scale) < 10 * TOLERANCE
    losses = qtarget_loss(logits, problem.labels, name, reduction="none", **arguments)
    assert relative_error(losses, plain, FLOOR) < 10 * TOLERANCE


@laws
@given(problems, names, st.randoms(use_true_random=False), st.sampled_from([None, 1, 3]))
def test_permuted_tokens_give_permuted_results(problem, name, random, chunk_tokens):
    order = list(range(len(problem.labels)))
    random.shuffle(order)
    permuted = make_permuted(problem, torch.tensor(order))
    config = QTargetConfig(name, chunk_tokens=chunk_tokens)
    before, after = evaluate(problem, config), evaluate(permuted, config)
    for key in ("dense value", "fused value", "dense gradient", "hidden"):
        assert relative_error(after[key], before[key][order], FLOOR) < TOLERANCE, key
    for key in ("weight", "bias"):
        assert relative_error(after[key], before[key], FLOOR) < TOLERANCE, key


def make_permuted(problem: Problem, rows: torch.Tensor) -> Problem:
    """These rows of a problem."""
    per_token = ("hidden", "labels", "prior_hidden", "token_weights", "sequence_ids")
    chosen = {name: getattr(problem, name)[rows] for name in per_token}
    return Problem(**{**vars(problem), **chosen})


@laws
@given(problems, names, st.integers(1, 30))
def test_chunk_tokens_do_not_change_the_result(problem, name, chunk_tokens):
    whole = evaluate(problem, name)
    parts = evaluate(problem, QTargetConfig(name, chunk_tokens=chunk_tokens))
    assert_same(parts, whole)


@laws
@given(problems, names)
def test_ignored_tokens_have_no_influence(problem, name):
    kept = problem.scored.nonzero().squeeze(1)
    before = evaluate(problem, name)
    rest = evaluate(make_permuted(problem, kept), name)
    for key in ("dense value", "fused value", "dense gradient", "hidden"):
        assert (before[key][~problem.scored] == 0).all()
        assert relative_error(before[key][kept], rest[key], FLOOR) < TOLERANCE, key
    for key in ("weight", "bias"):
        assert relative_error(before[key], rest[key], FLOOR) < TOLERANCE, key
    # Not even NaN reaches the result: the positions are not looked at.
    poisoned = make_permuted(problem, torch.arange(len(problem.labels)))
    for name_of_rows in ("hidden", "prior_hidden"):
        rows = getattr(poisoned, name_of_rows).clone()
        rows[~problem.scored] = torch.nan
        setattr(poisoned, name_of_rows, rows)
    for key, value in evaluate(poisoned, name).items():
        assert torch.equal(value, before[key]), key


@laws
@given(problems, names, st.floats(1, 1000), st.booleans())
def test_num_items_in_batch_divides(problem, name, items, as_tensor):
    leaves = problem.leaves()
    arguments = problem.linear_arguments()
    count = torch.tensor(items) if as_tensor else items
    output = linear_qtarget_loss(
        *leaves[:2], problem.labels, name, bias=leaves[2], num_items_in_batch=count, **arguments
    )
    gradients = torch.autograd.grad(output.loss, leaves)
    mean = evaluate(problem, name)
    items, scored = float(count), problem.scored.sum().clamp(min=1)
    assert relative_error(output.loss * items, output.token_loss.sum(), FLOOR) < TOLERANCE
    for gradient, key in zip(gradients, ("hidden", "weight", "bias"), strict=True):
        assert relative_error(gradient * items / scored, mean[key], FLOOR) < TOLERANCE


@laws
@given(problems, st.sampled_from(sorted(set(FORMULAS) - SIGNED)))
def test_divergence_to_a_proper_target_is_not_negative(problem, name):
    output = linear_qtarget_loss(
        problem.hidden, problem.weight, problem.labels, name, bias=problem.bias, **problem.linear_arguments()
    )
    # No entry of Q = γ δ + (1 - γ) π̃ is negative; γ may be, of `asft_k1`, where the policy gives the label enough.
    proper = (output.label_mass >= 0) & (output.trust <= 1)
    # KL is the difference of two cross-entropies of up to a few hundred nats: rounding may leave -1e-13.
    assert (output.kl[proper] >= -1e-13).all()
    assert output.kl[~proper].isnan().all()
    assert (output.label_mass[proper] >= 0).all() and (output.label_mass[proper] <= 1 + 1e-15).all()
    assert (output.entropy >= 0).all() and (output.nll >= 0).all()


@laws
@given(problems, st.sampled_from(["iw_sft", "target_sft"]), st.integers(-(2**40), 2**40), st.integers(1, 2**20))
def test_sequence_ids_are_only_names(problem, name, offset, stride):
    before = evaluate(problem, name)
    problem.sequence_ids = offset - stride * problem.sequence_ids
    assert_same(evaluate(problem, name), before)


def test_without_sequence_ids_all_tokens_are_one_sequence():
    problem = make_problem(13, 37, 6, 7)
    outputs = []
    for ids in (None, torch.full((13,), 5)):
        arguments = {**problem.linear_arguments(), "sequence_ids": ids}
        outputs.append(linear_qtarget_loss(problem.hidden, problem.weight, problem.labels, "iw_sft", **arguments))
    assert relative_error(outputs[0].token_loss, outputs[1].token_loss) < 1e-15
    assert len(outputs[0].trust[problem.scored].unique()) == 1


def test_each_sequence_has_its_own_weight():
    problem = make_problem(29, 37, 6, 8)
    arguments = problem.linear_arguments()
    whole = linear_qtarget_loss(problem.hidden, problem.weight, problem.labels, "iw_sft", **arguments)
    for sequence in problem.sequence_ids.unique():
        alone = problem.labels.masked_fill(problem.sequence_ids != sequence, IGNORE)
        part = linear_qtarget_loss(problem.hidden, problem.weight, alone, "iw_sft", **arguments)
        assert relative_error(part.trust[part.scored], whole.trust[part.scored]) < TOLERANCE
