"""Dead letters: write them, queue their rows again, delete old ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from embedline.catalog.health import MAX_ERROR_CHARACTERS, record_error
from embedline.catalog.keys import from_json, json_names, key_json
from embedline.catalog.load import load_pipeline
from embedline.catalog.rights import require_control
from embedline.catalog.values import Pipeline
from embedline.errors import InvalidParameter, NotFound
from embedline.postgres.entry import entry_point
from embedline.postgres.session import Session
from embedline.postgres.sqlstates import sqlstate_of
from embedline.queue.inbox import enqueue_key, enqueue_query
from embedline.queue.outbox import ClaimedRow, Key, key_columns

RETENTION_SETTING = "dead_letter_retention"
# Characters of a key that are shown before its error.
_SHOWN_KEY_CHARACTERS = 100


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A row that is given up: its stage, SQLSTATE, message and content."""

    row: ClaimedRow
    stage: str
    error_code: str
    message: str
    content_hash: bytes | None


def write_dead_letters(session: Session, pipeline: Pipeline, letters: Sequence[DeadLetter]) -> None:
    """Record rows that are given up, with their reasons.

    Their outdated chunks leave search.
    """
    count = len(pipeline.key_columns)
    arrays = key_columns([letter.row.key for letter in letters], count)
    hashes = [letter.content_hash for letter in letters]
    for table in (*pipeline.chunk_tables, pipeline.generated("hidden")):
        session.query(
            f"DELETE FROM {table} AS t USING unnest({pipeline.key_arrays()}) AS k ({pipeline.key_list})"
            f" WHERE {pipeline.key_join('t', 'k')}",
            pipeline.key_parameter_types,
            *arrays,
        )
    session.query(
        f"""
        INSERT INTO {pipeline.document} AS d ({pipeline.key_list}, content_hash, state, recipe, embedded_at)
        SELECT {pipeline.key_list_of("k")}, k.content_hash, 'dead', ${count + 2}, clock_timestamp()
        FROM unnest({pipeline.key_arrays()}, ${count + 1}) AS k ({pipeline.key_list}, content_hash)
        ORDER BY {pipeline.key_list_of("k")}
        ON CONFLICT ({pipeline.key_list}) DO UPDATE SET content_hash = excluded.content_hash, state = 'dead',
            recipe = excluded.recipe, embedded_at = excluded.embedded_at
        """,
        [*pipeline.key_parameter_types, "bytea[]", "integer"],
        *arrays,
        hashes,
        pipeline.recipe,
    )
    session.query(
        f"""
        INSERT INTO embedline.dead_letter (pipeline_id, key, stage, error_code, message, content_hash, attempts)
        SELECT $1, l.* FROM unnest($2::text[]::jsonb[], $3, $4, $5, $6, $7) AS l ORDER BY 2
        ON CONFLICT (pipeline_id, {_digest("key")}) DO UPDATE SET stage = excluded.stage, error_code = excluded.error_code,
            message = excluded.message, content_hash = excluded.content_hash, attempts = excluded.attempts, created_at = now()
        """,
        ["bigint", "text[]", "text[]", "text[]", "text[]", "bytea[]", "integer[]"],
        pipeline.pipeline_id,
        [key_json(pipeline, letter.row.key) for letter in letters],
        [letter.stage for letter in letters],
        [letter.error_code for letter in letters],
        [letter.message[:MAX_ERROR_CHARACTERS] for letter in letters],
        hashes,
        [letter.row.attempts for letter in letters],
    )
    first = letters[0]
    record_error(session, pipeline, f"{key_json(pipeline, first.row.key)[:_SHOWN_KEY_CHARACTERS]}: {first.message}")


def _digest(key: str) -> str:
    """Return the indexed expression of a dead letter's key.

    As JSON a key may be longer than an index entry. Written so because convert_to is not immutable; the backslashes are
    those of the escape format of bytea.
    """
    return rf"sha256(replace(({key})::text, E'\\', E'\\\\')::bytea)"


def forget_dead_letters(session: Session, pipeline: Pipeline, keys: Sequence[Key]) -> None:
    """Remove the dead letters of keys that are embedded or gone."""
    if session.scalar(
        "SELECT 1 FROM embedline.dead_letter WHERE pipeline_id = $1 LIMIT 1", ["bigint"], pipeline.pipeline_id
    ):
        session.query(
            f"DELETE FROM embedline.dead_letter AS d USING unnest($2::text[]::jsonb[]) AS k (key)"
            f" WHERE d.pipeline_id = $1 AND {_digest('d.key')} = {_digest('k.key')}",
            ["bigint", "text[]"],
            pipeline.pipeline_id,
            [key_json(pipeline, key) for key in keys],
        )


def letter_of(session: Session, pipeline: Pipeline, key: Sequence[str]) -> dict[str, Any] | None:
    """Return message and time of a row's dead letter, None if it has none."""
    found = session.query(
        f"SELECT message, created_at::text AS since FROM embedline.dead_letter"
        f" WHERE pipeline_id = $1 AND {_digest('key')} = {_digest('$2')}",
        ["bigint", "jsonb"],
        pipeline.pipeline_id,
        key_json(pipeline, key),
    )
    return found[0] if found else None


