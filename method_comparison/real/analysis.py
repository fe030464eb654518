"""From the results on the real model to numbers: differences to plain SFT, and where they agree with small models."""

from dataclasses import dataclass

from trl_qtarget.tuning.verdict import Difference, judge

from .. import analysis, settings
from ..__main__ import COMMITTED
from ..analysis import AT_ONE, BASE, GREEDY, Row, Tested, with_error
from ..evaluation import mean
from ..settings import Setting
from ..store import Store


MEASURES = (GREEDY, AT_ONE)
SFT, AGAIN = "sft", "sft_again"
# Beyond chance: less likely than this, on both sides together, where there is no difference.
LEVEL = 0.05


@dataclass(frozen=True)
class Found:
    """A difference in accuracy, its standard error, and 1 or -1 where it is beyond chance, else 0."""

    value: float
    error: float
    sign: int


def accuracy(row: Row, measure: str) -> analysis.Difference:
    """Mean over seeds and prompts, with its error over prompts, which are the same for all seeds."""
    return with_error([[mean(prompt) for prompt in zip(*row.solved(measure), strict=True)]])


def against_sft(setting: Setting, tested: Tested, measure: str) -> dict[str, Found]:
    """Each method minus plain SFT, paired by prompt, and by the seed of the training; empty without `sft`.

    SFT is the mean of `sft` and `sft_again`, where both are there: judged as `trl-qtarget tune` judges. Under the name
    `sft_again` stands the difference of the two, which is chance.
    """
    # The base is not trained, so it has no part in how trainings differ.
    rows = {row.name: row.solved(measure) for row in tested.rows(setting) if row.name != BASE}
    sft, again = rows.pop(SFT, None), rows.pop(AGAIN, None)
    if sft is None or (again is None and not rows):
        return {}
    verdict = judge(rows, sft, again, last=True)
    found = {each.name: _found(each.difference) for each in verdict.judged}
    return found | ({AGAIN: _found(verdict.control)} if verdict.control and again is not None else {})


def _found(difference: Difference) -> Found:
    chance = difference.p_value
    sign = 1 if chance < LEVEL / 2 else -1 if chance > 1 - LEVEL / 2 else 0
    return Found(difference.value, difference.error, sign)


class RealTested(Tested):
    """What has been tested on the real model, whose differences are judged as `trl-qtarget tune` judges them."""

    def difference(self, setting: Setting, name: str, baseline: str, measure: str) -> Found:
        """A method minus plain SFT.

        Raises:
            ValueError: the baseline is another one, or the method has not been tested in the setting.
        """
        found = against_sft(setting, self, measure) if baseline == SFT else {}
        if name not in found:
            raise ValueError(f"`{name}` was not tested against `{baseline}` in `{setting.name}`.")
        return found[name]


# --- beside the small models ---


@dataclass(frozen=True)
class Pair:
    """A method's difference to plain SFT on small models and on the real one, on demonstrations of the same kind."""

    method: str
    setting: str
    small: Found
    real: Found

    @property
    def word(self) -> str:
        """What the two say of each other."""
        if self.small.sign and self.real.sign:
            return "agree" if self.small.sign == self.real.sign else "contradict"
        if self.small.sign or self.real.sign:
            return "small only" if self.small.sign else "real only"
        return "neither"


WORDS = {
    "agree": "both are beyond chance, on the same side",
    "neither": "neither is beyond chance",
    "small only": "beyond chance on small models alone",
    "real only": "beyond chance on the real model alone",
    "contradict": "both are beyond chance, on opposite sides",
}


def kind_of(setting: Setting) -> str:
    """The setting of the small comparison that has the same kind of demonstrations."""
    return setting.name.split("-")[1]


def small_tested() -> Tested:
    """The committed comparison of small models."""
    study = settings.load()
    return Tested(study, Store(COMMITTED, study, writable=False))


def pairs(tested: Tested, small: Tested, measure: str) -> list[Pair]:
    """Everything that was measured on both."""
    found = []
    known = {setting.name: setting for setting in small.study.settings}
    for setting in tested.study.settings:
        same = known[kind_of(setting)]
        baseline = small.row(same, SFT)
        for name, real in against_sft(setting, tested, measure).items():
            row = small.row(same, name)
            if row is None or baseline is None:
                continue
            difference = analysis.difference(row, baseline, measure)
            found.append(Pair(name, setting.name, Found(difference.value, difference.error, difference.sign), real))
    return found
