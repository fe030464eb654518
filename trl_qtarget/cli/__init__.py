"""`trl-qtarget`: the command line."""

import importlib
import importlib.resources
import signal
import sys
from collections.abc import Sequence

from ..target.shown import nearest
from .errors import is_mistake, say, take_debug, write_anywhere
from .noise import quiet


# Name: (module, what it does). A module is imported when its command is called, for some of them take seconds.
COMMANDS = {
    "sft": ("launch", "fine-tune a model toward a target; the arguments of `trl sft`, and the target's"),
    "tune": ("tune", "find the target for a model and its data, and say whether it beats plain SFT beyond chance"),
    "cache": ("cache", "run a teacher once over a dataset, and keep what it says for later trainings"),
    "inspect": ("inspect", "write a page that shows what methods teach, token by token, on your own examples"),
    "plot": ("plot", "draw methods as functions of the label's probability, or the curves of runs"),
    "methods": ("methods", "list the published objectives, or explain one"),
    "recipes": ("recipes", "list the recipes and examples, or copy some of them"),
}
# Commands that take TRL's arguments, which are hundreds and cost seconds to collect: texts that tests hold to parsers.
SHORT_HELP = {"sft": "help/sft.txt", "tune": "help/tune.txt", "cache": "help/cache.txt", "inspect": "help/inspect.txt"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status; 2 where the command or one of its arguments is wrong.
    """
    write_anywhere()
    arguments = take_debug(sys.argv[1:] if argv is None else argv)
    name = arguments.pop(0) if arguments else "--help"
    if name in ("-h", "--help"):
        sys.stdout.write(_usage())
        return 0
    if name == "--version":
        from .. import __version__

        sys.stdout.write(f"trl-qtarget {__version__}\n")
        return 0
    if name not in COMMANDS:
        near = nearest(name, COMMANDS)
        hint = f": did you mean {near[0]}?" if near else f": there are {', '.join(COMMANDS)}."
        sys.stderr.write(f"trl-qtarget: unknown command `{name}`{hint}\n")
        return 2
    if name in SHORT_HELP and ("-h" in arguments or "--help" in arguments):
        sys.stdout.write(importlib.resources.files(__name__).joinpath(SHORT_HELP[name]).read_text(encoding="utf-8"))
        return 0
    arguments = ["--help" if item == "--help_all" else item for item in arguments]
    try:
        with quiet():
            return importlib.import_module(f".{COMMANDS[name][0]}", __name__).main(arguments)
    except KeyboardInterrupt:
        sys.stderr.write(f"trl-qtarget {name}: interrupted.\n")
        return 128 + signal.SIGINT
    except Exception as error:
        if not is_mistake(error, began=False):
            raise
        say(name, error)
        return 2


def _usage() -> str:
    commands = "".join(f"  {name:<10}{text}\n" for name, (_, text) in COMMANDS.items())
    return (
        f"usage: trl-qtarget COMMAND ... (or --help, --version; COMMAND --help for its arguments)\n\n{commands}\n"
        "example:\n  trl-qtarget sft --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/Capybara \\\n"
        "      --method dft --output_dir out\n\n"
        "`--debug` with any command shows the traceback of an error.\n"
    )
