"""Keep a table of documents with a pipeline over it.

The vector stores of LangChain and LlamaIndex own one. A vector store's promise is that a document which was added is
found. So `put` commits the rows first, as any application does, and then sees to their vectors: it embeds what waits,
or waits for the workers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from psycopg.types.json import Jsonb

from embedline.client.integrations.database import Database, Row
from embedline.client.integrations.search_call import search_call
from embedline.core.expression import require_single_expression
from embedline.core.sql_text import quote_ident, quote_literal
from embedline.errors import EmbedlineError

# Who embeds an added document. "embed" is the call itself, whose role needs embedline_worker. "worker" is a resident
# worker, for which the call waits. With "none" the call does not wait.
Wait = Literal["embed", "worker", "none"]

# Seconds between two questions whether the workers have finished.
_POLL_SECONDS = 0.05
# Rows that one transaction embeds.
_BATCH_ROWS = 1000

_PIPELINE = """
    SELECT p.routing_view::text AS view, p.source::text AS source,
        (SELECT array_agg(a.attname::text) FROM pg_attribute AS a WHERE a.attrelid = p.source AND a.attnum > 0) AS columns
    FROM embedline.pipeline AS p WHERE p.name = %(name)s
"""
_COLUMNS = ("id", "content", "metadata")
_STATUS = "SELECT pending, last_error FROM embedline.status WHERE pipeline = %(name)s"
# Takes 2.5 ms a document (2 cores), and stops at the first that waits.
_OWN_PENDING = """
    SELECT i.id FROM unnest(%(ids)s::text[]) AS i (id) CROSS JOIN LATERAL embedline.state(%(name)s, i.id) AS s
    WHERE s.state = 'pending' LIMIT 1
