"""Recipes and words on the command line that are wrong: one message, exit status 2, and nothing started."""

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl_qtarget import METHODS, QTargetConfig, cli
from trl_qtarget.cli import launch
from trl_qtarget.cli.models import ReferenceArguments
from trl_qtarget.cli.options import read_method
from trl_qtarget.cli.recipe import read_recipe
from trl_qtarget.cli.sft import make_parser, names_method


GIVEN = ["--use_cpu", "--bf16", "False", "--output_dir", "never"]
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def recipe(tmp_path):
    def write(content: str | bytes) -> str:
        file = tmp_path / "recipe.yaml"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(file)

    return write


def refused(capsys, command: str, *arguments: str) -> str:
    """What is said, which is one message."""
    assert cli.main([command, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"trl-qtarget {command}: ") and error.count("trl-qtarget") == 1
    assert "usage:" not in error and "Traceback" not in error and len(error) < 1500
    return error


@pytest.mark.parametrize("command", ["sft", "inspect"])
@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("method: asft\nlam: 0.1\nlam: 0.2\n", "`lam` stands in it twice"),
        ("method: asft\nmodel_init_kwargs: {a: 1, a: 2}\n", "`a` stands in it twice"),
        ("- method: asft\n", "holds no arguments"),
        ("asft", "holds no arguments"),
        ("", "holds no arguments"),
        ("method: [asft\n", "is no valid YAML"),
        ("[" * 5000, "is no valid YAML"),
        ("lam: " + "9" * 5000, "is no valid YAML"),
        ("lam: !!bool maybe", "is no valid YAML"),
        ("lam: !!timestamp soon", "is no valid YAML"),
        ("lam: !!python/object/apply:os.getcwd []", "is no valid YAML"),
        ("? [a]\n: 1\n", "is no valid YAML"),
        ("1: 2\n", "which is no string"),
        ("a: 1\n---\nb: 2\n", "is no valid YAML"),
        (b"method: \xff\xfe", "cannot be read"),
        ("method: asft\n".encode("utf-16"), "cannot be read"),
        ("lam: \x07", "is no valid YAML"),
    ],
    ids=range(17),
)
def test_files_that_are_no_recipe(recipe, capsys, command, content, why):
    file = recipe(content)
    said = refused(capsys, command, *GIVEN, "--config", file)
    assert f"`--config {file}`" in said and why in said
    assert why in refused(capsys, command, *GIVEN, f"--config={file}")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--config"], "`--config` needs a value"),
        (["--config", "none.yaml"], "`--config none.yaml` cannot be read"),
        (["--config", "x" * 300], "cannot be read"),
        (["--config", "a\0b"], "cannot be read"),
        (["--config", "a.yaml", "--config=b.yaml"], "`--config` stands twice"),
        (["--lam", "much"], "`--lam`: invalid"),
        (["--learning_rate", "fast"], "`--learning_rate`: invalid float value: 'fast'"),
        (["--max_steps", "2.5"], "`--max_steps`: invalid int value"),
        (["--ref_load_in_4bit", "maybe"], "`--ref_load_in_4bit`"),
        (["--prior", "teacher"], "`--prior`: invalid choice: 'teacher'"),
        (["--eval_strategy", "often"], "`--eval_strategy`"),
        (["--lam"], "`--lam`: expected one argument"),
        (["--num_processes", "two"], "`--num_processes`: invalid int value: 'two'"),
        (["--lam", "1e400"], "`lam=inf` is out of range"),
        (["--chunk_tokens", str(10**400)], "`chunk_tokens=an integer of 1329 bits` is out of range"),
        (["--method", "cft", "--token_weight_column", ""], "`token_weight_column=''` is no name of a column"),
        (["--resume_from_checkpoint", "nowhere"], "`resume_from_checkpoint` names no folder: nowhere does not exist"),
        (["--resume_from_checkpoint", "true"], "finds no whole checkpoint in `output_dir`"),
        (["--resume_from_checkpoint"], "`--resume_from_checkpoint`: expected one argument"),
        (["--test_split_size", "0"], "`test_split_size=0.0` is no size"),
        (["--test_split_size", "-3"], "`test_split_size=-3.0` is no size"),
        (["--test_split_size", "1.5"], "`test_split_size=1.5` is no size"),
        (["--test_split_size", "nan"], "`test_split_size=nan` is no size"),
        (["--dataset_name", "x" * 300 + ".json"], "does not exist"),
        (["--accelerate_config", "x" * 300], "neither a file nor a known configuration"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_words_that_are_wrong(capsys, arguments, why):
    method = [] if "--method" in arguments else ["--method", "asft"]
    assert why in refused(capsys, "sft", *GIVEN, *method, *arguments)


def test_missing_teacher_is_refused_before_the_launch(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "run", lambda command: pytest.fail("launched"))
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "a"}\n')
    given = [*GIVEN, "--model_name_or_path", "m", "--dataset_name", str(data), "--method", "distill"]
    assert "needs a reference model" in refused(capsys, "sft", *given)


