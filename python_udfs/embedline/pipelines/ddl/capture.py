"""Generating a pipeline's objects: tables, capture triggers, read functions and the routing view, as SQL text.

Users' expressions enter only the functions of content, filter, prefix and tenant and what reads through them; these belong
to the source's owner. The trigger functions and tables belong to Embedline and hold key columns only.

The triggers' conditions compare the input columns and never evaluate the expression as the writer: it could raise, or
call what the writer may not call, and an application's write never fails because of Embedline. Only where an input
changed does `<pipeline>_changed` evaluate it, as the source's owner, and an error counts as a change.

Bodies are quoted as constants: between dollar signs, a column's name that holds the same tag would end them.

No function takes the source's row type as a parameter: PostgreSQL would then refuse ALTER TABLE ... ADD COLUMN ...
DEFAULT. So trigger functions name the columns in plain text, and the event trigger embedline_follow_source writes them
anew when one is renamed.
"""

from __future__ import annotations

from dataclasses import dataclass

from embedline.catalog.load import chunk_table_suffix
from embedline.core.sql_text import quote_ident, quote_literal
from embedline.postgres.session import EXPRESSION_SCHEMA, data_name

# The generated functions of a pipeline of another number are written anew by the next upgrade: raise it when they change.
CODE_VERSION = 7

# Suffixes of the generated functions, in an order in which they can be dropped: those that call others come first.
FUNCTIONS = (
    *("read", "lock", "look", "missing", "range", "tenant", "audit", "gone", "present", "foreign"),
    *("changed", "digest", "tenant_or_null"),
    *("content", "filter", "prefix", "tenant_value"),
)
TRIGGER_FUNCTIONS = ("capture_insert", "capture_update", "capture_delete", "capture_truncate")

# Suffixes of the tables that belong to a pipeline and to none of its chunk sets or versions.
TABLES = ("inbox", "deleted", "hidden", "lent", "claim", "outbox", "document")

CHUNK_COLUMNS = ("chunk_id", "chunk_seq", "chunk_start", "chunk_end", "chunk", "embedding")


# Of the functions that read the source as its owner. Where policies would hide rows from that they raise: rows that are
# only hidden must not pass for deleted.
DEFINER = "SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET row_security = off"

TENANT_COMMENT = "Whose change it is, set when it is claimed; NULL without a tenant expression"
DELETED_COMMENT = (
    "Keys of deleted rows: workers remove what is stored of them once no earlier change can use the vectors"
)
SEEN_COMMENT = (
    "When no earlier change waited any more; versions beside the serving one may still have chunks of it to embed"
)
HIDDEN_COMMENT = (
    "Keys whose stored chunks are those of an earlier row of the same key: views and searches leave them out"
)
LENT_COMMENT = (
    "Vectors of chunks that a new row of the same key has replaced, until no earlier change waits that could use them"
)
RECIPE_COMMENT = "Stamp of the versions'' fingerprints that the document was cut by; with another one it is cut anew"
PREFIX_COMMENT = "Text put before the chunk for embedding, NULL if none"


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
    """A user's expression as PostgreSQL prints it, with bare column names, and the (name, type) of its input columns.

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

    @property
    def rows(self) -> str:
        """The source as a FROM item: rows of a plain table's children are none of its rows, and not captured."""
        return self.source if self.partitioned else f"ONLY {self.source}"

    @property
    def chunk_tables(self) -> list[str]:
        """Qualified, quoted names of the tables of all chunk sets."""
        return [self.generated(chunk_table_suffix(number)) for number in self.chunk_sets]

    def generated(self, suffix: str) -> str:
        """Qualified, quoted name of a generated object."""
        return data_name(f"{self.name}_{suffix}")

    def expression(self, suffix: str, schema: str = EXPRESSION_SCHEMA) -> str:
        """Qualified, quoted name of the function of a user's expression."""
        return f"{schema}.{quote_ident(f'{self.name}_{suffix}')}"

    def enqueue(self, keys: str, rows: str, table: str = "inbox") -> str:
        """Return the INSERT of a row source's keys into the inbox or another table, 100 keys a row at most."""
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
        """The expressions, by the suffix of their function, of which a change is a change of what is to be embedded."""
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
    """The condition that a row has a key: while the key of a source is exchanged its columns may be NULL.

    Such a row is found by its new key when the pipeline follows. In the queue it would stop every claim.
    """
    return " AND ".join(f"{column} IS NOT NULL" for column in columns)


