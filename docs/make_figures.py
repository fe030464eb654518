"""Make the figures of the documentation, with the commands that the documentation explains.

python docs/make_figures.py     (`make figures`)

Three short trainings of the demo's model on sums with worked steps, one in six with a planted wrong step; and an
inspection of one of them, photographed in Chromium. What is there already in `outputs/figures` is not made again.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import torch
from playwright.sync_api import sync_playwright


ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from demo_model import packaged_model
from demo_task import task_problems

from benchmarks.planted_errors import plant


FIGURES = ROOT / "docs" / "figures"
WORK = ROOT / "outputs" / "figures"
METHODS = ("sft", "dft", "target_sft")
SEED, EXAMPLES, SHARE = 0, 192, 1 / 6


def command(*words: str) -> None:
    """One command of `trl-qtarget`, as a user would give it."""
    print("trl-qtarget " + " ".join(words), flush=True)
    subprocess.run([sys.executable, "-m", "trl_qtarget.cli", *words], check=True, cwd=ROOT)


def train(method: str, model: str, data: str) -> str:
    """Folder of a short run with LoRA."""
    folder = WORK / method
    if not (folder / "adapter_config.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        options = "--use_peft --lora_r 16 --lora_alpha 32 --lora_target_modules all-linear --max_steps 48"
        options += " --per_device_train_batch_size 8 --learning_rate 5e-4 --logging_steps 2 --lr_scheduler_type cosine"
        options += f" --gradient_checkpointing False --report_to none --seed {SEED}"
        options += "" if torch.cuda.is_available() else " --use_cpu True --bf16 False"
        base = ["--model_name_or_path", model, "--dtype", "float32", "--dataset_name", data, "--method", method]
        command("sft", *base, "--output_dir", str(folder), *options.split())
    return str(folder)


def photograph(page: Path) -> None:
    """The page with the trust of `target_sft`, and the chart of the label that it finds most suspicious."""
    with sync_playwright() as running:
        program = shutil.which("chromium") or shutil.which("google-chrome")
        browser = running.chromium.launch(executable_path=program, args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": 1360, "height": 900})
        view.goto(page.as_uri())
        view.locator("#methods label", has_text="target_sft").click()
        view.locator("#suspicious-tokens tbody tr").first.click()
        view.wait_for_timeout(300)
        view.screenshot(path=FIGURES / "inspection.png")
        browser.close()


def main() -> None:
    WORK.mkdir(parents=True, exist_ok=True)
    FIGURES.mkdir(exist_ok=True)
    command("plot", "--output", str(FIGURES / "methods.svg"))
    problems, _ = task_problems("chain_sum", {}, EXAMPLES, 8, SEED)
    dataset, planted = plant(problems, "wrong_step", SHARE, SEED)
    data = WORK / "sums.jsonl"
    dataset.to_json(data)
    print(f"Planted among the first 24, which are shown: {sorted(number for number in planted if number < 24)}")
    model = str(packaged_model(ROOT / "outputs"))
    runs = [f"{method}={train(method, model, str(data))}" for method in METHODS]
    command("plot", "--runs", *runs, "--output", str(FIGURES / "runs.svg"))
    page = WORK / "inspection.html"
    looked_at = ["--model_name_or_path", str(WORK / "target_sft"), "--dtype", "float32", "--dataset_name", str(data)]
    command("inspect", *looked_at, "--methods", *METHODS, "--examples", "24", "--output", str(page))
    photograph(page)
    drawn = ["--methods", "all", "--examples", "24", "--alternatives", "2", "--map", str(FIGURES / "map.svg")]
    command("inspect", *looked_at, *drawn, "--output", str(WORK / "all.html"))


if __name__ == "__main__":
    main()
