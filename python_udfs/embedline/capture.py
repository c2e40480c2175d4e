"""Generating a pipeline's objects: tables, capture triggers, read functions and the routing view, as SQL text.

Users' expressions enter only the functions that read the source, which belong to the source's owner, and the trigger
conditions, which run as whoever writes. The trigger functions and tables belong to Embedline and hold key columns only.
Key columns are reached through generated functions of the row (`<pipeline>_key_1`), because a body that names columns
in plain text would break at RENAME COLUMN, and with it the application's write.
"""

from __future__ import annotations

from dataclasses import dataclass

from embedline.database import data_name, quote_ident, quote_literal

CHUNK_COLUMNS = ("chunk_id", "chunk_seq", "chunk_start", "chunk_end", "chunk", "embedding")


@dataclass(frozen=True)
class KeyColumn:
    """One column of the source's key: as the source names it now, as the generated tables name it, and its type."""

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
    """A user's expression, deparsed by PostgreSQL for each place where it is used."""

    of_source_row: str
    of_old: str
    of_new: str


@dataclass(frozen=True)
class CapturePlan:
    """All that the generator needs to know of a pipeline."""

    name: str
    source: str
    row_type: str
    keys: tuple[KeyColumn, ...]
    content: SourceExpression
    filter: SourceExpression | None
    capture: str
    always: bool = False
    watched_columns: tuple[str, ...] = ()

    def generated(self, suffix: str) -> str:
        """Qualified, quoted name of a generated object."""
        return data_name(f"{self.name}_{suffix}")

    def enqueue(self, keys: str, rows: str) -> str:
        """Return the INSERT of the keys of a row source into the inbox, in arrays of at most 100 keys."""
        listed = ", ".join(f"array_agg(k.{quote_ident(key.name)})" for key in self.keys)
        return (
            f"INSERT INTO {self.generated('inbox')} ({self.key_names}) SELECT {listed}"
            f" FROM (SELECT {keys}, row_number() OVER () AS embedline_row FROM {rows}) AS k ({self.key_names}, embedline_row)"
            " GROUP BY (k.embedline_row - 1) / 100;"
        )

    def enqueue_row(self, row: str) -> str:
        """Return the INSERT of one row's key into the inbox."""
        keys = ", ".join(f"ARRAY[{self.generated(f'key_{i + 1}')}({row})]" for i in range(len(self.keys)))
        return f"INSERT INTO {self.generated('inbox')} ({self.key_names}) VALUES ({keys});"

    @property
    def key_names(self) -> str:
        """Key columns of the generated tables."""
        return ", ".join(quote_ident(key.name) for key in self.keys)

    def keys_of_row(self, row: str) -> str:
        """The key of a row expression, column by column."""
        return ", ".join(f"{self.generated(f'key_{i + 1}')}({row})" for i in range(len(self.keys)))


