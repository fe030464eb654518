"""Which checkpoint a run may go on from: a whole one, of one run, written toward the same target."""

import json
import os
import re
import shutil
from pathlib import Path

from ..priors.own import STATE_NAME
from ..priors.record import RECORD_NAME
from ..priors.resolved import ResolvedTarget
from ..target.config import QTargetConfig
from ..target.config_file import CONFIG_NAME


# transformers writes this file last, after the weights, the optimiser and the random numbers of every rank.
_LAST_FILE = "trainer_state.json"
# What a run cannot go on without. DeepSpeed has the first two in a folder of its own.
_DEEPSPEED = "global_step*"
_STATE = {
    "the optimiser": ("optimizer*", _DEEPSPEED),
    "the learning rate's schedule": ("scheduler.pt", _DEEPSPEED),
    "the random numbers": ("rng_state*.pth",),
}


def clear_state(checkpoint: str | os.PathLike) -> None:
    """Take away the state that an earlier run has left in a folder, and first of all what marks it as whole.

    What is written there next may end early or, with `save_only_model`, never replace it.
    """
    patterns = [_LAST_FILE, *(pattern for part in _STATE.values() for pattern in part), "scaler.pt"]
    patterns += [STATE_NAME, RECORD_NAME]
    for pattern in dict.fromkeys(patterns):
        for path in Path(checkpoint).glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def is_whole(checkpoint: str | os.PathLike) -> bool:
    """Whether a checkpoint was written to its end."""
    try:
        json.loads((Path(checkpoint) / _LAST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def last_whole_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest checkpoint in a folder that was written to its end; None if there is none."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    newest_first = sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)
    return next((str(path) for path in newest_first if is_whole(path)), None)


def settled_as_in(checkpoint: str | os.PathLike, config: QTargetConfig) -> QTargetConfig:
    """A target whose open knobs (`"auto"`) have the values that a checkpoint was trained with, if it has them."""
    if not (Path(checkpoint) / CONFIG_NAME).is_file():
        return config
    return config.settled_as(QTargetConfig.from_pretrained(checkpoint).knobs)


def check_checkpoint(checkpoint: str | os.PathLike | None, target: ResolvedTarget, allow_new_target: bool) -> None:
    """Raise unless a run toward `target` may go on from a checkpoint; None is what `last_whole_checkpoint` found."""
    if checkpoint is None:
        raise ValueError(
            "`resume_from_checkpoint=True` finds no whole checkpoint in `output_dir`: start from the beginning, or "
            "name the folder of the run that is to go on."
        )
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise ValueError(f"`resume_from_checkpoint` names no folder: {checkpoint} does not exist.")
    if not is_whole(checkpoint):
        raise ValueError(
            f"`resume_from_checkpoint` names an interrupted checkpoint: {checkpoint} has no complete `{_LAST_FILE}`. "
            "Use an earlier one; `resume_from_checkpoint=True` finds the last whole one."
        )
    missing = [part for part, patterns in _STATE.items() if not any(any(folder.glob(name)) for name in patterns)]
    if missing:
        raise ValueError(
            f"`resume_from_checkpoint` names a checkpoint without {', '.join(missing)}: {checkpoint} was written with "
            "`save_only_model=True`, or is incomplete. Resume from one written with `save_only_model=False`, or start "
            f"a new run from its weights (`model={str(checkpoint)!r}`)."
        )
    if allow_new_target or not (folder / CONFIG_NAME).is_file():
        return
    former = QTargetConfig.from_pretrained(checkpoint)
    target = target.settled_as(former.knobs)
    then, now = former.target, target.config.target
    if (folder / RECORD_NAME).is_file():
        # It says which prior was used, and is compared when the weights are there. `base` and `start` may be one.
        then, now = then | {"prior": None}, now | {"prior": None}
    # What was asked for is found in checkpoints that were not written by a trainer of this version.
    if then != now and former.target != target.requested.target:
        asked = target.requested
        if target.became_another and (asked.method, asked.trust, asked.residual) == (
            former.method,
            former.trust,
            former.residual,
        ):
            raise ValueError(
                f"the prior is not the one that {checkpoint} was trained with: without it {asked.label} is "
                f"{target.config.label}. Pass the same `ref_model`, or the same starting weights as `model`, or call "
                "`train(resume_from_checkpoint=..., allow_new_target=True)` (`--allow_new_target`)."
            )
        changed = sorted(name for name in then | now if then.get(name) != now.get(name))
        raise ValueError(
            f"`qtarget_config` ({target.config.label}) is not the target that {checkpoint} was trained toward "
            f"({former.label}): they differ in {', '.join(changed)}. Resume with the same target, or say that it may "
            "change: `train(resume_from_checkpoint=..., allow_new_target=True)`, `--allow_new_target`."
        )
