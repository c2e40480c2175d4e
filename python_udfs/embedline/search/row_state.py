"""Decide the state of one row of a source, for embedline.state.

What is stored is compared with the row as it is now, by its content's hash. So the answer needs no queue, and a change that
no trigger saw is found, too. Only for a row that is not up to date are the queues searched, for the time and the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from embedline.catalog.load import load_pipeline, load_version
from embedline.catalog.values import Pipeline
from embedline.core.fingerprint import recipe_stamp
from embedline.models import circuit
from embedline.postgres.entry import entry_point
from embedline.postgres.rollback import read_and_release
from embedline.postgres.session import Session
from embedline.postgres.sqlstates import ENDING, sqlstate_of
from embedline.queue.dead_letters import letter_of

# Rows of each queue that are searched for a key, because its keys have no index.
_SEARCHED_ROWS = 10_000
_SOURCE_TROUBLE = "SELECT message FROM embedline._source_trouble($1) WHERE state IS NOT NULL"
_CIRCUIT = """
    SELECT embedline._shown_error(last_error) AS last_error, open_until::timestamptz(0)::text AS until
    FROM embedline.circuit WHERE model_id = $1
"""
_WORKERS = "SELECT workers_alive FROM embedline._workers_alive() AS w (workers_alive)"

Answer = dict[str, Any]


@entry_point
def row_state(session: Session, pipeline_name: str, version: int, key: Sequence[str]) -> list[Answer]:
    """Return the state of a row that the source has, for one version."""
    pipeline = load_version(session, pipeline_name, version)
    return [_RowState(session, pipeline, key).answer()]


class _RowState:
    def __init__(self, session: Session, pipeline: Pipeline, key: Sequence[str]) -> None:
        self.session, self.pipeline, self.key = session, pipeline, list(key)
        # Every query has the key's columns first.
        self._types = ["text"] * len(self.key)
        columns = ", ".join(
            f"${place}::{key_type} AS {column}"
            for place, (key_type, column) in enumerate(
                zip(pipeline.key_types, pipeline.quoted_key_columns, strict=True), 1
            )
        )
        self._wanted = f"(SELECT {columns}) AS k"
        self._next = len(self.key) + 1

    def answer(self) -> Answer:
        """Return state, since and reason."""
        stored, row = self._stored(), self._row()
        letter = letter_of(self.session, self.pipeline, self.key)
        if row is None:
            # The content or the filter raises.
            return self._failed(letter) if letter else self._pending("its content cannot be read")
        if not row["accepted"]:
            if stored is None:
                return _answer("excluded", None, "the pipeline's filter leaves the row out")
            return self._pending("the filter leaves the row out now, and what is stored of it is removed")
        if stored is None:
            return self._pending()
        is_current = bool(stored["content_hash"] == row["content_hash"] and stored["is_of_recipe"])
        if stored["state"] == "dead" and (is_current or stored["content_hash"] is None):
            return self._failed(letter)
        if not is_current or stored["is_hidden"]:
            return self._pending()
        if stored["state"] == "empty":
            return _answer("excluded", stored["since"], "the content is NULL")
        return self._of_chunks(stored)

    def _stored(self) -> dict[str, Any] | None:
        """Return what is stored of the document, None if there is nothing."""
        pipeline, n = self.pipeline, self._next
        found = self._query(
            f"""
            SELECT d.state, d.content_hash, d.embedded_at::text AS since,
                coalesce(d.recipe = ANY (${n}), true)
                AND (d.state <> 'embedded' OR coalesce(d.embedded_at >= ${n + 1}::timestamptz, true)) AS is_of_recipe,
                EXISTS (SELECT FROM {pipeline.generated("hidden")} AS h WHERE {pipeline.key_join("h", "k")}) AS is_hidden
            FROM {self._wanted} JOIN {pipeline.document} AS d ON {pipeline.key_join("d", "k")}
            """,
            ["integer[]", "text"],
            self._recipes(),
            pipeline.version.vectors_valid_from,
        )
        return found[0] if found else None

    def _recipes(self) -> list[int]:
        """Return the stamps of documents that are cut as the version wants them.

        While a version with another chunking is added, rows are read again for it. What the serving one has stays right.
        """
        serving = load_pipeline(self.session, self.pipeline.name)
        is_cut_alike = self.pipeline.chunk_set == serving.chunk_set
        return [serving.recipe, *([recipe_stamp([serving.version.fingerprint])] if is_cut_alike else ())]

    def _row(self) -> dict[str, Any] | None:
        """Return the row as the pipeline's expressions see it, None if they fail."""
        pipeline = self.pipeline
        arrays = ", ".join(f"ARRAY[${place}::{kind}]" for place, kind in enumerate(pipeline.key_types, 1))
        query = f"SELECT l.accepted, l.content_hash FROM {pipeline.generated('look')}({arrays}) AS l"
        try:
            found = read_and_release(self.session, lambda: self._query(query, []))
        except self.session.plpy.SPIError as error:
            if sqlstate_of(error) in ENDING or sqlstate_of(error)[:2] in ("40", "42", "55"):
                raise
            return None
        return found[0] if found else None

    def _of_chunks(self, stored: dict[str, Any]) -> Answer:
        """Return the answer for a document that is cut as it should be."""
        pipeline = self.pipeline
        row = self._query(
            f"""
            SELECT count(*) AS chunks, count(*) FILTER (WHERE v.chunk_id IS NULL) AS lacking, min(l.message) AS message,
                count(*) FILTER (WHERE v.chunk_id IS NULL AND l.chunk_id IS NOT NULL) AS given_up,
                max(l.created_at)::text AS since
            FROM {self._wanted} JOIN {pipeline.chunk} AS c ON {pipeline.key_join("c", "k")}
            LEFT JOIN {pipeline.vectors} AS v ON v.chunk_id = c.chunk_id
            LEFT JOIN embedline.version_dead_letter AS l ON l.version_id = ${self._next} AND l.chunk_id = c.chunk_id
                AND v.chunk_id IS NULL
            """,
            ["bigint"],
            pipeline.version.version_id,
        )[0]
        if row["lacking"] > row["given_up"] or not row["chunks"]:
            lacking = f"{row['lacking']} of {row['chunks']} chunks" if row["chunks"] else "all chunks"
            return self._pending(f"version {pipeline.version.number} lacks {lacking}")
        if row["given_up"] == row["chunks"]:
            return _answer("failed", row["since"], row["message"])
        if row["given_up"]:
            told = f"{row['given_up']} of {row['chunks']} chunks have no vector: {row['message']}"
            return _answer("partial", row["since"], told)
        return _answer("fresh", stored["since"], None)

    def _failed(self, letter: dict[str, Any] | None) -> Answer:
        """Return the answer for a row that was given up.

        One that is queued again is pending.
        """
        if letter is None:
            return _answer("failed", None, "its dead letter was removed; embedline.requeue queues the row again")
        queued = self._queued()
        if queued["since"] is not None:
            return _answer("pending", queued["since"], f"is tried again; it failed before: {letter['message']}")
        return _answer("failed", letter["since"], letter["message"])

    def _pending(self, told: str | None = None) -> Answer:
        queued = self._queued()
        return _answer("pending", queued["since"], "; ".join(filter(None, (told, self._obstacle(queued)))))

    def _queued(self) -> dict[str, Any]:
        """Return the row's oldest change in the queues, if it is found.

        It has a time, the last error, and whether a worker has it in flight.
        """
        pipeline = self.pipeline
        arrays = ", ".join(f"t.{column}" for column in pipeline.quoted_key_columns)
        first = pipeline.quoted_key_columns[0]
        # Of several columns the arrays are taken apart only if the first column is among them.
        of_arrays = " UNION ALL ".join(
            f"""
            SELECT t.enqueued_at, NULL::text, NULL::smallint, NULL::timestamptz, {is_claim}
            FROM (SELECT * FROM {pipeline.generated(table)} LIMIT {_SEARCHED_ROWS}) AS t, {self._wanted}
            WHERE k.{first} = ANY (t.{first}) AND EXISTS (
                SELECT FROM unnest({arrays}) AS q ({pipeline.key_list}) WHERE {pipeline.key_join("q", "k")})
            """
            for table, is_claim in (("inbox", "false"), ("claim", "true"))
        )
        found = self._query(
            f"""
            WITH queued (enqueued_at, last_error, attempts, not_before, is_claim) AS (
                SELECT t.enqueued_at, t.last_error, t.attempts, t.not_before, t.claimed_by IS NOT NULL
                FROM (SELECT * FROM {pipeline.outbox} LIMIT {_SEARCHED_ROWS}) AS t
                JOIN {self._wanted} ON {pipeline.key_join("t", "k")}
                UNION ALL {of_arrays}
            )
            SELECT min(enqueued_at)::text AS since, embedline._shown_error(max(last_error)) AS last_error,
                max(attempts) AS attempts,
                max(not_before)::timestamptz(0)::text AS not_before, coalesce(bool_or(is_claim), false) AS is_claimed
            FROM queued
            """,
            [],
        )
        return found[0]

    def _obstacle(self, queued: dict[str, Any]) -> str:
        """Return the reason why a queued row is not embedded yet."""
        pipeline = self.pipeline
        if pipeline.state == "paused":
            return f"the pipeline is paused: SELECT embedline.resume_pipeline('{pipeline.name}') resumes it"
        trouble = self.session.scalar(_SOURCE_TROUBLE, ["bigint"], pipeline.pipeline_id)
        if trouble is not None:
            return str(trouble)
        model = pipeline.version.model
        if circuit.is_open(self.session, model.model_id):
            row = self.session.query(_CIRCUIT, ["bigint"], model.model_id)[0]
            return f'model "{model.config.name}" is unavailable until {row["until"]}: {row["last_error"]}'
        if queued["last_error"]:
            return f"try {queued['attempts']} failed: {queued['last_error']}; the next is due at {queued['not_before']}"
        if queued["is_claimed"]:
            return "a worker has the row in flight"
        if not self.session.scalar(_WORKERS):
            return "no resident worker runs"
        return "waits for a worker"

    def _query(self, query: str, types: list[str], *values: object) -> list[dict[str, Any]]:
        return self.session.query(query, [*self._types, *types], *self.key, *values)


def _answer(state: str, since: str | None, reason: str | None) -> Answer:
    return {"state": state, "since": since, "reason": reason}
