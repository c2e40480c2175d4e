"""Read the figures of a report in one snapshot, over the SQL interface.

Messages of dead letters, errors of rows and groups of a gate are left out, because they may quote a source's values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, TypeVar

import psycopg
from psycopg.rows import class_row, dict_row

import embedline
from embedline.client.connection import Connection
from embedline.client.report.figures import (
    Alert,
    Budget,
    Cutover,
    DeadLetters,
    Evaluation,
    Measure,
    PipelineState,
    Quality,
    Report,
    Scope,
    Usage,
    VersionState,
    Work,
)

_Figures = TypeVar("_Figures")

# The longest periods, in days, whose steps are an hour and a day. Beyond, bars of a day would be thinner than a hair.
_MOST_DAYS_BY_HOUR, _MOST_DAYS_BY_DAY = 2, 45
_HOUR, _DAY, _WEEK = timedelta(hours=1), timedelta(days=1), timedelta(days=7)
# Measures of a gate. Others are of groups, whose names are values of the source.
_MEASURE = re.compile(r"(preview: )?(index recall|nDCG|recall|MRR|overlap)@\d+|(embedding|search) p\d+ ms")
# How a gate tells the intervals of both versions, after the interval of their difference.
_INTERVALS = re.compile(r"old \[([\d.]+), ([\d.]+)\], new \[([\d.]+), ([\d.]+)\]")

_SCOPE = """
    SELECT current_database()::text AS database, current_user::text AS role,
        current_setting('server_version') AS server_version, %(package)s AS package_version, %(days)s::integer AS days,
        date_trunc(%(unit)s, clock_timestamp()) - %(back)s::interval AS since, clock_timestamp() AS until,
        %(step)s::interval AS step
"""
_READABLE = "SELECT coalesce(has_table_privilege(to_regclass(%s), 'SELECT'), false)"
_ALERTS = """
    SELECT severity, alert, subject, since, message, remedy FROM embedline.alert
    ORDER BY array_position(ARRAY['critical', 'warning', 'note'], severity), since, alert, subject
"""
_PIPELINES = """
    SELECT s.pipeline, s.source, s.model, s.state, s.pending,
        extract(epoch FROM s.oldest_pending_age)::float8 AS oldest_seconds,
        s.backfill_percent::float8 AS backfill_percent, s.dead_letters, s.index_state,
        s.index_recall::float8 AS index_recall, s.workers_alive, l.lag_median, l.lag_p95
    FROM embedline.status AS s
    LEFT JOIN (
        SELECT b.pipeline, percentile_cont(0.5) WITHIN GROUP (ORDER BY extract(epoch FROM b.lag)) AS lag_median,
            percentile_cont(0.95) WITHIN GROUP (ORDER BY extract(epoch FROM b.lag)) AS lag_p95
        FROM embedline.batch AS b WHERE b.kind = 'change' AND b.lag IS NOT NULL GROUP BY b.pipeline
    ) AS l USING (pipeline)
    ORDER BY s.pipeline
"""
_WORK = """
    SELECT t.pipeline, date_bin(%(step)s, t.hour, %(since)s) AS at, sum(t.rows)::bigint AS rows,
        sum(t.embedded)::bigint AS embedded, sum(t.retried)::bigint AS retried, sum(t.dead)::bigint AS dead,
        sum(t.chunks)::bigint AS chunks, sum(t.tokens)::bigint AS tokens, sum(t.embed_seconds)::float8 AS embed_seconds,
        sum(t.claim_seconds + t.read_seconds + t.chunk_seconds + t.embed_seconds + t.write_seconds)::float8
        AS busy_seconds
    FROM embedline.throughput AS t WHERE t.hour >= %(since)s GROUP BY 1, 2 ORDER BY 1, 2
"""
_QUALITY = """
    SELECT pipeline, version, measured_at, kind, value::float8 AS value, low::float8 AS low, high::float8 AS high
    FROM embedline.quality WHERE measured_at >= %(since)s AND value IS NOT NULL ORDER BY pipeline, kind, measured_at
"""
# Without a series there are the last measurement of each index, and those of the gates.
_REACH = """
    SELECT p.name AS pipeline, v.number AS version, r.measured_at, 'reach' AS kind, r.recall::float8 AS value,
        NULL::float8 AS low, NULL::float8 AS high
    FROM embedline.index_reach AS r JOIN embedline.version AS v USING (version_id)
    JOIN embedline.pipeline AS p ON p.pipeline_id = v.pipeline_id
    WHERE r.measured_at >= %(since)s AND r.recall IS NOT NULL
