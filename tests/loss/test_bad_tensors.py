"""Tensors that do not fit: refused with the argument, the cause and the remedy."""

import math
import re

import pytest
import torch
from problems import make_problem

from trl_qtarget import QTargetConfig, build_target, induced_target, linear_qtarget_loss, qtarget_loss


TOKENS, VOCABULARY, WIDTH = 6, 11, 4
WAYS = ["build_target", "qtarget_loss", "linear_qtarget_loss"]


def call(way: str, config, **changes) -> None:
    """Call one of the functions on a good problem, with some arguments changed."""
    problem = make_problem(TOKENS, VOCABULARY, WIDTH, 0)
    given = {"labels": problem.labels.clamp(min=0), "config": config}
    if way == "linear_qtarget_loss":
        given.update(hidden=problem.hidden, weight=problem.weight, bias=problem.bias)
        given.update({name: getattr(problem, name) for name in ("prior_hidden", "prior_weight", "prior_bias")})
    else:
        given.update(logits=problem.logits(), prior_logits=problem.prior_logits(), embeddings=problem.weight)
    given.update(token_weights=problem.token_weights, sequence_ids=problem.sequence_ids)
    given.update(changes)
    function = {f.__name__: f for f in (build_target, qtarget_loss, linear_qtarget_loss)}[way]
    function(**{name: value for name, value in given.items() if value is not None})


def refused(match: str, way: str, config="target_sft", **changes) -> None:
    with pytest.raises(ValueError, match=re.escape(match)):
        call(way, config, **changes)


@pytest.mark.parametrize("way", WAYS)
def test_the_good_problem_is_accepted(way):
    for config in ("target_sft", "cft", "iw_sft", {"method": None, "trust": "one", "residual": "neighbors"}):
        call(way, config)


# --- labels ---


@pytest.mark.parametrize("way", WAYS)
def test_labels_of_another_shape(way):
    for shape in ([TOKENS - 1], [TOKENS, 1], [1, TOKENS], []):
        labels = torch.zeros(shape, dtype=torch.long)
        refused(f"`labels` must have shape [6], one per token, got {shape}: flatten it.", way, labels=labels)


@pytest.mark.parametrize("way", WAYS)
def test_labels_that_are_no_ids(way):
    for dtype in (torch.float32, torch.bfloat16, torch.bool):
        labels = torch.zeros(TOKENS, dtype=dtype)
        message = f"`labels` must be token ids, got dtype {dtype}: convert it to torch.long."
        refused(message, way, labels=labels)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.uint8], ids=str)
def test_labels_of_another_integer_dtype(way, dtype):
    # Either they work or they are refused; not an error from inside PyTorch.
    try:
        call(way, "sft", labels=torch.arange(TOKENS, dtype=dtype))
    except ValueError as error:
        assert str(error).startswith("`labels`")


@pytest.mark.parametrize("way", WAYS)
def test_labels_outside_the_vocabulary(way):
    for outside in (VOCABULARY, VOCABULARY + 5, -1, -99):
        labels = torch.tensor([0, 1, -100, outside, 2, 3])
        message = (
            f"`labels` holds the id {outside}, outside the vocabulary of 11: mark tokens that should not be scored "
            "with `ignore_index` (-100)."
        )
        refused(message, way, labels=labels)
    refused("with `ignore_index` (-1).", way, labels=torch.full((TOKENS,), -100), ignore_index=-1)


# --- what is given per token ---


@pytest.mark.parametrize("way", WAYS)
def test_weights_that_are_missing(way):
    message = (
        "`token_weights` is missing: the trust 'token_weights' reads one weight per token. Pass a tensor as long as "
        "`labels`."
    )
    refused(message, way, "cft", token_weights=None)
    refused(message, way, {"method": None, "trust": "token_weights", "residual": "uniform"}, token_weights=None)


@pytest.mark.parametrize("way", WAYS)
def test_weights_that_do_not_fit(way):
    for shape in ([TOKENS + 1], [TOKENS, 1], []):
        message = f"`token_weights` must have shape [6], one per token, got {shape}."
        refused(message, way, "cft", token_weights=torch.ones(shape))
    for bad in (-0.1, float("nan"), float("inf"), -float("inf")):
        weights = torch.ones(TOKENS)
        weights[3] = bad
        message = "`token_weights` has a weight that is negative, NaN or infinite: weights must be >= 0."
        refused(message, way, "cft", token_weights=weights)
        refused(message, way, "sft", token_weights=weights)  # a mistake even where nothing reads them


