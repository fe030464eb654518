"""`trl-qtarget`: what its commands print, what they refuse, and that `sft` trains what the trainer trains."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import quantized
import tiny
import torch
import yaml
from datasets import load_dataset
from launch import end, finish, free_port, start, torchrun
from safetensors.torch import load_file
from thinned import thinned
from training import OPTIMIZERS, sft_config, warm_model
from transformers import AutoModelForCausalLM
from trl import DatasetMixtureConfig, ScriptArguments
from trl.scripts.utils import DatasetConfig

from trl_qtarget import METHODS, QTargetConfig, QTargetSFTTrainer, __version__, cli
from trl_qtarget.cli.data import load_data, split_of
from trl_qtarget.cli.launch import check, with_accelerate_config
from trl_qtarget.cli.methods import describe
from trl_qtarget.cli.models import ReferenceArguments, load_reference
from trl_qtarget.cli.sft import make_parser, names_method


ROWS = [
    {"prompt": prompt, "completion": f" {text}"}
    for prompt, text in zip(tiny.sentences(40, 1, 6), tiny.sentences(40, 2), strict=True)
]
OPTIONS = {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, **OPTIMIZERS["adamw"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A policy, a teacher and a dataset, on disk."""
    folder = tmp_path_factory.mktemp("cli")
    for name, steps in (("policy", 20), ("teacher", 30)):
        warm_model(steps=steps).save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "rows").mkdir()
    shutil.copy(folder / "rows.jsonl", folder / "rows" / "train.jsonl")
    return folder


def _recipe(folder: Path, output: str, **changes) -> Path:
    values = {
        "model_name_or_path": str(folder / "policy"),
        "dataset_name": str(folder / "rows.jsonl"),
        "output_dir": str(folder / output),
        "dtype": "float32",
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "gradient_checkpointing": False,
        **OPTIONS,
        **changes,
    }
    file = folder / f"{output}.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


OURS = [sys.executable, "-m", "trl_qtarget.cli", "sft"]
THEIRS = [sys.executable, "-m", "trl.cli.main", "sft"]


def _run(folder: Path, output: str, *arguments: str, command: list[str] = OURS, **changes) -> dict:
    recipe, log = _recipe(folder, output, **changes), folder / f"{output}.log"
    job = start([*command, "--config", str(recipe), *arguments], log)
    try:
        finish(job, log)
    finally:
        end(job)
    assert job.returncode == 0, log.read_text()[-3000:]
    return load_file(folder / output / "model.safetensors")


def _trained(folder: Path, **arguments) -> dict:
    """What the trainer makes of the same recipe, in this process."""
    _, training, *_ = make_parser().parse_args_and_config(["--config", str(_recipe(folder, "here"))])
    training.model_init_kwargs = {"dtype": "float32"}
    trainer = QTargetSFTTrainer(
        str(folder / "policy"),
        training,
        train_dataset=load_dataset("json", data_files=str(folder / "rows.jsonl"))["train"],
        **arguments,
    )
    trainer.train()
    return trainer.model.state_dict()


def _same(found: dict, wanted: dict, tolerance: float = 0.0) -> None:
    for name, weight in found.items():
        torch.testing.assert_close(weight, wanted[name], rtol=tolerance, atol=tolerance)


# --- training ---


@pytest.mark.slow
def test_sft_trains_what_the_trainer_trains(folder):
    """The recipe's `lam` gives way to the command line's."""
    arguments = ["--lam", "0.2", "--ref_model_name_or_path", str(folder / "teacher")]
    found = _run(folder, "asft", *arguments, method="asft", lam=0.7)
    _same(found, _trained(folder, qtarget_config=QTargetConfig("asft", lam=0.2), ref_model=str(folder / "teacher")))
    assert QTargetConfig.from_pretrained(folder / "asft") == QTargetConfig("asft", lam=0.2, prior="model")
    AutoModelForCausalLM.from_pretrained(folder / "asft")


@pytest.mark.slow
def test_recipe_of_trl_works_and_gives_its_weights(folder):
    """The same YAML through `trl sft` and, after changing the program's name, through ours."""
    recipe = {"loss_type": "dft", "dataset_name": str(folder / "rows")}
    theirs = _run(folder, "theirs", command=THEIRS, **recipe)
    ours = _run(folder, "ours", **recipe)
    # 3 steps of AdamW from gradients that agree to float32 rounding.
    _same(ours, theirs, tolerance=2e-6)


