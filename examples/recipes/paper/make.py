"""Write the ten recipes of arXiv 2606.11189, one per line of its main figure.

What the paper says is marked `paper`; what it leaves open (its appendices are not public) is our choice: `ours`.
"""

from pathlib import Path


MATH = ("Qwen/Qwen3-1.7B", "Qwen/Qwen2.5-Math-1.5B", "Qwen/Qwen2.5-Math-7B")
MEDICAL = (
    *("meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.1-8B"),
    *("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-7B"),
)
# Teachers of the same tokenizer. Which ones the paper used is not known.
TEACHERS = {
    "Qwen/Qwen3-1.7B": "Qwen/Qwen3-8B",
    "Qwen/Qwen2.5-Math-1.5B": "Qwen/Qwen2.5-Math-1.5B-Instruct",
    "Qwen/Qwen2.5-Math-7B": "Qwen/Qwen2.5-Math-7B-Instruct",
    "meta-llama/Llama-3.2-3B": "meta-llama/Llama-3.2-3B-Instruct",
    "meta-llama/Llama-3.1-8B": "meta-llama/Llama-3.1-8B-Instruct",
    "Qwen/Qwen2.5-1.5B": "Qwen/Qwen2.5-1.5B-Instruct",
    "Qwen/Qwen2.5-7B": "Qwen/Qwen2.5-7B-Instruct",
}
DATASETS = {
    "numina": """\
datasets:
  - path: AI-MO/NuminaMath-CoT  # paper
    columns: [messages]
    split: train[:100000]  # ours
""",
    "openr1": """\
datasets:
  - path: open-r1/OpenR1-Math-220k  # paper: "OpenR1-15k"
    columns: [messages]
    split: train[:15000]  # ours: which 15k the paper took is not known
""",
    "medical": """\
datasets:
  - path: UCSC-VLAA/m23k-tokenized  # paper: m23k
    columns: [text]
""",
}
RECIPE = """\
# arXiv 2606.11189: {model} on {dataset}. Lines without a mark are ours.
#   trl-qtarget sft --config {file} --accelerate_config zero3
# Average@16 afterwards: examples/evaluate.py.
model_name_or_path: {model}  # paper
output_dir: outputs/paper/{stem}
{data}
method: target_sft  # paper
eta: 0.5  # ours: the paper's eta is not public
ref_model_name_or_path: {teacher}  # ours: the paper's teacher is not public

dtype: bfloat16
learning_rate: {rate}
lr_scheduler_type: cosine
warmup_steps: 20
num_train_epochs: 1
max_length: {length}
per_device_train_batch_size: 1
gradient_accumulation_steps: 16
save_steps: 200
save_total_limit: 2
seed: 0
"""


def main() -> None:
    settings = [(dataset, model) for dataset in ("numina", "openr1") for model in MATH]
    settings += [("medical", model) for model in MEDICAL]
    for dataset, model in settings:
        stem = f"{dataset}_{model.split('/')[1].lower()}"
        large = model.endswith(("-7B", "-8B"))
        text = RECIPE.format(
            model=model,
            dataset=dataset,
            file=f"{stem}.yaml",
            stem=stem,
            data=DATASETS[dataset],
            teacher=TEACHERS[model],
            rate="1.0e-5" if large else "2.0e-5",
            length=4096 if dataset == "numina" else 8192,
        )
        (Path(__file__).parent / f"{stem}.yaml").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
