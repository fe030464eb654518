"""A map of objectives: how far each believes a label, at which labels it learns, and which ones are near twins."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..target.config import QTargetConfig
from ..target.methods import GROUPS
from .curves import method_curves
from .figures import pyplot_to_files, save


# What has no row of its own, a free combination.
_OWN = "your own"
# Of the curves: a ratio may be anything, and what is above says no more.
_HIGHEST_TRUST = 1.6


@dataclass(frozen=True)
class Place:
    """Where an objective stands, by what its target asks of the labelled tokens of a sample.

    A step moves `s · TV(Q, p)` of a token's probability.

    Attributes:
        title, group: the objective, and what its group does.
        trust: mean γ.
        learns_at: mean of `p_y` over all that is moved: near 0 it learns what the model does not know.
        to_label: share of what is moved that goes to labels; below 0 it is taken from them.
        zeros: share of the tokens without any gradient.
        twin: the objective whose pulls on the labels, token by token, are most nearly a multiple of its own.
        likeness: cosine of the two.
    """

    title: str
    group: str
    trust: float
    learns_at: float
    to_label: float
    zeros: float
    twin: str | None = None
    likeness: float = math.nan


def places(data: dict[str, Any], configs: Sequence[QTargetConfig]) -> list[Place]:
    """The places of the methods of an inspection, whose targets were `configs`, in their order."""
    label_probs = [row[0] for example in data["examples"] for row in example["p"]]
    pulls, found = [], []
    for number, (method, config) in enumerate(zip(data["methods"], configs, strict=True)):
        trust, scale, mass, moved = (
            [value for example in data["examples"] for value in example["methods"][number][name]]
            for name in ("trust", "scale", "label_mass", "moved")
        )
        pull = [s * (q - p) for s, q, p in zip(scale, mass, label_probs, strict=True)]
        whole = sum(moved)
        pulls.append(pull)
        found.append(
            Place(
                method["title"],
                config.row.group if config.row else _OWN,
                trust=sum(trust) / len(trust),
                learns_at=_over(sum(m * p for m, p in zip(moved, label_probs, strict=True)), whole),
                to_label=_over(sum(pull), whole),
                zeros=sum(m == 0 for m in moved) / len(moved),
            )
        )
    return [_with_twin(place, number, found, pulls) for number, place in enumerate(found)]


def _with_twin(place: Place, number: int, found: list[Place], pulls: list[list[float]]) -> Place:
    likeness = {
        other: _cosine(pulls[number], pulls[other])
        for other in range(len(found))
        if other != number and any(pulls[number]) and any(pulls[other])
    }
    if not likeness:
        return place
    twin = max(likeness, key=likeness.get)
    return replace(place, twin=found[twin].title, likeness=likeness[twin])


def _over(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _cosine(left: list[float], right: list[float]) -> float:
    dot = math.fsum(a * b for a, b in zip(left, right, strict=True))
    return dot / (math.hypot(*left) * math.hypot(*right))


def table(found: Sequence[Place]) -> str:
    """The places as aligned lines, by group."""
    width = max(len(place.title) for place in found)
    lines = [f"{'':{width}}  trust  learns at p_y  to labels  zeros  nearest twin (cosine of the pulls)"]
    for place in sorted(found, key=lambda place: (_order(place.group), place.title)):
        twin = "" if place.twin is None else f"{place.twin} ({place.likeness:.3f})"
        lines.append(
            f"{place.title:{width}}  {place.trust:5.2f}  {place.learns_at:13.2f}  {place.to_label:9.2f}  "
            f"{place.zeros:5.2f}  {twin}"
        )
    return "\n".join(lines) + "\n"


def _order(group: str) -> int:
    return [*GROUPS, _OWN].index(group)


def draw_map(data: dict[str, Any], configs: Sequence[QTargetConfig], path: Path) -> list[Place]:
    """Draw trust over `p_y` of every objective, by group, and below where each stands on a sample.

    Args:
        data: what `inspect_target` returned.
        configs: its targets.
        path: a .png, .svg or .pdf file.

    Returns:
        The places.

    Raises:
        ValueError: matplotlib is not installed, or the file has another ending.
    """
    # What was measured on the sample is drawn at what came of it.
    configs = [config.settled_as(method["knobs"]) for config, method in zip(configs, data["methods"], strict=True)]
    pyplot, found = pyplot_to_files(), places(data, configs)
    groups = sorted({place.group for place in found}, key=_order)
    figure = pyplot.figure(figsize=(3.2 * len(groups), 10))
    grid = figure.add_gridspec(2, len(groups), height_ratios=(1, 2), hspace=0.25, wspace=0.2)
    chart = figure.add_subplot(grid[1, :])
    for column, group in enumerate(groups):
        members = [(place, config) for place, config in zip(found, configs, strict=True) if place.group == group]
        axes = figure.add_subplot(grid[0, column])
        _draw_curves(axes, members, pyplot)
        axes.set_title(group, fontsize=10)
        axes.set_ylabel("trust γ" if column == 0 else "")
        stands = [place for place, _ in members if not math.isnan(place.learns_at)]
        chart.scatter(
            [place.learns_at for place in stands],
            [place.to_label for place in stands],
            s=[30 + 200 * min(1.0, max(0.0, place.trust)) for place in stands],
            color=f"C{_order(group)}",
            alpha=0.6,
            label=group,
        )
    _name_points(chart, found)
    chart.set_xlabel("mean p(y) of what it moves; to the left, what the model does not know yet")
    chart.set_ylabel("share of it that goes to the labels")
    chart.set_title(
        f"{data['model']} on {data['dataset'] or 'a sample'}; the larger a point, the higher its mean trust"
    )
    chart.grid(alpha=0.3)
    chart.legend(fontsize=8, loc="best", markerscale=0.6)
    save(figure, path)
    pyplot.close(figure)
    return found


def _draw_curves(axes: Any, members: Sequence[tuple[Place, QTargetConfig]], pyplot: Any) -> None:
    """γ along `p_y`; what follows no probability is left out."""
    colours = pyplot.get_cmap("tab20")
    for number, (place, config) in enumerate(members):
        try:
            (curve,) = method_curves([config])
        except ValueError:
            continue
        axes.plot(
            curve.label_probs,
            curve.trust.clamp(max=_HIGHEST_TRUST),
            color=colours(number % 20),
            linestyle=("-", "--", "-.")[number // 7 % 3],
            label=place.title,
        )
    axes.set_xlabel("p(y)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6, loc="best", framealpha=0.6)


def _name_points(axes: Any, found: Sequence[Place]) -> None:
    """Names beside the points; those of points that nearly coincide stand above each other."""
    taken: list[tuple[float, float]] = []
    stands = [place for place in found if not math.isnan(place.learns_at)]
    low, high = (pick([place.to_label for place in stands], default=0.0) for pick in (min, max))
    line = (high - low or 1.0) / 40
    for place in sorted(stands, key=lambda place: (place.learns_at, place.to_label)):
        height = place.to_label
        while any(abs(place.learns_at - x) < 0.06 and abs(height - y) < line for x, y in taken):
            height -= line
        taken.append((place.learns_at, height))
        axes.annotate(
            place.title,
            (place.learns_at, place.to_label),
            (place.learns_at + 0.004, height),
            fontsize=7,
            va="center",
        )
