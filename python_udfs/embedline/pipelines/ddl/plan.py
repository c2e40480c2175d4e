"""Values from which a pipeline's objects are generated."""

from __future__ import annotations

from dataclasses import dataclass

from embedline.core import names
from embedline.core.sql_text import quote_ident
from embedline.postgres.relations import EXPRESSION_SCHEMA, data_name

# The next upgrade regenerates the functions of pipelines that have another number. Raise it when they change.
CODE_VERSION = 12
# Suffixes of the generated functions, in an order in which they can be dropped: those that call others come first.
FUNCTIONS = (
    *("read", "lock", "look", "missing", "range", "tenant", "audit", "gone", "present", "foreign"),
    *("changed", "digest", "tenant_or_null"),
    *("content", "filter", "prefix", "tenant_value"),
)
TRIGGER_FUNCTIONS = tuple(map(names.capture_suffix, names.EVENTS))
# Suffixes of the tables that belong to a pipeline and to none of its chunk sets or versions.
TABLES = ("inbox", "deleted", "hidden", "lent", "claim", "outbox", "document")
CHUNK_COLUMNS = ("chunk_id", "chunk_seq", "chunk_start", "chunk_end", "chunk", "embedding")


@dataclass(frozen=True)
class KeyColumn:
    """One column of the source's key.

    It has the source's name of now, the name in the generated tables, and its type.
    """

    source_name: str
    name: str
    type: str
    collation: str | None

    @property
    def definition(self) -> str:
        """Column definition for the generated tables."""
        collate = f" COLLATE {self.collation}" if self.collation else ""
        return f"{quote_ident(self.name)} {self.type}{collate} NOT NULL"


@dataclass(frozen=True)
class SourceExpression:
    """A user's expression as PostgreSQL prints it, and its input columns.

    The text has bare column names; the columns are (name, type).

    An empty `text` stands for an expression whose generated function is there already and stays as it is.
    """

    text: str
    columns: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class CapturePlan:
    """All that the generator needs to know of a pipeline."""

    name: str
    source: str
    keys: tuple[KeyColumn, ...]
    content: SourceExpression
    filter: SourceExpression | None
    capture: str
    always: bool = False
    watch_all: bool = False
    prefix: SourceExpression | None = None
    tenant: SourceExpression | None = None
    chunk_sets: tuple[int, ...] = (1,)
    partitioned: bool = False
    # Whether the content is a file; an address of one is a text.
    is_file: bool = False

    @property
    def content_type(self) -> str:
        """The type of the content expression's value."""
        return "bytea" if self.is_file else "text"

    @property
    def rows(self) -> str:
        """The source as a FROM item.

        Rows of a plain table's children are none of its rows, and not captured.
        """
        return self.source if self.partitioned else f"ONLY {self.source}"

    @property
    def chunk_tables(self) -> list[str]:
        """Qualified, quoted names of the tables of all chunk sets."""
        return [self.generated(names.chunk_suffix(number)) for number in self.chunk_sets]

    def generated(self, suffix: str) -> str:
        """Qualified, quoted name of a generated object."""
        return data_name(names.generated(self.name, suffix))

    def expression(self, suffix: str, schema: str = EXPRESSION_SCHEMA) -> str:
        """Qualified, quoted name of the function of a user's expression."""
        return f"{schema}.{quote_ident(names.generated(self.name, suffix))}"

    def enqueue(self, keys: str, rows: str, table: str = "inbox") -> str:
        """Return the INSERT of keys into the inbox or another table.

        One row takes 100 keys at most.
        """
        listed = ", ".join(f"array_agg(k.{quote_ident(key.name)})" for key in self.keys)
        return (
            f"INSERT INTO {self.generated(table)} ({self.key_names}) SELECT {listed}"
            f" FROM (SELECT {keys}, row_number() OVER () AS embedline_row FROM {rows}) AS k ({self.key_names}, embedline_row)"
            f" WHERE {_none_null([f'k.{quote_ident(key.name)}' for key in self.keys])}"
            " GROUP BY (k.embedline_row - 1) / 100;"
        )

    def enqueue_row(self, row: str, table: str = "inbox") -> str:
        """Return the INSERT of one row's key into the inbox or another table of its form."""
        is_key = _none_null([f"{row}.{quote_ident(key.source_name)}" for key in self.keys])
        return f"INSERT INTO {self.generated(table)} ({self.key_names}) SELECT {self.key_arrays_of_row(row)} WHERE {is_key};"

    def key_arrays_of_row(self, row: str) -> str:
        """The key of a row, an array of one element for each column."""
        return ", ".join(f"ARRAY[{row}.{quote_ident(key.source_name)}::{key.type}]" for key in self.keys)

    @property
    def watched(self) -> dict[str, SourceExpression]:
        """The expressions that decide the content, by their function's suffix."""
        expressions = {"content": self.content, "filter": self.filter, "prefix": self.prefix}
        return {suffix: expression for suffix, expression in expressions.items() if expression is not None}

    @property
    def expression_columns(self) -> tuple[tuple[str, str], ...]:
        """(name, type) of the source columns that the watched expressions read."""
        return tuple(dict.fromkeys(column for expression in self.watched.values() for column in expression.columns))

    @property
    def input_columns(self) -> tuple[str, ...]:
        """Source columns that decide the content, its prefix, the filter or the key."""
        names = [name for name, _ in self.expression_columns]
        return tuple(dict.fromkeys([*names, *(key.source_name for key in self.keys)]))

    def call(self, suffix: str, expression: SourceExpression, row: str) -> str:
        """The call of an expression's function for a row of the source."""
        arguments = ", ".join(f"{row}.{quote_ident(name)}" for name, _ in expression.columns)
        return f"{self.expression(suffix)}({arguments})"

    @property
    def key_names(self) -> str:
        """Key columns of the generated tables."""
        return ", ".join(quote_ident(key.name) for key in self.keys)

    def keys_of_row(self, row: str) -> str:
        """The key of a row, column by column, as the generated tables hold it."""
        return ", ".join(f"{row}.{quote_ident(key.source_name)}::{key.type}" for key in self.keys)


def _none_null(columns: list[str]) -> str:
    """Return the condition that a row has a key.

    While the key of a source is exchanged its columns may be NULL.

    Such a row is found by its new key when the pipeline follows. In the queue it would stop every claim.
    """
    return " AND ".join(f"{column} IS NOT NULL" for column in columns)
