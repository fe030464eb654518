"""Mistakes end in one or two lines and exit status 2, once for a launch; tracebacks where they are asked for."""

import io
import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path

import pytest
import tiny
from launch import end, start
from test_sft_script import folder, words  # noqa: F401
from transformers import AutoTokenizer

from trl_qtarget import cli
from trl_qtarget.cli import errors, launch, sft
from trl_qtarget.cli.noise import quiet


pytestmark = pytest.mark.usefixtures("_environment")


@pytest.fixture
def _environment(monkeypatch):
    """`--debug` is for this process and all that it starts."""
    monkeypatch.setenv("TRL_QTARGET_DEBUG", "0")


def said(capsys) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trl-qtarget sft: ")]
    return line


@pytest.fixture
def alpaca(tmp_path) -> Path:
    file = tmp_path / "alpaca.jsonl"
    file.write_text(json.dumps({"instruction": "Add.", "input": "1 2", "output": "3"}) + "\n")
    return file


def test_alpaca_columns_are_told_the_formats(folder, tmp_path, alpaca, capsys):  # noqa: F811
    assert sft.main(words(folder, tmp_path / "out", dataset_name=alpaca)) == 2
    line = said(capsys)
    assert "`instruction`, `input`, `output`" in line and "`messages`, or `prompt` and `completion`, or `text`" in line
    assert "Of Alpaca's columns" in line
    assert cli.main(["inspect", "--model_name_or_path", str(folder / "model"), "--dataset_name", str(alpaca)]) == 2
    assert "`messages`, or `prompt` and `completion`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "package", "extra"),
    [
        (["--use_peft"], "peft", "peft"),
        (["--load_in_4bit"], "bitsandbytes", "quantization"),
        (["--ref_load_in_8bit", "--ref_model_name_or_path", "x"], "bitsandbytes", "quantization"),
        (["--accelerate_config", "zero2"], "deepspeed", "deepspeed"),
    ],
)
def test_missing_package_is_named_with_its_extra(folder, tmp_path, capsys, monkeypatch, arguments, package, extra):  # noqa: F811
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(launch, "run", lambda _: pytest.fail("it was launched"))
    assert cli.main(["sft", *words(folder, tmp_path / "out"), *arguments]) == 2
    line = said(capsys)
    assert f"needs the package `{package}`" in line and f"`pip install 'trl-qtarget[{extra}]'`" in line


def test_plot_without_matplotlib_names_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["plot", "--output", str(tmp_path / "x.png")]) == 2
    assert "`pip install 'trl-qtarget[plot]'`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"method": "distill", "ref_model_name_or_path": "./no/teacher"}, "no/teacher"),
        ({"method": "cft"}, "`token_weight_column='token_weights'` is missing from the train dataset"),
        ({"dataset_name": "./no/folder"}, "no/folder"),
    ],
    ids=str,
)
def test_what_is_missing_is_one_line(folder, tmp_path, capsys, options, why):  # noqa: F811
    assert sft.main(words(folder, tmp_path / "out", **options)) == 2
    line = said(capsys)
    assert why in line and len(line) < 700