"""
_EMBED = "SELECT embedline.embed_pending(%(rows)s, %(name)s) AS embedded"


class NotEmbedded(EmbedlineError):
    """Documents are stored, but have no vectors, so no search finds them yet."""

    sqlstate = "EL050"


@dataclass(frozen=True)
class Document:
    """A row of the table; metadata is what JSON can hold."""

    id: str
    content: str
    metadata: Mapping[str, Any]


class DocumentTable:
    """The table (id text, content text, metadata jsonb) that a pipeline watches."""

    def __init__(self, database: Database, name: str, *, wait: Wait = "embed", wait_seconds: float = 60.0) -> None:
        """Open the table of a pipeline.

        Raises LookupError if there is none, and ValueError if its source is another kind of table.
        """
        found = database.rows(_PIPELINE, {"name": name})
        if not found or found[0]["view"] is None:
            raise LookupError(f'there is no pipeline "{name}"; create() makes one')
        if not set(_COLUMNS) <= set(found[0]["columns"]):
            raise ValueError(f'the source of pipeline "{name}" has no columns {", ".join(_COLUMNS)}: use a retriever')
        self.name, self._database = name, database
        # As PostgreSQL writes them: quoted, and with their schema if the search_path lacks it.
        self._table, self._view = _escaped(found[0]["source"]), _escaped(found[0]["view"])
        self._wait, self._wait_seconds = wait, wait_seconds

    def put(self, documents: Sequence[Document]) -> None:
        """Write documents over those of the same ids, commit, and see to their vectors.

        Raises NotEmbedded if there are none in time; the rows stay.
        """
        latest = {document.id: document for document in documents}
        if not latest:
            return
        columns = {
            "ids": list(latest),
            "contents": [document.content for document in latest.values()],
            "metadata": [json.dumps(dict(document.metadata), ensure_ascii=False) for document in latest.values()],
        }
        self._database.rows(
            f"INSERT INTO {self._table} AS t (id, content, metadata)"
            " SELECT d.id, d.content, d.metadata::jsonb"
            " FROM unnest(%(ids)s::text[], %(contents)s::text[], %(metadata)s::text[]) AS d (id, content, metadata)"
            " ON CONFLICT (id) DO UPDATE SET content = excluded.content, metadata = excluded.metadata",
            columns,
        )
        if self._wait != "none":
            self._see_to(columns["ids"])

    def _see_to(self, ids: Sequence[str]) -> None:
        """Return once none of these documents waits and each has a vector.

        Changes of others may wait longer.
        """
        limit = time.monotonic() + self._wait_seconds
        while True:
            embedded = 0
            if self._wait == "embed":
                embedded = self._database.rows(_EMBED, {"rows": _BATCH_ROWS, "name": self.name})[0]["embedded"]
            status = self._database.rows(_STATUS, {"name": self.name})[0]
            if status["pending"] == 0 or (not embedded and not self._is_pending(ids)):
                break
            if time.monotonic() > limit:
                raise NotEmbedded(
                    f'pipeline "{self.name}" still has {status["pending"]} changes to embed'
                    f" after {self._wait_seconds:g} s",
                    detail=status["last_error"],
                    hint="SELECT * FROM embedline.alert;",
                )
            if not embedded:
                time.sleep(_POLL_SECONDS)
        missing = self._database.rows(
            f"SELECT t.id FROM {self._table} AS t WHERE t.id = ANY(%(ids)s) AND t.content ~ '\\S'"
            f" AND NOT EXISTS (SELECT FROM {self._view} AS v WHERE v.id = t.id) ORDER BY t.id",
            {"ids": list(ids)},
        )
        if missing:
            raise NotEmbedded(
                f"{len(missing)} documents have no vectors, among them {missing[0]['id']}",
                detail=status["last_error"],
                hint=f"SELECT * FROM embedline.dead_letter; SELECT embedline.requeue({quote_literal(self.name)});",
            )

    def _is_pending(self, ids: Sequence[str]) -> bool:
        return bool(self._database.rows(_OWN_PENDING, {"ids": list(ids), "name": self.name}))

    def get(self, ids: Collection[str] | None = None, condition: str | None = None) -> list[Document]:
        """Return documents in the order of their ids, embedded or not."""
        where, parameters = _where(ids, condition)
        found = self._database.rows(f"SELECT id, content, metadata FROM {self._table}{where} ORDER BY id", parameters)
        return [document_of(row) for row in found]

    def delete(self, ids: Collection[str] | None = None, condition: str | None = None) -> None:
        """Delete documents; without ids and a condition all of them.

        A search finds none of them from then on.
        """
        where, parameters = _where(ids, condition)
        self._database.rows(f"DELETE FROM {self._table}{where}", parameters)

    def nearest(self, query: str, k: int, condition: str | None, options: Mapping[str, Any]) -> list[Row]:
        """Return the documents whose best chunks are nearest to a text.

        A row has the columns of `search`, too. `condition` is an SQL condition over the table's columns. If the
        options have a filter as well, a document passes both.
        """
        conditions = [found for found in (condition, options.get("filter")) if found is not None]
        # Each alone, because one with a closing parenthesis too many would get round the other.
        both = " AND ".join(f"({require_single_expression(found, 'filter')})" for found in conditions) or None
        asked = {"per_document": True, **options, "filter": both}
        return self._database.rows(
            f"SELECT t.id, t.content, t.metadata, s.* FROM {search_call(asked)} WITH ORDINALITY AS s"
            f" JOIN {self._table} AS t ON t.id = s.key ORDER BY s.ordinality",
            {"pipeline": self.name, "query": query, "k": k, **asked},
        )

    def vectors(self, query: str, ids: Sequence[str]) -> tuple[list[float], dict[str, list[float]]]:
        """Return the vector of a text, and for each document one of its own.

        That is the vector of the chunk that is nearest to the text.
        """
        found = self._database.rows(
            "WITH asked AS MATERIALIZED (SELECT embedline.embed_query(%(pipeline)s, %(query)s) AS vector)"
            " SELECT DISTINCT ON (v.id) v.id, v.embedding::text AS vector, (SELECT vector FROM asked)::text AS asked"
            f" FROM {self._view} AS v WHERE v.id = ANY(%(ids)s::text[])"
            " ORDER BY v.id, v.embedding <=> (SELECT vector FROM asked)",
            {"pipeline": self.name, "query": query, "ids": list(ids)},
        )
        asked = json.loads(found[0]["asked"]) if found else []
        return asked, {row["id"]: json.loads(row["vector"]) for row in found}


def open_document_table(database: Database, name: str, wait: Wait, wait_seconds: float) -> DocumentTable:
    """Open the table of a pipeline, and close the database if that fails."""
    try:
        return DocumentTable(database, name, wait=wait, wait_seconds=wait_seconds)
    except BaseException:
        database.close()
        raise


def create_document_table(database: Database, name: str, model: str, options: Mapping[str, Any]) -> None:
    """Create a table and a pipeline of its name over it, each unless it is there.

    `options` are further arguments of `create_pipeline`.
    """
    unknown = sorted(option for option in options if not option.isidentifier())
    if unknown:
        raise TypeError(f"embedline.create_pipeline has no argument {', '.join(unknown)}")
    given = {option: Jsonb(value) if isinstance(value, dict) else value for option, value in options.items()}
    table = (
        f"CREATE TABLE IF NOT EXISTS {_escaped(quote_ident(name))} (id text PRIMARY KEY, content text NOT NULL,"
        " metadata jsonb NOT NULL DEFAULT '{}')"
    )
    named = "".join(f", {option} => %({option})s" for option in given)
    pipeline = f"SELECT embedline.create_pipeline(%(name)s, %(source)s::regclass, 'content', %(model)s{named})"
    arguments = {"name": name, "source": quote_ident(name), "model": model, **given}
    if not database.rows(_PIPELINE, {"name": name}):
        # In one transaction, so that a refused pipeline leaves no table behind.
        database.run([(table, {}), (pipeline, arguments)])


def metadata_has(wanted: Mapping[str, Any]) -> str:
    """Return the SQL condition that a document's metadata has these values."""
    return f"metadata @> {quote_literal(json.dumps(dict(wanted), ensure_ascii=False))}::jsonb"


def document_of(row: Row) -> Document:
    """Return a row's document."""
    return Document(row["id"], row["content"], row["metadata"])


def _where(ids: Collection[str] | None, condition: str | None) -> tuple[str, dict[str, Any]]:
    conditions = [] if ids is None else ["id = ANY(%(ids)s::text[])"]
    conditions += [] if condition is None else [f"({_escaped(condition)})"]
    return (f" WHERE {' AND '.join(conditions)}" if conditions else ""), {"ids": list(ids or ())}


def _escaped(text: str) -> str:
    """Return SQL text in which psycopg takes no sign for a parameter."""
    return text.replace("%", "%%")
