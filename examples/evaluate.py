# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-qtarget[evaluation]"]
# ///
"""Average@k of a model on problems with known answers: k sampled answers to each problem, each judged.

    python examples/evaluate.py --model outputs/my-model --dataset problems.jsonl
    python examples/evaluate.py --model Qwen/Qwen3-1.7B --dataset HuggingFaceH4/MATH-500 --split test

Answers are judged by math-verify (`--judge math`), as the letter of a choice (`letter`), by their last number or line
(`exact`), as text (`text`), or by a function of yours, `module:function(right answer, generated text) -> bool`. vLLM
samples where it is installed, else transformers. An interrupted evaluation goes on where it was.
"""

import argparse
import hashlib
import json
import math
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from huggingface_hub import try_to_load_from_cache
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed

from trl_qtarget import find_judge


FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}

# Files of a model's folder that decide what it answers; logs, cards and results lie beside them.
WEIGHTS = (".safetensors", ".bin", ".gguf")
CONFIGURATIONS = ("config.json", "generation_config.json", "adapter_config.json", "tokenizer.json")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="Model or adapter: hub id or path.")
    parser.add_argument("--dataset", required=True, help="A .json, .jsonl, .parquet or .csv file, or a hub id.")
    parser.add_argument("--split", default="train", help="Split of the dataset; a file has only `train`.")
    parser.add_argument("--problem_column", default="problem", help="Text, or messages that end with the user's.")
    parser.add_argument("--answer_column", default="answer", help="The right answer.")
    parser.add_argument("--limit", type=count, help="Only so many problems, the first ones.")
    parser.add_argument(
        "--samples", type=count, default=16, help="Sampled answers to each problem, the k of Average@k."
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="Sampling temperature; 0 is greedy, k = 1.")
    parser.add_argument("--top_p", type=float, default=1.0, help="Nucleus of the sampling; 1 is all of it.")
    parser.add_argument("--max_new_tokens", type=count, default=2048, help="Longest answer.")
    parser.add_argument("--system", help="System message before every problem.")
    parser.add_argument("--judge", default="math", help="math, letter, exact, text, or `module:function`.")
    parser.add_argument("--backend", choices=["auto", "transformers", "vllm"], default="auto", help="What samples.")
    parser.add_argument("--batch_size", type=count, default=16, help="Answers at a time, with transformers.")
    parser.add_argument("--output", type=Path, default=Path("outputs/evaluation.jsonl"), help="A line per problem.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the sampling.")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.temperature < math.inf:
        parser.error(f"--temperature {arguments.temperature} must be 0 or more")
    if not 0 < arguments.top_p <= 1:
        parser.error(f"--top_p {arguments.top_p} must be in (0, 1]")
    if not 0 <= arguments.seed < 2**31:
        parser.error(f"--seed {arguments.seed} must be in [0, 2^31)")
    if arguments.temperature == 0:
        arguments.samples = 1
    return arguments


def count(text: str) -> int:
    """A whole number of at least 1, as an argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least 1")
    return int(text)


# --- problems ---


@dataclass(frozen=True)
class Problem:
    number: int
    prompt: str
    answer: str

    @property
    def fingerprint(self) -> str:
        """Of what was asked and what is right: a line of results belongs to one of these."""
        return hashlib.sha256(json.dumps([self.prompt, self.answer]).encode()).hexdigest()[:16]


def load_problems(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> list[Problem]:
    path = Path(arguments.dataset)
    loader = FORMATS.get(path.suffix)
    if loader and not path.is_file():
        raise SystemExit(f"--dataset {path}: there is no such file.")
    if loader:
        rows: Dataset = load_dataset(loader, data_files=str(path), split=arguments.split)
    else:
        rows = load_dataset(arguments.dataset, split=arguments.split)
    for name in (arguments.problem_column, arguments.answer_column):
        if name not in rows.column_names:
            raise SystemExit(f"--dataset has no column `{name}`: it has {', '.join(rows.column_names)}.")
    if arguments.limit is not None:
        rows = rows.select(range(min(len(rows), arguments.limit)))
    if not len(rows):
        raise SystemExit("--dataset has no rows.")
    return [_problem(number, row, arguments, tokenizer) for number, row in enumerate(rows)]


def _problem(
    number: int, row: dict[str, Any], arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase
) -> Problem:
    for name in (arguments.problem_column, arguments.answer_column):
        if row[name] is None:
            raise SystemExit(f"--dataset has nothing in column `{name}` of row {number}.")
    prompt = _prompt(row[arguments.problem_column], arguments, tokenizer)
    return Problem(number, prompt, str(row[arguments.answer_column]))


def _prompt(problem: Any, arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> str:
    messages = problem if isinstance(problem, list) else [{"role": "user", "content": problem}]
    if arguments.system:
        messages = [{"role": "system", "content": arguments.system}, *messages]
    if tokenizer.chat_template is None:
        return "\n\n".join(message["content"] for message in messages)
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


# --- sampling: answers to a problem, one list per problem ---


def sample_transformers(
    problems: list[Problem], arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase
) -> Iterator[list[str]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).to(device).eval()
    sampling = {"do_sample": False}
    if arguments.temperature:
        sampling = {"do_sample": True, "temperature": arguments.temperature, "top_p": arguments.top_p, "top_k": 0}
    for problem in problems:
        # A seed per problem: an answer does not depend on where an evaluation was interrupted.
        set_seed(arguments.seed + problem.number)
        inputs = tokenizer(problem.prompt, return_tensors="pt", add_special_tokens=tokenizer.chat_template is None)
        inputs = inputs.to(device)
        answers: list[str] = []
        while len(answers) < arguments.samples:
            count = min(arguments.batch_size, arguments.samples - len(answers))
            with torch.inference_mode():
                output = model.generate(
                    **inputs,
                    **sampling,
                    num_return_sequences=count,
                    max_new_tokens=arguments.max_new_tokens,
                    pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
                )
            answers += tokenizer.batch_decode(output[:, inputs["input_ids"].size(1) :], skip_special_tokens=True)
        yield answers


def sample_vllm(
    problems: list[Problem], arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase
) -> Iterator[list[str]]:
    from vllm import LLM, SamplingParams

    model = LLM(arguments.model)
    special = tokenizer.chat_template is None  # a chat template writes its own
    for start in range(0, len(problems), 64):
        chunk = problems[start : start + 64]
        options = [
            SamplingParams(
                n=arguments.samples,
                temperature=arguments.temperature,
                top_p=arguments.top_p,
                max_tokens=arguments.max_new_tokens,
                seed=arguments.seed + problem.number,
            )
            for problem in chunk
        ]
        tokens = [tokenizer(problem.prompt, add_special_tokens=special)["input_ids"] for problem in chunk]
        for found in model.generate([{"prompt_token_ids": ids} for ids in tokens], options, use_tqdm=False):
            yield [answer.text for answer in found.outputs]


def resolve_backend(arguments: argparse.Namespace) -> str:
    """What samples: vLLM where it is installed, but for adapters, which transformers loads with their base."""
    adapter = (Path(arguments.model) / "adapter_config.json").is_file()
    if adapter and arguments.backend == "vllm":
        raise SystemExit("--backend vllm: merge the adapter into its base first, or take --backend transformers.")
    if arguments.backend != "auto":
        return arguments.backend
    return "vllm" if find_spec("vllm") and not adapter else "transformers"


# --- results ---


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What decides an answer beside the problem; a file of results belongs to one of these."""
    left_out = ("output", "batch_size", "limit")
    settings = {name: value for name, value in vars(arguments).items() if name not in left_out}
    return settings | {"weights": weights_of(arguments.model)}


