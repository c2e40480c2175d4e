"""SQL text of a pipeline's tables, indexes and claims."""

from __future__ import annotations

from embedline.core import names
from embedline.core.sql_text import quote_ident, quote_literal
from embedline.pipelines.ddl.plan import CapturePlan

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
RECIPE_COMMENT = "Stamp of the versions'' fingerprints that the document was cut by; with another one it is cut again"
PREFIX_COMMENT = "Text put before the chunk for embedding, NULL if none"


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
            CONSTRAINT {quote_ident(names.generated(plan.name, "outbox_pkey"))} PRIMARY KEY (outbox_id)
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
            state text NOT NULL CONSTRAINT {quote_ident(names.generated(plan.name, "document_state_check"))}
                CHECK (state IN ('embedded', 'empty', 'dead')),
            embedded_at timestamptz NOT NULL,
            recipe integer,
            CONSTRAINT {quote_ident(names.generated(plan.name, "document_pkey"))} PRIMARY KEY ({plan.key_names})
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
    """Return the triggers that tell workers of new work.

    Whatever queues a key, in whatever way, passes them.
    """
    return [
        f"CREATE TRIGGER embedline_signal AFTER {events} ON {plan.generated(suffix)} FOR EACH STATEMENT"
        f" EXECUTE FUNCTION embedline._signal_work({quote_literal(plan.name).strip()})"
        for suffix, events in _SIGNALLED
    ]


def chunk_set_statements(plan: CapturePlan, number: int) -> list[str]:
    """The table of one chunk set."""
    suffix = names.chunk_suffix(number)
    chunk, name = plan.generated(suffix), names.generated(plan.name, suffix)
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
    """Return the tables of deleted keys, hidden keys and vectors to lend."""
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
        f"CREATE INDEX {quote_ident(names.generated(plan.name, 'lent_hash_idx'))} ON {lent} (content_hash)",
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
    """Return the index by which hidden keys are looked up."""
    index = quote_ident(names.generated(plan.name, "hidden_key_idx"))
    return f"CREATE INDEX {index} ON {plan.generated('hidden')} ({plan.key_names})"


def claim_statements(plan: CapturePlan) -> list[str]:
    """Return the table of claims.

    It has one row for all keys that a worker took out of the inbox at once.
    """
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
            CONSTRAINT {quote_ident(names.generated(plan.name, "claim_pkey"))} PRIMARY KEY (claim_id)
        ) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500)""",
        f"COMMENT ON TABLE {table} IS 'Changed keys in flight, all of one claim in one row'",
        f"REVOKE ALL ON TABLE {table} FROM public",
    ]


def outbox_index_statements(plan: CapturePlan) -> list[str]:
    """Return the indexes of the outbox.

    They find claimed keys, due ones, those in flight when a worker died, and those of a backfill.
    """
    outbox = plan.generated("outbox")
    entries = {
        "claim": "(claimed_by) WHERE claimed_by IS NOT NULL",
        "due": "(not_before, outbox_id) WHERE claimed_by IS NULL",
        "suspect": "(crash_count, not_before) WHERE claimed_by IS NULL AND crash_count > 0",
        "backfill": "(outbox_id) WHERE of_backfill",
    }
    return [
        f"CREATE INDEX {quote_ident(names.generated(plan.name, f'outbox_{name}_idx'))} ON {outbox} {entry}"
        for name, entry in entries.items()
    ]


def tenant_index(plan: CapturePlan) -> str:
    """Name of the index of `tenant_index_statements`."""
    return names.generated(plan.name, "outbox_tenant_idx")


def tenant_index_statements(plan: CapturePlan) -> list[str]:
    """Return the index by which claims share the queue among tenants.

    There is none without a tenant expression.
    """
    if plan.tenant is None:
        return []
    index = quote_ident(tenant_index(plan))
    return [f"CREATE INDEX IF NOT EXISTS {index} ON {plan.generated('outbox')} (tenant, outbox_id)"]


def version_statements(plan: CapturePlan, number: int, vector_type: str, chunk_set: int = 1) -> list[str]:
    """The table of one version's vectors of the chunks of a set."""
    table = plan.generated(names.version_suffix(number))
    return [
        f"""CREATE TABLE {table} (
            chunk_id bigint NOT NULL CONSTRAINT {quote_ident(names.of_version(plan.name, number, "chunk_id_fkey"))}
                REFERENCES {plan.generated(names.chunk_suffix(chunk_set))} ON DELETE CASCADE,
            {quote_ident(names.vector_column(number))} {vector_type} NOT NULL,
            CONSTRAINT {quote_ident(names.of_version(plan.name, number, "pkey"))} PRIMARY KEY (chunk_id)
        )""",
        # Vectors of up to 2 kB stay in the row; longer ones go out of line uncompressed: floats do not compress.
        f"ALTER TABLE {table} ALTER COLUMN {quote_ident(names.vector_column(number))} SET STORAGE EXTERNAL",
        f"REVOKE ALL ON TABLE {table} FROM public",
    ]
