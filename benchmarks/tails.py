"""How far the gradient toward a top-k teacher is from that toward the whole one, by what is done with the rest.

The teacher is a language model, its policy the same model after some steps of training, and the text what the teacher
answers to the demo's prompts, sampled at temperature 1. Rules for the tokens that are not among the k: as the policy
would share the mass (`policy`), evenly (`uniform`), none with the k renormalised (`renormalised`), none at all
(`dropped`). Numbers are relative: of all tokens' gradients together, and of their mean.

    python -m benchmarks.tails --model FOLDER
    python -m benchmarks.tails --model FOLDER --prompts 2 --steps 2 --k 8 --output /tmp/tails.csv
"""

import copy
import math
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import SFTConfig

from trl_qtarget import QTargetSFTTrainer, TopKPrior, build_target

from .common import base_parser, finish_arguments, progress_bar, write_results


RULES = ("policy", "uniform", "renormalised", "dropped")
METHODS = ("distill", "target_sft")
_SYSTEM = {"role": "system", "content": "Work step by step, one operation per line."}


def prompts_of(count: int, seed: int) -> list[list[dict[str, str]]]:
    """Sums as the demo asks for them."""
    import reasoning_gym

    task = reasoning_gym.create_dataset("chain_sum", size=count, seed=seed, min_terms=3, max_terms=4, max_digits=1)
    return [[_SYSTEM, {"role": "user", "content": entry["question"]}] for entry in task]


def answers_of(model: PreTrainedModel, tokenizer: Any, count: int, seed: int, longest: int) -> list[tuple[list, list]]:
    """Ids of prompts, and of what the model answers to each, sampled."""
    torch.manual_seed(seed)
    found = []
    for prompt in prompts_of(count, seed):
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        output = model.generate(
            torch.tensor([ids]), max_new_tokens=longest, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
        )
        found.append((ids, output[0, len(ids) :].tolist()))
    return found


def trained(model: PreTrainedModel, tokenizer: Any, rows: list[tuple[list, list]], steps: int) -> PreTrainedModel:
    """A copy of a model after some steps on what it has answered itself."""
    data = [{"input_ids": [*a, *b], "labels": [-100] * len(a) + b} for a, b in rows]
    with tempfile.TemporaryDirectory() as folder:
        options = {"max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 2e-5, "warmup_steps": 2}
        arguments = SFTConfig(folder, report_to="none", save_strategy="no", use_cpu=True, bf16=False, **options)
        trainer = QTargetSFTTrainer(
            copy.deepcopy(model),
            arguments,
            train_dataset=Dataset.from_list(data),
            processing_class=tokenizer,
            qtarget_config="sft",
        )
        trainer.train()
    return trainer.model.eval()


def known_of(teacher: Tensor, labels: Tensor, k: int, tail: str) -> TopKPrior:
    """A top-k prior of the teacher's `log_probs[n, V]`."""
    top = teacher.topk(k, dim=-1)
    rest = teacher.scatter(1, top.indices, -math.inf).logsumexp(-1)
    return TopKPrior(top.indices, top.values, teacher.gather(1, labels[:, None]).squeeze(1), rest, tail)


def gradients(policy: Tensor, teacher: Tensor, labels: Tensor, method: str, k: int) -> Iterator[tuple[str, Tensor]]:
    """The gradient on the logits `[n, V]`, toward the whole teacher (`live`) and by each rule."""
    p = policy.softmax(-1)

    def toward(name: str, **prior: Any) -> tuple[str, Tensor]:
        target = build_target(policy, labels, method, **prior)
        return name, target.scale[:, None] * (p - target.probs)

    yield toward("live", prior_logits=teacher)
    for tail in ("policy", "uniform"):
        yield toward(tail, prior_top_k=known_of(teacher, labels, k, tail))
    top = teacher.topk(k, dim=-1)
    among = torch.full_like(teacher, -math.inf).scatter(1, top.indices, top.values)
    yield toward("renormalised", prior_logits=among)
    if (
        method == "distill"
    ):  # of a product of two distributions, nothing is lost by leaving tokens out: it is normalised
        mass = among.exp()
        yield "dropped", mass.sum(-1, keepdim=True) * p - mass


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = base_parser(__doc__, repeats=1)
    parser.add_argument("--model", required=True, help="folder or hub id of the teacher, with a chat template")
    parser.add_argument("--prompts", type=int, default=24, help="how many the teacher answers to be measured on")
    parser.add_argument("--steps", type=int, default=16, help="of the policy's training, on as many other answers")
    parser.add_argument("--k", type=int, nargs="+", default=[8, 32, 128], help="tokens that are known")
    parser.add_argument("--longest", type=int, default=64, help="tokens of an answer")
    arguments = finish_arguments(parser.parse_args(argv), "tails")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    teacher = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    others = answers_of(teacher, tokenizer, 4 * arguments.steps, 1, arguments.longest)
    with torch.enable_grad():
        policy = trained(teacher, tokenizer, others, arguments.steps)
    rows = answers_of(teacher, tokenizer, arguments.prompts, 2, arguments.longest)
    squares: dict[tuple[str, int, str], float] = {}
    sums: dict[tuple[str, int, str], Tensor] = {}
    tokens = 0
    with progress_bar(len(rows), "answer") as bar:
        for asked, answered in rows:
            ids, labels = torch.tensor([[*asked, *answered]]), torch.tensor(answered)
            logits, of_teacher = (model(ids).logits[0, len(asked) - 1 : -1].double() for model in (policy, teacher))
            of_teacher, tokens = of_teacher.log_softmax(-1), tokens + len(labels)
            for method in METHODS:
                for k in arguments.k:
                    found = dict(gradients(logits, of_teacher, labels, method, k))
                    live = found["live"]
                    for name, gradient in found.items():
                        key, error = (method, k, name), gradient if name == "live" else gradient - live
                        squares[key] = squares.get(key, 0.0) + error.square().sum().item()
                        sums[key] = sums.get(key, 0.0) + error.sum(0)
            bar.update()
    written = []
    size = {"N": tokens, "H": teacher.config.hidden_size, "V": teacher.config.vocab_size, "dtype": "float64"}
    for method, k, name in squares:
        if name == "live":
            continue
        whole = squares[method, k, "live"], sums[method, k, "live"].norm().item()
        errors = {
            "error of the gradients": math.sqrt(squares[method, k, name] / whole[0]),
            "error of their mean": sums[method, k, name].norm().item() / whole[1],
        }
        for metric, value in errors.items():
            row = {"benchmark": "tails", "provider": f"{method}, k={k}", "mode": name, "metric": metric, **size}
            written.append(row | {"median": value, "min": value, "max": value, "repeats": 1})
    write_results(arguments.output, written, arguments.device)
    sys.stdout.write(f"Results are in {arguments.output}.\n")


if __name__ == "__main__":
    main()