def storage_statements(plan: CapturePlan) -> list[str]:
    """Tables that belong to the pipeline, not to one of its versions."""
    columns = ", ".join(key.definition for key in plan.keys)
    outbox, document = (plan.generated(suffix) for suffix in ("outbox", "document"))
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
        # Without an identity a publication FOR ALL TABLES refuses every DELETE. A key would cost each write an index entry;
        # this costs nothing but WAL of the workers' deletes, and that only at wal_level logical.
        f"ALTER TABLE {plan.generated('inbox')} REPLICA IDENTITY FULL",
        f"COMMENT ON TABLE {plan.generated('inbox')} IS 'Changed keys as applications append them; workers take them out'",
        *deletion_statements(plan),
        *claim_statements(plan),
        f"""CREATE TABLE {outbox} (
            outbox_id bigint GENERATED ALWAYS AS IDENTITY,
            {columns},
            attempts smallint NOT NULL DEFAULT 0,
            crash_count smallint NOT NULL DEFAULT 0,
            claimed_by integer,
            enqueued_at timestamptz NOT NULL DEFAULT now(),
            not_before timestamptz NOT NULL DEFAULT now(),
            last_error text,
            of_backfill boolean NOT NULL DEFAULT false,
            tenant text,
            CONSTRAINT {quote_ident(plan.name + "_outbox_pkey")} PRIMARY KEY (outbox_id)
        ) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000,
            autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 100000,
            autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 5000)""",
        *outbox_index_statements(plan),
        *tenant_index_statements(plan),
        f"COMMENT ON TABLE {outbox} IS 'Changed keys with a history: to be tried again, or left by a worker that died'",
        f"COMMENT ON COLUMN {outbox}.not_before IS 'When the key is due'",
        f"COMMENT ON COLUMN {outbox}.of_backfill IS 'Of a backfill, which is not complete before the row is through'",
        f"COMMENT ON COLUMN {outbox}.tenant IS '{TENANT_COMMENT}'",
        f"""CREATE TABLE {document} (
            {columns},
            content_hash bytea,
            state text NOT NULL CONSTRAINT {quote_ident(plan.name + "_document_state_check")}
                CHECK (state IN ('embedded', 'empty', 'dead')),
            embedded_at timestamptz NOT NULL,
            recipe integer,
            CONSTRAINT {quote_ident(plan.name + "_document_pkey")} PRIMARY KEY ({plan.key_names})
        ) WITH (fillfactor = 80)""",
        f"COMMENT ON TABLE {document} IS 'What was last embedded of each source row: embedded (its chunks are current), "
        "empty (content is NULL, no chunks), dead (see embedline.dead_letter)'",
        f"COMMENT ON COLUMN {document}.recipe IS '{RECIPE_COMMENT}'",
        *chunk_set_statements(plan, 1),
        *(f"REVOKE ALL ON TABLE {table} FROM public" for table in (plan.generated("inbox"), outbox, document)),
        *signal_statements(plan),
    ]


# Queues of a pipeline, and what puts keys into them.
_SIGNALLED = (("inbox", "INSERT"), ("outbox", "INSERT OR UPDATE"), ("deleted", "INSERT"), ("lent", "INSERT"))


def signal_statements(plan: CapturePlan) -> list[str]:
    """The triggers that tell workers that something waits: whatever queues a key, in whatever way, passes them."""
    return [
        f"CREATE TRIGGER embedline_signal AFTER {events} ON {plan.generated(suffix)} FOR EACH STATEMENT"
        f" EXECUTE FUNCTION embedline._signal_work({quote_literal(plan.name).strip()})"
        for suffix, events in _SIGNALLED
    ]


def chunk_set_statements(plan: CapturePlan, number: int) -> list[str]:
    """The table of one chunk set."""
    suffix = chunk_table_suffix(number)
    chunk, name = plan.generated(suffix), f"{plan.name}_{suffix}"
    columns = ", ".join(key.definition for key in plan.keys)
    # Shorter for later sets: with the longest pipeline name it must stay an identifier.
    hash_index = f"{name}_content_hash_idx" if number == 1 else f"{name}_hash_idx"
    return [
        f"""CREATE TABLE {chunk} (
            chunk_id bigint GENERATED BY DEFAULT AS IDENTITY,
            {columns},
            seq integer NOT NULL,
            start_offset integer NOT NULL,
            end_offset integer NOT NULL,
            content_hash uuid NOT NULL,
            content text NOT NULL,
            prefix text,
            CONSTRAINT {quote_ident(name + "_pkey")} PRIMARY KEY (chunk_id)
        )""",
        f"CREATE INDEX {quote_ident(name + '_key_idx')} ON {chunk} ({plan.key_names})",
        f"CREATE INDEX {quote_ident(hash_index)} ON {chunk} (content_hash)",
        f"COMMENT ON TABLE {chunk} IS 'Chunks of the current content; offsets count characters of the repaired content'",
        f"COMMENT ON COLUMN {chunk}.prefix IS '{PREFIX_COMMENT}'",
        f"REVOKE ALL ON TABLE {chunk} FROM public",
    ]


