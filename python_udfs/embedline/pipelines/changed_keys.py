"""Exchange the key of a pipeline in its generated tables, without a loss.

Documents and chunks keep their ids, and so their vectors: only the columns of the key are exchanged. The old key
tells which row a document belongs to, if its columns are still there; else the content does. A document has the hash
of the content that it was cut from. The row with that content is its row, whatever the new key is. What finds no row
goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from embedline.catalog.source import Source
from embedline.catalog.values import Pipeline
from embedline.core import names
from embedline.core.sql_text import quote_ident
from embedline.pipelines.ddl.functions import DEFINER
from embedline.pipelines.ddl.plan import CapturePlan, KeyColumn
from embedline.pipelines.ddl.tables import hidden_index_statement
from embedline.pipelines.plan import KEY, key_of, load_key
from embedline.postgres.rollback import read_and_release
from embedline.postgres.session import Session

# Documents or chunks up to which a command that changes the key is followed by itself: 20,000 took 2.8 s on 2 busy cores.
# Beyond that the command would hold its lock on the source for too long, and the status says what to run.
FOLLOWED_AT_ONCE = 20_000
_OLD = "embedline_old_{}"
# The columns of the key as they are now: NULL where one was dropped.
_KEY_COLUMNS = """
    SELECT a.attname AS name, b.type, p.source_columns ->> k.attnum::text AS was, a.attnotnull AS is_set
    FROM embedline.pipeline AS p CROSS JOIN unnest(p.key_attributes) WITH ORDINALITY AS k (attnum, position)
    LEFT JOIN pg_attribute AS a ON a.attrelid = p.source AND a.attnum = k.attnum AND NOT a.attisdropped
    LEFT JOIN LATERAL (
        WITH RECURSIVE base AS (
            SELECT t.oid, t.typbasetype, t.typtypmod, a.atttypmod AS typmod FROM pg_type AS t WHERE t.oid = a.atttypid
            UNION ALL
            SELECT t.oid, t.typbasetype, t.typtypmod, d.typtypmod FROM base AS d JOIN pg_type AS t ON t.oid = d.typbasetype
        )
        SELECT format_type(e.oid, e.typmod) AS type FROM base AS e WHERE e.typbasetype = 0
    ) AS b ON true
    WHERE p.pipeline_id = $1 ORDER BY k.position
"""
# Whether these columns, in any order, are a key: unique, over no NULL, of all rows.
_IS_KEY = """
    SELECT EXISTS (
        SELECT FROM embedline.pipeline AS p JOIN pg_index AS i ON i.indrelid = p.source
        WHERE p.pipeline_id = $1 AND i.indisunique AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL
            AND (i.indkey::smallint[])[0:i.indnkeyatts - 1] @> p.key_attributes
            AND (i.indkey::smallint[])[0:i.indnkeyatts - 1] <@ p.key_attributes
            AND NOT EXISTS (SELECT FROM pg_attribute AS a WHERE a.attrelid = p.source
                AND a.attnum = ANY (p.key_attributes) AND NOT a.attnotnull))
