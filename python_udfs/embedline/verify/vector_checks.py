"""Check stored vectors: their values, the index's recall, and their model."""

from __future__ import annotations

import math
from typing import Any

from embedline.catalog.load import load_versions
from embedline.catalog.values import Pipeline
from embedline.core.sql_text import quote_ident
from embedline.postgres.relations import vector_schema
from embedline.postgres.session import Session
from embedline.queue.backfill import restart_backfill
from embedline.search.exact_rows import keep_exact, rebuild_hint
from embedline.search.index_recall import Measurement
from embedline.verify import model_drift
from embedline.verify.findings import Finding, make_finding

# Largest deviation of a norm from 1. float16 rounds the norm of a unit vector by under 5e-4; beyond this it was not
# normalised.
_NORM_TOLERANCE = 0.01


def vectors(session: Session, pipeline: Pipeline, repair: bool) -> list[Finding]:
    """Find vectors without a chunk, and vectors with an unusable norm.

    The former only come from writes that no foreign key saw (session_replication_role = replica). No HNSW index has a
    vector of norm zero, so it is removed, and the check of the chunks then finds the gap.
    """
    schema, version = vector_schema(session), pipeline.version
    column = quote_ident(version.column)
    norm = f"{schema}.{'vector_norm' if version.column_type == 'vector' else 'l2_norm'}(v.{column})"
    rows = session.query(
        f"""
        WITH bad AS MATERIALIZED (
            SELECT v.chunk_id, c.chunk_id IS NULL AS orphaned, n.norm = 0 AS is_zero
            FROM {pipeline.vectors} AS v LEFT JOIN {pipeline.chunk} AS c ON c.chunk_id = v.chunk_id
            CROSS JOIN LATERAL (SELECT {norm} AS norm) AS n
            WHERE c.chunk_id IS NULL OR n.norm = 0 OR ($2 AND abs(n.norm - 1) > $3)
        ), locked AS MATERIALIZED (
            SELECT b.* FROM {pipeline.vectors} AS v JOIN bad AS b ON b.chunk_id = v.chunk_id
            WHERE $1 FOR UPDATE OF v SKIP LOCKED
        ), removed AS (
            DELETE FROM {pipeline.vectors} AS v USING locked AS l
            WHERE v.chunk_id = l.chunk_id AND (l.orphaned OR l.is_zero) RETURNING l.orphaned
        ), mended AS (
            UPDATE {pipeline.vectors} AS v SET {column} = {schema}.l2_normalize(v.{column}) FROM locked AS l
            WHERE v.chunk_id = l.chunk_id AND NOT l.orphaned AND NOT l.is_zero RETURNING false AS orphaned
        ), done AS (
            SELECT orphaned FROM removed UNION ALL SELECT orphaned FROM mended
        )
        SELECT CASE WHEN b.orphaned THEN 'orphaned' ELSE 'unnormalised' END AS finding, count(*) AS count,
            (SELECT count(*) FROM done AS d WHERE d.orphaned = b.orphaned) AS repaired,
            jsonb_build_object('chunk_id', min(b.chunk_id)) AS example
        FROM bad AS b GROUP BY b.orphaned
        """,
        ["boolean", "boolean", "double precision"],
        repair,
        version.distance != "l2",
        _NORM_TOLERANCE,
    )
    return [make_finding(row) for row in rows]


def unreachable(session: Session, pipeline: Pipeline, repair: bool) -> list[Finding]:
    """Find rows that exact ranking puts first and search does not find.

    The index of each version is measured again with a sample of queries. A repair has search rank these rows exactly.
    """
    findings = []
    for version in load_versions(session, pipeline.name):
        if not version.version.has_index or version.version.state != "complete":
            continue
        measured = Measurement(session, version)
        measured.run()
        missed = sorted(measured.unreached)
        if not missed:
            continue
        if repair:
            keep_exact(session, version, missed, [-math.inf] * len(missed))
        example: dict[str, Any] = {"version": version.version.number, "chunk_id": missed[0]}
        if measured.is_poor:
            example["hint"] = rebuild_hint(session, version)
        findings.append(Finding("unreachable", len(missed), len(missed) if repair else 0, example))
    return findings


def foreign(session: Session, pipeline: Pipeline, found: model_drift.Drift, repair: bool) -> Finding:
    """Report vectors of another model.

    A repair embeds those of the sample again or, if most are foreign, all of the pipeline.
    """
    if found.error is not None:
        return Finding("foreign", None, 0, found.example)
    repaired = 0
    if repair and found.is_everywhere:
        session.query(
            "UPDATE embedline.version SET vectors_valid_from = clock_timestamp() WHERE version_id = $1",
            ["bigint"],
            pipeline.version.version_id,
        )
        restart_backfill(session, pipeline)
        repaired = len(found.foreign)
    elif repair:
        repaired = model_drift.replace_vectors(session, pipeline, found.foreign)
    if repair:
        model_drift.accept_fingerprint(session, pipeline, found)
    return Finding("foreign", len(found.foreign), repaired, found.example)