def deletion_statements(plan: CapturePlan) -> list[str]:
    """Tables of deleted keys, as applications append them, of keys whose chunks no view shows, and of vectors to lend."""
    deleted, hidden, lent = (plan.generated(suffix) for suffix in ("deleted", "hidden", "lent"))
    arrays = ", ".join(
        f"{quote_ident(key.name)} {key.type}[]{f' COLLATE {key.collation}' if key.collation else ''} NOT NULL"
        for key in plan.keys
    )
    return [
        f"""CREATE TABLE {deleted} (
            {arrays},
            enqueued_at timestamptz NOT NULL DEFAULT now(),
            seen_at timestamptz
        ) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000,
            autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 5000)""",
        f"COMMENT ON TABLE {deleted} IS '{DELETED_COMMENT}'",
        f"COMMENT ON COLUMN {deleted}.seen_at IS '{SEEN_COMMENT}'",
        # Applications only append: a unique index would make them wait for a worker that removes the same key.
        f"""CREATE TABLE {hidden} ({", ".join(key.definition for key in plan.keys)})
            WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000,
            autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 5000)""",
        hidden_index_statement(plan),
        f"COMMENT ON TABLE {hidden} IS '{HIDDEN_COMMENT}'",
        f"""CREATE TABLE {lent} (
            version_id bigint NOT NULL,
            content_hash uuid NOT NULL,
            vector bytea NOT NULL,
            kept_at timestamptz NOT NULL DEFAULT now()
        )""",
        f"CREATE INDEX {quote_ident(plan.name + '_lent_hash_idx')} ON {lent} (content_hash)",
        f"COMMENT ON TABLE {lent} IS '{LENT_COMMENT}'",
        *(
            statement
            for table in (deleted, hidden, lent)
            for statement in (
                f"REVOKE ALL ON TABLE {table} FROM public",
                # They have no key, and a publication of all tables would refuse to delete from them.
                f"ALTER TABLE {table} REPLICA IDENTITY FULL",
            )
        ),
    ]


def hidden_index_statement(plan: CapturePlan) -> str:
    """Return the statement that creates the index by which a chunk's key is looked up among the hidden ones."""
    index = quote_ident(f"{plan.name}_hidden_key_idx")
    return f"CREATE INDEX {index} ON {plan.generated('hidden')} ({plan.key_names})"


def claim_statements(plan: CapturePlan) -> list[str]:
    """The table of claims: one row for all keys that a worker took out of the inbox at once."""
    table = plan.generated("claim")
    arrays = ", ".join(
        f"{quote_ident(key.name)} {key.type}[]{f' COLLATE {key.collation}' if key.collation else ''} NOT NULL"
        for key in plan.keys
    )
    return [
        f"""CREATE TABLE {table} (
            claim_id bigint GENERATED ALWAYS AS IDENTITY,
            {arrays},
            claimed_by integer NOT NULL,
            enqueued_at timestamptz NOT NULL,
            CONSTRAINT {quote_ident(plan.name + "_claim_pkey")} PRIMARY KEY (claim_id)
        ) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500)""",
        f"COMMENT ON TABLE {table} IS 'Changed keys in the hands of a worker, all of one claim in one row'",
        f"REVOKE ALL ON TABLE {table} FROM public",
    ]


def outbox_index_statements(plan: CapturePlan) -> list[str]:
    """Indexes of the outbox: what is claimed, what is due, what was in hand when a worker died, what a backfill waits for."""
    outbox = plan.generated("outbox")
    return [
        f"CREATE INDEX {quote_ident(plan.name + '_outbox_claim_idx')} ON {outbox} (claimed_by) WHERE claimed_by IS NOT NULL",
        f"CREATE INDEX {quote_ident(plan.name + '_outbox_due_idx')} ON {outbox} (not_before, outbox_id) WHERE claimed_by IS NULL",
        f"CREATE INDEX {quote_ident(plan.name + '_outbox_suspect_idx')} ON {outbox} (crash_count, not_before)"
        " WHERE claimed_by IS NULL AND crash_count > 0",
        f"CREATE INDEX {quote_ident(plan.name + '_outbox_backfill_idx')} ON {outbox} (outbox_id) WHERE of_backfill",
    ]


def tenant_index(plan: CapturePlan) -> str:
    """Name of the index of `tenant_index_statements`."""
    return f"{plan.name}_outbox_tenant_idx"


def tenant_index_statements(plan: CapturePlan) -> list[str]:
    """The index through which claims share the queue among tenants; only where there are tenants."""
    if plan.tenant is None:
        return []
    index = quote_ident(tenant_index(plan))
    return [f"CREATE INDEX IF NOT EXISTS {index} ON {plan.generated('outbox')} (tenant, outbox_id)"]


