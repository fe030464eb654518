"""Names on a model card: whatever a model or a design is called, the card says the same around it."""

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl_qtarget import QTargetConfig
from trl_qtarget.priors.resolved import ResolvedTarget
from trl_qtarget.target.residual import RESIDUALS
from trl_qtarget.target.trust import TRUSTS
from trl_qtarget.training.card import add_names, add_target, code, target_section


markdown_it = pytest.importorskip("markdown_it")

HOSTILE = [
    "a`b",
    "``` \n# Title",
    "name`\n\n# Title\n\n<script>alert(1)</script>",
    "`) [click](https://example.com) (`",
    "<img src=x onerror=alert(1)>",
    "a | b | c",
    "x\n|---|---|\n| a | b |",
    "line\u2028separator\u2029\x85end",
    "\x1b[31mred\x07\0",
    "right\u202eleft\u200b",
    "surrogate \ud800",
    "![image](https://example.com/x.png)",
    "~~~\nopen",
    "\\`escaped\\",
    "````",
    "`",
    " ",
    "### Framework versions",
    "&lt;b&gt; &amp;",
    "---\ntags: [x]\n---",
]


def structure(text: str) -> tuple[list[str], list[str]]:
    """Kinds of the elements of a Markdown text, and the contents of its spans of code."""
    kinds, spans = [], []
    for token in markdown_it.MarkdownIt("gfm-like", {"linkify": False}).parse(text):
        kinds.append(f"{token.type} {token.tag}")
        for child in token.children or []:
            kinds.append(f"{child.type} {child.tag}")
            spans += [child.content] if child.type == "code_inline" else []
    return kinds, spans


def section(config: QTargetConfig, prior: str | None = None, name: str | None = None) -> str:
    return target_section(ResolvedTarget(config, config, prior, name))


def plain(name: str) -> str:
    """What is left of a name on one line: its printable characters, each gap a space."""
    return re.sub(" +", " ", "".join(letter if letter.isprintable() else " " for letter in name)).strip() or "?"


def check(name: str) -> None:
    config = QTargetConfig("asft")
    kinds, spans = structure(section(config, "the reference model", name))
    expected, before = structure(section(config, "the reference model", "teacher"))
    assert kinds == expected
    assert spans == [plain(name) if span == "teacher" else span for span in before]
    section(config, "the reference model", name).encode()  # as a file has to


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_name_of_a_model_stays_in_its_place(name):
    check(name)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(min_size=1) | st.text("`<>|[]()!\\\n~#-* a", min_size=1))
def test_any_name_stays_in_its_place(name):
    check(name)


def test_ordinary_names_look_as_before():
    assert code("Qwen/Qwen3-8B") == "`Qwen/Qwen3-8B`"
    assert code("a`b") == "``a`b``" and code("`a") == "`` `a ``"


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_of_registered_designs_stay_in_their_place(name, monkeypatch):
    monkeypatch.setitem(TRUSTS, name, TRUSTS["one"])
    monkeypatch.setitem(RESIDUALS, name, RESIDUALS["policy"])
    kinds, spans = structure(section(QTargetConfig(None, trust=name, residual=name)))
    expected, before = structure(section(QTargetConfig(None, trust="one", residual="policy")))
    assert kinds == expected
    assert spans == [plain(name) if span in ("one", "policy") else span for span in before]


def test_column_stays_in_the_block_of_the_configuration():
    config = QTargetConfig("cft", token_weight_column='```\n# Title "</code>')
    assert structure(section(config))[0] == structure(section(QTargetConfig("cft")))[0]


def test_heading_in_a_name_does_not_move_the_section(tmp_path):
    """TRL writes the names of model and dataset into the card above."""
    card = tmp_path / "README.md"
    card.write_text("# Model Card for ### Framework versions\n\ntext\n\n### Framework versions\n\n- TRL: 1\n")
    add_target(card, ResolvedTarget(QTargetConfig("dft"), QTargetConfig("dft")))
    text = card.read_text()
    assert text.startswith("# Model Card for ### Framework versions\n\ntext\n\n### Training target\n")
    assert text.endswith("\n\n### Framework versions\n\n- TRL: 1\n")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_of_folders_and_bases_stay_in_their_place(name, tmp_path):
    written = (
        "---\n---\n\n# Model Card for None\n\nThis is a version of [None](https://huggingface.co/None).\n\n"
        '```python\ngenerator = pipeline("text-generation", model="None", device_map="auto")\n```\n'
    )
    texts = []
    for folder, base in ((tmp_path / "out", "teacher"), (name.replace("\0", "").replace("\ud800", ""), name)):
        card = tmp_path / "README.md"
        card.write_text(written, encoding="utf-8")
        add_names(card, str(folder), base)
        texts.append(card.read_text(encoding="utf-8"))
    assert texts[0].startswith("---\n---\n\n# Model Card for out\n\nThis is a version of `teacher`.")
    assert 'model="out"' in texts[0] and "None" not in texts[0] + texts[1]
    assert structure(texts[0])[0] == structure(texts[1])[0]
