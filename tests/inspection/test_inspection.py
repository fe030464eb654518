"""What an inspection shows is what the methods' targets are: compared with `build_target` on the same tokens."""

import math
from itertools import product

import pytest
import tiny
import torch
from datasets import Dataset
from measured import CLOSED
from peft import LoraConfig, get_peft_model
from thinned import by_kernels, one_of_each, thinned
from training import sft_config, warm_model

from trl_qtarget import METHODS, QTargetConfig, build_target
from trl_qtarget.inspection.collect import inspect_target
from trl_qtarget.inspection.summary import summarise


# Five significant digits, of numbers that float32 has summed in another order.
TOLERANCE = {"rtol": 2e-4, "atol": 2e-6}
PROMPTS = tiny.prompt_dataset(3)


def _inspect(methods, dataset=PROMPTS, model=None, **arguments):
    arguments.setdefault("args", sft_config())
    return inspect_target(
        warm_model() if model is None else model,
        dataset,
        methods,
        processing_class=tiny.tokenizer(),
        progress=False,
        **arguments,
    )


def _dense(data, model, ref_model, config, token_weights=None):
    """For each example: Q, scale, p and the prior's distribution at the labelled positions."""
    for number, example in enumerate(data["examples"]):
        tokens = torch.tensor([example["tokens"]])
        with torch.no_grad():
            logits = model(tokens).logits[0]
            prior = logits if ref_model is None else ref_model(tokens).logits[0]
        before = torch.tensor(example["scored"]) - 1
        labels = tokens[0, before + 1]
        config = QTargetConfig.coerce(config)
        options = {} if token_weights is None else {"token_weights": token_weights[number][before + 1]}
        uses_prior = config.objective(has_prior=True).uses_prior
        if uses_prior:
            options["prior_logits"] = (logits if config.prior_source == "lagged" else prior)[before]
        embeddings = model.get_output_embeddings().weight
        target = build_target(logits[before], labels, config, embeddings=embeddings, **options)
        yield example, target, logits[before].softmax(-1), prior[before].softmax(-1), labels


@pytest.mark.parametrize("rows", [300, 400], ids=["fewer", "more"])
def test_prior_of_other_rows_is_shown_conditioned(rows):
    model, ref_model = warm_model(), tiny.model(seed=5, vocab_size=rows).eval()
    data = _inspect(["target_sft"], model=model, ref_model=ref_model)
    missing = torch.nn.functional.pad(torch.zeros(rows), (0, max(0, 320 - rows)), value=-math.inf)[:320]

    def reads(tokens):
        output = ref_model(torch.where(tokens < rows, tokens, 1))
        output.logits = torch.nn.functional.pad(output.logits[..., :320], (0, max(0, 320 - rows))) + missing
        return output

    labels_seen = torch.cat([labels for *_, labels in _dense(data, model, reads, "target_sft")])
    assert (labels_seen >= 300).any()
    for example, target, _, prior, _ in _dense(data, model, reads, "target_sft"):
        found, ids = example["methods"][0], torch.tensor(example["alternatives"])
        torch.testing.assert_close(torch.tensor(example["prior"]), prior.gather(1, ids), **TOLERANCE)
        torch.testing.assert_close(torch.tensor(found["q"]), target.probs.gather(1, ids), **TOLERANCE)


_METHODS = list(product([name for name in CLOSED if name != "cft"], [False, True]))


