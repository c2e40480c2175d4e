"""Print a line for each revision, and a summary.

`embedline upgrade`, `downgrade` and `upgrade-model` use it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import typer

import embedline

Direction = Literal["upgrade", "downgrade"]


class MigrationDisplay:
    """Print each revision as it is applied."""

    def __init__(self, direction: Direction, database: str) -> None:
        self._direction, self._database = direction, database
        self._count = 0

    def applied(self, *, step: Any, **_: Any) -> None:
        """Print a revision that has just run; Alembic calls this.

        The line has its number and the first line of its docstring.
        """
        self._count += 1
        undone = "" if step.is_upgrade else "undone: "
        typer.echo(f"  {step.up_revision.revision}  {undone}{first_line(step.up_revision.longdoc)}")

    def failed(self) -> None:
        """Report the rollback of the printed revisions, which ran in one transaction."""
        if self._count:
            typer.echo("What is listed above was rolled back: the database is as it was")

    def summary(self, revision: str) -> str:
        """Return the state of the database in words."""
        label = f'database "{self._database}"'
        if self._direction == "downgrade" and revision == "base":
            return f"Embedline is removed from {label}; your tables stay"
        if revision != "head":
            return f"Embedline: {label} is at revision {revision}; embedline upgrade brings it to the newest"
        if not self._count:
            return f"Embedline {embedline.__version__}: {label} was up to date; functions and views are written again"
        revisions = f"{self._count} revision{'' if self._count == 1 else 's'}"
        return f"Embedline {embedline.__version__}: {label} is up to date after {revisions}"


def first_line(text: str | None) -> str:
    """Return the first line of a docstring, without its full stop."""
    return ((text or "").strip().splitlines() or [""])[0].rstrip(".")


@contextmanager
def quiet_alembic(verbose: bool) -> Iterator[None]:
    """Suppress Alembic's own messages of level INFO while the block runs.

    `verbose` prints them. The configuration of loggers is left as it is, because an application's env.py sets up its
    own.
    """
    if verbose:
        # An env.py that configures logging replaces this.
        logging.basicConfig(level=logging.INFO, format="%(levelname)s [%(name)s] %(message)s")
        yield
        return
    before = logging.root.manager.disable
    logging.disable(max(logging.INFO, before))
    try:
        yield
    finally:
        logging.disable(before)
