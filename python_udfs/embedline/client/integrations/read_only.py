"""The error of a mapped routing view that is written to."""

from __future__ import annotations

from embedline.errors import EmbedlineError


class ReadOnlyView(EmbedlineError):
    """A routing view is read only: write to the source table."""

    sqlstate = "EL051"
