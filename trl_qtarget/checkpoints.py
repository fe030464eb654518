"""Which checkpoint a run may go on from: a whole one, written toward the same target."""

import json
import os
import re
from pathlib import Path

from .config import CONFIG_NAME, QTargetConfig


# transformers writes this file last, after the weights, the optimiser and the random numbers of every rank.
_LAST_FILE = "trainer_state.json"


def is_whole(checkpoint: str | os.PathLike) -> bool:
    """Whether a checkpoint was written to its end."""
    try:
        json.loads((Path(checkpoint) / _LAST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def last_whole_checkpoint(output_dir: str | os.PathLike) -> str:
    """The newest checkpoint in a folder that was written to its end; one that was interrupted is passed over.

    Raises:
        ValueError: there is none.
    """
    folder = Path(output_dir)
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for path in sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        if is_whole(path):
            return str(path)
    raise ValueError(
        f"`resume_from_checkpoint=True` finds no whole checkpoint in {folder}"
        + (f": {len(found)} were interrupted while they were written. " if found else ". ")
        + "Start from the beginning, or name another folder in `output_dir`."
    )


def check_checkpoint(checkpoint: str | os.PathLike, config: QTargetConfig, allow_new_target: bool) -> None:
    """Raise unless a run toward `config` may go on from a checkpoint."""
    if not Path(checkpoint).is_dir():
        raise ValueError(f"`resume_from_checkpoint` names no folder: {checkpoint} does not exist.")
    if not is_whole(checkpoint):
        raise ValueError(
            f"`resume_from_checkpoint` names an interrupted checkpoint: {checkpoint} has no complete `{_LAST_FILE}`. "
            "Use an earlier one; `resume_from_checkpoint=True` finds the last whole one."
        )
    if allow_new_target or not (Path(checkpoint) / CONFIG_NAME).is_file():
        return
    former = QTargetConfig.from_pretrained(checkpoint)
    if former.target != config.target:
        changed = sorted(
            name for name in former.target | config.target if former.target.get(name) != config.target.get(name)
        )
        raise ValueError(
            f"`qtarget_config` ({config.label}) is not the target that {checkpoint} was trained toward "
            f"({former.label}): they differ in {', '.join(changed)}. Resume with the same target, or call "
            "`train(resume_from_checkpoint=..., allow_new_target=True)`."
        )