@pytest.mark.parametrize("backend", thinned(["ddp", "zero3"], lambda backend: False))
def test_two_processes_give_the_weights_of_one(folder, backend):
    """A step takes all rows, whatever their order. Accelerate starts no DDP on CPUs without MPI; torchrun does."""
    options = {"method": "target_sft", "ref_model_name_or_path": str(folder / "teacher")}
    one = _run(folder, f"{backend}_one", **options, per_device_train_batch_size=len(ROWS))
    options["per_device_train_batch_size"] = len(ROWS) // 2
    if backend == "ddp":
        two = _run(folder, "ddp_two", command=[*torchrun(), "-m", "trl_qtarget.cli.sft"], **options)
    else:
        zero = {"zero_stage": 3, "zero3_init_flag": True, "zero3_save_16bit_model": True}
        config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "DEEPSPEED", "deepspeed_config": zero}
        config |= {"num_machines": 1, "num_processes": 2, "use_cpu": True, "mixed_precision": "no"}
        file = folder / "accelerate.json"
        file.write_text(json.dumps(config))
        launch = ["--accelerate_config", str(file), "--main_process_port", str(free_port())]
        two = _run(folder, "zero3_two", *launch, **options)
    # Sums of the same gradients in another order, through three steps.
    _same(two, one, tolerance=2e-6)


