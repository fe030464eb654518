"""Run the comparison of methods, or go on with it, and write its page.

python -m method_comparison                 the whole study, hours on two cores
python -m method_comparison --quick         a subset, minutes
python -m method_comparison --page          only write the page of the committed results again
"""

import argparse
import os
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from . import page, runs, settings, study
from .store import Store


COMMITTED = settings.HERE / "results"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few methods, settings, seeds and short training")
    parser.add_argument(
        "--page",
        action="store_true",
        help="train nothing; write the page of method_comparison/results, or of --results, again",
    )
    parser.add_argument(
        "--results", type=Path, help="folder of results, gone on with; None: outputs/comparison[-quick]"
    )
    parser.add_argument(
        "--models", type=Path, help="folder of pretrained models; None: a folder `models` in --results"
    )
    parser.add_argument("--workers", type=int, help="runs at a time; None: one per core, or four on a GPU")
    arguments = parser.parse_args()
    chosen = settings.load(arguments.quick)
    runs.check(chosen)
    if arguments.page and arguments.results is None:
        store = Store(COMMITTED, chosen, writable=False)
        print(f"The page is {page.write(chosen, store, settings.HERE, page.TEMPLATE)}")
        return
    results = arguments.results or Path("outputs") / ("comparison-quick" if arguments.quick else "comparison")
    try:
        store = Store(results, chosen, writable=not arguments.page)
    except ValueError as error:
        parser.error(str(error))
    if not arguments.page:
        directory = arguments.models or results / "models"
        workers = arguments.workers or (4 if torch.cuda.is_available() else os.cpu_count() or 1)
        try:
            study.train_models(chosen, directory, workers)
            study.train_all(chosen, store, directory, workers)
        except (KeyboardInterrupt, BrokenProcessPool):
            raise SystemExit(f"\nInterrupted. What is done is in {results}; the same command goes on.") from None
    print(f"The page is {page.write(chosen, store, results)}")


if __name__ == "__main__":
    main()
