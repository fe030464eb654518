"""What a command says when something is wrong: one or two lines, once for all processes of a launch."""

import codecs
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
import traceback
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


# A folder that all processes of a launch know, with a file for each message that one of them has written.
_SAID = "TRL_QTARGET_SAID"
_DEBUG = "TRL_QTARGET_DEBUG"
# Of a message that comes from another library and may be a page long.
_LINES, _LETTERS = 2, 600
_ASCII = {
    "γ": "gamma", "δ": "delta", "π": "pi", "η": "eta", "λ": "lambda", "φ": "phi", "θ": "theta", "α": "alpha",
    "β": "beta", "ε": "epsilon", "τ": "tau", "Σ": "sum", "·": "*", "−": "-", "–": "-", "—": "-", "…": "...",
    "≥": ">=", "≤": "<=", "≠": "!=", "∝": "~", "→": "->", "‖": "||", "×": "x", "∈": "in", "√": "sqrt",
    "“": '"', "”": '"', "‘": "'", "’": "'", "█": "#",
}  # fmt: skip


def take_debug(arguments: Sequence[str]) -> list[str]:
    """The arguments without `--debug`, which holds for all processes of the launch.

    With a value it is an argument of the training, which transformers reads.
    """
    left = []
    for index, item in enumerate(arguments):
        if item == "--debug" and (index + 1 == len(arguments) or arguments[index + 1].startswith("--")):
            os.environ[_DEBUG] = "1"
        else:
            left.append(item)
    return left


def debugging() -> bool:
    """Whether tracebacks are wanted."""
    return os.environ.get(_DEBUG) == "1"


@contextmanager
def one_launch() -> Iterator[None]:
    """For the processes that are started meanwhile: what one of them has said, the others do not say again."""
    folder = tempfile.mkdtemp(prefix="trl-qtarget-")
    os.environ[_SAID] = folder
    try:
        yield
    finally:
        del os.environ[_SAID]
        shutil.rmtree(folder, ignore_errors=True)


def in_launch() -> bool:
    """Whether a command has started this process."""
    return _SAID in os.environ


def say(command: str, error: BaseException | str) -> None:
    """Write a message, or what an error says; under `--debug` with its traceback. Once in a launch."""
    text = error if isinstance(error, str) else _brief(error)
    if debugging() and isinstance(error, BaseException):
        traceback.print_exception(error)
    if in_launch():
        if not _first(text):
            return
        rank = ""
    else:
        number = os.environ.get("RANK", "0")
        rank = "" if number == "0" else f" (rank {number})"
    sys.stderr.write(f"trl-qtarget {command}{rank}: {text}\n")


def _first(text: str) -> bool:
    file = Path(os.environ[_SAID]) / hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]
    try:
        os.close(os.open(file, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    except OSError:  # no such folder, or a full disk: better twice than never
        pass
    return True


def _brief(error: BaseException) -> str:
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:_LINES]) or type(error).__name__
    return text if len(text) <= _LETTERS else f"{text[:_LETTERS]} … (`--debug` shows all)"


def is_mistake(error: BaseException, began: bool) -> bool:
    """Whether an error is for the user to mend, and says how.

    Args:
        error: what was raised.
        began: whether the first training step had begun. After that only our own refusals are.
    """
    from datasets.exceptions import DatasetsError

    if not began:
        return isinstance(error, ValueError | OSError | ImportError | DatasetsError)
    last = traceback.extract_tb(error.__traceback__)[-1:]
    ours = Path(__file__).parents[1]
    return isinstance(error, ValueError) and any(Path(frame.filename).is_relative_to(ours) for frame in last)


def check_installed(package: str, extra: str, wanted_by: str) -> None:
    """Raise unless an optional package is installed; the message names the extra that brings it."""
    try:
        found = importlib.util.find_spec(package) is not None
    except ValueError:
        found = False
    if not found:
        raise ValueError(
            f"`{wanted_by}` needs the package `{package}`, which is not installed: "
            f"`pip install 'trl-qtarget[{extra}]'`."
        )


def write_anywhere() -> None:
    """From here on, what the output's encoding does not have is written in ASCII, as in a pipe on Windows."""
    codecs.register_error("trl_qtarget_ascii", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and not (stream.encoding or "").lower().startswith("utf"):
            stream.reconfigure(errors="trl_qtarget_ascii")


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(map(_letter, letters)), error.end


def _letter(letter: str) -> str:
    if letter in _ASCII:
        return _ASCII[letter]
    plain = unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode()
    return plain or ("" if unicodedata.combining(letter) else "?")