def storage_statements(plan: CapturePlan) -> list[str]:
    """Tables that belong to the pipeline, not to one of its versions."""
    columns = ", ".join(key.definition for key in plan.keys)
    outbox, document, chunk = (plan.generated(suffix) for suffix in ("outbox", "document", "chunk"))
    arrays = ", ".join(
        f"{quote_ident(key.name)} {key.type}[]{f' COLLATE {key.collation}' if key.collation else ''} NOT NULL"
        for key in plan.keys
    )
    return [
        # All that an application's write pays for: up to 100 keys a row, no index, no sequence. Insert of 50,000 rows:
        # 1.4 times the plain one; 2.1 times with a row and an index entry of the outbox for each key.
        f"""CREATE TABLE {plan.generated("inbox")} (
            {arrays},
            enqueued_at timestamptz NOT NULL DEFAULT now()
        ) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000,
            autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 5000)""",
        f"COMMENT ON TABLE {plan.generated('inbox')} IS 'Changed keys as applications append them; workers move them on'",
        f"""CREATE TABLE {outbox} (
            outbox_id bigint GENERATED ALWAYS AS IDENTITY,
            {columns},
            attempts smallint NOT NULL DEFAULT 0,
            crash_count smallint NOT NULL DEFAULT 0,
            claimed_by integer,
            enqueued_at timestamptz NOT NULL DEFAULT now(),
            not_before timestamptz,
            last_error text,
            CONSTRAINT {quote_ident(plan.name + "_outbox_pkey")} PRIMARY KEY (outbox_id)
        ) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000,
            autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 100000,
            autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 5000)""",
        # Only claims are in this index, so an application's insert never pays for it.
        f"CREATE INDEX {quote_ident(plan.name + '_outbox_claim_idx')} ON {outbox} (claimed_by) WHERE claimed_by IS NOT NULL",
        f"COMMENT ON TABLE {outbox} IS 'Changed keys that wait for a worker or are in its hands'",
        f"""CREATE TABLE {document} (
            {columns},
            content_hash bytea,
            state text NOT NULL CONSTRAINT {quote_ident(plan.name + "_document_state_check")}
                CHECK (state IN ('embedded', 'empty', 'dead')),
            embedded_at timestamptz NOT NULL,
            CONSTRAINT {quote_ident(plan.name + "_document_pkey")} PRIMARY KEY ({plan.key_names})
        ) WITH (fillfactor = 80)""",
        f"COMMENT ON TABLE {document} IS 'What was last embedded of each source row: embedded (its chunks are current), "
        "empty (content is NULL, no chunks), dead (see embedline.dead_letter)'",
        f"""CREATE TABLE {chunk} (
            chunk_id bigint GENERATED BY DEFAULT AS IDENTITY,
            {columns},
            seq integer NOT NULL,
            start_offset integer NOT NULL,
            end_offset integer NOT NULL,
            content_hash uuid NOT NULL,
            content text NOT NULL,
            CONSTRAINT {quote_ident(plan.name + "_chunk_pkey")} PRIMARY KEY (chunk_id)
        )""",
        f"CREATE INDEX {quote_ident(plan.name + '_chunk_key_idx')} ON {chunk} ({plan.key_names})",
        f"CREATE INDEX {quote_ident(plan.name + '_chunk_content_hash_idx')} ON {chunk} (content_hash)",
        f"COMMENT ON TABLE {chunk} IS 'Chunks of the current content; offsets count characters of the repaired content'",
        *(f"REVOKE ALL ON TABLE {table} FROM public" for table in (plan.generated("inbox"), outbox, document, chunk)),
    ]


def version_statements(plan: CapturePlan, number: int, vector_type: str) -> list[str]:
    """The table of one version's vectors."""
    table = plan.generated(f"v{number}")
    return [
        f"""CREATE TABLE {table} (
            chunk_id bigint NOT NULL CONSTRAINT {quote_ident(f"{plan.name}_v{number}_chunk_id_fkey")}
                REFERENCES {plan.generated("chunk")} ON DELETE CASCADE,
            {quote_ident(f"embedding_v{number}")} public.{vector_type} NOT NULL,
            CONSTRAINT {quote_ident(f"{plan.name}_v{number}_pkey")} PRIMARY KEY (chunk_id)
        )""",
        # Vectors of up to 2 kB stay in the row; longer ones go out of line uncompressed: floats do not compress.
        f"ALTER TABLE {table} ALTER COLUMN {quote_ident(f'embedding_v{number}')} SET STORAGE EXTERNAL",
        f"REVOKE ALL ON TABLE {table} FROM public",
    ]