"""
_GATES_OF_INDEXES = """
    SELECT p.name AS pipeline, v.number AS version, e.evaluated_at AS measured_at, 'fidelity' AS kind,
        (r ->> 'new')::float8 AS value, (r ->> 'low')::float8 AS low, (r ->> 'high')::float8 AS high
    FROM embedline.evaluation AS e JOIN embedline.version AS v USING (version_id)
    JOIN embedline.pipeline AS p ON p.pipeline_id = v.pipeline_id
    CROSS JOIN jsonb_array_elements(e.evidence -> 'rows') AS r
    WHERE e.kind = 'gate' AND e.evaluated_at >= %(since)s AND r ->> 'measure' LIKE 'index recall@%%'
        AND r ->> 'new' IS NOT NULL
"""
_EVALUATIONS = """
    SELECT DISTINCT ON (p.name, e.kind, e.version_id, e.fingerprint) p.name AS pipeline, e.kind, v.number AS version,
        coalesce(e.evidence ->> 'model', e.evidence -> 'models' ->> -1, m.name) AS model,
        e.baseline_number AS baseline,
        CASE WHEN e.kind = 'preview' THEN m.name WHEN jsonb_array_length(e.evidence -> 'models') = 2
            THEN e.evidence -> 'models' ->> 0 END AS baseline_model,
        e.verdict, e.fidelity_verdict, e.quality_verdict, e.query_source, e.query_count, e.margin, e.evaluated_at,
        e.evidence -> 'rows' AS measures
    FROM embedline.evaluation AS e JOIN embedline.version AS v USING (version_id)
    JOIN embedline.model AS m USING (model_id) JOIN embedline.pipeline AS p ON p.pipeline_id = e.pipeline_id
    WHERE e.kind = 'preview' OR e.fingerprint = v.fingerprint
    ORDER BY p.name, e.kind, e.version_id, e.fingerprint, e.evaluation_id DESC
"""
_CUTOVERS = """
    SELECT p.name AS pipeline, c.kind, c.from_number AS from_version, c.to_number AS to_version, c.performed_at,
        e.verdict, c.override_reason IS NOT NULL AS overridden, c.swap_seconds
    FROM embedline.cutover AS c JOIN embedline.pipeline AS p USING (pipeline_id)
    LEFT JOIN embedline.evaluation AS e USING (evaluation_id)
    WHERE c.performed_at >= %(since)s ORDER BY c.performed_at DESC
"""
_USAGE = """
    SELECT date_bin(greatest(%(step)s, interval '1 day'), u.day::timestamptz, date_trunc('day', %(since)s)) AS at,
        u.model, sum(u.requests)::bigint AS requests, sum(u.tokens)::bigint AS tokens, sum(u.money)::float8 AS money
    FROM embedline.usage AS u WHERE u.day >= (%(since)s)::date GROUP BY 1, 2 ORDER BY 1, 2
"""
_BUDGETS = """
    SELECT scope, name, period, unit, amount::float8 AS amount, spent::float8 AS spent, reserved::float8 AS reserved,
        remaining::float8 AS remaining, state, resets_at
    FROM embedline.budget ORDER BY remaining / nullif(amount, 0), scope, name, period, unit
"""
_DEAD_LETTERS = """
    SELECT p.name AS pipeline, NULL::integer AS version, d.stage, d.error_code, count(*) AS count,
        min(d.created_at) AS oldest_at
    FROM embedline.dead_letter AS d JOIN embedline.pipeline AS p USING (pipeline_id) GROUP BY p.name, d.stage, d.error_code
    UNION ALL
    SELECT p.name, v.number, d.stage, d.error_code, count(*), min(d.created_at)
    FROM embedline.version_dead_letter AS d JOIN embedline.version AS v USING (version_id)
    JOIN embedline.pipeline AS p ON p.pipeline_id = v.pipeline_id GROUP BY p.name, v.number, d.stage, d.error_code
    ORDER BY count DESC, pipeline, stage, error_code
"""
_VERSIONS = """
    SELECT s.pipeline, s.version, s.model, s.state, s.serving, v.dimensions, v.column_type, s.chunks, s.vectors,
        s.missing, s.index_state, s.index_recall::float8 AS index_recall, s.ef_search,
        pg_table_size(c.oid) AS table_bytes, i.index_bytes, s.gate, s.rollback_until
    FROM embedline.versions AS s
    JOIN embedline.pipeline AS p ON p.name = s.pipeline
    JOIN embedline.version AS v ON v.pipeline_id = p.pipeline_id AND v.number = s.version
    LEFT JOIN pg_class AS c
        ON c.relname = s.pipeline || '_v' || s.version AND c.relnamespace = to_regnamespace('embedline_data')
    LEFT JOIN LATERAL (
        SELECT sum(pg_relation_size(x.indexrelid))::bigint AS index_bytes FROM pg_index AS x
        JOIN pg_class AS k ON k.oid = x.indexrelid JOIN pg_am AS a ON a.oid = k.relam
        WHERE x.indrelid = c.oid AND a.amname IN ('hnsw', 'ivfflat')
    ) AS i ON true
    ORDER BY s.pipeline, s.version