def weights_of(model: str) -> str | None:
    """Of a folder, a digest of the files that decide what it answers; of a model on the hub, the commit in use."""
    folder = Path(model)
    if not folder.is_dir():
        found = try_to_load_from_cache(model, "tokenizer_config.json")
        return Path(found).parent.name if isinstance(found, str) else None
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in WEIGHTS or path.name in CONFIGURATIONS:
            with path.open("rb") as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        digest.update(f"base {base and weights_of(base)}\n".encode())
    return digest.hexdigest()[:16]


def line_of(values: dict[str, Any]) -> str:
    """A line of JSON in ASCII: characters that some readers take for the end of a line are escaped, as all others."""
    return json.dumps(values) + "\n"


def read_done(arguments: argparse.Namespace, problems: list[Problem]) -> dict[int, dict[str, Any]]:
    """Whole lines of an earlier evaluation, by the number of the problem; what follows the last of them is removed.

    The file is left with its first line, the settings.

    Raises:
        SystemExit: the file holds something else, answers of other settings, or answers to other problems.
    """
    path, first = arguments.output, line_of(settings_of(arguments)).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if not whole and first.startswith(content):  # killed while it wrote its first line, or before
        path.write_bytes(first)
        return {}
    if not whole.startswith(first):
        raise SystemExit(f"--output {path} holds another evaluation: name another file, or remove it.")
    try:
        lines = [json.loads(line) for line in whole.decode().split("\n")[1:-1]]
        done = {line["number"]: line for line in lines}
    except (ValueError, TypeError, KeyError) as error:
        raise SystemExit(f"--output {path} has a damaged line ({error}): name another file, or remove it.") from None
    for problem in problems:
        if problem.number in done and done[problem.number].get("problem") != problem.fingerprint:
            raise SystemExit(
                f"--output {path} holds answers to other problems: that of row {problem.number} has changed since. "
                "Name another file, or remove it."
            )
    os.truncate(path, len(whole))
    return {problem.number: done[problem.number] for problem in problems if problem.number in done}


def report(lines: list[dict[str, Any]], samples: int) -> str:
    """Average@k with its standard error over problems, and pass@k."""
    shares = [line["right"] / samples for line in lines]
    passed = sum(line["right"] > 0 for line in lines) / len(lines)
    average = f"{100 * statistics.fmean(shares):.2f}"
    if len(shares) > 1:
        average += f" ± {100 * statistics.stdev(shares) / len(shares) ** 0.5:.2f}"
    return f"{len(lines)} problems: Average@{samples} {average} %, pass@{samples} {100 * passed:.2f} %"


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    try:
        judge = find_judge(arguments.judge)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    problems = load_problems(arguments, tokenizer)
    arguments.backend = resolve_backend(arguments)
    done = read_done(arguments, problems)
    left = [problem for problem in problems if problem.number not in done]
    sample = sample_vllm if arguments.backend == "vllm" else sample_transformers
    with arguments.output.open("a", encoding="utf-8", newline="\n") as file:
        bar = tqdm(total=len(problems), initial=len(done), desc=f"Average@{arguments.samples}", unit="problem")
        for problem, answers in zip(left, sample(left, arguments, tokenizer) if left else [], strict=True):
            right = sum(bool(judge(problem.answer, answer)) for answer in answers)
            done[problem.number] = {
                "number": problem.number,
                "problem": problem.fingerprint,
                "right": right,
                "answers": answers,
            }
            file.write(line_of(done[problem.number]))
            file.flush()
            bar.update()
            bar.set_postfix_str(report(list(done.values()), arguments.samples).split(": ")[1].split(",")[0])
        bar.close()
    print(report([done[problem.number] for problem in problems], arguments.samples))


if __name__ == "__main__":
    main()
