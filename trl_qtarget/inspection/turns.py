"""Which tokens of a conversation the assistant has written: what the user of a dataset can change first."""

from collections.abc import Mapping, Sequence
from typing import Any


def assistant_tokens(processing_class: Any, row: Mapping[str, Any], tokens: Sequence[int]) -> list[bool] | None:
    """For each token of a conversation, whether it is of an assistant's turn, the end of the turn included.

    The chat template is asked for the conversation up to each such turn, with its words that begin an answer, and with
    the turn. Everything else is the template's own, or of the system, the user or a tool.

    Args:
        processing_class: the tokenizer or processor, with its chat template.
        row: an example before its preparation.
        tokens: its ids `[T]` as the trainer has prepared them, perhaps cut off at their end.

    Returns:
        None where there is no conversation, or where the tokens are not those that the template gives: it may write
        earlier turns in another way than the last, or the text may have been cut off at its start.
    """
    messages = row.get("messages") or row.get("conversations")
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        return None
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if not getattr(tokenizer, "chat_template", None):
        return None
    options = {"tools": row.get("tools") or None, **(row.get("chat_template_kwargs") or {})}
    added = {token for token, known in tokenizer.added_tokens_decoder.items() if known.special}
    special = {*tokenizer.all_special_ids, *added}
    found, tokens = [False] * len(tokens), list(tokens)
    for number, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        try:
            before = _ids(tokenizer, messages[:number], options, add_generation_prompt=True)
            whole = _ids(tokenizer, messages[: number + 1], options)
        except Exception:  # a template may refuse a conversation that ends there, in whatever way it likes
            return None
        if whole[: len(before)] != before or tokens[: len(whole)] != whole[: len(tokens)]:
            return None
        ends = [place for place in range(len(before), len(whole)) if whole[place] in special]
        end = min(ends[-1] + 1 if ends else len(whole), len(tokens))
        for place in range(len(before), end):
            found[place] = True
    return found


def _ids(tokenizer: Any, messages: list[dict[str, Any]], options: dict[str, Any], **more: Any) -> list[int]:
    if not messages:  # an answer to nothing: templates begin with a message
        raise ValueError("There is nothing before the first turn.")
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options, **more)