"""
_HAS_PRIMARY = "SELECT EXISTS (SELECT FROM pg_index WHERE indrelid = $1::oid AND indisprimary AND indisvalid)"


@dataclass(frozen=True)
class KeyNow:
    """The key of a pipeline as its source has it now.

    `names` are its columns; None if one of them is gone or has another type.
    """

    names: tuple[str, ...] | None
    is_key: bool

    @classmethod
    def of(cls, session: Session, pipeline: Pipeline) -> KeyNow:
        """Read the columns by which the pipeline knows its rows."""
        rows = session.query(_KEY_COLUMNS, ["bigint"], pipeline.pipeline_id)
        types = stored_types(session, pipeline)
        is_there = all(row["name"] is not None for row in rows) and [row["type"] for row in rows] == list(types)
        names = tuple(str(row["name"]) for row in rows) if is_there else None
        return cls(names, bool(session.scalar(_IS_KEY, ["bigint"], pipeline.pipeline_id)) if is_there else False)


def stored_types(session: Session, pipeline: Pipeline) -> tuple[str, ...]:
    """Return the types of the key in the generated tables.

    The source may have renamed a type.
    """
    rows = session.query(
        "SELECT format_type(a.atttypid, a.atttypmod) AS type FROM unnest($2::text[]) WITH ORDINALITY AS k (name, position)"
        " JOIN pg_attribute AS a ON a.attname = k.name AND a.attrelid = to_regclass($1) ORDER BY k.position",
        ["text", "text[]"], pipeline.document, list(pipeline.key_columns),
    )  # fmt: skip
    return tuple(str(row["type"]) for row in rows) or pipeline.key_types


def has_primary_key(session: Session, pipeline: Pipeline) -> bool:
    """Whether the source has a primary key now."""
    return bool(session.scalar(_HAS_PRIMARY, ["bigint"], pipeline.source_oid))


def has_key(session: Session, pipeline: Pipeline) -> bool:
    """Whether the source has a key of any kind now."""
    return bool(session.query(KEY, ["bigint"], pipeline.source_oid))


def is_small(session: Session, pipeline: Pipeline) -> bool:
    """Whether there is little enough to exchange that a command need not wait for it."""
    return all(
        session.scalar(f"SELECT count(*) FROM (SELECT FROM {table} LIMIT $1) AS c", ["bigint"], FOLLOWED_AT_ONCE + 1)
        <= FOLLOWED_AT_ONCE
        for table in (*pipeline.chunk_tables, pipeline.document)
    )


@dataclass(frozen=True)
class KeySwap:
    """The key that a pipeline is to have.

    `rows_by` are the source's columns of the old key; None if documents are matched to rows by content.
    """

    pipeline: Pipeline
    keys: tuple[KeyColumn, ...]
    is_needed: bool
    rows_by: tuple[str, ...] | None = None

    @classmethod
    def wanted(cls, session: Session, pipeline: Pipeline, source: Source, *, is_moved: bool) -> KeySwap:
        """Return the wanted key: the current one if it still is a key.

        Otherwise it is the key that the source has. Raises if there is none.
        """
        types = stored_types(session, pipeline)
        now = KeyNow.of(session, pipeline)
        if is_moved:
            return cls._of_another_table(session, pipeline, source, types)
        found = load_key(session, source)
        if now.names is not None and (now.is_key or not found):
            return cls(pipeline, _unchanged(pipeline, now.names, types), is_needed=False)
        return cls(pipeline, key_of(session, source, found), is_needed=True, rows_by=now.names)

    @classmethod
    def _of_another_table(cls, session: Session, pipeline: Pipeline, source: Source, types: tuple[str, ...]) -> KeySwap:
        found = load_key(session, source)
        keys = key_of(session, source, found)
        names = [
            str(row["name"] or row["was"]) for row in session.query(_KEY_COLUMNS, ["bigint"], pipeline.pipeline_id)
        ]
        if {key.source_name: key.type for key in keys} == dict(zip(names, types, strict=True)):
            return cls(pipeline, _unchanged(pipeline, tuple(names), types), is_needed=False)
        return cls(pipeline, keys, is_needed=True)

    def begin(self, session: Session) -> None:
        """Add the columns of the new key to the generated tables.

        The old ones stay beside them. The sweep finds again the rows that were queued.
        """
        pipeline = self.pipeline
        hidden = pipeline.generated("hidden")
        # What no search may show must not be mapped to a row.
        session.execute(f"DELETE FROM {pipeline.document} AS d USING {hidden} AS h WHERE {pipeline.key_join('d', 'h')}")
        lists = {pipeline.generated(suffix): "[]" for suffix in ("inbox", "deleted", "claim")}
        queues = lists | {pipeline.outbox: "", hidden: ""}
        session.execute(f"TRUNCATE {', '.join(queues)}")
        for table, dimension in queues.items():
            dropped = [f"DROP COLUMN {column}" for column in pipeline.quoted_key_columns]
            session.execute(f"ALTER TABLE {table} {', '.join(dropped)}")
            added = [f"ADD COLUMN {_definition(key, dimension)} NOT NULL" for key in self.keys]
            session.execute(f"ALTER TABLE {table} {', '.join(added)}")
        for table in (pipeline.document, *pipeline.chunk_tables):
            for i, column in enumerate(pipeline.quoted_key_columns):
                session.execute(f"ALTER TABLE {table} RENAME COLUMN {column} TO {_OLD.format(i)}")
            added = [f"ADD COLUMN {_definition(key, '')}" for key in self.keys]
            session.execute(f"ALTER TABLE {table} {', '.join(added)}")

    def finish(self, session: Session, plan: CapturePlan, source: Source) -> None:
        """Fill the new columns, drop the old ones, and make the key.

        Reads all rows of the source.
        """
        pipeline = self.pipeline
        if self.rows_by is not None:
            self._map_by_row(session, plan, self.rows_by)
        else:
            self._map_by_content(session, plan, source)
        old = [_OLD.format(i) for i in range(len(pipeline.key_columns))]
        new = [quote_ident(key.name) for key in self.keys]
        # A dead letter has no content to be known by, and is worth another try.
        session.execute(f"DELETE FROM {pipeline.document} WHERE {new[0]} IS NULL OR state = 'dead'")
        session.query("DELETE FROM embedline.dead_letter WHERE pipeline_id = $1", ["bigint"], pipeline.pipeline_id)
        same = " AND ".join(f"c.{column} = d.{column}" for column in old)
        values = ", ".join(f"{column} = d.{column}" for column in new)
        for table in pipeline.chunk_tables:
            session.execute(f"UPDATE {table} AS c SET {values} FROM {pipeline.document} AS d WHERE {same}")
            session.execute(f"DELETE FROM {table} WHERE {new[0]} IS NULL")
        required = [f"ALTER COLUMN {column} SET NOT NULL" for column in new]
        for table in (pipeline.document, *pipeline.chunk_tables):
            session.execute(f"ALTER TABLE {table} {', '.join(f'DROP COLUMN {column}' for column in old)}")
            session.execute(f"ALTER TABLE {table} {', '.join(required)}")
        constraint = quote_ident(names.generated(pipeline.name, "document_pkey"))
        session.execute(f"ALTER TABLE {pipeline.document} ADD CONSTRAINT {constraint} PRIMARY KEY ({', '.join(new)})")
        for chunk_set in (pipeline.chunk_set, *pipeline.other_sets):
            index = quote_ident(names.generated(pipeline.name, f"{names.chunk_suffix(chunk_set.number)}_key_idx"))
            session.execute(f"CREATE INDEX {index} ON {pipeline.chunk_table(chunk_set.number)} ({', '.join(new)})")
        session.execute(hidden_index_statement(plan))
        for table in (pipeline.document, *pipeline.chunk_tables):
            session.execute(f"ANALYZE {table} ({', '.join(new)})")

    def _map_by_row(self, session: Session, plan: CapturePlan, columns: tuple[str, ...]) -> None:
        values = ", ".join(
            f"{quote_ident(key.name)} = s.{quote_ident(key.source_name)}::{key.type}" for key in self.keys
        )
        same = " AND ".join(f"d.{_OLD.format(i)} = s.{quote_ident(column)}" for i, column in enumerate(columns))
        session.execute(f"UPDATE {self.pipeline.document} AS d SET {values} FROM {plan.rows} AS s WHERE {same}")

    def _map_by_content(self, session: Session, plan: CapturePlan, source: Source) -> None:
        """Give each document a row that has its content.

        Of several rows with the same content each gets one document, and any fits.
        """
        function = plan.generated("contents")
        keys = ", ".join(f"{quote_ident(key.name)} {key.type}" for key in self.keys)
        inputs = ", ".join(f"source_row.{quote_ident(name)}" for name, _ in plan.expression_columns)
        session.execute(
            f"""CREATE FUNCTION {function}() RETURNS TABLE ({keys}, digest bytea) LANGUAGE sql STABLE {DEFINER}
            BEGIN ATOMIC
            SELECT {plan.keys_of_row("source_row")}, {plan.generated("digest")}({inputs}) FROM {plan.rows} AS source_row;
            END"""
        )
        session.execute(f"REVOKE ALL ON FUNCTION {function}() FROM public")
        session.execute(f"ALTER FUNCTION {function}() OWNER TO {quote_ident(source.owner)}")
        names = [quote_ident(key.name) for key in self.keys]
        listed = ", ".join(f"array_agg(c.{name}::text) AS key_{i}" for i, name in enumerate(names))
        found: dict[str, Any] = read_and_release(
            session,
            lambda: session.execute(
                f"SELECT array_agg(c.digest) AS digests, {listed} FROM {function}() AS c WHERE octet_length(c.digest) > 1"
            )[0],
        )
        session.execute(f"DROP FUNCTION {function}()")
        count = len(names)
        arrays = ", ".join(f"${i + 1}::text[]::{key.type}[]" for i, key in enumerate(self.keys))
        old = ", ".join(_OLD.format(i) for i in range(len(self.pipeline.key_columns)))
        same = " AND ".join(f"d.{_OLD.format(i)} = o.{_OLD.format(i)}" for i in range(len(self.pipeline.key_columns)))
        session.query(
            f"""
            WITH fresh AS (
                SELECT f.*, row_number() OVER (PARTITION BY f.digest) AS place
                FROM unnest({arrays}, ${count + 1}::bytea[]) AS f ({", ".join(names)}, digest)
            ), old AS (
                SELECT {old}, content_hash, row_number() OVER (PARTITION BY content_hash) AS place
                FROM {self.pipeline.document} WHERE state = 'embedded'
            )
            UPDATE {self.pipeline.document} AS d SET {", ".join(f"{name} = f.{name}" for name in names)}
            FROM old AS o JOIN fresh AS f ON f.digest = o.content_hash AND f.place = o.place WHERE {same}
            """,
            [*["text[]"] * count, "bytea[]"],
            *(found[f"key_{i}"] or [] for i in range(count)), found["digests"] or [],
        )  # fmt: skip


def _unchanged(pipeline: Pipeline, names: tuple[str, ...], types: tuple[str, ...]) -> tuple[KeyColumn, ...]:
    return tuple(
        KeyColumn(name, column, key_type, None)
        for name, column, key_type in zip(names, pipeline.key_columns, types, strict=True)
    )


def _definition(key: KeyColumn, dimension: str) -> str:
    collate = f" COLLATE {key.collation}" if key.collation else ""
    return f"{quote_ident(key.name)} {key.type}{dimension}{collate}"
