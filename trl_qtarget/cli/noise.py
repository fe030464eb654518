"""What other libraries print and a user of the command line cannot act on."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the following, and nothing else.

    - That `gradient_checkpointing` and `is_gradient_checkpointing` are old names: TRL's own `SFTConfig` sets the one,
      whatever the user has written, and PEFT asks for the other.
    - DeepSpeed's word that there is no GPU, which ours says too, where DeepSpeed is installed and not used.
    - Progress bars of `datasets` on every rank but the first.
    """
    logger = logging.getLogger("DeepSpeed")
    logger.addFilter(_other_than_no_gpu)
    other_rank = os.environ.get("RANK", "0") != "0"
    if other_rank:
        from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

        shown = not are_progress_bars_disabled()
        disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
            yield
    finally:
        logger.removeFilter(_other_than_no_gpu)
        if other_rank and shown:
            enable_progress_bars()


def _other_than_no_gpu(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Setting accelerator to CPU")
