"""The inbox: changed keys as applications append them, and their claims.

Workers take keys out in bulk. A claim is one row that holds all of its keys. It counts exactly as long as its
worker's session advisory lock is held. The keys of a dead worker's claim go to the outbox, where each has its own
count of crashes.
"""

from __future__ import annotations

from collections.abc import Sequence

from embedline.catalog.values import Pipeline
from embedline.core.sql_text import quote_ident
from embedline.postgres.claims import Claims
from embedline.postgres.rollback import read_and_release
from embedline.postgres.session import Session
from embedline.queue import bulk_changes
from embedline.queue.claim import Claim
from embedline.queue.outbox import ClaimedRow, Key, in_flight_query, key_columns

# Triggers put up to this many keys into one row.
KEYS_PER_ROW = 100
# So much of a tenant is kept: an index entry holds 2,704 bytes, and tenants that begin alike may share a turn.
_TENANT_CHARACTERS = 500


def enqueue_query(pipeline: Pipeline, rows: str, condition: str = "true") -> str:
    """Return the INSERT of a relation's keys into the inbox, as capture does it.

    Each row returns its key_count.
    """
    columns = ", ".join(quote_ident(column) for column in pipeline.key_columns)
    arrays = ", ".join(f"array_agg(k.{quote_ident(column)})" for column in pipeline.key_columns)
    first = quote_ident(pipeline.key_columns[0])
    return (
        f"INSERT INTO {pipeline.generated('inbox')} ({columns}) SELECT {arrays}"
        f" FROM (SELECT {columns}, row_number() OVER () AS embedline_row FROM {rows} WHERE {condition}) AS k"
        f" GROUP BY (k.embedline_row - 1) / {KEYS_PER_ROW} RETURNING cardinality({first}) AS key_count"
    )


def enqueue_key(session: Session, pipeline: Pipeline, key: Key) -> None:
    """Queue one key."""
    session.query(
        f"INSERT INTO {pipeline.generated('inbox')} ({pipeline.key_list}) VALUES ({pipeline.key_arrays()})",
        pipeline.key_parameter_types,
        *([part] for part in key),
    )


def claim_inbox(session: Session, pipeline: Pipeline, limit: int, claims: Claims, live: list[int]) -> Claim | None:
    """Take about `limit` keys out of the inbox, oldest first; None if none is free.

    Keys that a living worker has in flight go to the outbox instead, so that nothing is embedded twice at the same time. If
    all keys found are, the claim is empty. The limit is passed by the keys of one row at most.
    """
    inbox = pipeline.generated("inbox")
    first = pipeline.quoted_key_columns[0]
    # Rows hold up to 100 keys, or one: as many rows as make up the limit. No order and no index: the scan reads from the
    # front, where the oldest are.
    sized = f"""
        SELECT ctid AS place FROM {inbox} WHERE ctid = ANY (ARRAY(
            SELECT s.place FROM (
                SELECT r.place, sum(r.key_count) OVER (ROWS UNBOUNDED PRECEDING) - r.key_count AS before
                FROM (SELECT ctid AS place, cardinality({first}) AS key_count FROM {inbox} LIMIT $1) AS r
            ) AS s WHERE s.before < $1))
        FOR UPDATE SKIP LOCKED"""
    # If embed_pending has locked the front until its caller commits: the rows behind it.
    behind = f"SELECT ctid AS place FROM {inbox} LIMIT greatest($1 / {KEYS_PER_ROW}, 1) FOR UPDATE SKIP LOCKED"
    for front in (sized, behind):
        statement = _claim_statement(pipeline, front, is_marked=claims.is_resident)
        row = session.query(statement, ["integer", "integer[]", *claims.types], limit, live, *claims.values)[0]
        if row["row_count"]:
            keys = zip(*(row[column] or () for column in pipeline.key_columns), strict=True)
            rows = list(map(ClaimedRow, keys))
            if pipeline.has_bulk_rule and rows:
                bulk_changes.mark(session, pipeline, rows, row["embedline_starts"])
            return Claim(rows, enqueued_at=row["enqueued_at"], claim_id=row["claim_id"])
    return None


def _claim_statement(pipeline: Pipeline, front: str, *, is_marked: bool) -> str:
    keys, columns = pipeline.key_list, pipeline.quoted_key_columns
    claimed = (
        f"INSERT INTO {pipeline.generated('claim')} ({keys}, claimed_by, enqueued_at)"
        f" SELECT {', '.join(f'array_agg({column})' for column in columns)}, $3, min(enqueued_at)"
        " FROM judged WHERE NOT busy HAVING count(*) > 0 RETURNING claim_id"
        if is_marked
        else "SELECT NULL::bigint AS claim_id WHERE false"
    )
    last = starts = ""
    if pipeline.has_bulk_rule:
        last = f", max(taken.enqueued_at) OVER (PARTITION BY {pipeline.key_list_of('k')}) AS embedline_last"
        starts = " array_agg(embedline_last::text) FILTER (WHERE NOT busy) AS embedline_starts,"
    return f"""
        WITH front AS MATERIALIZED ({front}
        ), taken AS (
            DELETE FROM {pipeline.generated("inbox")} WHERE ctid = ANY (ARRAY(SELECT place FROM front)) RETURNING *
        ), key AS MATERIALIZED (
            -- Equal keys may be spelled differently (1.0 and 1.00): all go by the spelling of one.
            SELECT DISTINCT ON ({keys}) k.*, taken.enqueued_at{last} FROM taken
            CROSS JOIN LATERAL unnest({", ".join(f"taken.{column}" for column in columns)}) AS k ({keys})
            ORDER BY {keys}, taken.enqueued_at
        ), judged AS MATERIALIZED (
            SELECT key.*, ({keys}) IN ({in_flight_query(pipeline, "$2")}) AS busy FROM key
        ), waiting AS (
            INSERT INTO {pipeline.outbox} ({keys}, enqueued_at) SELECT {keys}, enqueued_at FROM judged WHERE busy
        ), claimed AS (
            {claimed}
        )
        SELECT (SELECT count(*) FROM front) AS row_count, (SELECT claim_id FROM claimed) AS claim_id,
            min(enqueued_at)::text AS enqueued_at,{starts}
            {", ".join(f"array_agg({column}::text) FILTER (WHERE NOT busy) AS {column}" for column in columns)}
        FROM judged
        """


