"""One run in a folder at a time: two would write checkpoints over each other, and resume from each other's."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout


logger = get_logger(__name__)

# `Trainer` pushes no file whose name begins so.
_NAME = "_run.lock"


@contextmanager
def one_run_in(folder: str | os.PathLike, wait: float = 10.0) -> Iterator[None]:
    """Keep a folder for the run of this process, or of the distributed job that it belongs to.

    Every rank of a job calls it; rank 0 holds the lock, and what it finds is known to all. The system gives the lock
    back however the process ends.

    Args:
        folder: the `output_dir` of the run; made if it does not exist.
        wait: seconds to wait for a run that is just ending.

    Raises:
        ValueError: another run holds the folder, or it cannot be made. On every rank.
    """
    lock, refusal = None, None
    if PartialState().is_main_process:
        try:
            lock = _held(Path(folder), wait)
        except Timeout:
            refusal = (
                f"`output_dir`: another run is writing into {folder}. Let it end, or choose another folder: two runs "
                "in one would overwrite each other's checkpoints."
            )
        except OSError as error:
            refusal = f"`output_dir`: {folder} cannot be made ({error}): choose a folder that can be written to."
    refusal = broadcast_object_list([refusal])[0]
    if refusal is not None:
        raise ValueError(refusal)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _held(folder: Path, wait: float) -> FileLock | None:
    """The lock of a folder, held; None where its file system has no locks."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _NAME)
    try:
        lock.acquire(timeout=wait)
    except Timeout:
        raise
    except (OSError, NotImplementedError) as error:
        logger.warning(f"{folder} cannot be locked ({error}): a second run in it would not be noticed.")
        return None
    return lock
