"""Marks for sentences: what a sentence says of the results is looked up, and refused where they say otherwise.

A template has ``dft` ends {{dft far below sft in unseen}} points below `sft``, of which the page makes `8.7 ± 2.8`; if
the results do not say so, no page is written. `METHOD`, `SETTING` and `MEASURE` may be several, joined by `|`;
`MEASURE` is `T=1`, `best` (where none is named) or `greedy`:

- `METHOD [far|slightly] above|below OTHER in SETTING [at MEASURE] [bare]`: points; `far` beyond two standard errors,
  or as the page has it, `slightly` within them; the smallest to the largest of several; `bare` without the error.
  `OTHER` may be `base`.
- `nobody far above|below OTHER in SETTING [at MEASURE]`: `no method`; controls are none.
- `all far above|below OTHER in SETTING [at MEASURE]`: their names, the farthest first; `how many` instead of `all`:
  how many, of how many that were tested there; `how many with a reference`: of those that read one.
- `accuracy of METHOD in SETTING [at MEASURE]`: percent. `others of METHOD in SETTING`: that on the other tasks.
- `mean FIELD of METHOD in SETTING`: of the results, as `nll` and `kl`.
- `knob of METHOD in SETTING`: what tuning chose.
- `unbeaten CHOICE [at MEASURE]`: in how many settings no method is better beyond two standard errors; in all measures
  where none is named. `beaten CHOICE [at MEASURE]`: in how many of them one is.
- `regret CHOICE [at MEASURE]`: points behind the best method in hindsight, on average; the largest of all measures
  where none is named.
- `behind sft CHOICE [at MEASURE]`: the most that it is below `sft` in any setting.
"""

import re
from collections.abc import Callable

from .analysis import AT_BEST, AT_ONE, GREEDY, MEASURES, Difference, Row, Tested
from .everywhere import Choice, choices
from .settings import Setting


_MEASURES = {"T=1": AT_ONE, "best": AT_BEST, "greedy": GREEDY}
_IN, _AT = r"in (?P<settings>\S+)", r"(?: at (?P<measures>\S+))?"
_SIDE = r"(?P<side>above|below) (?P<other>\S+) " + _IN + _AT


def say(mark: str, tested: Tested) -> str | None:
    """What a mark becomes; None if it is no claim.

    Raises:
        ValueError: the results do not say so, or it names what is not in them.
    """
    for pattern, maker in _CLAIMS.items():
        if found := re.fullmatch(pattern, mark):
            try:
                return maker(tested, **found.groupdict())
            except ValueError as error:
                raise ValueError(f"`{{{{{mark}}}}}`: {error}") from None
    return None


def _one(tested: Tested, names: str, how: str | None, bare: str | None, **where: str | None) -> str:
    found = _differences(tested, names.split("|"), **where)
    sign = 1 if where["side"] == "above" else -1
    for name, each in found:
        if each.value * sign <= 0:
            raise ValueError(f"`{name}` is not {where['side']}: {_points(each)}.")
        if how is not None and (each.sign == sign) != (how == "far"):
            raise ValueError(f"`{name}` is not {how} {where['side']}: {_points(each)}.")
    text = _range([abs(100 * each.value) for _, each in found])
    return text if bare or len(found) > 1 else f"{text} ± {100 * found[0][1].error:.1f}"


def _nobody(tested: Tested, **where: str | None) -> str:
    if beyond := _beyond(tested, **where):
        raise ValueError(", ".join(f"`{name}` is: {_points(each)}" for name, each in beyond) + ".")
    return "no method"


def _all(tested: Tested, **where: str | None) -> str:
    names = list(dict.fromkeys(f"`{name}`" for name, _ in _beyond(tested, **where)))
    if not names:
        raise ValueError(f"no method is far {where['side']}.")
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _how_many(tested: Tested, reference: str | None, **where: str | None) -> str:
    names = set(_candidates(tested, _settings(tested, where["settings"]), where["other"]))
    if reference is not None:
        names &= {method.name for method in tested.study.methods if method.needs != "nothing"}
    return f"{len(names & {name for name, _ in _beyond(tested, **where)})} of {len(names)}"


def _beyond(tested: Tested, **where: str | None) -> list[tuple[str, Difference]]:
    """Methods that are beyond two standard errors on that side, the farthest first; controls are none."""
    sign = 1 if where["side"] == "above" else -1
    names = _candidates(tested, _settings(tested, where["settings"]), where["other"])
    found = _differences(tested, names, **where, optional=True)
    return sorted(((n, each) for n, each in found if each.sign == sign), key=lambda pair: -sign * pair[1].value)


