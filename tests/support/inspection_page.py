"""What tests read from a page of inspection data, and texts that try to break out of it."""

import json

import pytest
from inspection_data import inspection_data


HOSTILE = [
    "</script><script>window.__hacked = 1; alert(1)</script>",
    "<img src=x onerror='window.__hacked = 1'>",
    "<!--<script>",
    "]]>&lt;b&gt;&amp;",
    "\"'`${window.__hacked = 1}\\",
    "javascript:window.__hacked=1",
    "{{style}}{{data}}",
    "a\u2028b\u2029c",
    "\x00\x07\x1b[31m\x7f\x85",
    "\u202eevil\u2066\u200f",
    "שלום",
    " \n\t\r",
    "\ud800\udfffx\udc00",
    "\ufffd\ufffd",
    "\u0301e",
    "",
    "x" * 400,
    " http://example.org/",
]


def hostile_data():
    data = inspection_data(2, 60, texts=HOSTILE)
    for name in ("title", "model", "dataset", "reference", "date"):
        data[name] = "</title></script><img src=x onerror=alert(1)>\u202e\ud800"
    data["versions"] = {"<b>": HOSTILE[0]}
    for method in data["methods"]:
        method["name"] += HOSTILE[1]
        method |= {
            "title": method["name"],
            "formula": HOSTILE[0],
            "knobs": {HOSTILE[1]: HOSTILE[2]},
            "prior": HOSTILE[3],
            "arxiv": HOSTILE[0],
        }
    data["examples"][0]["name"] = HOSTILE[0]
    return data


def shown(x):
    """A number as the page shows it."""
    if x is None:
        return "–"
    if x == 0:
        return "0"
    if abs(x) < 0.0005:
        mantissa, exponent = f"{abs(x):.1e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    else:
        text = f"{abs(x):.3f}" if abs(x) < 100 else f"{abs(x):.1f}"
    return f"−{text}" if x < 0 else text


def seen(word):
    """A word of the test's own text as the page shows it."""
    return word.translate({ord(" "): "·", ord("\n"): "↵", ord("\t"): "→"})


def row_of(page, name):
    return page.locator(f"#panel tr[data-row={name}] td").all_inner_texts()


def check_panel(page, data, e, j):
    """Every number of the panel, against the data and the formula of the step."""
    example = data["examples"][e]
    title = page.locator("#panel-title").inner_text()
    assert f"position {example['scored'][j]} in example {example['name']} " in title
    numbers = page.locator("#panel .numbers dd").all_inner_texts()
    assert numbers[:3] == [shown(example["nll"][j]), shown(example["entropy"][j]), shown(example["p"][j][0])]
    if example["prior"]:
        assert numbers[3] == shown(example["prior"][j][0])
    for name in ("trust", "scale", "label_mass", "kl", "suspicion"):
        assert row_of(page, name) == [shown(method[name][j]) for method in example["methods"]]
    for method, cell in zip(example["methods"], row_of(page, "preferred"), strict=True):
        word = data["vocabulary"][str(method["preferred"][j])]
        assert cell == (seen(word) if method["suspicion"][j] else "the label")
    for k, p in enumerate(example["p"][j]):
        cells = [method["q"][j][k] for method in example["methods"]]
        assert row_of(page, f"q{k}") == [shown(q) for q in cells]
        for m, method in enumerate(example["methods"]):
            bars = page.locator(f"#panel tr[data-row=q{k}] td").nth(m).locator("rect")
            prior = [example["prior"][j][k]] if example["prior"] else []
            values = [float(bar.get_attribute("data-value")) for bar in bars.all()]
            wanted = [*([1.0] if k == 0 else []), p, *prior, method["q"][j][k]]
            assert values == pytest.approx(wanted, rel=1e-6, abs=0)
            change = p * (method["scale"][j] * (method["q"][j][k] - p) - method["drift"][j])
            text = row_of(page, f"step{k}")[m]
            bar = page.locator(f"#panel tr[data-row=step{k}] td").nth(m).locator("rect")
            assert float(bar.get_attribute("data-value")) == pytest.approx(change, rel=1e-4, abs=1e-7)
            if abs(change) > 1e-7:
                assert text[0] == ("▲" if change > 0 else "▼")


def labels(page, e):
    return page.locator("#texts article").nth(e).locator(".t")


def focused(page):
    """Numbers of the example and the label that have the focus."""
    return page.evaluate("[document.activeElement.place?.e, document.activeElement.place?.j]")


def spoken_labels(page, e):
    return labels(page, e).evaluate_all("all => all.map((t) => t.getAttribute('aria-label'))")


def in_sight(page, e, j):
    """Whether a label stands below the bar, and above the panel where that is a sheet."""
    token, bar = labels(page, e).nth(j).bounding_box(), page.locator(".bar").bounding_box()
    sheet = page.locator("#panel").evaluate("panel => getComputedStyle(panel).position") == "fixed"
    end = page.locator("#panel").bounding_box()["y"] if sheet else page.viewport_size["height"]
    return token["y"] >= bar["y"] + bar["height"] - 1 and token["y"] + token["height"] <= end + 1


def exported(page):
    """The name of the file that the button gives, and its rows."""
    with page.expect_download() as download:
        page.get_by_role("button", name="Export as JSONL").click()
    lines = download.value.path().read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    return download.value.suggested_filename, [json.loads(line) for line in lines]


def column(page, table, number):
    return page.locator(f"#{table} tbody tr td:nth-child({number})").all_inner_texts()


def until_still(page):
    """Playwright's own waiting compiles strings, which the page's policy forbids."""
    for _ in range(100):
        if page.evaluate("document.getAnimations().length") == 0:
            return
        page.wait_for_timeout(20)
    raise AssertionError("an animation does not end")
