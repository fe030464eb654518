"""The prior that was chosen, made: loaded, frozen and placed beside the policy."""

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from ..loss.head import vocabulary_of
from .base import Prior, base_model_of
from .cached import CachedPrior
from .choice import PriorChoice, PriorKind
from .fit import check_kind, check_separate
from .loading import policy_options
from .own import OwnPrior
from .reference import ModelPrior, freeze, load_reference
from .shards import is_sharded
from .starting_copy import StartingCopyPrior, starting_copy
from .store import PriorCache
from .tokens import ReadableIds, check_tokens
from .ulysses import check_same_heads, has_packed_rows, is_split


def build_prior(
    choice: PriorChoice,
    policy: PreTrainedModel,
    wrapped: Callable[[], nn.Module],
    args: TrainingArguments,
    accelerator: Accelerator,
    processing_class: Any,
    tail: str | None = None,
) -> Prior | None:
    """The prior of a choice; None where nothing but the policy runs.

    Args:
        choice: what `choose_prior` decided.
        policy: the policy, loaded and perhaps with adapters, before any wrapper.
        wrapped: called for the policy in its wrapper, which the trainer makes later.
        args: how a model is loaded from a path: `model_init_kwargs`, where they have them.
        accelerator: where models are placed.
        processing_class: the policy's tokenizer or processor, which a reference model's is compared with.
        tail: of a cache of the form `top_k`.

    Raises:
        ValueError: the reference model or the cache does not fit the policy.
    """
    match choice.kind:
        case PriorKind.NONE | PriorKind.POLICY:
            return None
        case PriorKind.CACHED:
            check_cache(choice.cache, policy)
            return CachedPrior(choice.cache, tail or "policy")
        case PriorKind.LAGGED:
            return OwnPrior(policy, wrapped, sync_steps=choice.sync_steps, decay=choice.sync_decay)
        case PriorKind.START:
            return OwnPrior(policy, wrapped)
        case PriorKind.ADAPTERS_OFF:
            return OwnPrior(policy, wrapped, adapters=False)
        case PriorKind.REFERENCE:
            model = choice.reference
            check_tokens(model, processing_class, choice.reference_name, policy_options(args))
            if isinstance(model, str):
                model = load_reference(model, policy, args, accelerator)
            check_kind("ref_model", model)
            check_separate(model, policy)
            if is_split(accelerator):
                check_same_heads(base_model_of(model), base_model_of(policy), accelerator)
            ids = ReadableIds(base_model_of(model), base_model_of(policy), processing_class)
            placed, causal_model = freeze(model, accelerator)
            ids.announce(causal_model)
            prior = ModelPrior(placed, causal_model, ids=ids)
            if is_split(accelerator):
                prior.keep_rows(packed=has_packed_rows(args))
            return prior
        case PriorKind.STARTING_COPY:
            if is_sharded(policy):  # while it was loaded
                model = load_reference(choice.starting_path, policy, args, accelerator, same_model=True)
            else:
                model = starting_copy(policy, accelerator)
            return StartingCopyPrior(*freeze(model, accelerator), policy)


def check_cache(cache: PriorCache, policy: PreTrainedModel) -> None:
    """Raise unless a cache of the form `top_k` is of the policy's vocabulary. A head may have other rows."""
    rows = vocabulary_of(base_model_of(policy))
    if cache.manifest.form == "top_k" and cache.manifest.vocabulary != rows:
        raise ValueError(
            f"`prior_cache` has a vocabulary of {cache.manifest.vocabulary}, the policy one of {rows}: make the cache "
            "with a prior of the policy's vocabulary, or of the form 'hidden'."
        )
