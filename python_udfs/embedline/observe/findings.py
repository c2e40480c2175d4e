"""The finding of one check of embedline.doctor()."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from embedline.postgres.session import Session

# The gravest first.
SEVERITIES = ("critical", "warning", "note", "ok")


@dataclass(frozen=True)
class Finding:
    """A row of embedline.doctor(), with the statement to run."""

    severity: Literal["critical", "warning", "note", "ok"]
    finding: str
    subject: str
    message: str
    remedy: str | None = None


Check = Callable[[Session], Iterator[Finding]]
