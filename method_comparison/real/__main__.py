"""Run the comparison on a real model, or go on with it, and write its page.

python -m method_comparison.real                the whole study, hours on two cores
python -m method_comparison.real --seeds 5      with more fresh seeds, as a GPU allows
python -m method_comparison.real --quick        a tiny random model, to see that all of it works
python -m method_comparison.real --page         only write the page of the committed results again

Interrupted at any moment, the same command goes on; a run is there whole or not at all. A GPU is used if there is one.
"""

import argparse
import os
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from .. import settings as small
from .. import study
from ..store import VERSIONS, Store
from . import models, page, runs, settings


COMMITTED = small.HERE / "results" / "real"
# What was found, in words; the committed page begins with it.
WORDS = settings.HERE / "found.md"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny random model, few methods and prompts: seconds")
    parser.add_argument(
        "--page",
        action="store_true",
        help="train nothing; write the page of method_comparison/results/real, or of --results, again",
    )
    parser.add_argument("--seeds", type=int, help="fresh seeds that the best rate is tested on; None: two")
    parser.add_argument(
        "--results", type=Path, help="folder of results, gone on with; None: outputs/comparison-real[-quick]"
    )
    parser.add_argument("--models", type=Path, default=Path("outputs"), help="folder of the model, made once")
    parser.add_argument("--workers", type=int, help="runs at a time; None: one, or four on a GPU")
    arguments = parser.parse_args()
    results = arguments.results or Path("outputs") / f"comparison-real{'-quick' if arguments.quick else ''}"
    workers = arguments.workers or (4 if torch.cuda.is_available() else 1)
    try:
        chosen = settings.load(arguments.quick, arguments.seeds)
        if arguments.page and arguments.results is None:
            store = Store(COMMITTED, chosen, writable=False)
            print(f"The page is {page.write(chosen, store, settings.HERE, words())}")
            return
        store = Store(results, chosen, writable=not arguments.page, versions=(*VERSIONS, "peft"))
    except ValueError as error:
        parser.error(str(error))
    if not arguments.page:
        directory = results if arguments.quick else arguments.models
        try:
            models.prepare(chosen, directory)
            threads = max(1, (os.cpu_count() or 1) // workers)
            study.train_all(chosen, store, directory, workers, runs.execute, threads)
        except (KeyboardInterrupt, BrokenProcessPool):
            raise SystemExit(f"\nInterrupted. What is done is in {results}; the same command goes on.") from None
    print(f"The page is {page.write(chosen, store, results)}")


def words() -> str:
    """What was found, as it was written down."""
    return WORDS.read_text(encoding="utf-8").strip() if WORDS.is_file() else ""


if __name__ == "__main__":
    main()