@pytest.mark.parametrize("way", WAYS)
def test_weights_of_any_number_type(way):
    for dtype in (torch.bool, torch.int64, torch.float16, torch.float32):
        call(way, "cft", token_weights=torch.tensor([1, 0, 1, 1, 0, 1], dtype=dtype))


@pytest.mark.parametrize("way", WAYS)
def test_sequence_ids_that_do_not_fit(way):
    for shape in ([TOKENS - 1], [1, TOKENS]):
        ids = torch.zeros(shape, dtype=torch.long)
        refused(f"`sequence_ids` must have shape [6], one per token, got {shape}.", way, "iw_sft", sequence_ids=ids)


# --- dense arguments ---


@pytest.mark.parametrize("way", WAYS[:2])
def test_logits_of_another_shape(way):
    for shape in ([2, 3, VOCABULARY], [VOCABULARY]):
        message = f"`logits` must have shape [N, V], got {shape}: flatten the leading dimensions."
        refused(message, way, logits=torch.zeros(shape))


@pytest.mark.parametrize("way", WAYS[:2])
def test_prior_logits_that_do_not_fit(way):
    for shape in ([TOKENS - 1, VOCABULARY], [1, TOKENS, VOCABULARY], [TOKENS], [TOKENS, 0]):
        message = f"`prior_logits` must be [6, V'], one row per row of `logits`, got {shape}: V' may differ from V"
        refused(message, way, prior_logits=torch.zeros(shape))


