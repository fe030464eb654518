"""Tokens as text, one by one: with their spaces, and without a mark of replacement in place of a piece of a letter."""

from collections.abc import Iterable
from functools import cache
from typing import Any


REPLACEMENT = "\ufffd"


def vocabulary(processing_class: Any, ids: Iterable[int]) -> dict[str, str]:
    """The text of every token, by its id as a string."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    # Decoders of the SentencePiece kind strip the space before the first token, so each stands behind another.
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
    before = tokenizer.decode(anchor, clean_up_tokenization_spaces=False)
    return {str(token): _word(tokenizer, anchor, before, token) for token in sorted(ids)}


def _word(tokenizer: Any, anchor: list[int], before: str, token: int) -> str:
    text = tokenizer.decode([*anchor, token], clean_up_tokenization_spaces=False)
    text = text[len(before) :] if text.startswith(before) else tokenizer.decode([token])
    piece = tokenizer.convert_ids_to_tokens(token)
    if REPLACEMENT not in text or piece is None or piece == text:
        return text
    known = _bytes_of_letters()
    if not piece.isascii() and all(letter in known for letter in piece):  # byte-level BPE: a letter for every byte
        piece = " ".join(f"{known[letter]:02X}" for letter in piece)
    return f"⟨{piece}⟩"


@cache
def _bytes_of_letters() -> dict[str, int]:
    """The byte that each letter of byte-level BPE stands for: itself if it can be printed, else 256, 257, ..."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + number): byte for number, byte in enumerate(others)}
