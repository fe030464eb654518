"""The page of an inspection in a browser: tokens are chosen, methods switched, suspicious labels exported."""

import pytest
from inspection_data import inspection_data
from inspection_page import (
    check_panel,
    column,
    exported,
    focused,
    in_sight,
    labels,
    row_of,
    seen,
    shown,
    spoken_labels,
    until_still,
)

from trl_qtarget.inspection.suspicious import suspicious_examples, suspicious_tokens


def test_token_is_chosen_by_mouse(opened):
    data = inspection_data(2, 40, methods=("dft", "gem", "target_sft"))
    assert min(q for row in data["examples"][1]["methods"][1]["q"] for q in row) < 0  # a signed target is among them
    page = opened(data)
    labels(page, 1).nth(7).click()
    check_panel(page, data, 1, 7)
    labels(page, 0).nth(3).click()
    check_panel(page, data, 0, 3)
    assert page.locator("[aria-current]").count() == 1
    page.get_by_role("button", name="Next label").click()
    check_panel(page, data, 0, 4)
    page.get_by_role("button", name="Close").click()
    assert page.locator("#panel table").count() == 0
    assert focused(page) == [0, 4]
    stops = page.locator("#texts article").nth(0).locator("[tabindex='0']")
    assert stops.evaluate_all("all => all.map((t) => t.place.j)") == [4]  # a later Tab comes back to it


def test_token_is_chosen_by_keyboard(opened):
    data = inspection_data(2, 40)
    page = opened(data)
    # One tab stop per example: after the links and the methods, the first label.
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.className").startswith("t "):
            break
    assert page.evaluate("document.activeElement.tabIndex") == 0
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert page.locator("#panel table").count() == 0  # moving alone opens nothing
    page.keyboard.press("Space")
    check_panel(page, data, 0, 1)
    assert focused(page) == [0, 1]
    page.keyboard.press("End")  # an open panel follows
    check_panel(page, data, 0, 29)
    page.keyboard.press("ArrowRight")
    check_panel(page, data, 1, 0)
    page.keyboard.press("ArrowDown")
    below = page.evaluate("document.activeElement.getBoundingClientRect().top")
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.getBoundingClientRect().top") < below
    page.keyboard.press("Escape")
    assert page.locator("#panel table").count() == 0
    assert page.evaluate("document.activeElement.className").startswith("t ")
    page.keyboard.press(" ")
    assert page.locator("#panel table").count() == 1
    assert page.locator("#texts [tabindex='0']").count() == 2


def test_enter_goes_to_the_panel_and_escape_returns(opened):
    data = inspection_data(2, 40)
    page = opened(data)
    labels(page, 0).nth(29).focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "panel"
    check_panel(page, data, 0, 29)
    page.keyboard.press("ArrowRight")  # the arrows still move the choice, into the next example too
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    check_panel(page, data, 1, 0)
    assert page.evaluate("document.activeElement.id") == "panel"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "previous"
    page.keyboard.press("Escape")
    assert page.locator("#panel table").count() == 0
    assert focused(page) == [1, 0]
    page.keyboard.press("Escape")  # nothing is left to close
    assert focused(page) == [1, 0]
    page.keyboard.press("Enter")
    for _ in range(3):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "close"
    page.keyboard.press("Enter")
    assert focused(page) == [1, 0]


def test_every_token_says_its_trust(opened):
    data = inspection_data(2, 60)
    data["examples"][1]["methods"][2]["trust"][4] = None
    page = opened(data)
    for m in (0, 2, 1):
        page.locator("#methods label").nth(m).click()
        for e, example in enumerate(data["examples"]):
            words = [seen(data["vocabulary"][str(row[0])]) for row in example["alternatives"]]
            trusts = [shown(x) for x in example["methods"][m]["trust"]]
            wanted = [f"{word}, trust {trust}" for word, trust in zip(words, trusts, strict=True)]
            assert spoken_labels(page, e) == wanted


