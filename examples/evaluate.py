"""Average@k of a model on problems with known answers: k sampled answers to each problem, each judged.

    python examples/evaluate.py --model outputs/my-model --dataset problems.jsonl
    python examples/evaluate.py --model Qwen/Qwen3-1.7B --dataset HuggingFaceH4/MATH-500 --split test

Answers are judged by math-verify (`--judge math`), as the letter of a choice (`letter`), or as text (`text`). vLLM
samples where it is installed, else transformers. An interrupted evaluation goes on where it was.
"""

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed


FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="Model or adapter: hub id or path.")
    parser.add_argument("--dataset", required=True, help="A .json, .jsonl, .parquet or .csv file, or a hub id.")
    parser.add_argument("--split", default="train", help="Split of the dataset; a file has only `train`.")
    parser.add_argument("--problem_column", default="problem", help="Text, or messages that end with the user's.")
    parser.add_argument("--answer_column", default="answer", help="The right answer.")
    parser.add_argument("--limit", type=int, help="Only so many problems, the first ones.")
    parser.add_argument("--samples", type=int, default=16, help="Sampled answers to each problem, the k of Average@k.")
    parser.add_argument("--temperature", type=float, default=1.0, help="Sampling temperature; 0 is greedy, k = 1.")
    parser.add_argument("--top_p", type=float, default=1.0, help="Nucleus of the sampling; 1 is all of it.")
    parser.add_argument("--max_new_tokens", type=int, default=2048, help="Longest answer.")
    parser.add_argument("--system", help="System message before every problem.")
    parser.add_argument("--judge", choices=list(JUDGES), default="math", help="How an answer is compared.")
    parser.add_argument("--backend", choices=["auto", "transformers", "vllm"], default="auto", help="What samples.")
    parser.add_argument("--batch_size", type=int, default=16, help="Answers at a time, with transformers.")
    parser.add_argument("--output", type=Path, default=Path("outputs/evaluation.jsonl"), help="A line per problem.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the sampling.")
    arguments = parser.parse_args(argv)
    for name in ("samples", "max_new_tokens", "batch_size"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if arguments.temperature == 0:
        arguments.samples = 1
    return arguments


# --- judges: (right answer, generated text) -> bool ---


def judge_math(answer: str, text: str) -> bool:
    """Mathematically equal, as math-verify sees it."""
    from math_verify import parse, verify

    return verify(parse(answer if "$" in answer or "\\boxed" in answer else f"${answer}$"), parse(text))


def judge_letter(answer: str, text: str) -> bool:
    """The letter of a choice: a boxed one, one after "answer is", else the last single capital letter."""
    for pattern in (r"\\boxed\{\(?([A-Z])\)?\}", r"answer is:?\s*\(?([A-Z])\b", r"\b([A-Z])\b"):
        if found := re.findall(pattern, text):
            return found[-1] == answer.strip("() .").upper()
    return False


def judge_text(answer: str, text: str) -> bool:
    """The last line, word for word."""
    lines = text.strip().splitlines()
    return bool(lines) and lines[-1].strip() == answer.strip()


JUDGES: dict[str, Callable[[str, str], bool]] = {"math": judge_math, "letter": judge_letter, "text": judge_text}


# --- problems ---


@dataclass(frozen=True)
class Problem:
    number: int
    prompt: str
    answer: str


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
    rows = rows.select(range(min(len(rows), arguments.limit or len(rows))))
    return [
        Problem(
            number, _prompt(row[arguments.problem_column], arguments, tokenizer), str(row[arguments.answer_column])
        )
        for number, row in enumerate(rows)
    ]


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
    """What decides an answer; a file of results belongs to one of these."""
    left_out = ("output", "batch_size", "limit")
    return {name: value for name, value in vars(arguments).items() if name not in left_out}


def read_done(arguments: argparse.Namespace) -> dict[int, dict[str, Any]]:
    """Whole lines of an earlier evaluation with the same settings; a half-written last line is removed."""
    if not arguments.output.is_file():
        return {}
    whole, _, rest = arguments.output.read_text(encoding="utf-8").rpartition("\n")
    lines = [json.loads(line) for line in whole.splitlines()]
    if not lines or lines[0] != settings_of(arguments):
        raise SystemExit(f"--output {arguments.output} holds another evaluation: name another file, or remove it.")
    if rest:
        arguments.output.write_text(whole + "\n", encoding="utf-8")
    return {line["number"]: line for line in lines[1:]}


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
    if arguments.judge == "math" and find_spec("math_verify") is None:
        raise SystemExit("--judge math needs math-verify: pip install math-verify, or choose another judge.")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    problems = load_problems(arguments, tokenizer)
    arguments.backend = resolve_backend(arguments)
    done = read_done(arguments)
    left = [problem for problem in problems if problem.number not in done]
    sample = sample_vllm if arguments.backend == "vllm" else sample_transformers
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("a", encoding="utf-8") as file:
        if not done:
            file.truncate(0)
            file.write(json.dumps(settings_of(arguments)) + "\n")
        bar = tqdm(total=len(problems), initial=len(done), desc=f"Average@{arguments.samples}", unit="problem")
        for problem, answers in zip(left, sample(left, arguments, tokenizer) if left else [], strict=True):
            right = sum(JUDGES[arguments.judge](problem.answer, answer) for answer in answers)
            done[problem.number] = {"number": problem.number, "right": right, "answers": answers}
            file.write(json.dumps(done[problem.number], ensure_ascii=False) + "\n")
            file.flush()
            bar.update()
            bar.set_postfix_str(report(list(done.values()), arguments.samples).split(": ")[1].split(",")[0])
        bar.close()
    print(report([done[problem.number] for problem in problems], arguments.samples))


if __name__ == "__main__":
    main()
