"""Checks of the tensors that users hand to the loss functions."""

import torch
from torch import Tensor

from .objective import Objective


def check_labels(labels: Tensor, rows: int, vocabulary: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return the labels as int64 and the mask of scored tokens, both `[N]`; labels must be inside the vocabulary."""
    if labels.shape != (rows,):
        raise ValueError(f"`labels` must have shape [{rows}], one per token, got {list(labels.shape)}: flatten it.")
    if labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise ValueError(f"`labels` must be token ids, got dtype {labels.dtype}: convert it to torch.long.")
    labels = labels.long()
    scored = labels != ignore_index
    _check_inside(labels.masked_fill(~scored, 0), vocabulary, ignore_index)
    return labels, scored


def check_labels_inside(labels: Tensor, index: Tensor, vocabulary: int, ignore_index: int = -100) -> None:
    """Raise unless `labels[N]` at the positions `index[n]` are inside the vocabulary: the rows of the LM head.

    One number is read from the device. Right after the positions were found, for which it has finished all that it was
    given before, that takes no longer than the comparison itself.
    """
    _check_inside(labels[index], vocabulary, ignore_index)


def _check_inside(ids: Tensor, vocabulary: int, ignore_index: int) -> None:
    outside = (ids < 0) | (ids >= vocabulary)
    if outside.any():
        raise ValueError(
            f"`labels` holds the id {ids[outside][0].item()}, outside the vocabulary of {vocabulary}: mark tokens "
            f"that should not be scored with `ignore_index` ({ignore_index})."
        )


def check_head(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> None:
    """Raise unless hidden states `[N, H]`, head `[V, H]` and bias `[V]` fit; `name` prefixes the arguments."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.size(1) != weight.size(1):
        raise ValueError(
            f"`{name}hidden` must be [N, H] and `{name}weight` [V, H], got {list(hidden.shape)} and "
            f"{list(weight.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"`{name}bias` must have shape [{weight.size(0)}], got {list(bias.shape)}.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"`{name}logit_softcap={softcap}` must be > 0, or None for a head without one.")


def check_per_token(name: str, value: Tensor | None, rows: int) -> None:
    """Raise unless `value` is None or has one entry per token."""
    if value is not None and value.shape != (rows,):
        raise ValueError(f"`{name}` must have shape [{rows}], one per token, got {list(value.shape)}.")


def check_token_weights(weights: Tensor | None, rows: int, objective: Objective) -> None:
    """Raise unless the weights that the objective reads are there, of the right length, finite and not negative."""
    if weights is None:
        for kind, design in objective.designs._asdict().items():
            if design.uses_token_weights:
                raise ValueError(
                    f"`token_weights` is missing: the {kind} {design.name!r} reads one weight per token. Pass a "
                    "tensor as long as `labels`."
                )
        return
    check_per_token("token_weights", weights, rows)
    if not (torch.isfinite(weights) & (weights >= 0)).all():
        raise ValueError("`token_weights` has a weight that is negative, NaN or infinite: weights must be >= 0.")


def check_prior_logits(prior_logits: Tensor, logits: Tensor) -> None:
    """Raise unless `prior_logits[N, V']` have a row per row of `logits[N, V]`; V' is any number from 1 on."""
    if prior_logits.dim() != 2 or prior_logits.size(0) != logits.size(0) or prior_logits.size(1) == 0:
        raise ValueError(
            f"`prior_logits` must be [{logits.size(0)}, V'], one row per row of `logits`, got "
            f"{list(prior_logits.shape)}: V' may differ from V, where the tokens that both have are the same."
        )


def check_embeddings(embeddings: Tensor | None, vocabulary: int, objective: Objective) -> None:
    """Raise unless the output embeddings that the objective reads are there and are `[V, H]`."""
    if embeddings is None:
        residual = objective.residual
        if residual.uses_embeddings:
            raise ValueError(
                f"`embeddings` is missing: the residual {residual.name!r} reads the output embeddings [V, H]."
            )
    elif embeddings.dim() != 2 or embeddings.size(0) != vocabulary or not embeddings.is_floating_point():
        raise ValueError(
            f"`embeddings` must be the output embeddings [V, H] of the same vocabulary, [{vocabulary}, H], got "
            f"{list(embeddings.shape)} of {embeddings.dtype}: pass the weight of the LM head that gave `logits`."
        )


def check_num_items(count: Tensor | int | float | None) -> None:
    """Raise unless `num_items_in_batch` is None or one number that is not negative."""
    if count is None:
        return
    value = torch.as_tensor(count)
    if value.numel() != 1 or not value.item() >= 0:
        raise ValueError(
            f"`num_items_in_batch` must be one number >= 0, got {count}: pass the number of labelled tokens that the "
            "summed loss is divided by, or None to have them counted."
        )


def check_progress(progress: float) -> float:
    """The share of the training that is done; raise unless it is one."""
    if not 0 <= progress <= 1:
        raise ValueError(f"`progress={progress!r}` must be the share of the training that is done, from 0 to 1.")
    return progress