def version_statements(plan: CapturePlan, number: int, vector_type: str, chunk_set: int = 1) -> list[str]:
    """The table of one version's vectors of the chunks of a set."""
    table = plan.generated(f"v{number}")
    return [
        f"""CREATE TABLE {table} (
            chunk_id bigint NOT NULL CONSTRAINT {quote_ident(f"{plan.name}_v{number}_chunk_id_fkey")}
                REFERENCES {plan.generated(chunk_table_suffix(chunk_set))} ON DELETE CASCADE,
            {quote_ident(f"embedding_v{number}")} {vector_type} NOT NULL,
            CONSTRAINT {quote_ident(f"{plan.name}_v{number}_pkey")} PRIMARY KEY (chunk_id)
        )""",
        # Vectors of up to 2 kB stay in the row; longer ones go out of line uncompressed: floats do not compress.
        f"ALTER TABLE {table} ALTER COLUMN {quote_ident(f'embedding_v{number}')} SET STORAGE EXTERNAL",
        f"REVOKE ALL ON TABLE {table} FROM public",
    ]


def content_function_statements(plan: CapturePlan, schema: str) -> dict[str, str]:
    """The users' expressions as functions of their input columns, by suffix. Inlined by the planner where they are called."""
    functions = dict(plan.watched)
    if plan.tenant is not None:
        functions["tenant_value"] = plan.tenant
    return {
        suffix: f"""CREATE FUNCTION {plan.expression(suffix, schema)}(
            {", ".join(f"{quote_ident(name)} {column_type}" for name, column_type in expression.columns)})
        RETURNS {"boolean" if suffix == "filter" else "text"} LANGUAGE sql STABLE
        BEGIN ATOMIC SELECT {expression.text}; END"""
        for suffix, expression in functions.items()
        if expression.text
    }


def changed_function_statement(plan: CapturePlan) -> str:
    """The function that tells whether a change of input columns changes what is embedded; an error counts as a change."""
    columns = plan.expression_columns
    parameters = [
        f"{side}_{i + 1} {column_type}" for side in ("old", "new") for i, (_, column_type) in enumerate(columns)
    ]
    places = {name: i + 1 for i, (name, _) in enumerate(columns)}
    differences = [
        " IS DISTINCT FROM ".join(
            f"{plan.expression(suffix)}({', '.join(f'{side}_{places[name]}' for name, _ in expression.columns)})"
            for side in ("old", "new")
        )
        for suffix, expression in plan.watched.items()
    ]
    return f"""CREATE OR REPLACE FUNCTION {plan.generated("changed")}({", ".join(parameters)})
        RETURNS boolean LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
        AS """ + quote_literal(f"""
        BEGIN
            RETURN {" OR ".join(differences)};
        EXCEPTION WHEN OTHERS THEN
            -- The application's write goes through; the worker will meet the same error and keep it as a dead letter.
            RETURN true;
        END
        """)


def read_function_statements(plan: CapturePlan) -> list[str]:
    """SECURITY DEFINER functions of the source's owner through which workers read the source."""
    content = plan.call("content", plan.content, "source_row")
    prefix = plan.call("prefix", plan.prefix, "source_row") if plan.prefix else "NULL::text"
    accepted = f"coalesce({plan.call('filter', plan.filter, 'source_row')}, false)" if plan.filter else "true"
    arrays = ", ".join(f"{quote_ident(key.name)} {key.type}[]" for key in plan.keys)
    unnested = plan.key_names
    max_bytes = f"${len(plan.keys) + 1}"
    wanted = f"unnest({unnested}) WITH ORDINALITY AS wanted ({unnested}, ordinality)"
    join = " AND ".join(
        f"source_row.{quote_ident(key.source_name)} = wanted.{quote_ident(key.name)}" for key in plan.keys
    )
    order = ", ".join(f"source_row.{quote_ident(key.source_name)}" for key in plan.keys)
    return [
        # Contents up to max_bytes in all; past that the row comes back deferred, and is asked for again.
        f"""CREATE OR REPLACE FUNCTION {plan.generated("read")}({arrays}, max_bytes bigint)
        RETURNS TABLE (
            ordinality bigint, accepted boolean, deferred boolean, content text, content_hash bytea, prefix text)
        LANGUAGE sql STABLE {DEFINER}
        BEGIN ATOMIC
        SELECT r.ordinality, r.accepted, r.before >= {max_bytes},
            CASE WHEN r.before < {max_bytes} THEN r.content END,
            CASE WHEN r.before < {max_bytes} THEN {content_hash_sql(plan, "r.content", "r.prefix")} END,
            CASE WHEN r.before < {max_bytes} THEN r.prefix END
        FROM (
            SELECT c.ordinality, c.accepted, c.content, c.prefix,
                coalesce(sum(octet_length(c.content)::bigint) OVER (
                    ORDER BY c.ordinality ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS before
            FROM (
                SELECT wanted.ordinality, {accepted} AS accepted, CASE WHEN {accepted} THEN {content} END AS content,
                    CASE WHEN {accepted} THEN {prefix} END AS prefix
                FROM {wanted} JOIN {plan.rows} AS source_row ON {join}
            ) AS c
        ) AS r
        ORDER BY r.ordinality;
        END""",
        # KEY SHARE conflicts with a DELETE or a change of the key, not with any other UPDATE. SKIP LOCKED: a worker
        # never waits for an application's lock. No expression of the owner's: what these do is rolled back.
        f"""CREATE OR REPLACE FUNCTION {plan.generated("lock")}({arrays})
        RETURNS TABLE (ordinality bigint)
        LANGUAGE sql VOLATILE {DEFINER}
        BEGIN ATOMIC
        SELECT wanted.ordinality FROM {wanted} JOIN {plan.rows} AS source_row ON {join}
        ORDER BY {order}
        FOR KEY SHARE OF source_row SKIP LOCKED;
        END""",
        f"""CREATE OR REPLACE FUNCTION {plan.generated("look")}({arrays})
        RETURNS TABLE (ordinality bigint, accepted boolean, content_hash bytea)
        LANGUAGE sql STABLE {DEFINER}
        BEGIN ATOMIC
        SELECT wanted.ordinality, {accepted},
            CASE WHEN {accepted} THEN {content_hash_sql(plan, content, prefix)} END
        FROM {wanted} JOIN {plan.rows} AS source_row ON {join};
        END""",
        range_function_statement(plan),
    ]