@pytest.mark.parametrize(
    ("method", "reference"), thinned(_METHODS, lambda *pair: by_kernels(*pair) and pair in one_of_each(_METHODS))
)
def test_numbers_are_those_of_build_target(method, reference):
    if METHODS[method].prior == "model" and not reference:
        pytest.skip("a teacher has to be given")
    model, ref_model = warm_model(), warm_model(steps=30) if reference else None
    data = _inspect([method], model=model, ref_model=ref_model)
    assert len(data["examples"]) == len(PROMPTS)
    for example, target, p, prior, labels in _dense(data, model, ref_model, method):
        found, ids = example["methods"][0], torch.tensor(example["alternatives"])
        assert ids[:, 0].tolist() == labels.tolist()
        q = target.probs
        torch.testing.assert_close(torch.tensor(found["q"]), q.gather(1, ids), **TOLERANCE)
        torch.testing.assert_close(torch.tensor(found["scale"]), target.scale, **TOLERANCE)
        torch.testing.assert_close(torch.tensor(example["p"]), p.gather(1, ids), **TOLERANCE)
        mass = q.gather(1, labels[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found["label_mass"]), mass, **TOLERANCE)
        drift = target.scale * (p * (q - p)).sum(1)
        torch.testing.assert_close(torch.tensor(found["drift"]), drift, **TOLERANCE)
        nll = -p.gather(1, labels[:, None])[:, 0].log()
        torch.testing.assert_close(torch.tensor(example["nll"]), nll, **TOLERANCE)
        torch.testing.assert_close(torch.tensor(example["entropy"]), -(p * p.log()).sum(1), **TOLERANCE)
        if reference:
            torch.testing.assert_close(torch.tensor(example["prior"]), prior.gather(1, ids), **TOLERANCE)
        else:
            assert example["prior"] is None
        if method in ("gem", "tofu", "otr", "mask_target", "lp_sft"):
            assert set(found["kl"]) == {None}  # Q is more than the label and one residual, and may be negative
        elif (q >= 0).all():
            kl = (torch.xlogy(q, q) - q * p.log()).sum(1)
            torch.testing.assert_close(torch.tensor(found["kl"]), kl, rtol=1e-3, atol=1e-5)
        rival = q.scatter(1, labels[:, None], 0.0).amax(1)
        prefers = (rival > mass) & (mass > 1e-30)
        expected = torch.where(prefers, rival.clamp(min=1e-30).log() - mass.clamp(min=1e-30).log(), 0.0)
        suspicion = torch.tensor(found["suspicion"])
        torch.testing.assert_close(suspicion[mass > 1e-30], expected[mass > 1e-30], rtol=1e-3, atol=1e-4)
        preferred = q.gather(1, torch.tensor(found["preferred"])[:, None])[:, 0]
        torch.testing.assert_close(preferred, q.scatter(1, labels[:, None], -math.inf).amax(1), **TOLERANCE)
        assert all(one != other for one, other in zip(found["preferred"], labels.tolist(), strict=True))


def test_drift_is_what_a_step_takes_from_the_others():
    """The first-order change of the probabilities under a gradient step on the logits, as the page draws it."""
    model = warm_model().double()
    data = _inspect(["target_sft"], model=model, ref_model=warm_model(steps=30).double())
    example = data["examples"][0]
    logits = model(torch.tensor([example["tokens"]])).logits[0, example["scored"][0] - 1].detach()
    ids, found = torch.tensor(example["alternatives"][0]), example["methods"][0]
    q, p, step = torch.tensor(found["q"][0]), torch.tensor(example["p"][0]), 1e-4
    # The whole Q is not in the data: only its alternatives move, as far as they are known.
    shown = p * (found["scale"][0] * (q - p) - found["drift"][0])
    prior = warm_model(steps=30).double()(torch.tensor([example["tokens"]])).logits[0, example["scored"][0] - 1]
    target = build_target(logits[None], ids[:1], "target_sft", prior_logits=prior[None].detach())
    moved = (logits + step * target.scale * (target.probs[0] - logits.softmax(-1))).softmax(-1)
    torch.testing.assert_close(((moved - logits.softmax(-1)) / step)[ids].float(), shown, rtol=1e-2, atol=1e-4)


def test_methods_stand_side_by_side_on_the_same_tokens():
    data = _inspect(["sft", "dft", QTargetConfig("asft", lam=0.3)], ref_model=warm_model(steps=30))
    assert [method["name"] for method in data["methods"]] == ["sft", "dft", "asft"]
    assert data["methods"][2]["knobs"] == {"lam": 0.3} and data["methods"][2]["prior"]
    assert data["methods"][0]["prior"] is None
    for example in data["examples"]:
        for method in example["methods"]:
            assert all(len(column) == len(example["scored"]) for column in method.values())
        assert set(example["methods"][0]["trust"]) == {1.0}
        assert example["methods"][1]["trust"] == pytest.approx([row[0] for row in example["p"]], rel=1e-4)