@pytest.mark.parametrize("phone", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_chosen_token_is_scrolled_into_sight(opened, phone):
    data = inspection_data(3, 500, methods=("sft", "dft", "gem", "target_sft"))
    size = {"width": 360, "height": 740} if phone else {"width": 1280, "height": 600}
    page = opened(data, viewport=size, is_mobile=phone, has_touch=phone)
    last = len(data["examples"][0]["scored"]) - 1
    labels(page, 0).nth(last - 1).click()
    until_still(page)
    assert in_sight(page, 0, last - 1)
    step, back = (page.get_by_role("button", name=name) for name in ("Next label", "Previous label"))
    for at in ((0, last), (1, 0), *((1, j) for j in range(1, 24))):
        step.click()
        assert in_sight(page, *at)
    # Wherever the page has been scrolled meanwhile.
    for place in (0, 10**6):
        page.evaluate(f"scrollTo(0, {place})")
        back.click()
        step.click()
        assert in_sight(page, 1, 23)
    labels(page, 1).nth(23).focus()
    for _ in range(8):
        page.keyboard.press("ArrowDown")
        assert in_sight(page, *focused(page))
    for _ in range(24):
        page.keyboard.press("ArrowUp")
        assert in_sight(page, *focused(page))
    assert focused(page)[0] == 0


def test_methods_are_switched(opened):
    data = inspection_data(1, 60)
    page = opened(data)
    assert set(labels(page, 0).evaluate_all("all => all.map((t) => t.className)")) == {"t g10"}  # sft
    labels(page, 0).nth(2).click()
    page.locator("#methods label", has_text="target_sft").click()
    trust = data["examples"][0]["methods"][2]["trust"]
    classes = labels(page, 0).evaluate_all("all => all.map((t) => t.className)")
    assert classes == [f"t g{int(10 * x + 0.5)}" for x in trust]
    assert "CE(Q, p)" in page.locator("#formula").inner_text()
    assert page.locator("#panel td.current").first.inner_text() == shown(trust[2])
    assert page.locator("#suspicious-method").inner_text() == "target_sft"
    assert page.locator("figure").count() == 3
    assert page.locator("figure.current b").inner_text() == "target_sft"


def test_trust_above_one_and_equal_names(opened):
    data = inspection_data(1, 20, methods=("dft", "dft"))
    data["methods"][0]["title"], data["methods"][1]["title"] = "dft alpha=0.5", "dft alpha=2"
    data["examples"][0]["methods"][0]["trust"][:2] = [4.0, 2.0]
    page = opened(data)
    assert page.locator("#legend").inner_text().split()[-1] == "4"
    assert labels(page, 0).first.get_attribute("class") == "t g10"
    assert labels(page, 0).nth(1).get_attribute("class") == "t g5"
    assert page.locator("#methods label").all_inner_texts() == ["dft alpha=0.5", "dft alpha=2"]
    for m, name in enumerate(("dft_alpha_0.5", "dft_alpha_2")):
        page.locator("#methods label").nth(m).click()
        found, rows = exported(page)
        assert found == f"suspicious-labels-{name}.jsonl"
        assert rows == suspicious_tokens(data, m)
        assert {row["method"] for row in rows} == {data["methods"][m]["title"]}


@pytest.mark.parametrize("prior", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_suspicious_labels_are_sorted_shown_and_exported(opened, prior):
    data = inspection_data(4, 90, prior=prior)
    page = opened(data)
    page.locator("#methods label", has_text="dft").click()
    wanted = suspicious_tokens(data, 1)
    assert column(page, "suspicious-tokens", 3) == [shown(row["suspicion"]) for row in wanted][:200]
    wholes = suspicious_examples(data, 1)
    assert column(page, "suspicious-examples", 1) == [row["example"] for row in wholes]
    assert column(page, "suspicious-examples", 2) == [shown(row["suspicion"]) for row in wholes]

    page.get_by_role("button", name="more of").click()
    assert len(column(page, "suspicious-tokens", 1)) == len(wanted) == 272
    assert page.get_by_role("button", name="more of").count() == 0

    assert column(page, "suspicious-tokens", 8) == [
        seen(row["preferred"]) if row["suspicion"] else "–" for row in wanted
    ]

    name, rows = exported(page)
    assert name == "suspicious-labels-dft.jsonl"
    assert rows == wanted
    assert [list(row) for row in rows] == [list(row) for row in wanted]  # in the same order

    heads = page.locator("#suspicious-tokens th")
    nll = sorted(x for example in data["examples"] for x in example["nll"])
    heads.nth(4).get_by_role("button").click()
    assert heads.nth(4).get_attribute("aria-sort") == "descending"
    assert heads.nth(2).get_attribute("aria-sort") is None
    assert column(page, "suspicious-tokens", 5) == [shown(x) for x in reversed(nll)]
    heads.nth(4).get_by_role("button").click()
    assert heads.nth(4).get_attribute("aria-sort") == "ascending"
    assert column(page, "suspicious-tokens", 5) == [shown(x) for x in nll]
    e, j = min(((e, j) for e in range(4) for j in range(68)), key=lambda at: data["examples"][at[0]]["nll"][at[1]])
    page.locator("#suspicious-tokens tbody tr").first.click()
    check_panel(page, data, e, j)
    box = labels(page, e).nth(j).bounding_box()
    assert 0 < box["y"] < 900
    assert page.evaluate("document.activeElement.hasAttribute('aria-current')")


def test_preferred_is_the_targets_own_choice(opened):
    data = inspection_data(1, 24, methods=("dft", "target_sft"), alternatives=3)
    first, second = data["examples"][0]["methods"]
    # Neither the policy's nor the prior's favourite, nor even among the alternatives; and each method has its own.
    absent = [id for id in map(int, data["vocabulary"]) if id not in data["examples"][0]["alternatives"][4]]
    (first["preferred"][4], second["preferred"][4]), first["suspicion"][4], second["suspicion"][4] = absent[:2], 99, 98
    words = [data["vocabulary"][str(id)] for id in absent[:2]]
    assert words[0] != words[1]
    page = opened(data)
    labels(page, 0).nth(4).click()
    assert row_of(page, "preferred") == [seen(word) for word in words]
    assert "favourite" not in page.locator("body").inner_text()
    for m in range(2):
        page.locator("#methods label").nth(m).click()
        assert column(page, "suspicious-tokens", 8)[0] == seen(words[m])
        assert exported(page)[1][0]["preferred"] == words[m]
    head = page.locator("#suspicious-tokens th").nth(7)
    assert head.inner_text().startswith("preferred")
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    found = column(page, "suspicious-tokens", 8)
    none = found.count("–")
    assert 0 < none < len(found) and set(found[-none:]) == {"–"}


def test_missing_values_stay_last(opened):
    data = inspection_data(1, 24)
    data["examples"][0]["methods"][0]["suspicion"][5] = None
    page = opened(data)
    assert column(page, "suspicious-tokens", 3)[-1] == "–"
    page.locator("#suspicious-tokens th button").nth(2).click()
    assert column(page, "suspicious-tokens", 3)[-1] == "–"
