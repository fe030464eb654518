"""At what share of a text's tokens a teacher of another tokenizer has the same token at the same place.

That is where `trl-qtarget cache --own_tokens` carries over what the teacher says. Texts are the demo's sums with their
worked steps, this project's documentation as English prose, and its source as code; or files of your own.

    python -m benchmarks.crossing --policy FOLDER --teacher FOLDER
    python -m benchmarks.crossing --policy FOLDER --teacher FOLDER --files chats.txt --output /tmp/crossing.csv
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path

from transformers import AutoTokenizer

from trl_qtarget.priors.across import Crossing

from .common import RESULTS, base_parser, finish_arguments, write_results


sys.path.append(str(Path(__file__).parents[1] / "examples"))

from demo_task import task_problems, text_of


ROOT = Path(__file__).parents[1]


def texts_of(files: list[Path] | None) -> Mapping[str, list[str]]:
    """Texts by what they are, in pieces of about the length of an example."""
    if files:
        return {file.name: _pieces(file) for file in files}
    prose = [piece for file in sorted((ROOT / "docs").glob("*.md")) for piece in _pieces(file)]
    code = [piece for file in sorted((ROOT / "trl_qtarget").rglob("*.py")) for piece in _pieces(file)]
    problems, _ = task_problems("chain_sum", {}, 256, 1, 0)
    sums = [f"{text_of(problem.prompt)}\n{problem.reference}" for problem in problems]
    # Tables and blocks of code are no prose.
    return {"sums": sums, "prose": [piece for piece in prose if re.match(r"[A-Z][a-z]", piece)], "code": code}


def _pieces(file: Path) -> list[str]:
    return [piece for piece in file.read_text(encoding="utf-8").split("\n\n") if piece.strip()]


def main() -> None:
    parser = base_parser(__doc__, repeats=1)
    parser.add_argument("--policy", required=True, help="folder or hub id of the policy's tokenizer")
    parser.add_argument("--teacher", required=True, help="of the teacher's")
    parser.add_argument("--files", type=Path, nargs="+", help="texts, in pieces between empty lines")
    arguments = parser.parse_args()
    arguments.output = arguments.output or RESULTS / "crossing.csv"
    arguments = finish_arguments(arguments, "crossing")
    policy, teacher = (AutoTokenizer.from_pretrained(name) for name in (arguments.policy, arguments.teacher))
    crossing = Crossing(policy, teacher, len(policy), len(teacher))
    shared, rows = int(crossing.shared.sum()), []
    names = f"{Path(arguments.policy).name} from {Path(arguments.teacher).name}"
    sys.stdout.write(f"{names}: {shared} of {len(policy)} tokens are the teacher's too\n")
    for kind, texts in texts_of(arguments.files).items():
        heard = labels = 0
        for text in texts:
            ids = policy(text, add_special_tokens=False)["input_ids"] + [policy.eos_token_id]
            # The first token is no label.
            heard += sum(place > 0 for place in crossing.read(ids).places)
            labels += len(ids) - 1
        share = heard / labels
        sys.stdout.write(f"{kind}: {share:.1%} of {labels} labels\n")
        what = {"benchmark": "crossing", "provider": names, "mode": kind, "metric": "share of labels"}
        rows.append(what | {"N": labels, "V": shared, "median": share, "min": share, "max": share, "repeats": 1})
    write_results(arguments.output, rows, arguments.device)
    sys.stdout.write(f"Results are in {arguments.output}.\n")


if __name__ == "__main__":
    main()