def move_to_outbox(session: Session, pipeline: Pipeline, row_limit: int) -> int:
    """Move rows of the inbox to the outbox with the tenant of each key.

    So tenants can have their turns. Return the number of keys moved. The rows of the inbox are locked until they are
    gone, so no other session moves them. The tenants are read between, because the owner's expression must leave
    nothing behind.
    """
    columns, count = pipeline.quoted_key_columns, len(pipeline.key_columns)
    key = f"k ({pipeline.key_list})"
    taken = session.query(
        f"""
        WITH front AS MATERIALIZED (
            SELECT ctid AS place FROM {pipeline.generated("inbox")} LIMIT $1 FOR UPDATE SKIP LOCKED
        ), found AS (
            SELECT k.*, i.enqueued_at FROM {pipeline.generated("inbox")} AS i
            CROSS JOIN LATERAL unnest({", ".join(f"i.{column}" for column in columns)}) AS {key}
            WHERE i.ctid = ANY (ARRAY(SELECT place FROM front))
        )
        SELECT ARRAY(SELECT place::text FROM front) AS places, array_agg(f.enqueued_at::text) AS times,
            {", ".join(f"array_agg(f.{column}::text) AS key_{i}" for i, column in enumerate(columns))}
        FROM found AS f
        """,
        ["integer"],
        row_limit,
    )[0]
    if not taken["places"]:
        return 0
    arrays = [taken[f"key_{i}"] for i in range(count)]
    tenants: list[str | None] = [None] * len(taken["times"])
    query = f"SELECT t.ordinality, t.tenant FROM {pipeline.generated('tenant')}({pipeline.key_arrays()}) AS t"
    for row in read_and_release(session, lambda: session.query(query, pipeline.key_parameter_types, *arrays)):
        tenants[row["ordinality"] - 1] = row["tenant"] and row["tenant"][:_TENANT_CHARACTERS]
    session.query(
        f"""
        WITH gone AS (DELETE FROM {pipeline.generated("inbox")} WHERE ctid = ANY (${count + 1}::text[]::tid[]))
        INSERT INTO {pipeline.outbox} ({pipeline.key_list}, enqueued_at, tenant)
        SELECT * FROM unnest({pipeline.key_arrays()}, ${count + 2}::text[]::timestamptz[], ${count + 3}::text[])
        """,
        [*pipeline.key_parameter_types, *["text[]"] * 3],
        *arrays,
        taken["places"],
        taken["times"],
        tenants,
    )
    return len(tenants)


def finish_claim(session: Session, pipeline: Pipeline, claim_id: int, claims: Claims) -> None:
    """Remove a settled claim, fenced by its worker."""
    session.query(
        f"DELETE FROM {pipeline.generated('claim')} WHERE claim_id = $1{claims.fence(2)}",
        ["bigint", *claims.types],
        claim_id,
        *claims.values,
    )


def narrow_claim(session: Session, pipeline: Pipeline, claim_id: int, keys: Sequence[Key], claims: Claims) -> None:
    """Leave only these keys in a claim.

    The others are back in the queue, and other workers may have them at once.
    """
    count = len(pipeline.key_columns)
    assigned = ", ".join(
        f"{column} = ${2 + i}::text[]::{key_type}[]"
        for i, (column, key_type) in enumerate(zip(pipeline.quoted_key_columns, pipeline.key_types, strict=True))
    )
    session.query(
        f"UPDATE {pipeline.generated('claim')} SET {assigned} WHERE claim_id = $1{claims.fence(2 + count)}",
        ["bigint", *pipeline.key_parameter_types, *claims.types],
        claim_id,
        *key_columns(keys, count),
        *claims.values,
    )


def break_claims(session: Session, pipeline: Pipeline, condition: str, ids: Sequence[int], crash_count: int) -> None:
    """Put the keys of claims into the outbox.

    Of dead workers (each has been in a crash), or of one that ends in order. `condition` compares claimed_by or claim_id
    with the array $1.
    """
    keys = ", ".join(f"broken.{quote_ident(column)}" for column in pipeline.key_columns)
    session.query(
        f"""
        WITH broken AS (DELETE FROM {pipeline.generated("claim")} WHERE {condition} RETURNING *)
        INSERT INTO {pipeline.outbox} ({pipeline.key_list}, enqueued_at, crash_count)
        SELECT k.*, broken.enqueued_at, $2 FROM broken CROSS JOIN LATERAL unnest({keys}) AS k
        """,
        ["bigint[]", "smallint"],
        list(ids),
        crash_count,
    )