"""


def read(connection: Connection, days: int) -> Report:
    """Read all figures of the last days in one read-only transaction.

    Its snapshot is held until the end. A table that the role may not read is left out. `connection` is in autocommit mode.
    """
    connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    connection.read_only = True
    try:
        with connection.transaction():
            # The views have many parts: compiling them takes seconds, and running them milliseconds.
            connection.execute("SET LOCAL jit = off")
            connection.execute("SET LOCAL timezone = 'UTC'")
            return _read(connection, days)
    finally:
        connection.isolation_level = connection.read_only = None


def _read(connection: Connection, days: int) -> Report:
    scope = _all(connection, Scope, _SCOPE, _period(days))[0]
    period = {"since": scope.since, "step": scope.step}
    reads_gates = _may_read(connection, "embedline.evaluation")
    reads_cutovers = _may_read(connection, "embedline.cutover")
    reads_letters = all(_may_read(connection, f"embedline.{name}") for name in ("dead_letter", "version_dead_letter"))
    sections = {"evidence of model upgrades": reads_gates and reads_cutovers, "reasons of dead letters": reads_letters}
    return Report(
        scope=scope,
        alerts=_all(connection, Alert, _ALERTS),
        pipelines=_all(connection, PipelineState, _PIPELINES),
        work=_all(connection, Work, _WORK, period),
        quality=_quality(connection, period, reads_gates),
        evaluations=_evaluations(connection) if reads_gates else None,
        cutovers=_all(connection, Cutover, _CUTOVERS, period) if reads_cutovers else None,
        usage=_all(connection, Usage, _USAGE, period),
        budgets=_all(connection, Budget, _BUDGETS),
        dead_letters=_all(connection, DeadLetters, _DEAD_LETTERS) if reads_letters else None,
        versions=_all(connection, VersionState, _VERSIONS),
        unreadable=tuple(name for name, is_readable in sections.items() if not is_readable),
    )


def _period(days: int) -> dict[str, Any]:
    """Return the parameters of the period: steps whose last one is under way."""
    given = {"package": embedline.__version__, "days": days}
    if days <= _MOST_DAYS_BY_HOUR:
        return given | {"unit": "hour", "step": _HOUR, "back": _DAY * days - _HOUR}
    if days <= _MOST_DAYS_BY_DAY:
        return given | {"unit": "day", "step": _DAY, "back": _DAY * (days - 1)}
    # Whole weeks that end with today.
    return given | {"unit": "day", "step": _WEEK, "back": _WEEK * -(-days // 7) - _DAY}


def _all(
    connection: Connection, figures: type[_Figures], query: str, parameters: dict[str, Any] | None = None
) -> tuple[_Figures, ...]:
    with connection.cursor(row_factory=class_row(figures)) as cursor:
        return tuple(cursor.execute(query.encode(), parameters).fetchall())


def _may_read(connection: Connection, relation: str) -> bool:
    row = connection.execute(_READABLE, (relation,)).fetchone()
    return bool(row and row[0])


def _quality(connection: Connection, period: dict[str, Any], reads_gates: bool) -> tuple[Quality, ...]:
    if _may_read(connection, "embedline.quality"):
        found = _all(connection, Quality, _QUALITY, period)
        if found:
            return found
    found = _all(connection, Quality, _REACH, period)
    return found + (_all(connection, Quality, _GATES_OF_INDEXES, period) if reads_gates else ())


def _evaluations(connection: Connection) -> tuple[Evaluation, ...]:
    with connection.cursor(row_factory=dict_row) as cursor:
        found = cursor.execute(_EVALUATIONS).fetchall()
    return tuple(Evaluation(**(row | {"measures": _measures(row["measures"])})) for row in found)


def _measures(rows: Iterable[dict[str, Any]]) -> tuple[Measure, ...]:
    """Return the measures of a gate's rows; others may name values of the source."""
    return tuple(_measure(row) for row in rows if _MEASURE.fullmatch(row["measure"]))


def _measure(row: dict[str, Any]) -> Measure:
    old, new = row["old"], row["new"]
    old_interval = new_interval = None
    if told := _INTERVALS.search(row["detail"] or ""):
        edges = [float(edge) for edge in told.groups()]
        old_interval, new_interval = (edges[0], edges[1]), (edges[2], edges[3])
    elif old is None and row["low"] is not None:
        # Of one version alone the interval is that of its value.
        new_interval = (row["low"], row["high"])
    return Measure(
        name=row["measure"].removeprefix("preview: "),
        old=old,
        new=new,
        difference=row["difference"],
        low=row["low"] if row["difference"] is not None else None,
        high=row["high"] if row["difference"] is not None else None,
        verdict=row["verdict"],
        old_interval=old_interval,
        new_interval=new_interval,
    )