def test_teacher_of_another_vocabulary_is_one_line(folder, tmp_path, capsys):  # noqa: F811
    tiny.model().save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(tmp_path / "teacher")
    file = tmp_path / "teacher" / "tokenizer.json"
    parts = json.loads(file.read_text())
    words_of = parts["model"]["vocab"]
    first, second, *_ = (word for word in words_of if words_of[word] > 20)
    words_of[first], words_of[second] = words_of[second], words_of[first]
    file.write_text(json.dumps(parts))
    teacher = {"method": "distill", "ref_model_name_or_path": tmp_path / "teacher"}
    assert sft.main(words(folder, tmp_path / "out", **teacher)) == 2
    assert "ref_model" in said(capsys)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [("plot", ["--prior_label_prob", "much"]), ("methods", ["--group", "none"]), ("plot", ["--colour"])],
)
def test_small_commands_say_a_wrong_value_without_their_usage(capsys, command, arguments):
    assert cli.main([command, *arguments]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and text.startswith(f"trl-qtarget {command}: ") and "usage" not in text


def test_debug_shows_the_traceback(capsys):
    assert cli.main(["plot", "--methods", "dtf"]) == 2
    assert "Traceback" not in (text := capsys.readouterr().err) and text.count("\n") == 1
    assert cli.main(["plot", "--methods", "dtf", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err and errors.debugging()


def test_debug_with_a_value_is_an_argument_of_the_training():
    assert errors.take_debug(["--debug", "underflow_overflow", "--lam", "1"])[0] == "--debug"
    assert errors.take_debug(["--lam", "1", "--debug"]) == ["--lam", "1"]
    assert errors.take_debug(["--debug", "--lam", "1"]) == ["--lam", "1"]


def test_a_message_is_said_once_in_a_launch(capsys, monkeypatch):
    with errors.one_launch():
        for rank in "012":
            monkeypatch.setenv("RANK", rank)
            errors.say("sft", ValueError("the same"))
        errors.say("sft", ValueError("another"))
    assert capsys.readouterr().err == "trl-qtarget sft: the same\ntrl-qtarget sft: another\n"
    assert not errors.in_launch()


def test_error_of_our_own_is_a_mistake_also_later():
    def raised(call):
        try:
            call()
        except Exception as error:
            return error

    ours = raised(lambda: errors.check_installed("no_such_package", "x", "y"))
    theirs = raised(lambda: int("x"))
    assert errors.is_mistake(ours, began=True) and not errors.is_mistake(theirs, began=True)
    assert errors.is_mistake(theirs, began=False) and not errors.is_mistake(raised(lambda: 1 / 0), began=False)


def test_output_that_cannot_be_encoded_falls_back_to_ascii(monkeypatch):
    pipe = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", pipe)
    assert cli.main(["methods", "target_sft"]) == 0
    pipe.write("é ≥ 字")
    pipe.flush()
    text = pipe.buffer.getvalue().decode("ascii")
    assert "Q = gamma delta(y) + (1 - gamma) pi" in text and text.endswith("e >= ?")


def test_without_a_gpu_it_runs_on_the_cpu_and_says_so(folder, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    # As a recipe for a GPU has it.
    given = words(folder, tmp_path / "out", use_cpu=None, bf16=True, tf32=True, max_steps=1)
    assert sft.main(given) == 0
    assert said(capsys) == f"trl-qtarget sft: {sft.NO_GPU}"
    commands = []
    monkeypatch.setattr(launch, "run", lambda command: commands.append(command) or 0)
    assert cli.main(["sft", *given]) == 0
    assert said(capsys) == f"trl-qtarget sft: {sft.NO_GPU}"
    assert commands[0][-8:] == ["--use_cpu", "True", "--bf16", "False", "--fp16", "False", "--tf32", "False"]
    assert cli.main(["sft", *given, "--use_cpu", "True", "--tf32", "False"]) == 0, "who says it himself is left alone"
    assert sft.NO_GPU not in capsys.readouterr().err


def test_another_target_is_taken_up_where_it_is_allowed(folder, tmp_path, capsys):  # noqa: F811
    output = tmp_path / "out"
    assert sft.main(words(folder, output, max_steps=2)) == 0
    assert (output / "trainer_state.json").is_file(), "of the finished run"
    resumed = words(folder, output, max_steps=3, method="dft", resume_from_checkpoint="true")
    assert sft.main(resumed) == 2
    assert "`--allow_new_target`" in said(capsys)
    assert sft.main([*resumed, "--allow_new_target"]) == 0
    assert json.loads((output / "qtarget_config.json").read_text())["method"] == "dft"
    assert cli.main(["plot", "--runs", str(output), "--output", str(tmp_path / "runs.svg")]) == 0


def test_ctrl_c_says_what_is_left(folder, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Once: by the launching process where there is one."""

    def step(*_):
        raise KeyboardInterrupt

    output = tmp_path / "out"
    assert sft.main(words(folder, output, max_steps=2)) == 0
    given = words(folder, output, max_steps=3, resume_from_checkpoint="true")
    left = f"interrupted; the last whole checkpoint is {output}/checkpoint-2 (`--resume_from_checkpoint true`"
    with monkeypatch.context() as patched:
        patched.setattr(sft.QTargetSFTTrainer, "training_step", step)
        assert sft.main(given) == 130
        assert left in said(capsys)
        with errors.one_launch():
            assert sft.main(given) == 130
            assert "interrupted" not in capsys.readouterr().err
    monkeypatch.setattr(launch, "run", lambda _: 130)
    assert cli.main(["sft", *given]) == 130
    assert left in said(capsys)
    monkeypatch.setattr(launch, "main", step)
    assert cli.main(["sft", *given]) == 130
    assert said(capsys) == "trl-qtarget sft: interrupted."


@pytest.mark.slow
def test_ctrl_c_ends_a_launch(folder, tmp_path):  # noqa: F811
    output, log = tmp_path / "out", tmp_path / "log"
    given = words(folder, output, max_steps=100000, save_steps=1, save_total_limit=1, logging_steps=100000)
    job = start([sys.executable, "-m", "trl_qtarget", "sft", *given], log)
    try:
        deadline = time.monotonic() + 120
        while not list(output.glob("checkpoint-*/trainer_state.json")) and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(job.pid, signal.SIGINT)
        assert job.wait(60) == 130
    finally:
        end(job)
    text = log.read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("trl-qtarget sft: interrupted")]
    assert f"the last whole checkpoint is {output}/checkpoint-" in line and "Traceback" not in text


def test_word_of_what_is_left_without_a_checkpoint(tmp_path):
    assert sft.interrupted(str(tmp_path)) == f"interrupted; there is no whole checkpoint in {tmp_path}."


def test_what_a_user_cannot_act_on_is_not_said():
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with quiet():
            for name in ("gradient_checkpointing", "is_gradient_checkpointing", "something_else"):
                warnings.warn(f"`{name}` is deprecated and will be removed", FutureWarning, stacklevel=1)
    assert [str(each.message).split("`")[1] for each in heard] == ["something_else"]