def test_one_process_on_the_cpu_has_all_cores(folder, monkeypatch):
    """Accelerate would give it one."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("torch.get_num_threads", lambda: 6)
    option, recipe = "--num_cpu_threads_per_process", str(_recipe(folder, "cores"))

    def job(*words: str) -> list[str]:
        return check(["--config", recipe, *words]).job

    words = job("--num_processes", "1")
    assert words[words.index(option) + 1] == "6" and words.index(option) < words.index("--module")
    assert option in job()
    with monkeypatch.context() as patch:  # where the launcher would start four
        patch.setattr("torch.accelerator.device_count", lambda: 4)
        assert option not in job()
    assert option not in job("--num_processes", "2") and job(option, "3").count(option) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert option not in job("--num_processes", "1")


def test_ref_model_loads_as_asked(tmp_path):
    pytest.importorskip("bitsandbytes")
    quantized.wide().save_pretrained(tmp_path)
    training = sft_config(model_init_kwargs={"dtype": "float32", "revision": "main"})
    path = str(tmp_path)
    assert load_reference(ReferenceArguments(), training) is None
    assert load_reference(ReferenceArguments(path), training).dtype == torch.float32
    assert load_reference(ReferenceArguments(path, ref_dtype="bfloat16"), training).dtype == torch.bfloat16
    four = load_reference(ReferenceArguments(path, ref_load_in_4bit=True), training)
    assert four.is_loaded_in_4bit and four.config.quantization_config.bnb_4bit_quant_type == "nf4"
    assert load_reference(ReferenceArguments(path, ref_load_in_8bit=True), training).is_loaded_in_8bit


# --- arguments ---


def _refused(capsys, *arguments: str) -> str:
    assert cli.main(["sft", "--use_cpu", "--bf16", "False", "--output_dir", "never", *arguments]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lamm", "0.2"], "`--lamm` is no option: did you mean `--lam`"),
        (["--lr", "1e-4"], "`--lr` is no option: did you mean `--learning_rate`?"),
        (
            ["--learning_rat", "1", "--num_proceses", "2"],
            "`--num_proceses` is no option: did you mean `--num_processes`",
        ),
        (["--method", "dtf"], "`method='dtf'` is unknown: did you mean `dft`?"),
        (["--method", "asft", "--eta", "0.3"], "`eta` is not used by `method='asft'`"),
        (["--method", "none"], "set both `trust` and `residual`"),
        (["--accelerate_config", "zero4"], "did you mean `zero"),
        (["--ref_load_in_4bit"], "name it with `ref_model_name_or_path`"),
        (["--ref_load_in_4bit", "--ref_load_in_8bit", "--ref_model_name_or_path", "x"], "exclude each other"),
        (["--dataset_name", "missing.jsonl"], "`missing.jsonl` does not exist"),
        (["stray"], "`stray` belongs to no option"),
        (["--loss_type", "dft", "--method", "asft"], "contradicts `qtarget_config`"),
    ],
)
def test_mistakes_are_refused_before_anything_starts(capsys, arguments, message):
    assert message in _refused(capsys, *arguments)


def test_unknown_key_of_a_recipe_is_refused(capsys, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rat: 1.0e-4\n")
    assert "`--learning_rat` is no option: did you mean `--learning_rate`" in _refused(capsys, "--config", str(recipe))
    assert "`--learning_rat` is no option" in _refused(capsys, f"--config={recipe}")


def test_every_field_of_the_target_is_an_argument():
    options = make_parser()._option_string_actions
    for name in QTargetConfig.__dataclass_fields__:
        assert name == "_" or f"--{name}" in options
    *_, target, _, _ = make_parser().parse_args_and_config(
        [
            "--output_dir",
            "x",
            "--use_cpu",
            "--method",
            "none",
            "--trust",
            "entropy",
            "--residual",
            "guided",
            "--top_k",
            "5",
        ]
    )
    assert target == QTargetConfig(method=None, trust="entropy", residual="guided", top_k=5)


def test_a_named_method_is_told_from_the_default(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: target_sft\n")
    assert names_method(["--method", "target_sft"]) and names_method(["--method=target_sft"])
    assert names_method(["--config", str(recipe)])
    recipe.write_text("eta: 0.5\n")
    assert not names_method(["--config", str(recipe)]) and not names_method([])


def test_accelerate_configs_are_known_by_name(tmp_path):
    for name in ("single_gpu", "multi_gpu", "zero1", "zero2", "zero3", "fsdp2", "sequence_parallel"):
        found = with_accelerate_config(["--num_processes", "4", "--accelerate_config", name])
        assert found[0] == "--config_file" and Path(found[1]).is_file() and found[2:] == ["--num_processes", "4"]
    own = tmp_path / "own.yaml"
    own.write_text("num_processes: 2\n")
    assert with_accelerate_config([f"--accelerate_config={own}"]) == ["--config_file", str(own)]
    both = ["--accelerate_config", "zero2", "--num_processes", "4", "--accelerate_config", "zero3"]
    assert Path(with_accelerate_config(both)[1]).stem == "zero3", "the command line comes after the recipe"
    with pytest.raises(ValueError, match="needs a value"):
        with_accelerate_config(["--accelerate_config"])


# --- data ---


@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet", "csv"])
def test_local_files_of_every_format(folder, tmp_path, ending):
    dataset = load_dataset("json", data_files=str(folder / "rows.jsonl"))["train"]
    path = str(tmp_path / f"rows.{ending}")
    {"csv": dataset.to_csv, "parquet": dataset.to_parquet}.get(ending, dataset.to_json)(path)
    for streaming in (False, True):
        found = load_data(ScriptArguments(path, dataset_streaming=streaming), DatasetMixtureConfig())
        assert list(found["train"]) == ROWS
    parts = load_data(ScriptArguments(path), DatasetMixtureConfig(test_split_size=0.25))
    assert (len(parts["train"]), len(parts["test"])) == (30, 10)


def test_mixture_of_local_files_wins_over_a_name(folder):
    path = str(folder / "rows.jsonl")
    mixture = DatasetMixtureConfig([DatasetConfig(path), DatasetConfig(path, columns=["prompt", "completion"])])
    assert len(load_data(ScriptArguments("ignored"), mixture)["train"]) == 2 * len(ROWS)


def test_data_that_is_missing_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match="`dataset_name` is missing"):
        load_data(ScriptArguments(), DatasetMixtureConfig())
    odd = tmp_path / "rows.xlsx"
    odd.touch()
    with pytest.raises(ValueError, match=r"rows\.xlsx` has an unknown format"):
        load_data(ScriptArguments(str(odd)), DatasetMixtureConfig())
    dataset = load_data(ScriptArguments(str(folder / "rows.jsonl")), DatasetMixtureConfig())
    with pytest.raises(ValueError, match=r"`dataset_test_split='test'` is no split.*`test_split_size`"):
        split_of(dataset, "test", "dataset_test_split")


# --- methods ---


def test_methods_lists_every_row(capsys):
    assert cli.main(["methods"]) == 0
    table = capsys.readouterr().out
    for name, row in METHODS.items():
        assert f"\n{name} " in table and row.loss in table and (row.arxiv or "") in table
    assert all(len(line) <= 105 for line in table.splitlines())


def test_methods_as_json_has_every_fact(capsys):
    assert cli.main(["methods", "--json"]) == 0
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == list(METHODS)
    for name, row in METHODS.items():
        assert {knob: known["default"] for knob, known in rows[name]["knobs"].items()} == row.knobs
        assert (rows[name]["prior"], rows[name]["arxiv"]) == (row.prior, row.arxiv)
        assert rows[name]["trust"]["formula"].startswith("γ") and rows[name]["residual"]["formula"]


@pytest.mark.parametrize("name", METHODS)
def test_methods_explains_each(capsys, name):
    assert cli.main(["methods", name]) == 0
    text, row = capsys.readouterr().out, METHODS[name]
    assert row.loss in text and row.source in text and describe(name)["trust"]["formula"] in text
    knobs = {knob: default if isinstance(default, str) else f"{default:g}" for knob, default in row.knobs.items()}
    assert all(f"{knob} = {default}" in text for knob, default in knobs.items())
    assert f"--method {name}" in text


def test_wrong_names_are_suggested(capsys):
    assert cli.main(["methods", "targetsft"]) == 2
    assert "did you mean `target_sft`" in capsys.readouterr().err
    assert cli.main(["methods", "nosuch"]) == 2
    assert "`nosuch` is no method. Known: " in capsys.readouterr().err
    assert cli.main(["method"]) == 2
    assert "did you mean `methods`" in capsys.readouterr().err
    assert cli.main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out
    assert cli.main([]) == 0
    assert "sft" in capsys.readouterr().out
