"""A file of results belongs to its problems, settings and weights; it loses nothing, and reuses nothing wrongly."""

import json
import sys
from pathlib import Path

import pytest
import tiny
from peft import LoraConfig, get_peft_model


sys.path.append(str(Path(__file__).parents[2] / "examples"))

import evaluate


# What str.splitlines takes for ends of lines, and other characters that a file of lines has to survive.
ENDS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
ODD = ENDS + "\0\t\ufeff\ud800é😀"


def write_rows(path: Path, rows: list[tuple[str | None, str | None]]) -> None:
    path.write_text("".join(json.dumps({"problem": first, "answer": last}) + "\n" for first, last in rows))


@pytest.fixture
def command(tmp_path):
    tiny.model().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", [(text, "noisy") for text in tiny.sentences(3)])
    paths = {"model": tmp_path / "model", "dataset": tmp_path / "rows.jsonl", "output": tmp_path / "out.jsonl"}
    options = {"samples": 2, "max_new_tokens": 4, "judge": "text", "backend": "transformers"}
    return [word for name, value in (paths | options).items() for word in (f"--{name}", str(value))]


@pytest.fixture
def asked(monkeypatch):
    """Which problems are sampled; the answers are odd, as no tiny model gives them when it is asked to."""
    numbers = []

    def sample(problems, arguments, tokenizer):
        for problem in problems:
            numbers.append(problem.number)
            yield [f"{problem.number}{ODD}{index}" for index in range(arguments.samples)]

    monkeypatch.setattr(evaluate, "sample_transformers", sample)
    return numbers


def test_answers_with_ends_of_lines_are_read_again(command, asked, tmp_path):
    evaluate.main(command)
    content = (tmp_path / "out.jsonl").read_bytes()
    lines = [json.loads(line) for line in content.decode().splitlines()]
    assert [line["answers"] for line in lines[1:]] == [[f"{n}{ODD}{index}" for index in range(2)] for n in range(3)]
    evaluate.main(command)
    assert asked == [0, 1, 2] and (tmp_path / "out.jsonl").read_bytes() == content


def test_killed_at_any_byte_it_goes_on(command, asked, tmp_path):
    evaluate.main(command)
    output, whole = tmp_path / "out.jsonl", (tmp_path / "out.jsonl").read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == 10]
    cuts = {0, 1, 7, *ends, *(end - 1 for end in ends), *(end + 1 for end in ends[:-1])}
    for cut in sorted(cuts):
        output.write_bytes(whole[:cut])
        asked.clear()
        evaluate.main(command)
        assert output.read_bytes() == whole
        assert asked == list(range(max(0, sum(end <= cut for end in ends) - 1), 3)), cut


def test_killed_before_the_first_answer(command, tmp_path):
    """By the real thing: an empty file, and one with its settings alone."""
    output = tmp_path / "out.jsonl"
    evaluate.main(command)
    whole = output.read_bytes()
    for left in (b"", whole[:20], whole[: whole.index(b"\n") + 1]):
        output.write_bytes(left)
        evaluate.main(command)
        assert output.read_bytes() == whole


def test_other_problems_are_refused(command, asked, tmp_path):
    evaluate.main(command)
    before = (tmp_path / "out.jsonl").read_bytes()
    rows = [(text, "noisy") for text in tiny.sentences(3)]
    for changed in ([rows[0], ("another", "noisy"), rows[2]], [rows[0], (rows[1][0], "right"), rows[2]], rows[::-1]):
        write_rows(tmp_path / "rows.jsonl", changed)
        with pytest.raises(SystemExit, match=r"holds answers to other problems: that of row [01] has changed"):
            evaluate.main(command)
        assert (tmp_path / "out.jsonl").read_bytes() == before
    write_rows(tmp_path / "rows.jsonl", [*rows, ("one more", "noisy")])
    evaluate.main(command)
    assert asked == [0, 1, 2, 3], "rows that are added are answered, and nothing else"


