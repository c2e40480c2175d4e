"""The names of generated objects, for statements of tests that have no public view to ask.

No other module of the tests spells them, so a changed name is changed here and in `embedline.core.names`.
"""

from __future__ import annotations

from dataclasses import dataclass

from psycopg import sql

from embedline.core import names

_SCHEMA = "embedline_data"


def qualified(name: str) -> str:
    """Return the qualified name of a generated object, such as embedline_data.page_inbox."""
    return f"{_SCHEMA}.{name}"


@dataclass(frozen=True)
class Generated:
    """The tables, functions and indexes of one pipeline."""

    pipeline: str

    def __call__(self, suffix: str) -> str:
        """Return the qualified name of a table or function, such as embedline_data.page_inbox."""
        return qualified(names.generated(self.pipeline, suffix))

    def identifier(self, suffix: str) -> sql.Identifier:
        """Return that name as psycopg composes it."""
        return sql.Identifier(_SCHEMA, names.generated(self.pipeline, suffix))

    def version(self, number: int, part: str | None = None) -> str:
        """Return the qualified name of a version's table, or of a part of it."""
        return self(names.version_suffix(number, part))

    def index(self, number: int, precision: str | None = None) -> str:
        """Return the qualified name of the index of a version's column, or of a precision."""
        return qualified(names.vector_index(self.pipeline, number, precision))


# The pipelines that most tests create, and that of the benchmarks.
PAGE = Generated("page")
MINE = Generated("mine")
BENCH = Generated("bench")


def derived(name: str, part: str) -> str:
    """Return the qualified name of a table or function of derived vectors, such as readers_derived_dirty."""
    return qualified(names.derived(name, part))