def content_hash_sql(plan: CapturePlan, content: str, prefix: str) -> str:
    """The hash that tells whether a row must be embedded again: of its content and, where there is one, its prefix."""
    hashed = f"sha256(convert_to({content}, 'UTF8'))"
    if plan.prefix is None:
        return hashed
    # The hash of two hashes: no other pair of texts gives the same bytes. NULL where the content is.
    return f"sha256({hashed} || sha256(convert_to(coalesce({prefix}, ''), 'UTF8')))"


def tenant_function_statements(plan: CapturePlan) -> list[str]:
    """SECURITY DEFINER function of the source's owner that tells whose rows those of an array of keys are.

    An expression that fails must not hold the queue up: such a row has no tenant.
    """
    if plan.tenant is None:
        return []
    types = ", ".join(column_type for _, column_type in plan.tenant.columns)
    arguments = ", ".join(f"source_row.{quote_ident(name)}" for name, _ in plan.tenant.columns)
    places = ", ".join(f"${i + 1}" for i in range(len(plan.tenant.columns)))
    arrays = ", ".join(f"{quote_ident(key.name)} {key.type}[]" for key in plan.keys)
    join = " AND ".join(
        f"source_row.{quote_ident(key.source_name)} = wanted.{quote_ident(key.name)}" for key in plan.keys
    )
    return [
        f"""CREATE OR REPLACE FUNCTION {plan.generated("tenant_or_null")}({types})
        RETURNS text LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
        AS """
        + quote_literal(f"""
        BEGIN
            RETURN {plan.expression("tenant_value")}({places});
        EXCEPTION WHEN OTHERS THEN
            RETURN NULL;
        END
        """),
        f"""CREATE OR REPLACE FUNCTION {plan.generated("tenant")}({arrays})
        RETURNS TABLE (ordinality bigint, tenant text)
        LANGUAGE sql STABLE {DEFINER}
        BEGIN ATOMIC
        SELECT wanted.ordinality, {plan.generated("tenant_or_null")}({arguments})
        FROM unnest({plan.key_names}) WITH ORDINALITY AS wanted ({plan.key_names}, ordinality)
        JOIN {plan.rows} AS source_row ON {join};
        END""",
    ]


def range_function_statement(plan: CapturePlan) -> str:
    """The function that reads keys of a block range of the source or of one of its partitions."""
    returned_keys = ", ".join(f"{quote_ident(key.name)} {key.type}" for key in plan.keys)
    return f"""CREATE OR REPLACE FUNCTION {plan.generated("range")}(
            relation regclass, from_tid tid, to_tid tid, row_limit integer)
        RETURNS TABLE (row_tid tid, {returned_keys})
        LANGUAGE plpgsql STABLE {DEFINER}
        AS """ + quote_literal(f"""
        BEGIN
            RETURN QUERY EXECUTE format(
                'SELECT source_row.ctid, %s FROM ONLY %s AS source_row'
                ' WHERE source_row.ctid >= $1 AND source_row.ctid < $2 ORDER BY source_row.ctid LIMIT $3',
                {quote_literal(plan.keys_of_row("source_row"))}, relation)
            USING from_tid, to_tid, row_limit;
        END
        """)


