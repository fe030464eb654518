"""What `accelerate launch` runs for `trl-qtarget sft`: `python -m trl_qtarget.cli.script ARGUMENTS...`."""

import signal
import sys


def main() -> int:
    """Train. A Ctrl-C while libraries are loaded ends the process without a word: the launching one has it."""
    handled = signal.getsignal(signal.SIGINT) == signal.default_int_handler
    if handled:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .sft import main as train

    if handled:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return train(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
