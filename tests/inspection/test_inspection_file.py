"""The file of an inspection: self-contained, whole, small, and its data stay data."""

import base64
import copy
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
from inspection_data import inspection_data
from inspection_page import (
    hostile_data,
)

from trl_qtarget.inspection.render import render, write_page


class Page(HTMLParser):
    """Elements of a page with their attributes, and the texts of its blocks as a browser would delimit them."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.blocks, self.inside = [], {}, None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.inside = dict(attributes).get("id", tag) if tag in ("style", "script") else None

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, text):
        if self.inside:
            self.blocks[self.inside] = self.blocks.get(self.inside, "") + text


def test_hostile_texts_stay_data():
    data = hostile_data()
    text = render(data)
    text.encode("utf-8")
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1]
    assert re.fullmatch(r"[ -~]*", block)
    assert not set("<>&") & set(block)
    # What a browser finds there is what went in; lone surrogates and all.
    found, given = json.loads(Page(text).blocks["data"]), json.loads(json.dumps(data))
    for name in given.keys() - {"examples"}:
        assert found[name] == given[name]
    for example, wanted in zip(found["examples"], given["examples"], strict=True):
        for name in wanted.keys() - {"p", "prior", "methods"}:  # these are packed; the browser's tests read them
            assert example[name] == wanted[name]
    harmless = render(inspection_data())
    assert [tag for tag, _ in Page(text).elements] == [tag for tag, _ in Page(harmless).elements]


def test_policy_allows_nothing_but_the_two_blocks():
    page = Page(render(inspection_data()))
    (policy,) = [found["content"] for tag, found in page.elements if tag == "meta" and "http-equiv" in found]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert "unsafe" not in policy
    for rule, block in (("style-src", "style"), ("script-src", "script")):
        digest = base64.b64encode(hashlib.sha256(page.blocks[block].encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    # A policy counts only for what comes after it.
    tags = [tag for tag, found in page.elements]
    assert tags.index("meta") < tags.index("style") < tags.index("script")


def test_page_is_self_contained():
    text = render(inspection_data())
    for tag, attributes in Page(text).elements:
        assert tag not in ("link", "img", "iframe", "base", "object")
        assert not any(name.startswith("on") or name in ("src", "style", "srcset") for name in attributes)
        assert attributes.get("href", "#").startswith("#")
    # The one address is the name of SVG's elements, which no browser asks for.
    assert set(re.findall(r"https?://[^\s\"']*", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|url\(|@import|fetch\(", text)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_numbers_that_cannot_be_shown_are_refused(wrong):
    data = inspection_data(1, 8)
    data["examples"][0]["nll"][0] = wrong
    with pytest.raises(ValueError, match="not JSON compliant"):
        render(data)
    data = inspection_data(1, 8)
    data["examples"][0]["methods"][1]["q"][2][1] = wrong
    with pytest.raises(ValueError, match="NaN or infinite"):
        render(data)


def test_page_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "page.html"
    write_page(inspection_data(1, 8), path)
    before = path.read_bytes()
    assert before.decode("utf-8") == render(inspection_data(1, 8))
    with pytest.raises(ValueError):
        write_page(inspection_data(1, 8) | {"title": float("inf")}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_big_page_is_small():
    data = inspection_data(20, 500, prompt=1)
    # Numbers as long as a large vocabulary makes them: ids of six digits, and probabilities with an exponent.
    for example in data["examples"]:
        example["tokens"] = [100_000 + token for token in example["tokens"]]
        example["alternatives"] = [[100_000 + token for token in row] for row in example["alternatives"]]
        for holder in (example, *example["methods"]):
            for name in ("p", "prior", "q"):
                if name in holder:
                    holder[name] = [[1.2345e-05] * len(row) for row in holder[name]]
        for method in example["methods"]:
            for name in ("kl", "drift", "suspicion"):
                method[name] = [-1.2345e-05] * len(method[name])
    assert len(render(data).encode()) < 5e6


def test_rendering_changes_nothing_given():
    data = inspection_data(1, 12)
    before = copy.deepcopy(data)
    render(data)
    assert data == before