def trigger_function_statements(plan: CapturePlan) -> list[str]:
    """Trigger functions, SECURITY DEFINER: an application role needs no right on our tables.

    They run as Embedline's owner, and what casts a column of another type than when they were written may be a function of
    the source's owner: so they look at the types first.
    """
    bodies = _statement_bodies(plan) if plan.capture == "statement" else _row_bodies(plan)
    changed = " OR ".join(_differs(key.source_name) for key in plan.keys)
    inputs = ", ".join(f"{row}.{quote_ident(name)}" for row in ("OLD", "NEW") for name, _ in plan.expression_columns)
    # to_regtype: NULL for a type that has another name now. Then, as with a type that is not known, the row counts as changed.
    known = " AND ".join(
        f"pg_typeof(OLD.{quote_ident(name)}) = to_regtype({quote_literal(column_type)})" if column_type else "false"
        for name, column_type in plan.expression_columns
    )
    bodies["update"] = f"""
        IF {changed} THEN
            {plan.enqueue_row("OLD", "deleted")}
            {_hide_row(plan)}
        ELSIF {known or "false"} THEN
            -- Within: the planner may evaluate a cast of what stands in one expression with its condition.
            IF NOT {plan.generated("changed")}({inputs}) THEN
                RETURN NULL;
            END IF;
            -- A search_path that an expression of the owner's has set would outlive it.
            IF pg_catalog.current_setting('search_path') OPERATOR(pg_catalog.<>) 'pg_catalog, pg_temp' THEN
                PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
            END IF;
        END IF;
        {plan.enqueue_row("NEW")}
        RETURN NULL;"""
    of_statement = plan.capture == "statement"
    for event, row, rows in (("insert", "NEW", "new_rows"), ("update", "OLD", None), ("delete", "OLD", "old_rows")):
        bodies[event] = _type_guard(plan, row, rows if of_statement else None) + bodies[event]
    emptied = ("inbox", "deleted", "hidden", "lent", "outbox", "document")
    tables = ", ".join([*(plan.generated(suffix) for suffix in emptied), *plan.chunk_tables])
    listed = ", ".join(quote_ident(key.name) for key in plan.keys)
    bodies["truncate"] = f"""
        IF NOT {_OLD_SNAPSHOT} THEN
            -- Rows that are loaded again pay for nothing. 50,000 keys took 0.1 s.
            {plan.enqueue(listed, plan.generated("document"), "deleted")}
            RETURN NULL;
        END IF;
        -- An old snapshot may not see which documents there are.
        TRUNCATE {tables} CASCADE;
        RETURN NULL;"""
    return [
        statement
        for event, body in bodies.items()
        for statement in (
            f"""CREATE OR REPLACE FUNCTION {plan.generated("capture_" + event)}()
            RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
        AS """
            + quote_literal(f"""
            BEGIN{body}
            END
            """),
            f"REVOKE ALL ON FUNCTION {plan.generated('capture_' + event)}() FROM public",
        )
    ]


def resting_trigger_statements(name: str) -> list[str]:
    """Trigger functions that capture nothing: for a source that has lost its key. A write must not fail because of that."""
    return [
        f"CREATE OR REPLACE FUNCTION {data_name(f'{name}_capture_{event}')}() RETURNS trigger"
        " LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS 'BEGIN RETURN NULL; END'"
        for event in ("insert", "update", "delete")
    ]


def _type_guard(plan: CapturePlan, row: str, rows: str | None) -> str:
    """The test that the key of a row, or of a transition table's rows, has the types that it is cast to, or domains over them."""
    row = "r" if rows else row
    other = " OR ".join(
        f"pg_typeof({row}.{quote_ident(key.source_name)}) <> {wanted}"
        f" AND NOT embedline._is_type(pg_typeof({row}.{quote_ident(key.source_name)}), {wanted})"
        for key in plan.keys
        for wanted in [f"{quote_literal(key.type).strip()}::regtype"]
    )
    condition = f"(SELECT {other} FROM {rows} AS {row} LIMIT 1)" if rows else other
    return f"""
        IF {condition} THEN
            RAISE WARNING 'a key column of {{}} has another type than pipeline "{plan.name}" was made for: nothing is captured'
                USING HINT = 'SELECT embedline.refresh_pipeline(''{plan.name}'');';
            RETURN NULL;
        END IF;""".replace("{}", plan.source.replace("'", "''").replace("%", "%%"))


