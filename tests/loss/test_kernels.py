"""The Triton kernels equal the published formulas and the plain kernel. They run in Triton's interpreter, on a CPU."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch


pytest.importorskip("triton")

from designs import free_formula
from formulas import FORMULAS, OF_2026
from measured import CLOSED
from problems import HEADS, make_problem, relative_error
from rounding import HALF, NAMES, arguments_of, assert_no_worse, fused, published, results, truth_of
from test_exactness import FREE_CASES, METHOD_CASES, SHAPES, TOLERANCE, case_id, check_linear, free_knobs
from test_loss_memory import PeakMemory
from test_precision import importance_slack
from thinned import by_kernels, by_ways, one_of_each, thinned

from trl_qtarget import METHODS, QTargetConfig, linear_qtarget_loss, register_residual, register_trust
from trl_qtarget.loss import choice
from trl_qtarget.loss.chunks import STATISTICS
from trl_qtarget.loss.kernels import fold, folded, gradient
from trl_qtarget.loss.kernels.plain import PlainKernel
from trl_qtarget.target.registry import TILE_STATISTICS, Positive
from trl_qtarget.target.residual import RESIDUALS
from trl_qtarget.target.trust import TRUSTS


pytestmark = pytest.mark.skipif(not choice._interpreted(), reason="on a GPU the kernels are compiled: test_cuda.py")


def both(problem, config: QTargetConfig, **more):
    """Output and gradients of the loss by the plain and by the Triton kernel."""
    found = []
    for kernel in ("torch", "triton"):
        leaves = problem.leaves()
        bias = leaves[2] if len(leaves) > 2 else None
        output = linear_qtarget_loss(
            *leaves[:2],
            problem.labels,
            replace(config, kernel=kernel),
            bias=bias,
            **{**problem.linear_arguments(), **more},
        )
        found.append((output, torch.autograd.grad(output.loss, leaves)))
    return found


def check_same(problem, config: QTargetConfig, tolerance: float = TOLERANCE, **more) -> None:
    (plain, plain_gradients), (fast, gradients) = both(problem, config, **more)
    for name in STATISTICS:
        expected, value = getattr(plain, name), getattr(fast, name)
        assert torch.equal(value.isnan(), expected.isnan()), name
        assert relative_error(value.nan_to_num(), expected.nan_to_num(), 1.0) < tolerance, name
    for value, expected in zip(gradients, plain_gradients, strict=True):
        assert relative_error(value, expected, 1e-2) < tolerance


# --- exactness, in float64 ---


@pytest.mark.parametrize(
    ("name", "knobs"),
    thinned(METHOD_CASES, lambda name, knobs: by_kernels(name) and not (knobs and name in OF_2026)),
    ids=case_id,
)
def test_method_equals_its_formula(name, knobs):
    for shape, head, chunk_tokens in zip(SHAPES[:2], ("capped", "scaled"), (None, 5), strict=True):
        config = QTargetConfig(name, chunk_tokens=chunk_tokens, kernel="triton", **knobs)
        check_linear(make_problem(*shape, head=head), FORMULAS[name], config, knobs)


@pytest.mark.parametrize(("trust", "residual"), thinned(FREE_CASES, lambda *pair: pair in one_of_each(FREE_CASES)))
def test_free_combination_equals_its_formula(trust, residual):
    knobs = free_knobs(trust, residual)
    config = QTargetConfig(None, trust=trust, residual=residual, chunk_tokens=7, kernel="triton", **knobs)
    check_linear(make_problem(*SHAPES[1]), free_formula(trust, residual), config, knobs)


@pytest.mark.parametrize("residual", ["prior", "guided"])
def test_the_policy_as_its_prior(residual):
    config = QTargetConfig(None, trust="clipped_ratio", residual=residual, prior="policy", kernel="triton")
    formula = free_formula("clipped_ratio", "policy")
    check_linear(make_problem(*SHAPES[1]), formula, config, {}, prior=False)
    config = QTargetConfig("target_sft", kernel="triton")
    check_linear(make_problem(*SHAPES[1]), FORMULAS["dft"], config, {}, prior=False)
    tempered = QTargetConfig(None, trust="one", residual="prior", temperature=2.0, prior="policy")
    check_same(make_problem(*SHAPES[1]), tempered)


_ROWS_AND_HEADS = list(product(CLOSED, HEADS))


@pytest.mark.parametrize(
    ("name", "head"),
    thinned(_ROWS_AND_HEADS, lambda *pair: pair in one_of_each(_ROWS_AND_HEADS)),
)
def test_every_statistic_is_that_of_the_plain_kernel(name, head):
    check_same(make_problem(13, 37, 6, 1, head=head), QTargetConfig(name, chunk_tokens=4))


@pytest.mark.parametrize("vocabulary", [1, 2, folded._BLOCK, folded._BLOCK + 1, 2 * folded._BLOCK + 317])
@pytest.mark.parametrize("name", ["target_sft", "label_smoothing", "gem", "eaft", "psft"])
def test_vocabularies_of_any_size(name, vocabulary):
    # Several blocks, whole and ragged, and a vocabulary that fills only part of one.
    check_same(make_problem(7, vocabulary, 5, 3), QTargetConfig(name))


_MASKED = list(product(CLOSED, ["bias", "prior_bias"]))


@pytest.mark.parametrize(
    ("name", "which"),
    thinned(
        _MASKED, lambda *pair: pair in one_of_each(_MASKED) and (pair[0] not in OF_2026 or pair[0] == "rank_tuner")
    ),
)
def test_masked_tokens(name, which):
    problem = make_problem(9, 2 * folded._BLOCK + 11, 4, 5)
    tokens = torch.arange(folded._BLOCK - 3, problem.weight.size(0))  # from the first block on, and all of the last
    tokens = tokens[~torch.isin(tokens, problem.labels)]
    setattr(problem, which, getattr(problem, which).index_fill(0, tokens, -math.inf))
    (plain, plain_gradients), (fast, gradients) = both(problem, QTargetConfig(name))
    assert (fast.token_loss - plain.token_loss).abs().max() <= TOLERANCE * plain.token_loss.abs().max()
    for value, expected in zip(gradients, plain_gradients, strict=True):
        assert torch.isfinite(value).all() and relative_error(value, expected, 1e-2) < TOLERANCE


@pytest.mark.parametrize("name", ["target_sft", "asft", "gem", "label_smoothing"])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e3])
def test_flat_and_extreme_logits(name, spread):
    problem = make_problem(13, 301, 6, 6)
    problem.hidden, problem.prior_hidden = problem.hidden * spread, problem.prior_hidden * spread
    check_same(problem, QTargetConfig(name), 1e-11)  # logits to 1e5: rounded by 1e-11


@pytest.mark.parametrize("knobs", [{"temperature": 0.02}, {"temperature": 50.0}, {"temperature": 1e-6}], ids=case_id)
def test_sharp_and_flat_mixtures(knobs):
    # At 1e-6 a share is beyond what is folded, and torch operations take over.
    check_same(make_problem(13, 101, 6, 7), QTargetConfig("distill_hybrid", **knobs))


def test_among_equals_the_first_is_the_favourite():
    hidden, weight = torch.zeros(3, 3), torch.randn(5000, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([4999, 0, 2500])
    output = linear_qtarget_loss(
        hidden,
        weight,
        labels,
        QTargetConfig("sft_kl", kernel="triton"),
        prior_hidden=hidden,
        prior_weight=weight,
    )
    assert output.is_top1.tolist() == output.prior_is_top1.tolist() == [0.0, 1.0, 0.0]


def test_nothing_scored_and_nothing_but_ignored():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    output = linear_qtarget_loss(hidden, weight, torch.full((3,), -100), QTargetConfig("gem", kernel="triton"))
    output.loss.backward()
    assert output.loss.item() == 0 and not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_not_hidden(bad):
    problem = make_problem(5, 37, 6, 8)
    problem.hidden[2, 1] = bad
    problem.labels[:] = 3
    (plain, _), (fast, _) = both(problem, QTargetConfig("target_sft"))
    assert torch.equal(plain.token_loss.isnan(), fast.token_loss.isnan()) and fast.token_loss[2].isnan()


# --- rounding ---


_ROUNDED = list(product(CLOSED, [torch.float32, *HALF]))
_ROUNDING = ("sft", "dft", "eaft", "asft", "psft", "gem", "target_sft")


@pytest.mark.parametrize(
    ("name", "dtype"),
    thinned(_ROUNDED, lambda *pair: pair[0] in _ROUNDING and pair in one_of_each(_ROUNDED)),
    ids=str,
)
def test_method_is_no_worse_than_its_formula(name, dtype):
    problem = make_problem(61, 203, 31, 2)
    config = QTargetConfig(name, chunk_tokens=17, kernel="triton")
    values = arguments_of(problem, dtype, 0.5)
    fast, plain = (results(way, problem, config, values) for way in (fused, published))
    assert_no_worse(fast, plain, truth_of(problem, config, values), dict.fromkeys(NAMES, dtype))


@pytest.mark.parametrize(
    ("trust", "residual"),
    thinned(FREE_CASES, lambda *pair: pair in one_of_each(FREE_CASES) and pair[0] in ("one", "entropy", "importance")),
)
def test_free_combination_is_no_worse_than_its_formula(trust, residual):
    problem = make_problem(61, 203, 31, 2)
    config = QTargetConfig(None, trust=trust, residual=residual, chunk_tokens=17, kernel="triton")
    values = arguments_of(problem, torch.float32, 0.5)
    fast, plain = (results(way, problem, config, values) for way in (fused, published))
    slack = importance_slack(problem, values) if trust == "importance" else 0.0
    assert_no_worse(fast, plain, truth_of(problem, config, values), dict.fromkeys(NAMES, torch.float32), slack)


@pytest.mark.parametrize("name", ["sft", "gem", "target_sft", "distill"])
@pytest.mark.parametrize("vocabulary", [37, folded._BLOCK, 2 * folded._BLOCK + 317])
def test_a_narrow_gradient_takes_the_place_of_its_logits(name, vocabulary, monkeypatch):
    # As on CUDA, whose products take bfloat16 operands: half as wide, in the memory that is read in the same pass.
    problem = make_problem(11, vocabulary, 6, 9)
    objective = QTargetConfig(name).objective(has_prior=True)
    logits, prior_logits = problem.logits().float(), problem.prior_logits().float()
    labels, factor = problem.labels.clamp(min=0), torch.tensor(0.25)
    weights = problem.token_weights.float()
    wanted = logits.clone()
    plain = PlainKernel(objective)
    tile = plain.tile(wanted, labels, prior_logits.clone() if objective.uses_prior else None, weights, None)
    plain.write_gradient(wanted, objective.target(tile), factor, 1.0)

    monkeypatch.setattr(folded, "mixed_gemm_supported", lambda product, operands, out: True)
    kernel = folded.FoldingKernel(objective)
    narrow = kernel.gradient_of(logits, torch.bfloat16)
    assert narrow.shape == logits.shape and narrow.data_ptr() == logits.data_ptr()
    tile = kernel.tile(logits, labels, prior_logits if objective.uses_prior else None, weights, None)
    kernel.write_gradient(narrow, objective.target(tile), factor, (1.0, 0.0))
    # One bfloat16 rounding, which the interpreter does by cutting bits off; and float32's of p - γ where both are 1.
    assert ((narrow.float() - wanted).abs() <= 2**-7 * wanted.abs() + 0.25 * 2**-22).all()


# --- designs of one's own ---


@pytest.fixture
def own_designs():
    """Designs that ask a tile for all that the documentation offers."""

    @register_trust("peak")
    def peak(tile):
        return tile.probs.amax(-1) * (tile.policy.entropy + tile.log_probs[:, 0].exp()).clamp(max=0.5)

    @register_trust("agreement", uses_prior=True)
    def agreement(tile):
        return (tile.probs * tile.prior_log_probs.exp()).sum(-1)

    @register_residual("cubed")
    def cubed(tile, *, temperature: Positive = 0.5):
        return torch.log_softmax(tile.log_probs / temperature, dim=-1)

    @register_residual("steered", uses_prior=True)
    def steered(tile, *, alpha: Positive = 0.7):
        return tile.mixture(policy=alpha, prior=0.9)

    @register_residual("moved", uses_prior=True)
    def moved(tile):
        return tile.mixture(policy=0.5, prior=0.25), torch.log_softmax(tile.prior_logits * 2, dim=-1)

    @register_residual("two_mixtures", uses_prior=True)
    def two_mixtures(tile):
        return tile.mixture(policy=0.5), tile.mixture(prior=2.0)

    @register_residual("gated", uses_prior=True)
    def gated(tile):
        surprised = (tile.prior_label_log_probs < -2.0)[:, None]
        return torch.where(surprised, tile.log_probs, torch.log_softmax(tile.prior_logits, dim=-1))

    @register_residual("itself")
    def itself(tile):
        return tile.log_probs

    trusts, residuals = ("peak", "agreement"), ("cubed", "steered", "moved", "two_mixtures", "gated", "itself")
    yield [(trust, residual) for trust in (*trusts, "probability") for residual in (*residuals, "guided")]
    for name in trusts:
        del TRUSTS[name]
    for name in residuals:
        del RESIDUALS[name]


def tiles(statistics: frozenset[str], prior: bool = True):
    """A tile of torch operations, and a folded one that was asked for these statistics; rows over a seam of steps."""
    generator = torch.Generator().manual_seed(5)
    shape = (6, folded._BLOCK + 37)  # a step in float64 is half as wide
    # Of few different numbers, so that many are equal; each with masked tokens, a label of row 3 among them.
    logits, prior_logits = torch.randint(-4, 5, (2, *shape), generator=generator).double()
    labels = torch.tensor([0, shape[1] - 1, folded._BLOCK // 2, 100, 7, 2077])
    logits[:, 50:200], prior_logits[:, 3000:] = -math.inf, -math.inf
    logits[4, 7], prior_logits[5, 2077] = 30.0, 30.0  # nearly all of the mass on the label
    trust = TRUSTS["probability" if not prior else "prior_probability"]
    objective = QTargetConfig(None, trust=trust.name, residual="policy").objective(has_prior=prior)
    objective = replace(objective, trust=replace(trust, statistics=tuple(statistics)))
    given = prior_logits if prior else None
    fast = folded.FoldingKernel(objective).tile(logits, labels, given, None, None)
    copies = logits.clone(), labels, None if given is None else given.clone(), None, None
    return PlainKernel(objective).tile(*copies), fast


@pytest.mark.parametrize("asked", [(), TILE_STATISTICS, *((name,) for name in TILE_STATISTICS)], ids=str)
@pytest.mark.parametrize("prior", [True, False])
def test_what_a_design_asks_for(asked, prior):
    plain, fast = tiles(frozenset(asked), prior)
    gathered = [name for name in asked if prior or name != "prior_mass_below"]
    found = {name: getattr(fast, name) for name in (*gathered, "largest_prob", "prior_label_log_probs")}
    assert not {"log_probs", "prior_log_probs"} & vars(fast).keys()  # nothing of the vocabulary's size
    for name in TILE_STATISTICS:  # the other ones are made by torch operations
        found[name] = getattr(fast, name)
    for name, value in found.items():
        torch.testing.assert_close(value, getattr(plain, name), rtol=TOLERANCE, atol=1e-14)  # logarithms near 0
    assert plain.rank[3] == plain.logits.size(1) and plain.rank[4] == 1  # of zeros, all are at least as probable


def test_own_designs_run(own_designs):
    for trust, residual in own_designs:
        check_same(make_problem(13, 37, 6, 4, head="capped"), QTargetConfig(None, trust=trust, residual=residual))


NOT_FOLDED = ("neighbors", "spared_top")


def test_only_some_residuals_are_not_folded():
    # So a new published residual needs no new kernel; one that is no mixture still runs, by torch operations.
    for name in RESIDUALS:
        objective = QTargetConfig(None, trust="one", residual=name).objective(has_prior=True)
        assert (folded.made_by(objective) is None) == (name in NOT_FOLDED), name
    expected = {"uniform": (0, 0), "prior": (0, 1), "guided": (0.5, 0.5), "sharpened": (1 / 0.7, 0)}
    for name, shares in expected.items():
        objective = QTargetConfig(None, trust="one", residual=name).objective(has_prior=True)
        assert folded.made_by(objective) == ((*shares, False), False)
    spared = QTargetConfig("mask_target").objective(has_prior=True)
    assert folded.made_by(spared) == ((0, 1, True), True)
    assert folded.made_by(QTargetConfig("sft").objective(has_prior=True)) == (None, False)


# --- passes and memory ---


@pytest.mark.parametrize("name", thinned(CLOSED, by_ways))
def test_one_pass_to_fold_and_one_to_write(name, monkeypatch):
    launched = []

    class Counted:
        def __init__(self, kernel, label):
            self.kernel, self.label = kernel, label

        def __getitem__(self, grid):
            launched.append((self.label, grid))
            return self.kernel[grid]

    monkeypatch.setattr(fold, "fold_kernel", Counted(fold.fold_kernel, "fold"))
    monkeypatch.setattr(gradient, "gradient_kernel", Counted(gradient.gradient_kernel, "gradient"))
    problem = make_problem(12, 37, 6, 4)
    problem.labels = problem.labels.clamp(min=0)
    hidden, weight, *_ = problem.leaves()
    config = QTargetConfig(name, chunk_tokens=6, kernel="triton")
    linear_qtarget_loss(hidden, weight, problem.labels, config, **problem.linear_arguments())
    before = [("fold", (6,))] * (2 * config.objective(has_prior=True).trust.per_sequence)
    assert launched == before + [("fold", (6,)), ("gradient", (6,))] * 2


@pytest.mark.parametrize(
    "name", thinned([name for name in CLOSED if METHODS[name].residual not in NOT_FOLDED], by_ways)
)
def test_nothing_of_the_size_of_the_logits_is_made_beside_them(name):
    tokens, vocabulary = 24, 4096
    problem = make_problem(tokens, vocabulary, 4, 40, bias=False)
    arguments = problem.linear_arguments()
    arguments = {key: x.float() if torch.is_tensor(x) and x.is_floating_point() else x for key, x in arguments.items()}
    hidden, weight = (x.float().requires_grad_() for x in (problem.hidden, problem.weight))
    config = QTargetConfig(name, kernel="triton")
    with PeakMemory() as memory:
        linear_qtarget_loss(hidden, weight, problem.labels, config, **arguments)
    scored = int(problem.scored.sum())
    buffers = 1 + config.objective(has_prior=True).uses_prior
    gradients = 2 * weight.nbytes
    assert buffers * scored * vocabulary * 4 <= memory.peak < (buffers + 0.2) * scored * vocabulary * 4 + gradients