@pytest.mark.parametrize("policy", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prior", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_policy_and_prior_of_different_dtypes(policy, prior):
    # A teacher in another precision than the student's is nothing unusual, so all of these work.
    problem = make_problem(TOKENS, VOCABULARY, WIDTH, 0)
    logits, prior_logits = problem.logits().to(policy), problem.prior_logits().to(prior)
    for name in ("target_sft", "sft_kl", "psft", "distill", "iw_sft"):
        assert build_target(logits, problem.labels, name, prior_logits=prior_logits).probs.isfinite().all()
        assert qtarget_loss(logits, problem.labels, name, prior_logits=prior_logits).isfinite()
        linear_qtarget_loss(
            problem.hidden.to(policy),
            problem.weight.to(policy),
            problem.labels,
            name,
            prior_hidden=problem.prior_hidden.to(prior),
            prior_weight=problem.prior_weight.to(prior),
        )


@pytest.mark.parametrize("way", WAYS[:2])
def test_embeddings_that_are_missing(way):
    config = QTargetConfig(None, trust="one", residual="neighbors")
    message = "`embeddings` is missing: the residual 'neighbors' reads the output embeddings [V, H]."
    refused(message, way, config, embeddings=None)


@pytest.mark.parametrize("way", WAYS[:2])
def test_embeddings_that_do_not_fit(way):
    neighbors = QTargetConfig(None, trust="one", residual="neighbors")
    for config in (neighbors, "sft"):  # a mistake even where nothing reads them
        for shape in ([VOCABULARY + 1, WIDTH], [WIDTH, VOCABULARY], [VOCABULARY], [1, VOCABULARY, WIDTH]):
            message = f"`embeddings` must be the output embeddings [V, H] of the same vocabulary, [11, H], got {shape}"
            refused(message, way, config, embeddings=torch.zeros(shape))
    refused("of torch.int64: pass the weight of the LM head", way, embeddings=torch.ones(VOCABULARY, WIDTH).long())


def test_reduction_that_is_unknown():
    message = "`reduction='average'` is unknown: choose 'mean', 'sum' or 'none'."
    refused(message, "qtarget_loss", reduction="average")


def test_induced_target_of_something_that_is_no_per_token_loss():
    logits, labels = torch.randn(3, 5), torch.tensor([0, 1, 2])
    shape = re.escape("`loss_fn` must return one loss per token, of the shape of `labels`: remove its reduction.")
    for loss_fn in (
        lambda z, y: qtarget_loss(z, y, "sft"),
        lambda z, y: z,
        lambda z, y: None,
        lambda z, y: 0.0,
    ):
        with pytest.raises(ValueError, match=shape):
            induced_target(loss_fn, logits, labels)
    gradient = re.escape("`loss_fn` returned a loss without gradient: compute it from `logits` differentiably.")
    with pytest.raises(ValueError, match=gradient):
        induced_target(lambda z, y: z.detach().sum(-1), logits, labels)
    parameter = torch.zeros(3, requires_grad=True)  # differentiable, but not with respect to the logits
    with pytest.raises(ValueError, match=gradient):
        induced_target(lambda z, y: parameter * 2, logits, labels)


# --- arguments of the fused loss ---


def test_hidden_and_weight_that_do_not_fit():
    way = "linear_qtarget_loss"
    for hidden, weight in (
        ([2, 3, WIDTH], [VOCABULARY, WIDTH]),
        ([TOKENS, WIDTH], [VOCABULARY, WIDTH + 1]),
        ([TOKENS, WIDTH], [VOCABULARY]),
        ([WIDTH], [VOCABULARY, WIDTH]),
    ):
        message = f"`hidden` must be [N, H] and `weight` [V, H], got {hidden} and {weight}."
        refused(message, way, hidden=torch.zeros(hidden), weight=torch.zeros(weight))


def test_a_prior_in_halves():
    message = "`prior_hidden` and `prior_weight` belong together: pass both or none."
    for missing in ("prior_hidden", "prior_weight"):
        refused(message, "linear_qtarget_loss", **{missing: None})
    message = "`prior_bias` is a bias without a head: pass `prior_hidden` and `prior_weight` with it."
    refused(message, "linear_qtarget_loss", prior_hidden=None, prior_weight=None)


def test_a_number_of_items_that_is_none():
    way = "linear_qtarget_loss"
    for items in (-1, -0.5, math.nan, torch.tensor(-3), torch.tensor([2, 3]), torch.tensor([])):
        message = f"`num_items_in_batch` must be one number >= 0, got {items}: pass the number of labelled tokens"
        refused(message, way, num_items_in_batch=items)
    problem = make_problem(TOKENS, VOCABULARY, WIDTH, 0)
    for items in (3, 3.0, torch.tensor(3), torch.tensor([3])):
        output = linear_qtarget_loss(problem.hidden, problem.weight, problem.labels, "sft", num_items_in_batch=items)
        assert output.loss.shape == () and torch.equal(output.loss, output.token_loss.sum() / 3)


def test_a_prior_that_does_not_fit():
    way = "linear_qtarget_loss"
    refused("`prior_weight` has no rows", way, prior_weight=torch.zeros(0, 2), prior_bias=None)
    message = f"`prior_hidden` must have one row per row of `hidden`, got {[TOKENS + 1, 2]}."
    refused(message, way, prior_hidden=torch.zeros(TOKENS + 1, 2))
    for shape in ([2, 3, 2], [TOKENS]):
        message = f"`prior_hidden` must be [N, H] and `prior_weight` [V, H], got {shape} and"
        refused(message, way, prior_hidden=torch.zeros(shape))
    refused("`prior_logit_softcap=0` must be > 0", way, prior_logit_softcap=0)
    refused("`logit_softcap=-1.0` must be > 0", way, logit_softcap=-1.0)
    refused(f"`prior_bias` must have shape [{VOCABULARY}], got [1].", way, prior_bias=torch.zeros(1))
    refused(f"`bias` must have shape [{VOCABULARY}], got [1].", way, bias=torch.zeros(1))


@pytest.mark.parametrize("name", ["iw_sft", "sft_kl", "asft", "psft", "distill", "distill_hybrid"])
@pytest.mark.parametrize("way", WAYS)
def test_a_prior_that_is_missing(way, name):
    absent = dict.fromkeys(("prior_logits", "prior_hidden", "prior_weight", "prior_bias"))
    message = f"`method='{name}'` needs a prior and none is given: pass `prior_logits` or `prior_hidden`"
    refused(message, way, name, **absent)
    refused("`method='target_sft'` needs a prior", way, QTargetConfig(prior="base"), **absent)


@pytest.mark.parametrize("way", WAYS)
def test_a_configuration_that_does_not_fit(way):
    refused("`method='sfft'` is unknown", way, "sfft")
    refused("`qtarget_config` has unknown fields ['lamda']", way, {"method": "asft", "lamda": 0.1})
    refused("`qtarget_config` must be a `QTargetConfig`, a method's name or a dict, got `float`.", way, 0.5)