def _statement_bodies(plan: CapturePlan) -> dict[str, str]:
    variables = [quote_ident(f"found_{i + 1}") for i in range(len(plan.keys))]
    found = ", ".join(f"array_agg(d.{quote_ident(key.name)})" for key in plan.keys)
    declared = " ".join(f"{name} {key.type}[];" for name, key in zip(variables, plan.keys, strict=True))
    listed = ", ".join(variables)
    same = " AND ".join(
        f"d.{quote_ident(key.name)} = n.{quote_ident(key.source_name)}::{key.type}" for key in plan.keys
    )
    return {
        # A row may come under the key of a deleted one whose chunks still stand: these must not be shown with it. Large
        # loads look for such only while deleted keys wait: 50,000 rows beside 1,000,000 documents cost 1.3 times the bare
        # insert without the look, 1.9 times with it. A look-up for each row, because the first statement of a session
        # decides the plan for all later ones. An old snapshot may see neither the deletion nor which chunks stand: there all
        # new rows are hidden until a worker has looked at them.
        "insert": f"""
        {plan.enqueue(plan.keys_of_row("n"), "new_rows AS n")}
        IF {_OLD_SNAPSHOT} THEN
            INSERT INTO {plan.generated("hidden")} ({plan.key_names}) SELECT {plan.keys_of_row("n")} FROM new_rows AS n;
        ELSIF NOT EXISTS (SELECT FROM new_rows OFFSET {_FEW_ROWS}) OR EXISTS (SELECT FROM {plan.generated("deleted")}) THEN
            DECLARE
                {declared}
            BEGIN
                SELECT {found} INTO {listed} FROM new_rows AS n CROSS JOIN LATERAL (
                    SELECT {plan.key_names} FROM {plan.generated("document")} AS d
                    WHERE {same} AND d.state = 'embedded' LIMIT 1) AS d;
                IF {variables[0]} IS NOT NULL THEN
                    {_hide(plan, listed)}
                END IF;
            END;
        END IF;
        RETURN NULL;""",
        # Only appended: removing the chunks of 20,000 rows here took 30 times as long as the bare DELETE. They cannot be seen
        # from now on, because every view and search joins the live row. A worker removes them.
        "delete": f"""
        {plan.enqueue(plan.keys_of_row("o"), "old_rows AS o", "deleted")}
        RETURN NULL;""",
    }


# Rows of an INSERT up to which their keys are looked up in any case.
_FEW_ROWS = 100
_OLD_SNAPSHOT = "current_setting('transaction_isolation') IN ('repeatable read', 'serializable')"


def _hide(plan: CapturePlan, arrays: str) -> str:
    """Hide the chunks of keys, given as arrays, unless their row asks for exactly these.

    An error of the owner's expressions hides them all: the application's write goes through.
    """
    hidden = plan.generated("hidden")
    return f"""
        BEGIN
            INSERT INTO {hidden} ({plan.key_names}) SELECT * FROM {plan.generated("foreign")}({arrays});
        EXCEPTION WHEN OTHERS THEN
            INSERT INTO {hidden} ({plan.key_names}) SELECT * FROM unnest({arrays});
        END;
        -- A search_path that an expression of the owner's has set would outlive it.
        IF pg_catalog.current_setting('search_path') OPERATOR(pg_catalog.<>) 'pg_catalog, pg_temp' THEN
            PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
        END IF;"""


def _hide_row(plan: CapturePlan) -> str:
    """Hide chunks that stand under the key of a new row, as the trigger of INSERT does it for a statement."""
    key = " AND ".join(
        f"d.{quote_ident(key.name)} = NEW.{quote_ident(key.source_name)}::{key.type}" for key in plan.keys
    )
    return f"""
        IF {_OLD_SNAPSHOT} THEN
            INSERT INTO {plan.generated("hidden")} ({plan.key_names}) VALUES ({plan.keys_of_row("NEW")});
        ELSIF EXISTS (SELECT FROM {plan.generated("document")} AS d WHERE {key} AND d.state = 'embedded') THEN
            {_hide(plan, plan.key_arrays_of_row("NEW"))}
        END IF;"""


def _row_bodies(plan: CapturePlan) -> dict[str, str]:
    # A row that moves between partitions is deleted and inserted: the worker finds it unchanged and pays nothing.
    return {
        "insert": f"""
        {plan.enqueue_row("NEW")}
        {_hide_row(plan)}
        RETURN NULL;""",
        "delete": f"""
        {plan.enqueue_row("OLD", "deleted")}
        RETURN NULL;""",
    }


def trigger_name(pipeline: str, event: str) -> str:
    """Name of a capture trigger on the source."""
    return f"embedline_{pipeline}_{event}"


def _differs(column: str) -> str:
    # As text and byte by byte: some types have no equality (json), and equal is not the same (numeric 1.0 and 1.00, citext).
    name = quote_ident(column)
    return f'(OLD.{name}::text COLLATE "C") IS DISTINCT FROM (NEW.{name}::text COLLATE "C")'


