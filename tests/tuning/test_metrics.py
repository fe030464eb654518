"""Metrics and data of a study: exact where there is a truth to compare with."""

import copy

import pytest
import tiny
import torch
from datasets import Dataset
from training import make_trainer, other_model, sft_config, warm_model

from trl_qtarget import QTargetSFTTrainer
from trl_qtarget.tuning.answers import final_answer, judge_exact, shares_right
from trl_qtarget.tuning.data import split, with_answers, write
from trl_qtarget.tuning.metrics import Metric, kl_to_base


ROWS = {"text": tiny.text_dataset(6), "prompts": tiny.prompt_dataset(6), "chat": tiny.chat_dataset(6)}


@pytest.mark.parametrize("kind", list(ROWS))
def test_labels_are_scored_as_the_trainer_evaluates_them(kind):
    """Row by row, in every format."""
    rows = ROWS[kind]
    nll = Metric("eval_target/nll").scores(warm_model(), tiny.tokenizer(), rows, sft_config())
    accuracy = Metric("eval_mean_token_accuracy").scores(warm_model(), tiny.tokenizer(), rows, sft_config())
    trainer = make_trainer(QTargetSFTTrainer, rows, warm_model(), qtarget_config="sft")
    for number in (0, 5):
        found = trainer.evaluate(rows.select([number]))
        assert -nll[number] == pytest.approx(found["eval_target/nll"], rel=1e-5)
        assert accuracy[number] == pytest.approx(found["eval_mean_token_accuracy"], rel=1e-5)


def test_kl_to_the_base_is_the_dense_one():
    rows, mine, base = ROWS["text"].select([0]), warm_model(), other_model()
    assert kl_to_base(copy.deepcopy(mine), mine, tiny.tokenizer(), rows, sft_config()) == pytest.approx(0, abs=1e-7)
    found = kl_to_base(mine, base, tiny.tokenizer(), rows, sft_config())
    trainer = make_trainer(QTargetSFTTrainer, rows, warm_model(), qtarget_config="sft")
    ids = trainer.data_collator([trainer.prepare_rows(rows, "x")[0]])["input_ids"]
    with torch.no_grad():
        p, q = (model(ids).logits[0, :-1].double().log_softmax(-1) for model in (base, warm_model()))
    assert found == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)


def test_answers_do_not_depend_on_their_batch_when_greedy():
    """Padding on the left leaves each prompt's answer alone; the judge sees every answer once."""
    prompts, model, seen = tiny.sentences(5, 3, 6), warm_model(), []

    def judge(answer: str, text: str) -> bool:
        seen.append(text)
        return answer == "yes"

    options = {"samples": 3, "temperature": 0.0, "max_new_tokens": 6, "seed": 0}
    answers = ["yes", "no", "yes", "no", "no"]
    tokenizer = tiny.tokenizer()
    one = shares_right(model, tokenizer, prompts, answers, judge, batch_size=1, **options)
    alone, seen[:] = list(seen), []
    many = shares_right(model, tokenizer, prompts, answers, judge, batch_size=5, **options)
    assert one == many == [1.0, 0.0, 1.0, 0.0, 0.0]
    assert alone == seen and len(seen) == 5
    sampled = options | {"temperature": 1.0}
    shares = shares_right(model, tokenizer, prompts, answers, lambda *_: True, batch_size=4, **sampled)
    assert shares == [1.0] * 5


def test_own_function_is_a_metric(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_metric.py").write_text(
        "def whole(model, tokenizer, dataset): return len(dataset)\n"
        "def each(model, tokenizer, dataset): return [0.5] * len(dataset)\n"
        "def broken(model, tokenizer, dataset): return float('nan')\n"
    )
    measured = {}
    for name in ("whole", "each", "broken"):
        metric = Metric(f"own_metric:{name}")
        metric.check()
        if name == "broken":
            with pytest.raises(ValueError, match="returned no finite number"):
                metric.scores(None, None, ROWS["text"], None)
        else:
            measured[name] = metric.scores(None, None, ROWS["text"], None)
    assert measured == {"whole": [6.0], "each": [0.5] * 6}


@pytest.mark.parametrize(
    ("right", "said", "verdict"),
    [
        ("-19", "0 - 4 = -4\nThe answer is -19.", True),
        ("-19", "-19 and then 20", False),
        ("1200", "about 1,200", True),
        ("1,200", "1200", True),
        ("Paris", "I think\nParis", True),
        ("Paris", "Paris\nor not", False),
        ("3", "none", False),
    ],
)
def test_exact_judge(right, said, verdict):
    assert judge_exact(right, said) is verdict
    assert final_answer(right, right)


def test_no_prompt_is_in_two_sets(tmp_path):
    rows = Dataset.from_dict({"prompt": [f"q{number % 30}" for number in range(60)], "completion": ["a 1"] * 60})
    sets = split(rows, None, 20, seed=0)
    prompts = {name: set(found["prompt"]) for name, found in sets.items()}
    for one, other in (("train", "search"), ("train", "confirm"), ("search", "confirm")):
        assert not prompts[one] & prompts[other]
    assert all(len(found["prompt"]) == len(prompts[name]) for name, found in sets.items() if name != "train")
    assert set.union(*prompts.values()) == {f"q{number}" for number in range(30)}
    # A test split of one's own: what is trained on is left out of it.
    own = split(rows.select(range(10)), rows.select(range(5, 30)), None, seed=0)
    assert len(own["search"]) + len(own["confirm"]) == 20 and len(own["train"]) == 10
    written = write(own, tmp_path / "data")
    assert write(own, tmp_path / "data").counts() == written.counts() == {"train": 10, "search": 10, "confirm": 10}
    with pytest.raises(ValueError, match="the data have changed"):
        write(sets, tmp_path / "data")
    with pytest.raises(ValueError, match=r"leaves .* rows to train on"):
        split(rows.select(range(30)), rows, None, seed=0)


def test_prompt_and_answer_of_every_format():
    chat = [{"role": "user", "content": "2 + 1"}, {"role": "assistant", "content": "2 + 1 = 3"}]
    rows = {
        "messages": ({"messages": chat}, chat[:1], "3"),
        "completion": ({"prompt": "2 + 1", "completion": " It is 3"}, "2 + 1", "3"),
        "problem": ({"problem": "2 + 1", "answer": "3"}, chat[:1], "3"),
        "answer": ({"prompt": chat[:1], "completion": "so\n4", "answer": "3"}, chat[:1], "3"),
    }
    for row, prompt, answer in rows.values():
        assert with_answers(Dataset.from_list([row]))[0] == {"prompt": prompt, "answer": answer}
    with pytest.raises(ValueError, match="`metric` judges answers"):
        with_answers(tiny.text_dataset(2))