def test_base_under_adapters_is_the_prior():
    torch.manual_seed(0)
    peft = get_peft_model(warm_model(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    data = _inspect(["target_sft"], model=peft)
    assert data["reference"] == "the base weights (adapters off)"
    for example in data["examples"]:
        tokens, ids = torch.tensor([example["tokens"]]), torch.tensor(example["alternatives"])
        with torch.no_grad(), peft.disable_adapter():
            logits = peft(tokens).logits[0]
        prior = logits[torch.tensor(example["scored"]) - 1].softmax(-1)
        torch.testing.assert_close(torch.tensor(example["prior"]), prior.gather(1, ids), **TOLERANCE)


@pytest.mark.parametrize("make", [tiny.text_dataset, tiny.prompt_dataset, tiny.chat_dataset])
def test_formats_are_labelled_as_the_trainer_labels_them(make):
    data = _inspect(["dft"], dataset=make(2))
    for example in data["examples"]:
        assert 0 < len(example["scored"]) < len(example["tokens"])
        first = example["scored"][0]
        # Text is labelled from its second token on, a completion from its first.
        assert first == 1 if make is tiny.text_dataset or make is tiny.chat_dataset else first > 1
        assert all(str(token) in data["vocabulary"] for token in example["tokens"])


def test_token_weights_come_from_their_column():
    rows = tiny.text_dataset(2)
    lengths = [len(tiny.tokenizer()(text + "<eos>")["input_ids"]) for text in rows["text"]]
    weights = [[(number % 3) / 2 for number in range(length)] for length in lengths]
    data = _inspect(["cft", "sft"], dataset=rows.add_column("token_weights", weights))
    for example, wanted in zip(data["examples"], weights, strict=True):
        assert example["methods"][0]["trust"] == wanted[1:]


def test_small_chunks_change_nothing(monkeypatch):
    from trl_qtarget.loss import chunks
    from trl_qtarget.loss.kernels import plain

    whole = _inspect(["iw_sft", "target_sft"], ref_model=warm_model(steps=30))
    monkeypatch.setattr(chunks, "_CHUNK_ELEMENTS", 3 * 320)
    monkeypatch.setitem(plain.BLOCK_ELEMENTS, "cpu", 320)
    blocks = _inspect(["iw_sft", "target_sft"], ref_model=warm_model(steps=30))
    for one, other in zip(whole["examples"], blocks["examples"], strict=True):
        assert one["scored"] == other["scored"] and one["alternatives"] == other["alternatives"]
        for a, b in zip(one["methods"], other["methods"], strict=True):
            torch.testing.assert_close(torch.tensor(a["q"]), torch.tensor(b["q"]), **TOLERANCE)


def test_the_model_is_left_as_it_was():
    model = warm_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _inspect(["dft"], model=model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("methods", "arguments", "message"),
    [
        ([], {}, "`methods` is empty"),
        (["dft", QTargetConfig("dft")], {}, "names one target twice"),
        (["dft"], {"dataset": Dataset.from_dict({"text": []})}, "`dataset` is empty"),
        (["dft"], {"alternatives": 1}, "`alternatives=1` must be at least 2"),
        (["dtf"], {}, "`method='dtf'` is unknown"),
        (["sft", "distill"], {}, "needs a reference model and `ref_model` is None: pass a path"),
        (["cft", QTargetConfig("cft", token_weight_column="other")], {}, "different columns"),
    ],
)
def test_mistakes_are_refused(methods, arguments, message):
    with pytest.raises(ValueError, match=message):
        _inspect(methods, **arguments)


def test_summary_counts_every_token():
    examples = [
        {
            "p": [[0.01], [0.99], [1.0]],
            "nll": [4.0, 0.0, 0.0],
            "methods": [{"trust": [0.01, 0.99, 1.0], "label_mass": [0.02, 1.0, 1.4], "kl": [0.5, None, 0.1]}],
        }
    ]
    (found,) = summarise(examples, 1)
    assert sum(found["trust_by_p"]["count"]) == sum(found["mass_leaving"]["count"]) == 3
    assert found["trust_by_p"]["mean"][0] == 0.01 and found["trust_by_p"]["mean"][-1] == pytest.approx(0.995)
    assert found["mass_leaving"]["count"][0] == 2 and found["mass_leaving"]["count"][-1] == 1
    assert found["mean"]["kl"] == pytest.approx(0.3) and math.isclose(found["mean"]["nll"], 1.3333, rel_tol=1e-4)
