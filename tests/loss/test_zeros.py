"""Tokens without a gradient are left out of the products, and nothing else changes."""

import pytest
import torch
from problems import HEADS, make_problem
from thinned import thinned
from torch import Tensor

from trl_qtarget import QTargetConfig, linear_qtarget_loss
from trl_qtarget import gemm as gemm_module
from trl_qtarget.gemm import gather_rows_
from trl_qtarget.loss import choice
from trl_qtarget.loss.zeros import ZeroSearch


# Zeros that are known from the weights, and such as the statistics tell.
WITH_ZEROS = {
    "cft": QTargetConfig("cft"),
    "profit": QTargetConfig("profit", tau=0.02),
    "psft": QTargetConfig("psft", epsilon=0.1),
    "infosft": QTargetConfig("infosft", tau=0.51),
    "prift_mass": QTargetConfig("prift_mass", tau=0.9),
    "formula": QTargetConfig(method=None, trust="max(0, 0.05 - p)", residual="policy"),
    "formula of weights": QTargetConfig(method=None, trust="one", residual="policy", scale="weight"),
}
KERNELS = ["torch", "triton"]


@pytest.fixture(autouse=True)
def interpreter(request):
    """Triton's kernels run on a CPU in its interpreter alone; where a GPU compiles them, test_cuda.py has its turn."""
    if (
        "kernel" in request.fixturenames
        and request.getfixturevalue("kernel") == "triton"
        and not choice._interpreted()
    ):
        pytest.skip("on a GPU the kernels are compiled: test_cuda.py")


@pytest.fixture
def multiplied(monkeypatch):
    """How many tokens were multiplied back."""
    rows = []
    product = gemm_module.backproject
    monkeypatch.setattr(gemm_module, "backproject", lambda *args: rows.append(len(args[1])) or product(*args))
    return rows


def problem_with_zeros(head: str = "plain"):
    problem = make_problem(53, 97, 8, 5, head=head)
    problem.token_weights[::3] = 0.0
    problem.token_weights[20:34] = 0.0  # some chunks have no other
    return problem


def results(problem, config: QTargetConfig) -> list[Tensor]:
    leaves = problem.leaves()
    arguments = {**problem.linear_arguments(), "bias": leaves[2]}
    output = linear_qtarget_loss(*leaves[:2], problem.labels, config, **arguments)
    gradients = torch.autograd.grad(output.loss, leaves)
    return [output.loss.detach(), output.token_loss, output.nll, output.trust, *gradients]


CASES = [(name, head, kernel) for name in WITH_ZEROS for head in HEADS for kernel in ("torch", "triton")]


@pytest.mark.parametrize(
    "name, head, kernel",
    thinned(
        CASES, lambda name, head, kernel: kernel == "torch" or (name, head) in (("cft", "plain"), ("psft", "capped"))
    ),
)
def test_same_numbers_with_fewer_rows(name, head, kernel, multiplied, monkeypatch):
    problem = problem_with_zeros(head)
    config = QTargetConfig(**{**WITH_ZEROS[name].to_dict(), "chunk_tokens": 6, "kernel": kernel})
    pulling = int((problem_gradient(problem, config).abs().amax(-1) > 0).sum())
    multiplied.clear()
    found = results(problem, config)
    assert sum(multiplied) == pulling
    assert pulling < int(problem.scored.sum()) or (name, head) == ("infosft", "capped")  # no token is sure enough
    multiplied.clear()
    monkeypatch.setattr(ZeroSearch, "rows", lambda self, target: None)
    for value, whole in zip(found, results(problem, config), strict=True):
        torch.testing.assert_close(value, whole, rtol=1e-12, atol=1e-15)
    assert sum(multiplied) == int(problem.scored.sum())


def problem_gradient(problem, config: QTargetConfig) -> Tensor:
    """The gradient over the logits `[N, V]`, by the identity as head."""
    logits = problem.logits().detach().requires_grad_()
    arguments = {**problem.linear_arguments(), "bias": None, "logit_scale": 1.0, "logit_softcap": None}
    loss = linear_qtarget_loss(logits, torch.eye(logits.size(1)).to(logits), problem.labels, config, **arguments).loss
    return torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_pulls(kernel, multiplied):
    problem = problem_with_zeros()
    problem.token_weights.zero_()
    found = results(problem, QTargetConfig("cft", chunk_tokens=6, kernel=kernel))
    assert not multiplied and all((gradient == 0).all() for gradient in found[4:])


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_token_without_a_number_is_not_left_out(kernel):
    problem = problem_with_zeros()
    row = int((problem.scored & (problem.token_weights == 0)).nonzero()[0])
    problem.hidden[row] = torch.nan
    *_, of_hidden, of_weight, _ = results(problem, QTargetConfig("cft", kernel=kernel))
    assert of_hidden[row].isnan().all() and of_weight.isnan().any()


@pytest.mark.parametrize("name", ["sft", "target_sft"])
def test_methods_without_zeros_are_multiplied_whole(name, multiplied):
    problem = problem_with_zeros()
    results(problem, QTargetConfig(name, chunk_tokens=6))
    assert sum(multiplied) == int(problem.scored.sum())


class TestOnAnAccelerator:
    """What an accelerator is waited for; the search itself only reads the name of the device."""

    def search(self, config: QTargetConfig) -> ZeroSearch:
        return ZeroSearch(config.objective(has_prior=False), torch.device("cuda"))

    def test_is_not_waited_for_without_zeros_to_be_expected(self):
        assert self.search(QTargetConfig("dft")).rows(None) is None  # does not even look at the target

    @pytest.mark.parametrize("zeros, worthwhile", [(1, False), (6, True)])
    def test_goes_on_only_where_it_is_worth_it(self, zeros, worthwhile, monkeypatch):
        pulls = torch.arange(16) >= zeros
        monkeypatch.setattr("trl_qtarget.loss.zeros.tokens_that_pull", lambda target: pulls)
        search, target = self.search(QTargetConfig("profit")), type("Target", (), {"trust": torch.ones(16)})
        for _ in range(2):
            rows = search.rows(target)
            assert (rows.tolist() == list(range(zeros, 16))) if worthwhile else rows is None
            pulls = torch.arange(16) >= 6 if not worthwhile else pulls  # too late: it looks no more

    @pytest.mark.parametrize(
        "trust, expected", [("p ** 2", False), ("clip(p, 0.1, 1)", True), ("p * weight", True), ("p > 0.5", True)]
    )
    def test_formulas_say_whether_they_have_zeros(self, trust, expected):
        config = QTargetConfig(method=None, trust=trust, residual="policy")
        assert config.objective(has_prior=False).has_zeros == expected

    def test_another_residual_has_none(self):
        config = QTargetConfig(method=None, trust="threshold", residual="uniform")
        assert not config.objective(has_prior=False).has_zeros


@pytest.mark.parametrize(
    "rows", [[], [0], [15], [0, 1, 2], [3, 4, 9, 15], list(range(16)), list(range(1, 16, 2))], ids=str
)
def test_rows_are_moved_to_the_front(rows):
    matrix = torch.randn(16, 24)[:, :11]
    wanted = matrix[rows].clone() if rows else matrix[:0]
    assert torch.equal(gather_rows_(matrix, torch.tensor(rows, dtype=torch.long)), wanted)
