"""Define a pipeline's chunking recipe as a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from embedline.errors import InvalidParameter

METHODS = ("recursive", "sentences", "markdown", "fixed", "semantic", "none")
# Options of each method with the range of their values, ends excluded.
_OPTIONS: Mapping[str, Mapping[str, tuple[float, float]]] = {"semantic": {"percentile": (0.0, 100.0)}}


@dataclass(frozen=True)
class ChunkingSpec:
    """A chunking recipe: `tokens` and `overlap` count the model's tokens.

    Both are None if the method measures nothing.
    """

    method: str
    tokens: int | None = None
    overlap: int = 0
    options: tuple[tuple[str, float], ...] = ()

    def option(self, name: str, default: float) -> float:
        """Return the value of an option of the method."""
        return dict(self.options).get(name, default)


def chunking_spec(method: str, tokens: int | None, overlap: int | None, options: Mapping[str, object]) -> ChunkingSpec:
    """Return the spec of these values or raise InvalidParameter."""
    if method not in METHODS:
        raise InvalidParameter(f'chunking "{method}" is not known', hint=f"Use one of {', '.join(METHODS)}.")
    if method == "none":
        tokens = None
    elif tokens is None or tokens < 1:
        raise InvalidParameter(f"chunk_tokens must be at least 1, not {tokens}", hint="The default is 256.")
    overlap = 0 if overlap is None else overlap
    if overlap < 0 or (tokens is not None and overlap >= tokens):
        raise InvalidParameter(
            "chunk_overlap must be at least 0 and smaller than chunk_tokens",
            detail=f"Overlap {overlap}, chunks of {tokens} tokens." if tokens is not None else f"Overlap {overlap}.",
            hint="An eighth of chunk_tokens is usual where an overlap is wanted at all.",
        )
    return ChunkingSpec(method, tokens, overlap, tuple(sorted(_checked_options(method, options).items())))


def _checked_options(method: str, options: Mapping[str, object]) -> dict[str, float]:
    known = _OPTIONS.get(method, {})
    checked: dict[str, float] = {}
    for name, value in options.items():
        if name not in known:
            takes = f"It takes {', '.join(known)}." if known else "It takes none."
            raise InvalidParameter(f'chunking "{method}" has no option "{name}"', hint=takes)
        low, high = known[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < high:
            raise InvalidParameter(
                f'chunking option "{name}" cannot be {value}', hint=f"Use a number between {low:g} and {high:g}."
            )
        checked[name] = float(value)
    return checked