def row_function_statements(plan: CapturePlan) -> list[str]:
    """Functions of a source row: its content, its filter, its key. Inlined by the planner where they are called."""
    functions = [("content", "text", plan.content.of_source_row)]
    if plan.filter is not None:
        functions.append(("filter", "boolean", plan.filter.of_source_row))
    functions += [
        (f"key_{i + 1}", key.type, f"source_row.{quote_ident(key.source_name)}") for i, key in enumerate(plan.keys)
    ]
    return [
        f"""CREATE OR REPLACE FUNCTION {plan.generated(suffix)}(source_row {plan.row_type})
        RETURNS {result} LANGUAGE sql STABLE
        BEGIN ATOMIC SELECT ({body})::{result}; END"""
        for suffix, result, body in functions
    ]


def read_function_statements(plan: CapturePlan) -> list[str]:
    """SECURITY DEFINER functions of the source's owner through which workers read the source."""
    content = f"{plan.generated('content')}(source_row.*)"
    accepted = f"coalesce({plan.generated('filter')}(source_row.*), false)" if plan.filter else "true"
    arrays = ", ".join(f"{quote_ident(key.name)} {key.type}[]" for key in plan.keys)
    unnested = plan.key_names
    max_bytes = f"${len(plan.keys) + 1}"
    wanted = f"unnest({unnested}) WITH ORDINALITY AS wanted ({unnested}, ordinality)"
    join = " AND ".join(
        f"source_row.{quote_ident(key.source_name)} = wanted.{quote_ident(key.name)}" for key in plan.keys
    )
    order = ", ".join(f"source_row.{quote_ident(key.source_name)}" for key in plan.keys)
    returned_keys = ", ".join(f"{quote_ident(key.name)} {key.type}" for key in plan.keys)
    key_select = ", ".join(f"source_row.{quote_ident(key.source_name)}" for key in plan.keys)
    anti = " AND ".join(
        f"other.{quote_ident(key.name)} = source_row.{quote_ident(key.source_name)}" for key in plan.keys
    )
    taken = ", ".join(f"i.{quote_ident(key.name)}" for key in plan.keys)
    definer = "SECURITY DEFINER SET search_path = pg_catalog, pg_temp"
    return [
        # Contents up to max_bytes in all; past that the row comes back deferred, and is asked for again.
        f"""CREATE OR REPLACE FUNCTION {plan.generated("read")}({arrays}, max_bytes bigint)
        RETURNS TABLE (ordinality bigint, accepted boolean, deferred boolean, content text, content_hash bytea)
        LANGUAGE sql STABLE {definer}
        BEGIN ATOMIC
        SELECT r.ordinality, r.accepted, r.before >= {max_bytes},
            CASE WHEN r.before < {max_bytes} THEN r.content END,
            CASE WHEN r.before < {max_bytes} THEN sha256(convert_to(r.content, 'UTF8')) END
        FROM (
            SELECT c.ordinality, c.accepted, c.content,
                coalesce(sum(octet_length(c.content)::bigint) OVER (
                    ORDER BY c.ordinality ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS before
            FROM (
                SELECT wanted.ordinality, {accepted} AS accepted, CASE WHEN {accepted} THEN {content} END AS content
                FROM {wanted} JOIN {plan.source} AS source_row ON {join}
            ) AS c
        ) AS r
        ORDER BY r.ordinality;
        END""",
        # KEY SHARE conflicts with a DELETE or a change of the key, not with any other UPDATE. SKIP LOCKED: a worker
        # never waits for an application's lock.
        f"""CREATE OR REPLACE FUNCTION {plan.generated("lock")}({arrays})
        RETURNS TABLE (ordinality bigint, accepted boolean, content_hash bytea)
        LANGUAGE sql VOLATILE {definer}
        BEGIN ATOMIC
        SELECT wanted.ordinality, {accepted},
            CASE WHEN {accepted} THEN sha256(convert_to({content}, 'UTF8')) END
        FROM {wanted} JOIN {plan.source} AS source_row ON {join}
        ORDER BY {order}
        FOR KEY SHARE OF source_row SKIP LOCKED;
        END""",
        f"""CREATE OR REPLACE FUNCTION {plan.generated("range")}(
            relation regclass, from_tid tid, to_tid tid, row_limit integer)
        RETURNS TABLE (row_tid tid, {returned_keys})
        LANGUAGE plpgsql STABLE {definer}
        AS $plpgsql$
        BEGIN
            RETURN QUERY EXECUTE format(
                'SELECT source_row.ctid, %s FROM ONLY %s AS source_row'
                ' WHERE source_row.ctid >= $1 AND source_row.ctid < $2 ORDER BY source_row.ctid LIMIT $3',
                {quote_literal(plan.keys_of_row("source_row"))}, relation)
            USING from_tid, to_tid, row_limit;
        END
        $plpgsql$""",
        # The closing sweep of a backfill: an update that moved a row to a block already read was not captured.
        f"""CREATE OR REPLACE FUNCTION {plan.generated("missing")}(row_limit integer)
        RETURNS TABLE ({returned_keys})
        LANGUAGE sql STABLE {definer}
        BEGIN ATOMIC
        SELECT {key_select} FROM {plan.source} AS source_row
        WHERE {accepted}
            AND NOT EXISTS (SELECT FROM {plan.generated("document")} AS other WHERE {anti})
            AND NOT EXISTS (SELECT FROM {plan.generated("outbox")} AS other WHERE {anti})
            AND NOT EXISTS (
                SELECT FROM {plan.generated("inbox")} AS i CROSS JOIN LATERAL unnest({taken}) AS other ({plan.key_names})
                WHERE {anti})
        LIMIT row_limit;
        END""",
    ]


