"""`trl-qtarget plot`: the curves are the published formulas, and the runs those that were trained."""

import json
import shutil

import pytest
import tiny
import torch
from measured import CLOSED
from training import make_trainer

from trl_qtarget import QTargetConfig, QTargetSFTTrainer, cli
from trl_qtarget.cli.options import read_method
from trl_qtarget.cli.plot import main as plot
from trl_qtarget.inspection.curves import VOCABULARY, method_curves
from trl_qtarget.inspection.figures import RUN_METRICS, draw_methods, draw_runs, read_run


PRIOR = 0.3


def _guided(p: torch.Tensor, eta: float) -> torch.Tensor:
    """The guided residual of the label, with all other tokens alike."""
    label = p ** (1 - eta) * PRIOR**eta
    other = ((1 - p) / (VOCABULARY - 1)) ** (1 - eta) * ((1 - PRIOR) / (VOCABULARY - 1)) ** eta
    return label / (label + (VOCABULARY - 1) * other)


FORMULAS = {
    "sft": (lambda p: torch.ones_like(p), lambda p: torch.ones_like(p)),
    "dft": (lambda p: 2 * p - p**2, lambda p: torch.ones_like(p)),
    "beyond_log": (lambda p: 2 * p - p**2, lambda p: torch.ones_like(p)),
    "profit": (lambda p: torch.where(p > 0.1, 1.0, p), lambda p: torch.ones_like(p)),
    "label_smoothing": (lambda p: 0.9 + 0.1 / VOCABULARY + 0 * p, lambda p: torch.ones_like(p)),
    "sft_kl": (lambda p: (1 + 0.1 * PRIOR) / 1.1 + 0 * p, lambda p: torch.full_like(p, 1.1)),
    "asft": (lambda p: (p + 0.05 * PRIOR) / (p + 0.05), lambda p: p + 0.05),
    "distill": (lambda p: torch.full_like(p, PRIOR), lambda p: torch.ones_like(p)),
    "distill_hybrid": (lambda p: 0.5 + 0.5 * PRIOR + 0 * p, lambda p: torch.ones_like(p)),
    "target_sft": (lambda p: p + (1 - p) * _guided(p, 0.5), lambda p: torch.ones_like(p)),
    "iw_sft": (lambda p: p + p / PRIOR * (1 - p), lambda p: torch.ones_like(p)),
    "psft": (
        lambda p: torch.where(p / PRIOR < 1.28, p + p / PRIOR * (1 - p), p),
        lambda p: torch.ones_like(p),
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_curves_are_the_formulas(name):
    (curve,) = method_curves([QTargetConfig(name)], PRIOR)
    mass, scale = (formula(curve.label_probs) for formula in FORMULAS[name])
    # float64 throughout; a few sums of a thousand terms.
    torch.testing.assert_close(curve.label_mass, mass.double(), rtol=1e-10, atol=1e-12)
    gradient = scale * (curve.label_probs - mass)
    torch.testing.assert_close(curve.gradient, gradient.double(), rtol=1e-10, atol=1e-12)


def test_every_method_of_the_table_can_be_drawn(tmp_path):
    names = [name for name in CLOSED if name != "cft"]
    for ending in ("png", "svg", "pdf"):
        path = tmp_path / "new" / f"methods.{ending}"
        draw_methods([QTargetConfig(name) for name in names], path)
        assert path.stat().st_size > 5000
    assert [file.name for file in (tmp_path / "new").iterdir()].count("methods.png") == 1


def test_legend_names_every_curve(tmp_path):
    draw_methods([QTargetConfig("dft")], tmp_path / "methods.svg")
    text = (tmp_path / "methods.svg").read_text()
    assert "<!-- dft -->" in text and "<!-- the policy itself -->" in text


def test_curves_name_the_knobs_that_were_set():
    curves = method_curves(
        [QTargetConfig("asft", lam=0.3), QTargetConfig(method=None, trust="one", residual="uniform")]
    )
    assert [curve.name for curve in curves] == ["asft (lam=0.3)", "one + uniform"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "cft"], "follows the dataset's weights"),
        (["--methods", "dtf"], "`method='dtf'` is unknown"),
        (["--methods", "asft:lam"], "not of the form knob=value"),
        (["--prior_label_prob", "1"], "must lie between 0 and 1"),
        (["--output", "targets.gif"], "must end in .png, .svg or .pdf"),
        (["--runs", "nowhere"], "`nowhere` does not exist"),
        (["--runs", "nowhere", "./nowhere"], "give each run a name of its own"),
        (["--runs", "a=one", "a=two"], "`runs` has `a` twice"),
    ],
)
def test_mistakes_are_refused(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plot", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_methods_are_written_in_a_word(tmp_path):
    assert read_method("dft") == QTargetConfig("dft")
    assert read_method("target_sft:eta=0.3,prior=base") == QTargetConfig("target_sft", eta=0.3, prior="base")
    assert read_method("eaft:top_k=5") == QTargetConfig("eaft", top_k=5)
    assert read_method("none:trust=entropy,residual=uniform").trust == "entropy"
    QTargetConfig("gem", beta=0.5).save_pretrained(tmp_path)
    assert read_method(str(tmp_path)) == QTargetConfig("gem", beta=0.5)


def test_folder_named_like_a_method_is_not_taken_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    QTargetConfig("gem", beta=0.5).save_pretrained("sft")
    assert read_method("sft") == QTargetConfig("sft")
    assert read_method("./sft") == QTargetConfig("gem", beta=0.5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folders = {}
    for method in ("sft", "dft"):
        folders[method] = tmp_path_factory.mktemp(method)
        options = {"output_dir": str(folders[method]), "save_strategy": "steps", "save_steps": 2}
        trainer = make_trainer(
            QTargetSFTTrainer, tiny.text_dataset(), tiny.model(), steps=4, options=options, qtarget_config=method
        )
        trainer.train()
    return folders


def test_runs_are_overlaid(runs, tmp_path, capsys):
    output = tmp_path / "runs.png"
    assert cli.main(["plot", "--runs", f"plain={runs['sft']}", str(runs["dft"]), "--output", str(output)]) == 0
    assert output.stat().st_size > 10_000 and str(output) in capsys.readouterr().out
    lines = read_run(runs["dft"])
    assert [line["step"] for line in lines] == [1, 2, 3, 4], "the newest checkpoint is read"
    assert all(set(RUN_METRICS) - {"target/prior_agreement"} <= set(line) for line in lines)
    assert read_run(runs["dft"] / "checkpoint-2" / "trainer_state.json")[-1]["step"] == 2


@pytest.fixture
def drawn(monkeypatch):
    """What `plot` draws of runs, by name."""
    seen = {}
    monkeypatch.setattr("trl_qtarget.cli.plot.draw_runs", lambda runs, path: seen.update(runs))
    return seen


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["a/checkpoint-2", "b/checkpoint-2", "c"], ["a/checkpoint-2", "b/checkpoint-2", "c"]),
        (["a/x/trainer_state.json", "b/y/trainer_state.json"], ["x", "y"]),
        (["a/x/trainer_state.json", "b/x/trainer_state.json"], ["a/x", "b/x"]),
        (["one=a/x", "b/x"], ["one", "x"]),
        (["../runs/a", "."], ["a", "runs"]),
        (["lr=1e-4", "lr=1e-5"], ["lr=1e-4", "lr"]),  # the second is no folder
    ],
)
def test_runs_are_named_apart(given, names, drawn, tmp_path, monkeypatch):
    (tmp_path / "runs" / "lr=1e-4").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "runs")
    assert plot(["--runs", *given]) == 0
    assert list(drawn) == names
    assert str(drawn[names[0]]) == given[0].removeprefix("one=")


def test_checkpoints_of_one_name_are_all_drawn(runs, tmp_path):
    output = tmp_path / "runs.svg"
    folders = [runs[method] / "checkpoint-2" for method in ("sft", "dft")]
    assert plot(["--runs", *map(str, folders), "--output", str(output)]) == 0
    assert all(f"<!-- {folder.parent.name}/checkpoint-2 -->" in output.read_text() for folder in folders)


@pytest.mark.parametrize("rest", ["", '{"global_step": 4, "log_', "[]", "{}"])
def test_half_written_state_is_passed_over(runs, rest, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(runs["dft"], run)
    state = run / "checkpoint-4" / "trainer_state.json"
    state.write_text(rest)
    assert read_run(run)[-1]["step"] == 2
    assert f"`{state}` is not a whole" in caplog.text
    for path in (state, state.parent):
        with pytest.raises(ValueError, match=r"checkpoint-4.trainer_state\.json` is not a whole"):
            read_run(path)


def test_folders_without_a_run_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no trainer_state\.json"):
        draw_runs({"none": tmp_path}, tmp_path / "runs.png")
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 1, "log_history": [{"loss": 1.0}]}))
    with pytest.raises(ValueError, match="no `target/` metrics"):
        read_run(tmp_path)
