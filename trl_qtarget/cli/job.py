"""`accelerate launch` as the job of a supervisor: `python -m trl_qtarget.cli.job ARGUMENTS... PIPE`.

Its exit status is that of the training; that of the first process that failed, if there are several.
"""

import logging
import signal
import subprocess
import sys
from collections.abc import Sequence

from .errors import debugging, say, write_anywhere
from .supervise import exit_status, watch_parent


def main(arguments: Sequence[str]) -> int:
    """Launch, and wait for the training."""
    *arguments, pipe = arguments
    if int(pipe) >= 0:
        watch_parent(int(pipe))
    # A signal goes to the training as well, which says what there is to say. `torchrun` has handlers of its own.
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    write_anywhere()
    if not debugging():
        logging.disable(logging.ERROR)  # which rank ended how, after the rank itself has said why

    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except subprocess.CalledProcessError as error:  # the script has said what was wrong
        return exit_status(error.returncode)
    except ChildFailedError as error:
        failure = error.get_first_failure()[1]
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            say("sft", f"local rank {failure.local_rank} was ended by {name}, which a lack of memory can cause.")
        return exit_status(failure.exitcode)
    except SignalException as error:
        return 128 + error.sigval
    except ValueError as error:  # of the launcher's own arguments
        say("sft", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