def trigger_statements(plan: CapturePlan) -> list[str]:
    """Triggers on the source. CREATE TRIGGER takes SHARE ROW EXCLUSIVE on it for an instant."""
    if plan.capture == "statement":
        insert, delete = (
            "REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT",
            "REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT",
        )
    else:
        insert = delete = "FOR EACH ROW"
    return [
        *_trigger(plan, "insert", f"AFTER INSERT ON {plan.source} {insert}"),
        *_trigger(plan, "delete", f"AFTER DELETE ON {plan.source} {delete}"),
        *update_trigger_statements(plan),
        *_trigger(plan, "truncate", f"AFTER TRUNCATE ON {plan.source} FOR EACH STATEMENT"),
    ]


def update_trigger_statements(plan: CapturePlan) -> list[str]:
    """The trigger that names the input columns."""
    columns = "" if plan.watch_all else f" OF {', '.join(map(quote_ident, plan.input_columns))}"
    condition = " OR ".join(_differs(name) for name in plan.input_columns)
    return _trigger(plan, "update", f"AFTER UPDATE{columns} ON {plan.source} FOR EACH ROW WHEN ({condition})")


def _trigger(plan: CapturePlan, event: str, clause: str) -> list[str]:
    name = quote_ident(trigger_name(plan.name, event))
    create = f"CREATE OR REPLACE TRIGGER {name} {clause} EXECUTE FUNCTION {plan.generated('capture_' + event)}()"
    return [create, *([f"ALTER TABLE {plan.source} ENABLE ALWAYS TRIGGER {name}"] if plan.always else [])]


@dataclass(frozen=True)
class ShownVersion:
    """The version that a view shows: its number, its chunk set, and the type that the view gives the vectors.

    The routing view shows them without dimensions ("public.vector"): so CREATE OR REPLACE VIEW can put a version of other
    dimensions in their place, and an index is found all the same. `type_name` None leaves the column's own type.
    """

    number: int
    chunk_set: int
    type_name: str | None


def view_query(
    plan: CapturePlan, columns: list[tuple[str, str, bool]], shown: ShownVersion, *, has_policies: bool = False
) -> str:
    """The query of a view; `columns` are (column, its name in the view, whether it is one of CHUNK_COLUMNS).

    For a join over a key of several columns the planner multiplies what each column keeps: it expected 5 rows of 4,999, and
    ranked all exactly rather than by the index. Of a LEFT JOIN it expects all rows of the left side. The condition leaves out
    rows without a source row, in a form from which the planner does not make the plain join again; a filter on a column of
    the source still does, and is used first. Row-level security would not be used first, so a source with it (`has_policies`)
    keeps the plain join.
    """
    vector = f"v.{quote_ident(f'embedding_v{shown.number}')}"
    chunk_sources = {
        "chunk_id": "c.chunk_id",
        "chunk_seq": "c.seq",
        "chunk_start": "c.start_offset",
        "chunk_end": "c.end_offset",
        "chunk": "c.content",
        "embedding": vector if shown.type_name is None else f"{vector}::{shown.type_name}",
    }
    selected = [
        (chunk_sources[column] if of_chunk else f"s.{quote_ident(column)}") + f" AS {quote_ident(name)}"
        for column, name, of_chunk in columns
    ]
    join = " AND ".join(f"c.{quote_ident(key.name)} = s.{quote_ident(key.source_name)}" for key in plan.keys)
    chunk, vectors = plan.generated(chunk_table_suffix(shown.chunk_set)), plan.generated(f"v{shown.number}")
    if len(plan.keys) > 1 and not has_policies:
        return (
            f"SELECT {', '.join(selected)} FROM {vectors} AS v JOIN {chunk} AS c ON v.chunk_id = c.chunk_id"
            f" LEFT JOIN {plan.rows} AS s ON {join}"
            f" WHERE CASE WHEN s.{quote_ident(plan.keys[0].source_name)} IS NULL THEN false ELSE true END"
            f" AND {is_shown(plan, 'c')}"
        )
    return (
        f"SELECT {', '.join(selected)} FROM {plan.rows} AS s JOIN {chunk} AS c ON {join}"
        f" JOIN {vectors} AS v ON v.chunk_id = c.chunk_id WHERE {is_shown(plan, 'c')}"
    )


def is_shown(plan: CapturePlan, chunk: str) -> str:
    """The condition that a chunk is not hidden.

    An anti-join over the index of a table that is nearly always empty. As a subquery under CASE it had the table read whole
    for each search, and a filter on 400 of 40,000 rows took 15 ms in place of 3.
    """
    same = " AND ".join(f"h.{quote_ident(key.name)} = {chunk}.{quote_ident(key.name)}" for key in plan.keys)
    return f"NOT EXISTS (SELECT FROM {plan.generated('hidden')} AS h WHERE {same})"
