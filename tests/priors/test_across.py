"""A teacher of another tokenizer: what it says where both have the same token, and the policy everywhere else."""

import json
from itertools import accumulate
from pathlib import Path

import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models
from training import make_trainer, other_model, warm_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from trl_qtarget import QTargetSFTTrainer
from trl_qtarget.cli import main, sft
from trl_qtarget.priors.across import Crossing, Pieces
from trl_qtarget.priors.store import PriorCache
from trl_qtarget.training.caching import write_cache
from trl_qtarget.training.caching_across import WriterAcross


V = len(tiny.tokenizer())
TEXTS = [
    *tiny.sentences(12, seed=7),
    "",
    " two  spaces\n\tand a tab ",
    "Größe naïve 你好 🙂 <eos> <|im_start|>user",
    "1234567 × 3.14159",
]


def permuted() -> tuple[PreTrainedTokenizerFast, torch.Tensor]:
    """The tokens of the tests under other ids, and where each of them has gone."""
    order = torch.randperm(V, generator=torch.Generator().manual_seed(3))
    data = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    data["model"]["vocab"] = {token: order[id].item() for token, id in data["model"]["vocab"].items()}
    for token in data["added_tokens"]:
        token["id"] = order[token["id"]].item()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)), pad_token="<pad>", eos_token="<eos>"
    )
    return tokenizer, order


def permuted_model(order: torch.Tensor) -> LlamaForCausalLM:
    """`other_model` with its tokens under those ids."""
    model = other_model()
    for table in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
        table.data[order] = table.data.clone()
    return model


def marked() -> PreTrainedTokenizerFast:
    """A tokenizer of characters, with a mark for spaces."""
    tokenizer = Tokenizer(models.BPE(vocab={"▁": 0, "a": 1}, merges=[]))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def small_words() -> PreTrainedTokenizerFast:
    """Bytes like the policy's, with fewer merges."""
    data = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    dropped = data["model"]["merges"][20:]
    data["model"]["merges"] = data["model"]["merges"][:20]
    for pair in dropped:
        data["model"]["vocab"].pop("".join(pair), None)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)), pad_token="<pad>", eos_token="<eos>"
    )


TEACHERS = {"permuted": lambda: permuted()[0], "small_words": small_words}


@pytest.mark.parametrize("name", TEACHERS)
def test_pieces_are_the_text(name):
    for tokenizer in (tiny.tokenizer(), TEACHERS[name]()):
        pieces = Pieces(tokenizer)
        for text in TEXTS:
            read = b"".join(pieces.by_id[id] for id in tokenizer(text, add_special_tokens=False)["input_ids"])
            assert read.decode() == text


@pytest.mark.parametrize("name", TEACHERS)
def test_places_are_where_both_have_the_same_token_after_the_same_text(name):
    policy, teacher = tiny.tokenizer(), TEACHERS[name]()
    crossing = Crossing(policy, teacher, V, len(teacher))
    found = 0
    for text in TEXTS:
        ids = policy(text)["input_ids"] + [policy.eos_token_id]
        reading = crossing.read(ids)
        ours = [crossing.policy.by_id[id] for id in ids]
        theirs = [crossing.teacher.by_id[id] for id in reading.ids[len(crossing.prefix) :]]
        before = [b"", *accumulate(ours)]
        for place, state in reading.places.items():
            token = reading.ids[state + 1]
            assert crossing.of_teacher[token] == ids[place] and crossing.teacher.by_id[token] == ours[place]
            assert b"".join(theirs[: state + 1 - len(crossing.prefix)]) == before[place]
        found += len(reading.places)
        if name == "permuted":
            assert set(reading.places) == set(range(1, len(ids)))
        # The end of text is one to both, whatever it is called.
        assert not reading.ids or len(ids) - 1 in reading.places or len(ids) == 1
    assert found > 20


def test_another_text_is_not_carried_over():
    """A tokenizer that changes what it reads has other bytes before every token."""
    data = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    data["normalizer"] = {"type": "Lowercase"}
    lower = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)), eos_token="<eos>")
    crossing = Crossing(tiny.tokenizer(), lower, V, len(lower))
    assert crossing.read(tiny.tokenizer()("The model")["input_ids"]).places == {}
    assert crossing.read(tiny.tokenizer()("the model")["input_ids"]).places
    half = tiny.tokenizer()("你")["input_ids"][:2]
    assert len(half) == 2 and crossing.read(half).places == {}