@entry_point
def requeue(
    session: Session, pipeline_name: str, key: str | None, error_code: str | None, include_embedded: bool
) -> int:
    """Queue dead letters of a pipeline again, with no tries counted.

    All, or those of one key or error code. A dead letter stays until its row is embedded or fails again, so nothing is lost
    in between. A key that is not dead is queued too; with `include_embedded` it is embedded again although its content has
    not changed.
    """
    require_control(session, pipeline_name)
    pipeline = load_pipeline(session, pipeline_name)
    if key is not None:
        return _requeue_key(session, pipeline, _read_key(session, pipeline, key), error_code, bool(include_embedded))
    if include_embedded:
        raise InvalidParameter(
            "include_embedded needs a key",
            hint=f"SELECT * FROM embedline.verify('{pipeline_name}', repair => true) embeds again what is not as it should be.",
        )
    return _requeue_letters(session, pipeline, error_code)


@entry_point
def purge_dead_letters(session: Session, older_than: str | None) -> int:
    """Delete dead letters that are older than an interval, by default the setting.

    Return their number.
    """
    if session.scalar("SELECT $1::interval < interval '0'", ["text"], older_than):
        raise InvalidParameter(
            f"older_than must not be negative: {older_than}", hint="SELECT embedline.purge_dead_letters('90 days');"
        )
    return purge(session, older_than)


def purge(session: Session, older_than: str | None) -> int:
    """Delete old dead letters.

    Their documents stay in state dead, so that no sweep queues the rows again.
    """
    rows = session.query(
        """
        DELETE FROM embedline.dead_letter WHERE created_at < now() - coalesce(
            $1::interval, (SELECT value::interval FROM embedline.setting WHERE name = $2)) RETURNING 1
        """,
        ["text", "text"],
        older_than,
        RETENTION_SETTING,
    )
    return len(rows)


def _requeue_letters(session: Session, pipeline: Pipeline, error_code: str | None) -> int:
    rows = session.query(
        f"""
        WITH letter AS MATERIALIZED (
            SELECT {from_json(pipeline, "l.key")} FROM embedline.dead_letter AS l
            WHERE l.pipeline_id = $1 AND ($2 IS NULL OR l.error_code = $2)
        ), queued AS (
            {enqueue_query(pipeline, "letter")}
        )
        SELECT coalesce(sum(q.key_count), 0) AS count FROM queued AS q
        """,
        ["bigint", "text"],
        pipeline.pipeline_id,
        error_code,
    )
    return int(rows[0]["count"])


def _requeue_key(session: Session, pipeline: Pipeline, key: Key, error_code: str | None, include_embedded: bool) -> int:
    shown = key_json(pipeline, key)
    code = session.scalar(
        f"SELECT error_code FROM embedline.dead_letter WHERE pipeline_id = $1 AND {_digest('key')} = {_digest('$2')}",
        ["bigint", "jsonb"],
        pipeline.pipeline_id,
        shown,
    )
    if error_code is not None and code != error_code:
        return 0
    if code is None and not _has_row(session, pipeline, key):
        raise NotFound(
            f"pipeline {pipeline.name} has neither a dead letter nor a source row of key {shown}",
            hint="SELECT key FROM embedline.dead_letter lists the dead letters.",
        )
    if include_embedded and code is None and not _forget_chunks(session, pipeline, key):
        return 0
    enqueue_key(session, pipeline, key)
    return 1


def _read_key(session: Session, pipeline: Pipeline, key: str) -> Key:
    """Return a key given as jsonb in the spelling of its types.

    Raise InvalidParameter if it is none.
    """
    names = json_names(pipeline)
    given = json.loads(key)
    form = json.dumps({name: "..." for name in names})
    if not isinstance(given, dict) or set(given) != set(names) or None in given.values():
        raise InvalidParameter(
            f"{key} is no key of pipeline {pipeline.name}", hint=f"Give every key column: key => '{form}'."
        )
    try:
        rows = session.query(
            f"SELECT {pipeline.key_texts_of('k')} AS key FROM (SELECT {from_json(pipeline, '$1')}) AS k",
            ["jsonb"],
            key,
        )
    except Exception as error:
        if sqlstate_of(error)[:2] != "22":
            raise
        raise InvalidParameter(
            f"{key} is no key of pipeline {pipeline.name}: {error}",
            hint=f"Give key => '{form}' with values of the key's types.",
        ) from error
    return tuple(rows[0]["key"])


def _has_row(session: Session, pipeline: Pipeline, key: Key) -> bool:
    rows = session.query(
        f"SELECT * FROM {pipeline.generated('present')}({pipeline.key_arrays()})",
        pipeline.key_parameter_types,
        *([part] for part in key),
    )
    return bool(rows)


def _forget_chunks(session: Session, pipeline: Pipeline, key: Key) -> bool:
    """Remove a row's chunks and mark its document as not current.

    Return False if another session has locked it.
    """
    wanted = f"unnest({pipeline.key_arrays()}) AS k ({pipeline.key_list})"
    removals = "".join(
        f""", removed_{number} AS (
            DELETE FROM {table} AS c USING locked AS l WHERE {pipeline.key_join("l", "c")}
        )"""
        for number, table in enumerate(pipeline.chunk_tables)
    )
    rows = session.query(
        f"""
        WITH locked AS MATERIALIZED (
            SELECT {pipeline.key_list_of("d")} FROM {pipeline.document} AS d JOIN {wanted} ON {pipeline.key_join("d", "k")}
            FOR UPDATE OF d SKIP LOCKED
        ){removals}, marked AS (
            UPDATE {pipeline.document} AS d SET content_hash = '' FROM locked AS l WHERE {pipeline.key_join("l", "d")}
        )
        SELECT (SELECT count(*) FROM locked) = count(*) AS free
        FROM {pipeline.document} AS d JOIN {wanted} ON {pipeline.key_join("d", "k")}
        """,
        pipeline.key_parameter_types,
        *([part] for part in key),
    )
    return bool(rows[0]["free"])