def trigger_function_statements(plan: CapturePlan) -> list[str]:
    """Trigger functions, SECURITY DEFINER: an application role needs no right on our tables."""
    bodies = _statement_bodies(plan) if plan.capture == "statement" else _row_bodies(plan)
    changed = " OR ".join(
        f"{plan.generated(f'key_{i + 1}')}(OLD) IS DISTINCT FROM {plan.generated(f'key_{i + 1}')}(NEW)"
        for i in range(len(plan.keys))
    )
    bodies["update"] = f"""
        IF {changed} THEN
            {plan.enqueue_row("OLD")}
        END IF;
        {plan.enqueue_row("NEW")}
        RETURN NULL;"""
    tables = ", ".join(plan.generated(suffix) for suffix in ("inbox", "outbox", "document", "chunk"))
    bodies["truncate"] = f"""
        TRUNCATE {tables} CASCADE;
        RETURN NULL;"""
    return [
        statement
        for event, body in bodies.items()
        for statement in (
            f"""CREATE OR REPLACE FUNCTION {plan.generated("capture_" + event)}()
            RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
            AS $plpgsql$
            BEGIN{body}
            END
            $plpgsql$""",
            f"REVOKE ALL ON FUNCTION {plan.generated('capture_' + event)}() FROM public",
        )
    ]


def _statement_bodies(plan: CapturePlan) -> dict[str, str]:
    outbox, document, chunk = (plan.generated(suffix) for suffix in ("outbox", "document", "chunk"))
    names = [quote_ident(key.name) for key in plan.keys]
    gone = ", ".join(f"{plan.generated(f'key_{i + 1}')}(ROW(o.*)) AS {name}" for i, name in enumerate(names))
    join = " AND ".join(f"t.{name} = gone.{name}" for name in names)
    returned = ", ".join(f"t.{name}" for name in names)
    return {
        "insert": f"""
        {plan.enqueue(plan.keys_of_row("ROW(n.*)"), "new_rows AS n")}
        RETURN NULL;""",
        # At REPEATABLE READ a row that a worker wrote after the snapshot would raise a serialization failure, or stay
        # unseen: there the delete is left to the worker. Search never shows it: the routing view joins the live row.
        "delete": f"""
        IF current_setting('transaction_isolation') IN ('repeatable read', 'serializable') THEN
            {plan.enqueue(plan.keys_of_row("ROW(o.*)"), "old_rows AS o")}
            RETURN NULL;
        END IF;
        WITH gone AS MATERIALIZED (
            SELECT {gone} FROM old_rows AS o
        ), gone_chunk AS (
            DELETE FROM {chunk} AS t USING gone WHERE {join}
        ), gone_document AS (
            DELETE FROM {document} AS t USING gone WHERE {join} RETURNING {returned}, t.state
        )
        -- A dead letter has no typed key; the worker takes it away when it finds the row gone.
        INSERT INTO {outbox} ({plan.key_names}) SELECT {plan.key_names} FROM gone_document WHERE state = 'dead';
        RETURN NULL;""",
    }