def _candidates(tested: Tested, settings: list[Setting], other: str) -> list[str]:
    """Methods, no controls and no variants, that were tested in one of the settings."""
    names = [method.name for method in tested.study.methods if method.is_candidate and method.name != other]
    return [name for name in names if any(tested.row(setting, name) for setting in settings)]


def _differences(
    tested: Tested,
    names: list[str],
    other: str,
    settings: str,
    measures: str | None,
    side: str,
    optional: bool = False,
) -> list[tuple[str, Difference]]:
    found = []
    for setting in _settings(tested, settings):
        for name in names:
            if optional and tested.row(setting, name) is None:
                continue
            found += [
                (name, tested.difference(setting, name, other, measure)) for measure in _measures(measures or "best")
            ]
    return found


def _accuracy(tested: Tested, names: str, settings: str, measures: str | None) -> str:
    rows = _rows(tested, names, settings)
    return _range([100 * row.accuracy(measure) for row in rows for measure in _measures(measures or "best")])


def _others(tested: Tested, names: str, settings: str) -> str:
    return _range([100 * row.others for row in _rows(tested, names, settings)])


def _mean(tested: Tested, field: str, names: str, settings: str) -> str:
    return _range([row.mean(field) for row in _rows(tested, names, settings)], digits=2)


def _knob(tested: Tested, names: str, settings: str) -> str:
    knobs = sorted({row.knob.partition(" = ")[2] for row in _rows(tested, names, settings)}, key=float)
    return knobs[0] if len(knobs) == 1 else f"{knobs[0]} to {knobs[-1]}"


def _unbeaten(tested: Tested, name: str, measures: str | None, beaten: str | None) -> str:
    wanted, verdicts = _measures(measures) if measures else MEASURES, _choice(tested, name).verdicts
    count = sum(all(each[measure].unbeaten for measure in wanted) for each in verdicts)
    return f"{count if beaten is None else len(verdicts) - count} of {len(verdicts)}"


def _of_choice(pick: str) -> Callable[..., str]:
    def value(tested: Tested, name: str, measures: str | None) -> str:
        found = dict(zip(MEASURES, getattr(_choice(tested, name), pick), strict=True))
        return f"{100 * max(found[measure] for measure in (_measures(measures) if measures else MEASURES)):.1f}"

    return value


def _choice(tested: Tested, name: str) -> Choice:
    known = {choice.name: choice for choice in choices(tested)}
    if name not in known:
        raise ValueError(f"there is no choice `{name}`.")
    return known[name]


def _settings(tested: Tested, names: str) -> list[Setting]:
    known = {setting.name: setting for setting in tested.study.settings}
    if unknown := [name for name in names.split("|") if name not in known]:
        raise ValueError(f"there is no setting `{unknown[0]}`.")
    return [known[name] for name in names.split("|")]


def _rows(tested: Tested, names: str, settings: str) -> list[Row]:
    return [tested.known_row(setting, name) for setting in _settings(tested, settings) for name in names.split("|")]


def _measures(names: str) -> list[str]:
    if unknown := [name for name in names.split("|") if name not in _MEASURES]:
        raise ValueError(f"there is no measure `{unknown[0]}`: choose one of {', '.join(_MEASURES)}.")
    return [_MEASURES[name] for name in names.split("|")]


def _range(values: list[float], digits: int = 1) -> str:
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def _points(found: Difference) -> str:
    return f"{100 * found.value:+.1f} ± {100 * found.error:.1f}"


_CLAIMS: dict[str, Callable[..., str]] = {
    r"nobody far " + _SIDE: _nobody,
    r"all far " + _SIDE: _all,
    r"how many (?P<reference>with a reference )?far " + _SIDE: _how_many,
    r"(?P<names>\S+) (?:(?P<how>far|slightly) )?" + _SIDE + "(?P<bare> bare)?": _one,
    r"accuracy of (?P<names>\S+) " + _IN + _AT: _accuracy,
    r"mean (?P<field>\S+) of (?P<names>\S+) " + _IN: _mean,
    r"others of (?P<names>\S+) " + _IN: _others,
    r"knob of (?P<names>\S+) " + _IN: _knob,
    r"(?:un|(?P<beaten>))beaten (?P<name>.+?)" + _AT: _unbeaten,
    r"regret (?P<name>.+?)" + _AT: _of_choice("regret"),
    r"behind sft (?P<name>.+?)" + _AT: _of_choice("behind_sft"),
}
