"""The models that arguments name: whether they are there, and how they are loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import BitsAndBytesConfig, PreTrainedModel
from trl import ModelConfig, SFTConfig

from ..priors.loading import reference_options
from ..priors.reference import load_model
from ..priors.tokens import OF_FETCHING
from .errors import check_installed


@dataclass
class ReferenceArguments:
    """A reference model or teacher and how to load it, or what one has said before."""

    ref_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Reference model or teacher: path or hub id. It must have the policy's tokens; "
            "`trl-qtarget cache --own_tokens true` takes one of other tokens."
        },
    )
    ref_model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the reference model."})
    ref_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Data type of the reference model's weights. None: the policy's.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    ref_load_in_4bit: bool = field(default=False, metadata={"help": "Load the reference model in 4 bits (NF4)."})
    ref_load_in_8bit: bool = field(default=False, metadata={"help": "Load the reference model in 8 bits."})
    ref_attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention of the reference model. None: the policy's."}
    )
    ref_trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run code of the reference model's repository. The policy's `trust_remote_code` does not."},
    )

    prior_cache: str | None = field(
        default=None,
        metadata={"help": "In place of a reference model: a folder that `trl-qtarget cache` has written."},
    )

    def __post_init__(self):
        for item in fields(self):
            value, switch = getattr(self, item.name), isinstance(item.default, bool)
            if not isinstance(value, bool if switch else str | None):
                wanted = "true or false" if switch else "a string"
                raise ValueError(f"`{item.name}` must be {wanted}, got `{type(value).__name__}`.")
        if self.ref_load_in_4bit and self.ref_load_in_8bit:
            raise ValueError("`ref_load_in_4bit` and `ref_load_in_8bit` exclude each other: set one of them.")
        given = [name for name in vars(self) if getattr(self, name) != type(self).__dataclass_fields__[name].default]
        given = [name for name in given if name != "prior_cache"]
        if given and self.ref_model_name_or_path is None:
            raise ValueError(
                f"`{given[0]}` says how to load a reference model: name it with `ref_model_name_or_path`."
            )


def check_named(
    model: ModelConfig, reference: ReferenceArguments, options: Mapping[str, Any] | None = None, verb: str = "train"
) -> None:
    """Raise unless a model is named, and each that is named is a folder or on the hub.

    Without this, transformers would say after the dataset's preparation that it found something nowhere, and not what.
    """
    if model.model_name_or_path is None:
        raise ValueError(f"`model_name_or_path` is missing: name the model to {verb}.")
    _check_found("model_name_or_path", model.model_name_or_path, model.model_revision, options)
    if reference.ref_model_name_or_path is not None:
        name, revision = reference.ref_model_name_or_path, reference.ref_model_revision
        _check_found("ref_model_name_or_path", name, revision, options)


def _check_found(argument: str, name: str, revision: str | None, options: Mapping[str, Any] | None) -> None:
    if Path(name).is_dir():
        return
    nothing = f"`{argument}`: there is no folder `{name}` here, and "
    try:
        where = {key: value for key, value in (options or {}).items() if key in OF_FETCHING and key != "proxies"}
        try:
            hf_hub_download(name, "config.json", revision=revision, **where)
        except LocalEntryNotFoundError:
            hf_hub_download(name, "adapter_config.json", revision=revision, **where)
    except LocalEntryNotFoundError:
        raise ValueError(f"{nothing}the hub cannot be reached to look for it: correct the path.") from None
    except RevisionNotFoundError:
        raise ValueError(f"`{argument}`: `{name}` has no revision `{revision}` on the hub.") from None
    except GatedRepoError:
        raise ValueError(f"`{argument}`: `{name}` is gated: ask for access on its page, and log in.") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ValueError(f"{nothing}no such model on the hub: correct the name, or log in if it is private.") from None
    except (EntryNotFoundError, HfHubHTTPError, OSError):
        pass  # adapters have no configuration of a model; and what fails otherwise, loading will say


def check_extras(model: ModelConfig, reference: ReferenceArguments) -> None:
    """Raise where an argument needs a package that is not installed."""
    if model.use_peft:
        check_installed("peft", "peft", "use_peft")
    for arguments in (model, reference):
        for name in ("load_in_4bit", "load_in_8bit", "ref_load_in_4bit", "ref_load_in_8bit"):
            if getattr(arguments, name, False):
                check_installed("bitsandbytes", "quantization", name)


def init_kwargs(model: ModelConfig, training: SFTConfig) -> dict[str, Any]:
    """How the policy is loaded."""
    return {
        "revision": model.model_revision,
        "trust_remote_code": training.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }


def load_reference(reference: ReferenceArguments, training: SFTConfig) -> PreTrainedModel | None:
    """The reference model with its own options; precision, placement and attention are the policy's if not given."""
    if reference.ref_model_name_or_path is None:
        return None
    options = reference_options(training.model_init_kwargs, trust_remote_code=reference.ref_trust_remote_code)
    options["revision"] = reference.ref_model_revision
    if training.world_size > 1:
        options["device_map"] = None  # each process places it itself
    if reference.ref_dtype:
        options["dtype"] = reference.ref_dtype
    if reference.ref_attn_implementation:
        options["attn_implementation"] = reference.ref_attn_implementation
    if reference.ref_load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=_compute_dtype(options.get("dtype"))
        )
    elif reference.ref_load_in_8bit:
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    return load_model(reference.ref_model_name_or_path, options)


def _compute_dtype(dtype: str | None) -> str:
    return "bfloat16" if dtype in (None, "auto") else dtype
