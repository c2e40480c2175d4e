"""Count the tokens of requests: before the call, by bytes, and after it, as told.

A search loads this module, so it does without numpy.
"""

from __future__ import annotations

from collections.abc import Collection

from embedline.core.media import MediaPart, ModelInput

# Most bytes per token in a provider's count that is believed. The usual tokenizers have about four, and hardly ever 64.
_LONGEST_TOKEN_BYTES = 64
# Tokens per text that a count may have above one per byte, because a server may add an instruction of its own or
# padding.
_ADDED_TOKENS = 512


def most_tokens(text: ModelInput) -> int:
    """Return the tokens by which requests are packed: two bytes of UTF-8 per token.

    This is an upper estimate. English has about four bytes per token; Chinese, at three bytes a character, has two to
    three.
    """
    if isinstance(text, MediaPart):
        return text.tokens
    return (len(text) if text.isascii() else len(text.encode())) // 2 + 1


def likely_tokens(text: ModelInput) -> int:
    """Return the tokens to reserve before a call: three bytes of UTF-8 per token.

    The estimate is on the safe side.
    """
    if isinstance(text, MediaPart):
        return text.tokens
    return (len(text) if text.isascii() else len(text.encode())) // 3 + 1


def plausible_tokens(counted: int | None, inputs: Collection[ModelInput], prefix: str) -> int | None:
    """Return a provider's count of tokens, None if the texts cannot have that many.

    `inputs` were each sent with `prefix`. A count that is too small or too large for their bytes is refused.
    """
    texts = [given for given in inputs if isinstance(given, str)]
    size = sum(len(text.encode()) for text in texts) + len(texts) * len(prefix.encode())
    fewest = max(len(texts), size // _LONGEST_TOKEN_BYTES)
    most = size + len(texts) * _ADDED_TOKENS
    return counted if counted is not None and fewest <= counted <= most else None
