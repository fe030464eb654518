"""A cache from the `prompt_logprobs` of an engine: what the model itself says, as far as the listing tells it."""

import json
import math

import pytest
import tiny
import torch
from training import warm_model

from trl_qtarget.cli import main
from trl_qtarget.priors.cached import top_k_of
from trl_qtarget.priors.prompt_logprobs import RESOLUTION, rest_log_mass, write_prompt_logprobs
from trl_qtarget.priors.store import PriorCache


K = 4
ROWS = [[2, 5, 3, 7, 4, 1], [2, 6, 6, 1]]


def listed(log_probs: torch.Tensor, label: int, k: int) -> dict[str, dict]:
    """One token's entry, as vLLM's server writes it: the k most probable, and the prompt's own where it is another."""
    order = log_probs.argsort(descending=True, stable=True).tolist()
    ids = order[:k] if label in order[:k] else [label, *order[:k]]
    return {
        str(token): {"logprob": log_probs[token].item(), "rank": order.index(token) + 1, "decoded_token": f"<{token}>"}
        for token in ids
    }


@pytest.fixture(scope="module")
def said() -> list[dict]:
    model = warm_model().eval()
    requests = []
    for ids in ROWS:
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        entries = [listed(log_probs[at - 1], ids[at], K) for at in range(1, len(ids))]
        requests.append({"prompt_token_ids": ids, "prompt_logprobs": [None, *entries]})
    return requests


def written(tmp_path, requests, **options) -> PriorCache:
    (tmp_path / "said.jsonl").write_text("\n".join(json.dumps(request) for request in requests) + "\n\n")
    vocabulary = warm_model().config.vocab_size
    options = {"k": K, "name": "org/teacher", "progress": False} | options
    write_prompt_logprobs(
        tmp_path / "said.jsonl", tmp_path / "cache", tiny.tokenizer(), vocabulary=vocabulary, **options
    )
    return PriorCache(tmp_path / "cache")


def test_it_says_what_the_model_says(tmp_path, said):
    cache = written(tmp_path, said, shard_bytes=64)  # a shard for every example
    cache.check_sums()
    assert len(cache) == 2 and len(cache.names) == 2
    model = warm_model().eval()
    for ids in ROWS:
        places = cache.places(ids)
        assert places[0] == -1 and min(places[1:]) >= 0
        known = top_k_of(cache.read(torch.tensor(places[1:])), cache.manifest, "policy")
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
        top = log_probs.topk(K)
        assert torch.equal(known.ids, top.indices.int())
        of_label = log_probs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        rest = log_probs.scatter(1, top.indices, -math.inf).logsumexp(-1)
        for found, right in (
            (known.log_probs, top.values),
            (known.label_log_probs, of_label),
            (known.rest_log_mass, rest),
        ):
            torch.testing.assert_close(found.double(), right, rtol=0, atol=1e-5)


def test_labels_say_what_is_kept_and_a_second_file_adds(tmp_path, said):
    first, second = said
    cache = written(tmp_path, [first | {"labels": [-100, -100, -100, 7, -100, 1]}])
    assert [place >= 0 for place in cache.places(ROWS[0])] == [False, False, False, True, False, True]
    assert cache.places(ROWS[1]) == [-1] * 4
    cache = written(tmp_path, [second])
    assert len(cache) == 2


def test_a_rest_that_float32_cannot_tell_is_small_and_possible():
    assert rest_log_mass([math.log(0.5), math.log(0.2)], 10) == pytest.approx(math.log(0.3))
    assert rest_log_mass([math.log(0.5), math.log(0.01)], 4) == pytest.approx(math.log(0.02))  # two of .01
    certain = [-1e-8, math.log(1e-9)]
    assert rest_log_mass(certain, 10) == pytest.approx(math.log(1e-9))
    assert rest_log_mass([1e-7, math.log(1e-3)], 10) is None
    assert rest_log_mass([math.log(0.5)] * 2, 10) == pytest.approx(math.log(RESOLUTION))
    assert rest_log_mass([math.log(0.5)] * 2, 2) == -math.inf
    assert rest_log_mass([0.0, -math.inf], 10) == -math.inf


def test_tokens_beyond_the_policys_are_left_out(tmp_path):
    listing = {"5": -1.0, "1000": -2.0, "7": math.log(0.1)}  # the policy has fewer rows than 1000
    rows = {"prompt_token_ids": [3, 7], "prompt_logprobs": [None, listing]}
    cache = written(tmp_path, [rows], k=2)
    known = top_k_of(cache.read(torch.tensor(cache.places([3, 7])[1:])), cache.manifest, "policy")
    assert known.ids.tolist() == [[5, 7]]
    left = 1 - math.exp(-2)
    right = torch.tensor([math.exp(-1) / left, 0.1 / left])
    torch.testing.assert_close(known.log_probs[0].exp(), right)
    torch.testing.assert_close(known.label_log_probs.exp(), right[1:])


def replaced(request: dict, **fields) -> dict:
    return json.loads(json.dumps(request)) | fields


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda it: replaced(it, prompt_logprobs=it["prompt_logprobs"][1:]), "one entry of `prompt_logprobs`"),
        (lambda it: {"text": "a"}, "has no `prompt_token_ids`"),
        (lambda it: replaced(it, prompt_logprobs=[None] * 6), "token 1, does not map"),
        (lambda it: replaced(it, prompt_token_ids=[2, 5, 3, 7, 9, 1]), "does not list the prompt's own token, 9"),
        (lambda it: replaced(it, prompt_logprobs=[None, *[{"5": 0.5}] * 5]), "a probability above one"),
        (lambda it: replaced(it, prompt_logprobs=[None, *[{"5": -0.5}] * 5]), "lists 1 tokens"),
    ],
)
def test_what_is_no_listing_is_named(tmp_path, said, change, message):
    with pytest.raises(ValueError, match=message) as error:
        written(tmp_path, [said[1], change(said[0])])
    assert "line 2" in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_the_command(tmp_path, said, capsys):
    (tmp_path / "said.jsonl").write_text("\n".join(json.dumps(request) for request in said))
    warm_model().save_pretrained(tmp_path / "policy")
    tiny.tokenizer().save_pretrained(tmp_path / "policy")
    words = ["cache", "--prompt_logprobs", str(tmp_path / "said.jsonl"), "--output_dir", str(tmp_path / "cache")]
    words += ["--model_name_or_path", str(tmp_path / "policy"), "--ref_model_name_or_path", "org/teacher"]
    assert main([*words, "--k", str(K)]) == 0
    cache = PriorCache(tmp_path / "cache")
    assert len(cache) == 2 and cache.manifest.name == "org/teacher"
    assert main([*words, "--k", "9999"]) == 2
    assert "`k=9999` must be from 1" in capsys.readouterr().err
