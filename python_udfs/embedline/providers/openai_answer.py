"""Read an answer of an OpenAI-compatible endpoint into vectors."""

from __future__ import annotations

import array
import binascii
import contextlib
import itertools
import json
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from embedline.core.embedding import EmbeddingBlock
from embedline.errors import (
    DimensionMismatch,
    InvalidVectors,
    ProviderError,
    ProviderMisconfigured,
    TransientProviderError,
)
from embedline.providers.answers import mistaken_encoding, text_numbers

if TYPE_CHECKING:
    from collections.abc import Callable

from embedline.providers.openai_errors import error_text

_NO_VECTORS = "the provider's answer holds no vectors"
_ENCODING_WORDS = re.compile(r"encoding[_ -]?format|base64", re.IGNORECASE)


def is_about_encoding(error: ProviderError, *, is_probe: bool) -> bool:
    """Return True if a refusal is about the encoding.

    It names the encoding, or it refuses a probe's harmless text without another explanation.
    """
    if isinstance(error, TransientProviderError) and (error.throttled or error.unreachable or error.is_gateway):
        return False
    # Some servers refuse with status 200. Any other answer without a refusal may have been paid for.
    if not error.is_refusal and error.message != _NO_VECTORS:
        return False
    if _ENCODING_WORDS.search(error.detail or ""):
        return True
    return is_probe and error.is_refusal and not isinstance(error, ProviderMisconfigured)


def read_answer(
    content: bytes, count: int, dimensions: int | None, clean: Callable[[str], str], *, keeps_order: bool = True
) -> EmbeddingBlock:
    """Check an answer's body and return its vectors in the order of the texts.

    `keeps_order` is False once an answer of this endpoint had its vectors in another order. Values are checked in
    embedline.core.vectors.

    Raises TransientProviderError if the body is not an answer at all, and InvalidVectors if it does not fit the texts.
    Raises DimensionMismatch if the vectors have another width than the column.
    """
    items, tokens = _items(content, clean)
    if len(items) != count:
        raise InvalidVectors(f"the provider returned {len(items)} vectors for {count} texts")
    _check_encoding(items)
    numbers, is_indexed = text_numbers(items, keeps_order=keeps_order)
    rows = [b""] * count
    for number, item in zip(numbers, items, strict=True):
        rows[number] = _row(item.get("embedding") if isinstance(item, dict) else None)
    widths = sorted({len(row) // 4 for row in rows})
    if len(widths) != 1 or widths[0] == 0:
        found = " and ".join(map(str, widths))
        raise InvalidVectors(f"the provider returned vectors of {found} dimensions in one answer")
    if dimensions is not None and widths[0] != dimensions:
        raise DimensionMismatch(
            detail=f"Expected {dimensions} dimensions, got {widths[0]}.{_width_remark(items, dimensions)}"
        )
    learned = {} if is_indexed else {"index": "order of the texts"}
    if any(number < before for before, number in itertools.pairwise(numbers)):
        learned["order"] = "by index"
    return EmbeddingBlock(count, widths[0], b"".join(rows), tokens, learned)


def _items(content: bytes, clean: Callable[[str], str]) -> tuple[list[Any], int | None]:
    """Return the vectors of an answer and the tokens that it reports."""
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):
        text = clean(content[:4096].decode(errors="replace"))
        raise TransientProviderError("the provider's answer is not JSON", detail=text) from None
    items = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(items, list):
        text = clean(error_text(content[:4096].decode(errors="replace")))
        raise TransientProviderError(_NO_VECTORS, detail=text)
    usage = answer.get("usage")
    counts = [usage.get("total_tokens"), usage.get("prompt_tokens")] if isinstance(usage, dict) else []
    # Every text has tokens, so 0 stands for "not counted".
    return items, next((count for count in counts if type(count) is int and count > 0), None)


def _check_encoding(items: Sequence[Any]) -> None:
    """Raise ProviderMisconfigured if base64 does not hold little-endian float32.

    Only the first vector is read, because an endpoint encodes all vectors alike. No row is the cause, so none is
    charged.
    """
    first = items[0].get("embedding") if items and isinstance(items[0], dict) else None
    if not isinstance(first, str):
        return
    with contextlib.suppress(binascii.Error, ValueError):
        if found := mistaken_encoding(binascii.a2b_base64(first, strict_mode=True)):
            raise ProviderMisconfigured(
                f"the provider's base64 holds {found}, not little-endian float32",
                detail='The option {"encoding_format": "float"} asks for lists of numbers.',
                hint="""Set options => '{"encoding_format": "float"}' in embedline.create_model or embedline.alter_model.""",
            )


def _width_remark(items: Sequence[Any], dimensions: int) -> str:
    """Return a remark on base64 of an unexpected length."""
    first = items[0].get("embedding")
    if not isinstance(first, str):
        return ""
    count = len(binascii.a2b_base64(first))
    known = {dimensions: "one byte", 2 * dimensions: "float16", 8 * dimensions: "float64"}
    if count not in known:
        return ""
    return f" The base64 holds {count} bytes, as many as {dimensions} values of {known[count]} have."


def _row(embedding: object) -> bytes:
    """Return the float32 bytes of one vector.

    It comes as base64 or, from servers that know no base64, as a list of numbers.
    """
    try:
        if isinstance(embedding, str):
            row = binascii.a2b_base64(embedding, strict_mode=True)
            if len(row) % 4:
                raise InvalidVectors(
                    "the provider returned a base64 vector that is not made of float32 values",
                    detail=f"It holds {len(row)} bytes; each value takes 4.",
                )
            return row
        if isinstance(embedding, list) and not any(isinstance(value, bool) for value in embedding):
            values = array.array("f", embedding)
            if sys.byteorder == "big":
                values.byteswap()
            return values.tobytes()
    except (binascii.Error, TypeError, OverflowError, ValueError):
        pass
    raise InvalidVectors("the provider returned a vector that is neither base64 nor a list of numbers")