WRONG = {
    "list": ["sft"],
    "dict": {"sft": 1},
    "empty dict": {},
    "true": True,
    "date": yaml.safe_load("2020-01-01"),
    "infinity": float("inf"),
    "huge": 10**400,
    "nested": [[[[[[]]]]]],
}
# A target that uses the field, so that nothing but its value can be wrong.
USES = {"alpha": "beyond_log", "tau": "profit", "lam": "asft", "beta": "gem", "epsilon": "psft", "top_k": "eaft"}
USES |= {"temperature": "distill", "clip_max": "iw_sft", "prior_sync_steps": "psft", "prior_sync_decay": "psft"}
USES |= {"token_weight_column": "cft", "trust": "none", "residual": "none"}


@pytest.mark.parametrize("kind", WRONG)
def test_values_of_another_type(recipe, kind):
    """Of every field of the target, and of a reference model."""
    for name in QTargetConfig.__dataclass_fields__:
        if name == "_":
            continue
        values = {"method": USES.get(name, "target_sft"), "trust": None, "residual": None}
        if values["method"] == "none":
            values |= {"trust": "one", "residual": "policy"}
        file = recipe(yaml.safe_dump(values | {name: WRONG[kind]}))
        with pytest.raises(ValueError, match=f"`{name}=") as error:
            make_parser().parse_args_and_config([*GIVEN, "--config", file])
        assert type(error.value) is ValueError and len(str(error.value)) < 1000
    for name, item in ReferenceArguments.__dataclass_fields__.items():
        if isinstance(item.default, bool) and kind == "true":
            continue
        values = {"ref_model_name_or_path": "teacher", name: WRONG[kind]}
        with pytest.raises(ValueError, match=f"`{name}` must be (a string|true or false), got `"):
            make_parser().parse_args_and_config([*GIVEN, "--config", recipe(yaml.safe_dump(values))])


@pytest.mark.parametrize("content", ["learning_rate: [1]", "test_split_size: [0.5]", "datasets: 3", "env: {1: 2}"])
def test_other_values_of_another_type(recipe, capsys, content):
    refused(capsys, "sft", *GIVEN, "--config", recipe(content))


def test_recipes_that_mean_one_thing(recipe):
    text = "base: &b {a: 1}\nmore: {<<: *b, c: 2}\nmethod: asft\nlam: 1e-3\n"
    assert read_recipe(recipe(text)) == {"base": {"a": 1}, "more": {"a": 1, "c": 2}, "method": "asft", "lam": "1e-3"}
    for words in (["--config", recipe("method: asft\nlam: 1e-3\n")], [f"--config={recipe('method: asft')}"]):
        parsed = make_parser().parse_args_and_config([*GIVEN, *words])
        target = next(part for part in parsed if isinstance(part, QTargetConfig))
        assert target.method == "asft" and names_method(words)


@FUZZ
@given(st.text(max_size=40) | st.text("-:[]{}&*!#|>%@`\"',? \nlam1e.", max_size=40) | st.binary(max_size=30))
def test_any_file(recipe, content):
    try:
        values = read_recipe(recipe(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content))
    except ValueError as error:
        assert type(error) is ValueError and "`--config" in str(error)
    else:
        assert isinstance(values, dict) and all(isinstance(name, str) for name in values)


# --- methods as words ---


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("asft:lam=" + "1" * 5000, "`lam="),
        ("asft:lam=" + "[" * 100_000, "`lam="),
        ("asft:lam=1e400", "`lam=inf` is out of range"),
        ("asft:lam=0.1,lam=0.2", "`lam` twice"),
        ("asft:method=sft", "`method` twice"),
        ("x" * 5000, "`method="),
    ],
    ids=range(6),
)
def test_methods_as_words(text, why):
    with pytest.raises(ValueError, match="`") as error:
        read_method(text)
    assert type(error.value) is ValueError and why in str(error.value)


@FUZZ
@given(st.text(max_size=30) | st.text("asft:lam=,.e0-[{", max_size=30))
def test_any_word_for_a_method(text):
    try:
        config = read_method(text)
    except ValueError as error:
        assert type(error) is ValueError and "`" in str(error)
    else:
        assert config.method in METHODS
