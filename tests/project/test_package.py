"""The package as users get it: what the wheel holds, and that optional dependencies are optional."""

import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from thinned import thinned

import trl_qtarget


ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

TRAINING = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None  # an import of it fails
sys.path.insert(0, {tests!r})
import torch, tempfile
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig
from trl_qtarget import QTargetSFTTrainer
import trl_qtarget.cli
words = {{word: number for number, word in enumerate("<pad> <eos> a b c".split())}}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
sizes = dict(vocab_size=5, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
with tempfile.TemporaryDirectory() as folder:
    trainer = QTargetSFTTrainer(
        LlamaForCausalLM(LlamaConfig(**sizes)),
        SFTConfig(folder, max_steps=1, use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_dict({{"text": ["a b c"] * 8}}),
        processing_class=tokenizer,
        qtarget_config="target_sft",
    )
    trainer.train()
    trainer.save_model()
print("trained")
"""


@pytest.mark.parametrize(
    "blocked",
    thinned(
        [
            ["peft"],
            ["bitsandbytes"],
            ["deepspeed"],
            ["peft", "bitsandbytes", "deepspeed", "matplotlib", "reasoning_gym"],
        ],
        lambda names: len(names) > 1,
    ),
    ids=lambda names: "+".join(names),
)
@pytest.mark.slow
def test_works_without_what_is_optional(blocked):
    code = TRAINING.format(blocked=blocked, tests=str(ROOT))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "trained" in done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy: a build leaves folders behind.
    source = folder / "source"
    source.mkdir()
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in tracked.stdout.splitlines():
        if name.startswith(("trl_qtarget/", "examples/")) or name in (
            "pyproject.toml",
            "setup.py",
            "README.md",
            "LICENSE",
        ):
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "--wheel-dir", str(folder), str(source)], capture_output=True, text=True)
    if "Cannot import 'setuptools" in done.stderr or "No module named 'setuptools'" in done.stderr:
        pytest.skip("needs setuptools")
    assert done.returncode == 0, done.stderr[-3000:]
    return next(folder.glob("*.whl"))


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "trl_qtarget").rglob("*.py")}
    page = (ROOT / "trl_qtarget" / "inspection").glob("*.*")
    files = {str(path.relative_to(ROOT)) for path in page if path.suffix in (".html", ".css", ".js")}
    assert len(files) == 5
    files |= {f"trl_qtarget/cli/help/{name}.txt" for name in ("sft", "tune", "cache", "inspect")}
    files |= {"trl_qtarget/py.typed", "trl_qtarget/cli/sequence_parallel.yaml"}
    examples = {name.removeprefix("trl_qtarget/_") for name in names if name.startswith("trl_qtarget/_examples/")}
    held = {name for name in names if ".dist-info/" not in name and "/_examples/" not in name}
    assert modules | files == held
    assert {"examples/recipes/qlora_24gb.yaml", "examples/multi_node/train.py", "examples/evaluate.py"} <= examples
    assert all((ROOT / name).is_file() for name in examples)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_installed_wheel_runs(wheel, tmp_path):
    """Away from the checkout."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
        entry = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "trl-qtarget = trl_qtarget.cli:main" in archive.read(entry).decode()
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import trl_qtarget; print(trl_qtarget.__file__)\n"
    code += "from trl_qtarget.cli import main; main(['recipes', 'qlora_24gb'])"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith(str(tmp_path)), done.stderr[-2000:]
    assert (tmp_path / "qlora_24gb.yaml").read_text() == (
        ROOT / "examples" / "recipes" / "qlora_24gb.yaml"
    ).read_text()


def test_version_is_said_once():
    assert PROJECT["version"] == trl_qtarget.__version__
    assert f"## [{trl_qtarget.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {trl_qtarget.__version__}" in citation or "\nversion:" not in citation


def test_readme_is_whole_on_the_package_index():
    """There its links are absolute, and each leads to a file that there is; formulas are text."""
    spec = importlib.util.spec_from_file_location("publish_links", ROOT / ".github" / "publish_links.py")
    links = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(links)
    readme = (ROOT / "README.md").read_text()
    text = links.absolute(readme, "owner/name", "v1")
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    ours = [found[1] for each in targets if (found := re.match(r"https://\S+?/owner/name/(?:blob/)?v1/([^#]+)", each))]
    assert len(ours) > 20 and all((ROOT / target).exists() for target in ours)
    assert all(each.startswith(("https://", "#")) for each in targets)
    assert "https://raw.githubusercontent.com/owner/name/v1/docs/figures/inspection.png" in text
    assert "$$" not in readme
    project = tomllib.loads(links.urls("owner/name"))["project"]
    assert project["urls"]["Issues"] == "https://github.com/owner/name/issues"