@pytest.mark.parametrize("name", TEACHERS)
def test_all_of_the_probability_is_somewhere(name):
    teacher = TEACHERS[name]()
    crossing = Crossing(tiny.tokenizer(), teacher, V, len(teacher))
    torch.manual_seed(0)
    log_probs = (4 * torch.randn(6, len(teacher), dtype=torch.float64)).log_softmax(-1)
    labels = crossing.shared.nonzero()[:6, 0]
    shared = int(crossing.shared.sum())
    expected = {id: [token for token in range(len(teacher)) if crossing.of_teacher[token] == id] for id in range(V)}
    for k in (1, 5, shared):
        said = crossing.carried(log_probs, labels, k)
        total = torch.cat([said["log_probs"], said["rest_log_mass"][:, None]], dim=1).logsumexp(1)
        torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-12)
        for row in range(6):
            of = {id: log_probs[row, tokens].logsumexp(0) for id, tokens in expected.items() if tokens}
            best = sorted(of, key=lambda id: -of[id])[:k]
            assert said["ids"][row].tolist() == best
            torch.testing.assert_close(said["log_probs"][row], torch.stack([of[id] for id in best]))
            torch.testing.assert_close(said["label_log_probs"][row], of[labels[row].item()])


def test_what_the_teacher_has_no_token_for_is_not_among_the_k():
    """However little probability is left for those that it has: float32 makes zero of it."""
    teacher = small_words()
    crossing = Crossing(tiny.tokenizer(), teacher, V, len(teacher))
    log_probs = torch.full((1, len(teacher)), -300.0)
    log_probs[0, 9] = 0.0
    shared = crossing.shared.nonzero()[:, 0]
    assert len(shared) < V
    said = crossing.carried(log_probs, shared[:1], len(shared))
    assert sorted(said["ids"][0].tolist()) == shared.tolist()


def renamed(**names: str) -> PreTrainedTokenizerFast:
    """The tokenizer of the tests with control tokens of other names, and a beginning of text if one is named."""
    data = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    for token in data["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    data["model"]["vocab"] = {names.get(token, token): id for token, id in data["model"]["vocab"].items()}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)))


def test_the_end_of_text_is_one_to_both_though_another_token_has_its_name():
    policy, teacher = tiny.tokenizer(), tiny.tokenizer()
    teacher.eos_token = "<|im_end|>"
    crossing = Crossing(policy, teacher, V, V)
    assert crossing.of_teacher[teacher.eos_token_id] == policy.eos_token_id
    assert (crossing.of_teacher == policy.eos_token_id).sum() == 1
    ids = [*policy("the model")["input_ids"], policy.eos_token_id]
    reading = crossing.read(ids)
    assert len(ids) - 1 in reading.places and reading.ids[-1] == teacher.eos_token_id


def test_the_policys_beginning_of_text_is_not_read_as_text():
    policy = renamed(**{"<pad>": "<begin>"})
    policy.bos_token, policy.eos_token = "<begin>", "<eos>"
    teacher = tiny.tokenizer()
    words = teacher("the model")["input_ids"]
    reading = Crossing(policy, teacher, V, V).read([policy.bos_token_id, *words])
    assert reading.ids == words and set(reading.places) == {2, 3}


def test_text_that_spells_a_control_token_of_the_teacher_is_not_carried_over():
    policy = renamed(**{"<|im_start|>": "<|start|>"})
    policy.eos_token = "<eos>"
    ids = policy("the <|im_start|> model")["input_ids"]
    assert tiny.tokenizer().convert_tokens_to_ids("<|im_start|>") in tiny.tokenizer()("a<|im_start|>")["input_ids"]
    assert Crossing(policy, tiny.tokenizer(), V, V).read(ids).places == {}


def test_no_more_is_read_than_is_asked_for(tmp_path, monkeypatch):
    """A long document is trained on up to `max_length`; a teacher may not even have so many positions."""
    read = []
    states = WriterAcross._states
    monkeypatch.setattr(WriterAcross, "_states", lambda self, ids: read.extend(map(len, ids)) or states(self, ids))
    trainer = make_trainer(
        QTargetSFTTrainer, tiny.text_dataset(), warm_model(), options={"max_length": None}, qtarget_config="sft"
    )
    tokenizer, order = permuted()
    writer = WriterAcross(trainer, permuted_model(order), tokenizer, 4)
    read.clear()
    write_cache(writer, tmp_path, slice(None, 4))
    assert max(read) == 3 and max(map(len, trainer.train_dataset["input_ids"])) > 8
    assert PriorCache(tmp_path).known_share == 1.0


def test_a_cache_made_by_another_crossing_is_another_one():
    policy, tokenizer = tiny.tokenizer(), permuted()[0]
    one = Crossing(policy, tokenizer, V, V).fingerprint
    assert Crossing(tiny.tokenizer(), tokenizer, V, V).fingerprint == one
    policy.eos_token = "<|im_end|>"
    assert Crossing(policy, tokenizer, V, V).fingerprint != one


def cache_of(directory: Path, model, tokenizer, k: int) -> str:
    trainer = make_trainer(
        QTargetSFTTrainer, tiny.text_dataset(), warm_model(), options={"max_length": None}, qtarget_config="sft"
    )
    write_cache(WriterAcross(trainer, model, tokenizer, k), directory)
    return str(directory)


def trained(config, **prior) -> tuple[list[dict], dict[str, torch.Tensor]]:
    trainer = make_trainer(QTargetSFTTrainer, tiny.text_dataset(), warm_model(), qtarget_config=config, **prior)
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line], trainer.model.state_dict()


