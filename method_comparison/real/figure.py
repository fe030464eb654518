"""The figure of the page: differences to plain SFT, of the real model and of small ones."""

from pathlib import Path

from ..analysis import Tested
from ..figures import plt
from .analysis import MEASURES, Pair, against_sft, kind_of, pairs


def draw(tested: Tested, small: Tested, path: Path) -> None:
    """A panel per setting, a line per method; filled, with bars of two errors: the real model; hollow: small ones."""
    settings = tested.study.settings
    columns = min(3, len(settings))
    rows = -(-len(settings) // columns)
    names = [method.name for method in tested.study.methods if method.name != "sft"]
    size = (4.3 * columns, 0.6 + 0.42 * len(names) * rows)
    plot, grid = plt.subplots(rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    known: dict[str, list[Pair]] = {measure: pairs(tested, small, measure) for measure in MEASURES}
    for axes, setting in zip(grid.flat, settings, strict=False):
        for number, measure in enumerate(MEASURES):
            shift, colour = 0.3 * (number - 0.5), f"C{number}"
            for name, found in against_sft(setting, tested, measure).items():
                at = names.index(name) + shift
                bar = 200 * found.error
                axes.errorbar(100 * found.value, at, xerr=bar, fmt="o", color=colour, markersize=4, linewidth=1)
            for pair in known[measure]:
                if pair.setting == setting.name:
                    at = names.index(pair.method) + shift
                    axes.plot(100 * pair.small.value, at, "D", markerfacecolor="none", color=colour, markersize=5)
        axes.axvline(0, color="grey", linewidth=0.8)
        axes.set_title(f"{setting.name} (small: {kind_of(setting)})", fontsize=9)
        axes.grid(alpha=0.3, axis="x")
    for axes in list(grid.flat)[len(settings) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
    for number, measure in enumerate(MEASURES):
        grid[0, 0].plot([], [], "o", color=f"C{number}", label=f"real, {measure}")
        grid[0, 0].plot([], [], "D", markerfacecolor="none", color=f"C{number}", label=f"small, {measure}")
    plot.legend(
        *grid[0, 0].get_legend_handles_labels(), loc="lower center", ncols=4, fontsize=8, bbox_to_anchor=(0.5, 1)
    )
    plot.supxlabel("accuracy minus that of sft, in points (bars: two standard errors)", fontsize=9)
    plot.tight_layout()
    plot.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(plot)
