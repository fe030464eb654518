"""The notebook, and scripts that `uv run` takes: each works from an empty folder."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tiny
from training import warm_model


ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
# What stands at the top of a script, by PEP 723.
HEADER = re.compile(r"^# /// script\n((?:#.*\n)+?)# ///$", re.MULTILINE)
SCRIPTS = [path for path in sorted(EXAMPLES.glob("*.py")) if HEADER.search(path.read_text())]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    warm_model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_notebook_runs(model, tmp_path):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(EXAMPLES / "first_run.ipynb", 4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "committed without outputs"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {"MODEL": str(model), "STEPS": "2", "PROBLEMS": "2", "PYTHONPATH": path}
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}})
    client.execute(env={**os.environ, **environment})
    said = "".join(str(output) for cell in notebook.cells for output in cell.get("outputs", []))
    assert "right before" in said and "target/trust" in said and said.count("<iframe") == 2
    assert (tmp_path / "sums" / "final" / "qtarget_config.json").is_file()


def test_scripts_say_what_they_need():
    assert {"qlora.py", "evaluate.py"} <= {path.name for path in SCRIPTS}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for path in SCRIPTS:
        text = HEADER.search(path.read_text())[1]
        header = tomllib.loads("".join(line[2:] if line != "#" else "\n" for line in text.splitlines(keepends=True)))
        assert header["requires-python"] == ">=3.11"
        (ours,) = (each for each in header["dependencies"] if each.startswith("trl-qtarget"))
        assert set(re.findall(r"[\w-]+", ours.removeprefix("trl-qtarget"))) <= extras.keys()
        # Alone: nothing that lies beside it in the checkout.
        beside = {other.stem for other in EXAMPLES.glob("*.py")}
        assert not beside & set(re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.MULTILINE))


@pytest.mark.slow
def test_uv_runs_a_script_from_an_empty_folder(tmp_path):
    """With the package from a wheel, as an index has it."""
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is None:
        pytest.skip("uv is not installed")
    source, folder = tmp_path / "source", tmp_path / "empty"
    ignored = shutil.ignore_patterns(".git", ".venv*", "outputs", "build", "*.egg-info", "method_comparison")
    shutil.copytree(ROOT, source, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(pip, check=True)
    folder.mkdir()
    shutil.copy(EXAMPLES / "evaluate.py", folder)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [uv, "run", "--find-links", str(tmp_path), "evaluate.py", "--help"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "--judge" in done.stdout
