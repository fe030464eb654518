"""`trl-qtarget`: the command line."""

import importlib
import sys
from collections.abc import Sequence


# Name: (module, what it does). A module is imported when its command is called, for some of them take seconds.
COMMANDS = {
    "sft": ("launch", "fine-tune a model toward a target; the arguments of `trl sft`, and the target's"),
    "cache": ("cache", "run a teacher once over a dataset, and keep what it says for later trainings"),
    "inspect": ("inspect", "write a page that shows what methods teach, token by token, on your own examples"),
    "plot": ("plot", "draw methods as functions of the label's probability, or the curves of runs"),
    "methods": ("methods", "list the published objectives, or explain one"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status; 2 where the command or one of its arguments is wrong.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments.pop(0) if arguments else "--help"
    if name in ("-h", "--help"):
        sys.stdout.write(_usage())
        return 0
    if name == "--version":
        from .. import __version__

        sys.stdout.write(f"trl-qtarget {__version__}\n")
        return 0
    if name not in COMMANDS:
        from .options import suggestion

        sys.stderr.write(f"trl-qtarget: unknown command `{name}`{suggestion(name, COMMANDS)}.\n{_usage()}")
        return 2
    try:
        return importlib.import_module(f".{COMMANDS[name][0]}", __name__).main(arguments)
    except ValueError as error:
        # What users can mend needs no traceback.
        sys.stderr.write(f"trl-qtarget {name}: {error}\n")
        return 2


def _usage() -> str:
    commands = "".join(f"  {name:<10}{text}\n" for name, (_, text) in COMMANDS.items())
    return f"usage: trl-qtarget COMMAND ... (or --help, --version; COMMAND --help for its arguments)\n\n{commands}"
