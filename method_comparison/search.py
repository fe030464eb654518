"""The tuning of one method: a search on a ladder of learning rates and a ladder of its own knob, the same for all.

The next point depends only on the scores of the points before it, so an interrupted search goes on where it was. It
starts with three learning rates a factor of four apart at the knob's default, then tries the neighbours of the best
point, and once these are known, half steps of the learning rate. So a best value on the edge of what was tried draws
the search outward; a few extra runs are granted while it still lies there when the budget is spent.
"""

from dataclasses import dataclass


# In half steps of the ladder of learning rates, each a factor of the square root of two.
COARSE, STEP, HALF_STEP = 4, 2, 1


@dataclass(frozen=True)
class Point:
    """`rate` counts half steps from the ladder's middle; `knob` is an index into the knob's values (0 if none)."""

    rate: int
    knob: int


@dataclass(frozen=True)
class Search:
    """A search with a budget.

    Args:
        knobs: number of the knob's values; 1 for a method without a knob.
        start: index of the default value.
        budget: runs that every method gets.
        extra: further runs, granted only while the best point lies on an edge.
    """

    knobs: int
    start: int
    budget: int
    extra: int

    def best(self, scores: dict[Point, float]) -> Point:
        """The point with the best score; of equals the one with the smaller learning rate."""
        return max(scores, key=lambda point: (scores[point], -point.rate, -abs(point.knob - self.start)))

    def edges(self, scores: dict[Point, float]) -> list[Point]:
        """The neighbours that the best point lacks: none, if it lies within what was tried.

        A learning rate is bounded by any that was tried at the same knob; the ends of a knob's ladder bound it.
        """
        best = self.best(scores)
        tried = [point.rate for point in scores if point.knob == best.knob]
        missing = []
        if max(tried) == best.rate:
            missing.append(Point(best.rate + STEP, best.knob))
        if min(tried) == best.rate:
            missing.append(Point(best.rate - STEP, best.knob))
        for knob in (best.knob + 1, best.knob - 1):
            if 0 <= knob < self.knobs and not any(point.knob == knob for point in scores):
                missing.append(Point(best.rate, knob))
        return missing

    def next(self, scores: dict[Point, float]) -> Point | None:
        """The point to try next; None at the end."""
        for rate in (0, -COARSE, COARSE):
            if Point(rate, self.start) not in scores:
                return Point(rate, self.start)
        if len(scores) >= self.budget:
            edges = self.edges(scores)
            return edges[0] if edges and len(scores) < self.budget + self.extra else None
        for point in sorted(scores, key=lambda point: -scores[point]):
            for neighbour in self._neighbours(point):
                if neighbour not in scores:
                    return neighbour
        raise AssertionError("a point always has neighbours: learning rates have no end")

    def _neighbours(self, point: Point) -> list[Point]:
        rates = [Point(point.rate + step, point.knob) for step in (STEP, -STEP)]
        knobs = [Point(point.rate, point.knob + step) for step in (1, -1) if 0 <= point.knob + step < self.knobs]
        return rates + knobs + [Point(point.rate + step, point.knob) for step in (HALF_STEP, -HALF_STEP)]