def _row_bodies(plan: CapturePlan) -> dict[str, str]:
    # A row that moves between partitions is deleted and inserted: the worker finds it unchanged and pays nothing.
    return {
        "insert": f"""
        {plan.enqueue_row("NEW")}
        RETURN NULL;""",
        "delete": f"""
        {plan.enqueue_row("OLD")}
        RETURN NULL;""",
    }


def trigger_name(pipeline: str, event: str) -> str:
    """Name of a capture trigger on the source."""
    return f"embedline_{pipeline}_{event}"


def trigger_statements(plan: CapturePlan) -> list[str]:
    """Triggers on the source. CREATE TRIGGER takes SHARE ROW EXCLUSIVE on it for an instant."""
    columns = f" OF {', '.join(map(quote_ident, plan.watched_columns))}" if plan.watched_columns else ""
    conditions = [f"({plan.content.of_old}) IS DISTINCT FROM ({plan.content.of_new})"]
    if plan.filter is not None:
        conditions.append(f"({plan.filter.of_old}) IS DISTINCT FROM ({plan.filter.of_new})")
    conditions += [
        f"old.{quote_ident(key.source_name)} IS DISTINCT FROM new.{quote_ident(key.source_name)}" for key in plan.keys
    ]
    if plan.capture == "statement":
        insert, delete = (
            "REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT",
            "REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT",
        )
    else:
        insert = delete = "FOR EACH ROW"
    clauses = {
        "insert": f"AFTER INSERT ON {plan.source} {insert}",
        "delete": f"AFTER DELETE ON {plan.source} {delete}",
        "update": f"AFTER UPDATE{columns} ON {plan.source} FOR EACH ROW WHEN ({' OR '.join(conditions)})",
        "truncate": f"AFTER TRUNCATE ON {plan.source} FOR EACH STATEMENT",
    }
    statements = []
    for event, clause in clauses.items():
        name = quote_ident(trigger_name(plan.name, event))
        statements.append(f"CREATE TRIGGER {name} {clause} EXECUTE FUNCTION {plan.generated('capture_' + event)}()")
        if plan.always:
            statements.append(f"ALTER TABLE {plan.source} ENABLE ALWAYS TRIGGER {name}")
    return statements


def view_query(plan: CapturePlan, columns: list[tuple[str, str, bool]], number: int) -> str:
    """The routing view's query; `columns` are (column, its name in the view, whether it is one of CHUNK_COLUMNS)."""
    chunk_sources = {
        "chunk_id": "c.chunk_id",
        "chunk_seq": "c.seq",
        "chunk_start": "c.start_offset",
        "chunk_end": "c.end_offset",
        "chunk": "c.content",
        "embedding": f"v.{quote_ident(f'embedding_v{number}')}",
    }
    selected = [
        (chunk_sources[column] if of_chunk else f"s.{quote_ident(column)}") + f" AS {quote_ident(name)}"
        for column, name, of_chunk in columns
    ]
    join = " AND ".join(f"c.{quote_ident(key.name)} = s.{quote_ident(key.source_name)}" for key in plan.keys)
    return (
        f"SELECT {', '.join(selected)} FROM {plan.source} AS s JOIN {plan.generated('chunk')} AS c ON {join}"
        f" JOIN {plan.generated(f'v{number}')} AS v ON v.chunk_id = c.chunk_id"
    )