@pytest.mark.parametrize(
    "other",
    [
        ["--temperature", "0.5"],
        ["--max_new_tokens", "5"],
        ["--system", "Be brief."],
        ["--samples", "3"],
        ["--seed", "1"],
        ["--top_p", "0.9"],
    ],
    ids=lambda option: option[0],
)
def test_other_settings_are_refused(command, asked, other):
    evaluate.main(command)
    with pytest.raises(SystemExit, match="holds another evaluation: name another file, or remove it"):
        evaluate.main([*command, *other])


def test_other_weights_are_refused(command, asked, tmp_path):
    """Trained on, and saved under the same name."""
    evaluate.main(command)
    (tmp_path / "model" / "README.md").write_text("# A card")
    (tmp_path / "model" / "trainer_state.json").write_text("{}")
    evaluate.main(command)
    tiny.model(1).save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match="holds another evaluation"):
        evaluate.main(command)
    tiny.model(0).save_pretrained(tmp_path / "model")
    evaluate.main(command)
    assert asked == [0, 1, 2]


def test_other_base_of_an_adapter_is_refused(tmp_path):
    base = tmp_path / "base"
    tiny.model().save_pretrained(base)
    model = get_peft_model(tiny.model().from_pretrained(base), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    before = evaluate.weights_of(str(tmp_path / "adapter"))
    assert before == evaluate.weights_of(str(tmp_path / "adapter"))
    tiny.model(1).save_pretrained(base)
    assert evaluate.weights_of(str(tmp_path / "adapter")) != before


@pytest.mark.parametrize("content", ["notes of mine", "notes of mine\n", "[]\n", "null\n{}\n", '{"model": 3}\n'])
def test_file_of_something_else_is_left_alone(command, asked, content, tmp_path):
    (tmp_path / "out.jsonl").write_text(content)
    with pytest.raises(SystemExit, match="holds another evaluation"):
        evaluate.main(command)
    assert (tmp_path / "out.jsonl").read_text() == content and asked == []


@pytest.mark.parametrize("line", ["half a li", "[]", "{}", '{"number": [0]}'])
def test_damaged_line_is_named(command, asked, line, tmp_path):
    evaluate.main([*command, "--limit", "1"])
    with (tmp_path / "out.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(SystemExit, match="has a damaged line"):
        evaluate.main(command)


def test_limit_takes_the_first_problems(command, asked, capsys):
    evaluate.main([*command, "--limit", "1"])
    assert asked == [0] and "1 problems" in capsys.readouterr().out
    evaluate.main([*command, "--limit", "100"])
    assert asked == [0, 1, 2]
    evaluate.main([*command, "--limit", "2"])
    assert asked == [0, 1, 2] and "2 problems" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *[("limit", value, "a whole number of at least 1") for value in ("0", "-1", "1.5", "two", "")],
        *[(name, "0", "a whole number of at least 1") for name in ("samples", "max_new_tokens", "batch_size")],
        *[("temperature", value, "must be 0 or more") for value in ("-0.1", "nan", "inf")],
        *[("top_p", value, "must be in (0, 1]") for value in ("0", "1.1", "nan")],
        *[("seed", value, "must be in [0, 2^31)") for value in ("-1", str(2**32))],
    ],
)
def test_numbers_are_in_their_range(name, value, message, capsys):
    with pytest.raises(SystemExit) as error:
        evaluate.main(["--model", "never", "--dataset", "loaded", f"--{name}={value}"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert error.value.code == 2 and f"--{name}" in last and message in last


def test_rows_without_problem_or_answer(command, asked, tmp_path):
    for row, column in ((("what", None), "answer"), ((None, "that"), "problem")):
        write_rows(tmp_path / "rows.jsonl", [("a", "b"), row])
        with pytest.raises(SystemExit, match=f"nothing in column `{column}` of row 1"):
            evaluate.main(command)
