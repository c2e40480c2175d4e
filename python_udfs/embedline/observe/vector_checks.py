"""Check a sample of stored vectors, and the indexes over them."""

from __future__ import annotations

from collections.abc import Iterator

from embedline.catalog.load import load_versions
from embedline.core.sql_text import quote_ident, quote_literal
from embedline.observe.findings import Finding
from embedline.postgres.relations import vector_schema
from embedline.postgres.session import Session

# Vectors of each version whose norm is read: some 20 ms. embedline.verify reads all.
_SAMPLE = 1000
# Largest deviation of a norm from 1; see embedline.verify.vector_checks.
_NORM_TOLERANCE = 0.01
# Days without a scan after which an index is called unused.
_UNUSED_DAYS = 7
_UNUSED = """
    SELECT p.name AS pipeline, v.number, x.name AS precision, s.indexrelname AS index, pg_relation_size(s.indexrelid) AS bytes
    FROM embedline.precision_index AS x
    JOIN embedline.version AS v ON v.version_id = x.version_id JOIN embedline.pipeline AS p USING (pipeline_id)
    JOIN pg_stat_all_indexes AS s ON s.schemaname = 'embedline_data'
        AND s.indexrelname = p.name || '_v' || v.number || '_' || x.name || '_idx'
    WHERE s.idx_scan = 0 AND v.search_precision IS DISTINCT FROM x.name AND v.created_at < now() - make_interval(days => $1)
        AND coalesce((SELECT d.stats_reset FROM pg_stat_database AS d WHERE d.datname = current_database()), '-infinity')
            < now() - make_interval(days => $1)
"""
_MEASURED = """
    SELECT p.name AS pipeline, CASE v.index_method WHEN 'ivfflat' THEN 'probes' ELSE 'ef_search' END AS setting,
        CASE v.index_method WHEN 'ivfflat' THEN r.probes ELSE r.ef_search END AS effort, r.recall
    FROM embedline.pipeline AS p JOIN embedline.version AS v ON v.version_id = p.serving_version_id
    LEFT JOIN embedline.index_reach AS r ON r.version_id = v.version_id
    WHERE embedline._index_state(p.name || '_v' || v.number || '_embedding_idx') = 'valid' ORDER BY p.name
"""
_MIXED = """
    SELECT p.name, v.vectors_valid_from, t.backfill_percent
    FROM embedline.version AS v JOIN embedline.pipeline AS p ON p.serving_version_id = v.version_id
    JOIN embedline.status AS t ON t.pipeline = p.name
    WHERE v.vectors_valid_from IS NOT NULL AND v.state <> 'complete'
"""


def stored_vectors(session: Session) -> Iterator[Finding]:
    """Check a sample of each version for vectors of norm zero or of a wrong length."""
    schema = vector_schema(session)
    for name in [str(row["name"]) for row in session.query("SELECT name FROM embedline.pipeline ORDER BY name")]:
        for pipeline in load_versions(session, name):
            version = pipeline.version
            norm = f"{schema}.{'vector_norm' if version.column_type == 'vector' else 'l2_norm'}(v.{quote_ident(version.column)})"
            found = session.execute(
                f"""
                SELECT count(*) FILTER (WHERE n.norm = 0) AS zero,
                    count(*) FILTER (WHERE n.norm > 0 AND abs(n.norm - 1) > {_NORM_TOLERANCE}) AS unnormalised, count(*) AS read
                FROM (SELECT {norm} AS norm FROM {pipeline.vectors} AS v LIMIT {_SAMPLE}) AS n
                """
            )[0]
            wrong = found["zero"] + (found["unnormalised"] if version.distance != "l2" else 0)
            if wrong:
                what = f"of {found['read']} vectors of version {version.number}, {found['zero']} have norm zero"
                what += f", which no index finds, and {found['unnormalised']} another norm than 1"
                remedy = f"SELECT * FROM embedline.verify({quote_literal(name)}, repair => true);"
                yield Finding("warning", "wrong_norms", name, what, remedy)


def measured_recall(session: Session) -> Iterator[Finding]:
    """Show what each serving index was found to reach.

    Alerts tell of one that reaches too little.
    """
    for row in session.query(_MEASURED):
        name = str(row["pipeline"])
        if row["effort"] is None:
            what = "the recall of its index is not measured yet; an idle worker does that, and each verify"
            yield Finding(
                "note", "index_not_measured", name, what, f"SELECT * FROM embedline.verify({quote_literal(name)});"
            )
        else:
            what = f"recall@10 {row['recall']:.3f} with {row['setting']} {row['effort']}"
            yield Finding("ok", "index_recall", name, what)


def mixed_fingerprints(session: Session) -> Iterator[Finding]:
    """Find versions with vectors of an earlier fingerprint of the model."""
    for row in session.query(_MIXED):
        what = (
            f"vectors from before {row['vectors_valid_from']} are of another fingerprint; all rows are embedded again,"
            f" {row['backfill_percent']} % are"
        )
        remedy = f"SELECT * FROM embedline.progress WHERE pipeline = {quote_literal(str(row['name']))};"
        yield Finding("warning", "mixed_fingerprints", str(row["name"]), what, remedy)


def unused_indexes(session: Session) -> Iterator[Finding]:
    """Tell of precision indexes that no search has used."""
    for row in session.query(_UNUSED, ["integer"], _UNUSED_DAYS):
        what = (
            f"no search has used it for {_UNUSED_DAYS} days; it has {row['bytes'] // 1024**2:,} MB and slows each write"
        )
        arguments = f"{quote_literal(str(row['pipeline']))}, {row['number']}, {quote_literal(str(row['precision']))}"
        yield Finding(
            "note", "unused_index", str(row["index"]), what, f"SELECT embedline.drop_precision_index({arguments});"
        )
