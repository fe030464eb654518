"""`trl-qtarget tune`: find the target for a model and its data, and say whether it beats plain SFT beyond chance."""

import argparse
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import datasets
import psutil
import torch
import yaml
from datasets import Dataset, load_dataset
from trl import get_peft_config

from ..priors.choice import PolicyFacts
from ..target.config import QTargetConfig
from .data import load_data, local_format, split_of
from .device import cpu_words, threads_each
from .errors import check_installed, say
from .launch import check
from .options import read_method, refuse
from .recipe import names_given, recipe_of, separated
from .sft import make_parser as sft_parser


if TYPE_CHECKING:
    from ..tuning.study import Plan

INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        refuse(message)


def make_parser() -> argparse.ArgumentParser:
    """Parser of the study's own arguments; a recipe may hold them too."""
    parser = _Parser(
        prog="trl-qtarget tune",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--methods", nargs="+", default=None, help="methods, asft:lam=0.03 to fix a knob, or files of configurations")
    add("--metric", default="average_at_k", help="average_at_k, greedy_accuracy, eval_target/nll, "
        "eval_mean_token_accuracy, or module:function(model, tokenizer, dataset)")  # fmt: skip
    add("--judge", default="exact", help="of answers: exact, letter, math, text, or module:function(answer, text)")
    add("--samples", type=int, default=8, help="answers to each prompt, the k of average_at_k")
    add("--temperature_of_samples", type=float, default=1.0, help="sampling temperature of average_at_k")
    add("--max_new_tokens", type=int, default=256, help="longest answer")
    add("--problems", default=None, help="dataset or file with prompt and answer, to search and confirm on")
    add("--held_out", type=int, default=None, help="rows to search and confirm on, half each")
    add("--retention", default=None, help="dataset or file of text on which the KL to the starting model is reported")
    add("--budget", default=None, help="time of work, all workers together: 6h, 90m; None: --trials of each method")
    add("--trials", type=int, default=6, help="trials of every method before any is favoured")
    add("--rungs", type=int, default=1, help="intermediate evaluations, after each of which the worse trials end")
    add("--learning_rates", type=float, nargs=2, default=None, help="lowest and highest; None: a tenth to ten times "
        "--learning_rate")  # fmt: skip
    add("--finalists", type=int, default=2, help="methods that are confirmed beside sft")
    add("--confirm_seeds", type=int, default=3, help="fresh trainings of each of them in one look")
    add("--cache_prior", default="auto", help="how a frozen prior that runs once for all trials is kept: hidden "
        "(exact), top_k, none; auto: hidden, unless processes hold parts of the model")  # fmt: skip
    add("--workers", default="auto", help="trials at a time; auto: one per GPU")
    add("--storage", default=None, help="of Optuna: a URL, or a journal file; None: a journal in --output_dir")
    add("--study_name", default="trl-qtarget", help="of the study in the storage")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run a study, or go on with it, and print its verdict.

    Returns:
        0; 130 where it was interrupted; another status where a worker failed.

    Raises:
        ValueError: an argument is wrong.
    """
    for package in ("optuna", "mpmath", "matplotlib"):
        check_installed(package, "tune", "tune")
    import optuna

    from ..tuning import report
    from ..tuning.prior import CachingFailed
    from ..tuning.study import Study

    datasets.disable_progress_bars()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("trl_qtarget").setLevel(logging.INFO)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    given, recipe = parse(arguments)
    workers = _workers(given.workers)
    plan = make_plan(given, recipe)
    study = Study(plan, _storage(given.storage, plan.folder), given.study_name)
    try:
        with _terminable():
            if workers > 1 and not study.done:
                status = _share(arguments, workers)
                if status and not study.done:  # of a worker that died, the others may have done the rest
                    return status
            study.work()
    except KeyboardInterrupt:
        say("tune", "interrupted: the same command goes on.")
        return INTERRUPTED
    except CachingFailed as error:
        raise ValueError(str(error)) from None
    sys.stdout.write(f"{report.write(study)}\n{plan.folder / 'report.html'}\n{plan.folder / 'best.yaml'}\n")
    return 0


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The study's arguments, and those of `trl-qtarget sft` as one recipe.

    Raises:
        ValueError: an argument is wrong.
    """
    arguments = separated(arguments)
    recipe, parser = recipe_of(arguments), make_parser()
    if "--config" in arguments:
        index = arguments.index("--config")
        arguments = [*arguments[:index], *arguments[index + 2 :]]
    own = {action.dest for action in parser._actions} - {"help"}
    for name in own & recipe.keys():
        value = recipe.pop(name)
        parser.set_defaults(**{name: value if value is None or isinstance(value, list) else str(value)})
    given, rest = parser.parse_known_args(arguments)
    if not given.methods:
        raise ValueError(
            "`methods` is missing: name what to compare with `sft`, as in `--methods dft asft target_sft`."
        )
    if isinstance(given.methods, str):
        given.methods = [given.methods]
    for name, least in {"trials": 1, "rungs": 0, "finalists": 1, "confirm_seeds": 2}.items():
        if getattr(given, name) < least:
            raise ValueError(f"`{name}={getattr(given, name)}` must be at least {least}.")
    if given.rungs > 3:
        raise ValueError(
            f"`rungs={given.rungs}` would evaluate after each 3^{given.rungs}th of a training: 3 at most."
        )
    return given, recipe | _as_recipe(rest)


def _as_recipe(rest: Sequence[str]) -> dict[str, Any]:
    """Options of a command line as a recipe names them."""
    known, values = sft_parser()._option_string_actions, {}
    words: list[str] = [part for item in rest for part in (item.split("=", 1) if item.startswith("--") else [item])]
    for index, word in enumerate(words):
        if not word.startswith("--"):
            continue
        end = next((at for at in range(index + 1, len(words)) if words[at].startswith("--")), len(words))
        found, action = words[index + 1 : end], known.get(word) or known.get(word.replace("-", "_"))
        name = action.dest if action else word[2:].replace("-", "_")
        if not found:
            values[name] = not (action is not None and action.const is False)
        else:
            many = len(found) > 1 or (action is not None and action.nargs in ("*", "+"))
            values[name] = found if many else _typed(found[0], action)
    return values


def _typed(text: str, action: argparse.Action | None) -> Any:
    if action is not None and action.type in (int, float):
        try:
            return action.type(text)
        except ValueError:
            refuse(f"argument --{action.dest}: invalid {action.type.__name__} value: {text!r}")
    return text


def make_plan(given: argparse.Namespace, recipe: dict[str, Any]) -> "Plan":
    """The plan that the arguments describe, with its data written down.

    Raises:
        ValueError: an argument is wrong, or there are too few data.
    """
    from ..tuning.metrics import Metric
    from ..tuning.prior import shared_prior
    from ..tuning.study import Plan
    from ..tuning.trial import Evaluation, Training

    for name in ("method", "trust", "residual", "scale"):
        if name in recipe:
            raise ValueError(
                f"`{name}` is what is looked for: take it out of the recipe, and name what to try in `methods`."
            )
    if not recipe.get("output_dir"):
        raise ValueError("`output_dir` is missing: name the folder of the study.")
    folder = Path(recipe["output_dir"])
    metric = Metric(given.metric, given.judge, given.samples, given.temperature_of_samples, given.max_new_tokens)
    metric.check()
    candidates = _candidates(given, recipe)
    budget = seconds_of(given.budget)
    folder.mkdir(parents=True, exist_ok=True)
    # A candidate says all of its target.
    plain = {name: value for name, value in recipe.items() if name not in QTargetConfig.__dataclass_fields__}
    script, training, model, mixture = _checked(plain, candidates, folder)
    sets = _sets(given, load_data(script, mixture), script, metric, folder, training.seed)
    retained = None if given.retention is None else _rows(given.retention, "retention")
    dtype = recipe.get("dtype")
    evaluation = Evaluation(metric, training, dtype, training.seed, model.model_name_or_path, retained)
    facts = PolicyFacts.of(model.model_name_or_path or "", get_peft_config(model))
    prior = shared_prior(given.cache_prior, candidates, recipe, facts, folder, _cache)
    train = Training(plain, sets.train.resolve(), _launch, given.rungs, prior)
    return Plan(
        folder,
        tuple(candidates),
        train,
        evaluation,
        sets,
        trials=given.trials,
        budget=budget,
        finalists=given.finalists,
        seeds=given.confirm_seeds,
        seed=training.seed,
    )


def _checked(recipe: dict[str, Any], candidates: Sequence[Any], folder: Path) -> Sequence[Any]:
    """What the recipe says of script, training, model and mixture; a mistake should not cost the start of a training.

    The training is as models are evaluated in it.
    """
    evaluated = {"eval_strategy": "no", "output_dir": str(folder / "evaluation"), "report_to": "none"}
    with tempfile.TemporaryDirectory() as scratch:
        files = []
        for number, options in enumerate([{"method": "sft"}, *(each.options(each.defaults) for each in candidates)]):
            files.append(Path(scratch) / f"{number}.yaml")
            files[-1].write_text(yaml.safe_dump(recipe | options | evaluated, allow_unicode=True), encoding="utf-8")
            check(["--config", str(files[-1])])
        words = ["--config", str(files[0])]
        parsed = sft_parser().parse_args_and_config(
            [*words, *cpu_words(names_given(words))], return_remaining_strings=True
        )
    return parsed[:4]


def _candidates(given: argparse.Namespace, recipe: dict[str, Any]) -> list[Any]:
    from ..tuning.space import RATE_FACTOR, Candidate

    start = float(recipe.get("learning_rate", 2e-5))
    low, high = given.learning_rates or (start / RATE_FACTOR, start * RATE_FACTOR)
    if not 0 < low < high:
        raise ValueError(f"`learning_rates` {low:g} {high:g} must be a lower and a higher one, above 0.")
    fields = set(QTargetConfig.__dataclass_fields__) & recipe.keys()
    common = {name: recipe[name] for name in fields}  # a prior, a kernel: for the methods that take them
    names = list(dict.fromkeys(["sft", *given.methods]))
    if len(names) < 2:
        raise ValueError("`methods` holds nothing beside `sft`: name what to compare with it.")
    candidates = []
    for name in names:
        config = read_method(name)
        for field, value in common.items():
            try:
                config = QTargetConfig.coerce(config.to_dict() | {field: value})
            except ValueError:
                if field not in ("prior", "prior_sync_steps", "prior_sync_decay", "token_weight_column"):
                    raise
        candidates.append(Candidate(name, config, (float(low), float(high)), start))
    return candidates


def seconds_of(text: str | None) -> float | None:
    """`6h`, `1h30m`, `90m`, `45s` in seconds.

    Raises:
        ValueError: it is no time.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s)?", text)
    try:
        seconds = sum(float(each) * unit for each, unit in zip(found.groups("0"), (3600, 60, 1), strict=True))
    except (AttributeError, ValueError):
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"`budget={text!r}` is no time: write 6h, 1h30m or 90m.")
    return seconds


def _sets(given: argparse.Namespace, dataset: Any, script: Any, metric: Any, folder: Path, seed: int) -> Any:
    from ..tuning.data import split, with_answers, write

    train = split_of(dataset, script.dataset_train_split, "dataset_train_split")
    if not isinstance(train, Dataset):
        raise ValueError(
            "`streaming` leaves the number of rows unknown: a study needs the whole dataset, do not stream."
        )
    if given.problems is not None:
        held_out = _rows(given.problems, "problems")
    else:
        held_out = dataset[script.dataset_test_split] if script.dataset_test_split in dataset else None
    sets = split(train, held_out, given.held_out, seed)
    if metric.needs_answers:
        sets |= {name: with_answers(sets[name]) for name in ("search", "confirm")}
    return write(sets, folder / "data")


def _rows(name: str, argument: str) -> Dataset:
    """A local file, or a dataset on the hub whose only or first split is taken."""
    loader = local_format(name)
    try:
        found = load_dataset(loader, data_files=name) if loader else load_dataset(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"`{argument}`: {name} cannot be read ({error}).") from error
    return next(iter(found.values()))


def _launch(recipe: Path, log: Path, until: Callable[[], bool]) -> int:
    """Train as `trl-qtarget sft --config recipe` does."""
    from ..tuning.process import run_job

    return run_job(check(["--config", str(recipe)]).job, log, until)


def _cache(recipe: Path, folder: Path, form: str, log: Path) -> int:
    """Do as `trl-qtarget cache` does."""
    words = ["--config", str(recipe), "--form", form, "--output_dir", str(folder)]
    with log.open("ab") as output:
        command = [sys.executable, "-m", "trl_qtarget.cli", "cache", *words]
        return subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL).returncode


def _storage(text: str | None, folder: Path) -> Any:
    from optuna.storages import JournalStorage, get_storage
    from optuna.storages.journal import JournalFileBackend

    if text is not None and "://" in text:
        return get_storage(text)
    return JournalStorage(JournalFileBackend(str(text or folder / "journal.log")))


# --- workers ---


def _workers(text: str) -> int:
    if text == "auto":
        return max(1, torch.cuda.device_count())
    if not str(text).isdecimal() or int(text) < 1:
        raise ValueError(f"`workers={text!r}` must be a whole number of at least 1, or auto.")
    return int(text)


def _share(arguments: Sequence[str], workers: int) -> int:
    """Run so many processes of the same command, one per GPU where there are any.

    Returns:
        The first status that is not 0; 128 + n where signal n has ended a worker.
    """
    devices = [each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
    devices = devices or [str(number) for number in range(torch.cuda.device_count())]
    threads = None if devices else threads_each(workers)
    processes = []
    for number in range(workers):
        chosen = {"CUDA_VISIBLE_DEVICES": devices[number % len(devices)]} if devices else {}
        if threads is not None:
            chosen["OMP_NUM_THREADS"] = str(threads)
        command = [sys.executable, "-m", "trl_qtarget.cli", "tune", *arguments, "--workers", "1"]
        processes.append(subprocess.Popen(command, env=os.environ | chosen, stdout=subprocess.DEVNULL))
    try:
        statuses = [process.wait() for process in processes]
    except KeyboardInterrupt:
        # A terminal has told them too, and a second signal would cut short what they do about it.
        _, left = psutil.wait_procs(
            [psutil.Process(each.pid) for each in processes if each.poll() is None], timeout=10
        )
        for process in left:
            with suppress(psutil.Error):
                process.send_signal(signal.SIGINT)
        psutil.wait_procs(left)
        raise
    return next((128 - status if status < 0 else status for status in statuses if status), 0)


@contextmanager
def _terminable() -> Iterator[None]:
    """A SIGTERM ends as Ctrl-C does: what is running is ended and given back."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
