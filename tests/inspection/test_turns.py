"""Suspicious labels of conversations that are labelled as a whole: what the assistant has written comes first."""

import itertools
import json

import pytest
import tiny
from datasets import Dataset
from training import warm_model

from trl_qtarget import cli, inspect_target, suspicious_examples, suspicious_tokens
from trl_qtarget.inspection.collect import equal_targets
from trl_qtarget.inspection.suspicious import WORST, suspicious_method
from trl_qtarget.inspection.turns import assistant_tokens


def conversations(count: int = 4, turns: int = 2) -> Dataset:
    words = tiny.sentences(3 * count * turns, 5, 6)
    rows = []
    for number in range(count):
        said = words[3 * turns * number :]
        pairs = [
            [{"role": "user", "content": said[2 * turn]}, {"role": "assistant", "content": said[2 * turn + 1]}]
            for turn in range(turns)
        ]
        rows.append(
            {"messages": [{"role": "system", "content": said[-1]}, *(each for pair in pairs for each in pair)]}
        )
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def ids_of(tokenizer, row) -> list[int]:
    return tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)


def test_tokens_of_the_assistant_are_what_it_says(tokenizer):
    for row in conversations():
        ids = ids_of(tokenizer, row)
        mask = assistant_tokens(tokenizer, row, ids)
        runs = [list(run) for own, run in itertools.groupby(zip(mask, ids, strict=True), lambda pair: pair[0]) if own]
        said = [tokenizer.decode([token for _, token in run]) for run in runs]
        assert said == [f"{each['content']}<|im_end|>" for each in row["messages"] if each["role"] == "assistant"]
        # Cut off at its end, as `max_length` does, wherever that is.
        for length in range(len(ids)):
            assert assistant_tokens(tokenizer, row, ids[:length]) == mask[:length]


def test_what_is_not_known_is_not_said(tokenizer):
    (row,) = conversations(1)
    ids = ids_of(tokenizer, row)
    assert assistant_tokens(tokenizer, row, ids[1:]) is None, "cut off at its start"
    assert assistant_tokens(tokenizer, {"prompt": "a", "completion": "b"}, ids) is None
    other = tiny.tokenizer()
    other.chat_template = tiny.CHAT_TEMPLATE.replace(
        "{{ message['content'] }}", "{{ message['content'] if loop.last else 'old' }}"
    )
    assert assistant_tokens(other, row, ids_of(other, row)) is None, "earlier turns are written otherwise"
    other.chat_template = "{{ raise_exception('no') }}"
    assert assistant_tokens(other, row, ids) is None
    other.chat_template = None
    assert assistant_tokens(other, row, ids) is None
    assert assistant_tokens(tokenizer, {"messages": row["messages"][2:]}, ids) is None, "begins with an answer"


@pytest.fixture(scope="module")
def data(tokenizer):
    return inspect_target(
        warm_model(), conversations(), ["dft", "target_sft", "sft"], processing_class=tokenizer, progress=False
    )


def test_assistant_turns_are_ranked_first(data):
    rows = suspicious_tokens(data)
    assert {row["method"] for row in rows} == {"target_sft"}, "the last one that has suspicion, never `sft`"
    own = [row["assistant"] for row in rows]
    assert set(own) == {True, False} and own == sorted(own, reverse=True)
    for part in (True, False):
        found = [row["suspicion"] for row in rows if row["assistant"] is part]
        assert found == sorted(found, reverse=True)
    assert suspicious_tokens(data, assistant_only=True) == [row for row in rows if row["assistant"]]
    worst = suspicious_examples(data)[0]
    mine = sorted((r["suspicion"] for r in rows if r["example"] == worst["example"] and r["assistant"]), reverse=True)
    assert worst["suspicion"] == pytest.approx(sum(mine[:WORST]) / WORST)


def test_labels_that_are_all_the_assistants_are_not_told_apart():
    found = inspect_target(
        warm_model(), tiny.prompt_dataset(3), ["dft"], processing_class=tiny.tokenizer(), progress=False
    )
    assert all(example["assistant"] is None for example in found["examples"])
    assert {row["assistant"] for row in suspicious_tokens(found)} == {None}
    assert suspicious_tokens(found, assistant_only=True) == suspicious_tokens(found)


def test_method_without_suspicion_is_refused(data):
    plain = data | {"methods": data["methods"][2:]}
    plain["examples"] = [example | {"methods": example["methods"][2:]} for example in data["examples"]]
    with pytest.raises(ValueError, match="no label is suspicious to `sft`"):
        suspicious_method(plain)
    assert all(row["suspicion"] == 0 for row in suspicious_tokens(data, 2)), "who names it has it"


def test_equal_targets_are_marked(data):
    """Without a reference model `target_sft` is `dft`."""
    assert [method["equals"] for method in data["methods"]] == [None, "dft", None]
    assert equal_targets(data["examples"], 3) == [None, 0, None]


def test_command_says_what_comes_first_and_leaves_out(tokenizer, tmp_path, capsys):
    warm_model().save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    conversations().to_json(tmp_path / "rows.jsonl")
    command = ["inspect", "--model_name_or_path", str(tmp_path / "policy"), "--output", str(tmp_path / "page.html")]
    command += ["--dataset_name", str(tmp_path / "rows.jsonl"), "--methods", "dft", "sft"]
    command += ["--suspicious", str(tmp_path / "list.jsonl")]
    assert cli.main(command) == 0
    assert "Suspicious labels by `dft`, assistant turns first (" in capsys.readouterr().out
    whole = [json.loads(line) for line in (tmp_path / "list.jsonl").read_text().splitlines()]
    assert cli.main([*command, "--suspicious_assistant_only"]) == 0
    capsys.readouterr()
    found = [json.loads(line) for line in (tmp_path / "list.jsonl").read_text().splitlines()]
    assert found == [row for row in whole if row["assistant"]] and found != whole
    assert cli.main([*command[:-2], "--suspicious_assistant_only"]) == 2
    assert "name its file" in capsys.readouterr().err