@pytest.mark.parametrize("config", ["target_sft", "distill", "asft", "iw_sft"])
def test_the_same_tokens_under_other_ids_are_the_live_teacher(config, tmp_path):
    tokenizer, order = permuted()
    cache = cache_of(tmp_path, permuted_model(order), tokenizer, V)
    assert PriorCache(cache).known_share == 1.0
    lines, weights = trained(config, prior_cache=cache)
    live, of_live = trained(config, ref_model=other_model())
    for line, other in zip(lines, live, strict=True):
        for name in ("loss", "grad_norm", "target/nll", "target/kl", "target/prior_agreement"):
            if name in other:
                assert line[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
    for name, weight in weights.items():
        torch.testing.assert_close(weight, of_live[name], rtol=1e-5, atol=1e-5)


def test_where_nothing_can_be_carried_over_it_is_the_policy(tmp_path):
    """With a residual of prior and policy that leaves `dft`."""
    data = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    data["normalizer"] = {"type": "Prepend", "prepend": "x"}
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)), pad_token="<pad>", eos_token="<eos>"
    )
    other.add_tokens(["another"])
    cache = cache_of(tmp_path, other_model(), other, 8)
    assert PriorCache(cache).known_share == 0.0
    lines, weights = trained("target_sft", prior_cache=cache)
    plain, of_dft = trained("dft")
    for line, other in zip(lines, plain, strict=True):
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, of_dft[name], rtol=1e-5, atol=1e-5)


def test_the_command(tmp_path, capsys, logged):
    tokenizer = small_words()
    for name, model, own in (
        ("policy", warm_model(), tiny.tokenizer()),
        ("teacher", tiny.model(seed=5, vocab_size=max(tokenizer.get_vocab().values()) + 1), tokenizer),
    ):
        model.save_pretrained(tmp_path / name)
        own.save_pretrained(tmp_path / name)
    tiny.prompt_dataset(16).to_json(tmp_path / "data.jsonl")
    words = ["--model_name_or_path", str(tmp_path / "policy"), "--dataset_name", str(tmp_path / "data.jsonl")]
    words += ["--dtype", "float32", "--use_cpu", "true", "--bf16", "false", "--report_to", "none"]
    teacher = ["--ref_model_name_or_path", str(tmp_path / "teacher"), "--k", "6"]
    cache = ["cache", *words, *teacher, "--output_dir", str(tmp_path / "cache")]
    assert main(cache) == 2
    assert "trl-qtarget cache --own_tokens true" in capsys.readouterr().err
    assert main([*cache, "--own_tokens", "true", "--form", "hidden"]) == 2
    assert "of the form `top_k`" in capsys.readouterr().err
    assert main([*cache, "--own_tokens", "true"]) == 0
    share = PriorCache(tmp_path / "cache").known_share
    assert 0.1 < share < 1 and any(f"Of {share:.1%} of the labels" in line for line in logged())
    assert "NaN where the prior's own tokens" in (tmp_path / "cache" / "README.md").read_text()
    trained = ["--prior_cache", str(tmp_path / "cache"), "--max_steps", "2", "--output_dir", str(tmp_path / "out")]
    assert sft.main([*words, *trained]) == 0
    assert "which reads its own tokens" in (tmp_path / "out" / "README.md").read_text()


def test_what_cannot_be_carried_over_is_refused(tmp_path):
    trainer = make_trainer(QTargetSFTTrainer, tiny.text_dataset(), warm_model(), qtarget_config="sft")
    with pytest.raises(ValueError, match="has the policy's tokens"):
        WriterAcross(trainer, other_model(), tiny.tokenizer(), 4)
    with pytest.raises(ValueError, match=f"is more than the {V} tokens that the policy shares"):
        WriterAcross(trainer, other_model(), permuted()[0], V + 1)
    with pytest.raises(ValueError, match="Its tokens are not bytes"):
        Crossing(tiny.tokenizer(), marked(), V, 2)
    with pytest.raises(ValueError, match="Its tokens are not bytes"):
        Crossing(marked(), tiny.tokenizer(), 2, V)
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="`own_tokens`: a tokenizer cannot be compared by its bytes"):
        Crossing(tiny.tokenizer(), PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]"), V, 2)
